"""Readers of image folders: ``<class>/*``, and VIPriors' ``{train,val,test}/<class>/*``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from typing_extensions import Unpack  # torch depends on it

from equireg._checks import Arguments
from equireg.data.folders import Folder, class_names, refuse_emptied
from equireg.data.image_files import ImageFiles, Reading, ReadOptions
from equireg.data.k_shot import k_shot

__all__ = ["read_image_folder", "read_vipriors"]


def read_image_folder(
    root: str | os.PathLike[str],
    *,
    class_list: str | os.PathLike[str] | Sequence[str] | None = None,
    follow_links: bool = False,
    **reading: Unpack[Reading],
) -> ImageFiles:
    """Read the images of a folder with a folder for each class: ``root/<class>/*``, at any depth.

    Args:
        root: the folder.
        class_list: the classes to read, in the order of their labels: names, or the path of a text file with one on
            each line (text after a tab is ignored). ImageNet-100, for example, is ImageNet with its list of 100 wnids.
            ``None``: all class folders, sorted.
        transform, broken, max_broken, max_pixels, progress: as in `ImageFiles`.
        follow_links: whether symbolic links may lead out of ``root``.

    Classes and files are sorted by name, as in torchvision's ``ImageFolder``. A file is an image if it has an image's
    extension, or another one but an image's first bytes. Hidden files are left out.

    Returns:
        The images, as an `ImageFiles`.

    Raises:
        FileNotFoundError: the folder or a class of the list is missing; with its absolute path.
        ValueError: the folder cannot be read; it has no class folder, or only one without ``class_list``; a class has
            no image; a link leads out of the folder; or an entry of the class list is not a folder's name.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog", "elk"):
        ...         os.mkdir(os.path.join(folder, name))
        ...         Image.new("RGB", (8, 8)).save(os.path.join(folder, name, "1.png"))
        ...     images = read_image_folder(folder, class_list=["elk", "cat"])
        ...     images.classes, images.targets, images[0][0].size
        (['elk', 'cat'], [0, 1], (8, 8))
    """
    args = Arguments("read_image_folder")
    ReadOptions.given(args, reading)
    folder = Folder("read_image_folder", root, follow_links)
    if class_list is None:
        classes = folder.classes()
    else:
        classes = class_names(args, class_list)
        missing = [name for name in classes if not os.path.isdir(os.path.join(folder.path, name))]
        if missing:
            shown = ", ".join(repr(name) for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise FileNotFoundError(
                f"read_image_folder: root must hold every class of class_list, got {folder.path!r} "
                f"without {len(missing)} of {len(classes)}: {shown}"
            )
    paths, labels = folder.labelled(classes)
    files = ImageFiles(paths, labels, classes, **reading)
    refuse_emptied(args, files)
    return files


def read_vipriors(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    shots: int | None = None,
    follow_links: bool = False,
    **reading: Unpack[Reading],
) -> ImageFiles:
    """Read VIPriors-50, -20 or -10: ``root/{train,val,test}/<class>/*``.

    Args:
        root: the folder with the splits, or the one in which the challenge's script makes ``imagenet_50``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        shots: training images of each class, the first by name: 10 for VIPriors-10, 20 for VIPriors-20. ``None``: all,
            50 in VIPriors-50. ``"val"`` and ``"test"`` are the same whatever the shots (EqInv, Section 5.1).
        transform, broken, max_broken, max_pixels, follow_links, progress: as in `read_image_folder`.

    In every split, labels number the sorted class folders of ``train``. The challenge's test images lie in
    ``test/imgs`` without labels: theirs are -1, and they are sorted by the numbers in their names. If there is a folder
    ``testgt`` with classes, as in EqInv's data, ``"test"`` reads that.

    EqInv's script draws the images that it keeps, without a seed; here they are the first ones.

    Returns:
        The images, as an `ImageFiles`.

    Raises:
        FileNotFoundError: the folder or the split is missing; with its absolute path.
        ValueError: as `read_image_folder`; the split has other classes than ``train``; a class has fewer images
            than ``shots``.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("n01443537/1.png", "n01443537/2.png", "n02132136/1.png", "n02132136/2.png"):
        ...         os.makedirs(os.path.join(root, "train", os.path.dirname(name)), exist_ok=True)
        ...         Image.new("RGB", (8, 8)).save(os.path.join(root, "train", name))
        ...     read_vipriors(root, "train", shots=1)
        ImageFiles(2 images, 2 classes)
    """
    args = Arguments("read_vipriors")
    args.option("split", split, ("train", "val", "test"))
    if shots is not None:
        args.count("shots", shots)
    ReadOptions.given(args, reading)
    folder = Folder("read_vipriors", root, follow_links)
    splits = folder.folders()
    if split not in splits and "imagenet_50" in splits:
        folder = folder.inside("imagenet_50")
        splits = folder.folders()
    part = "testgt" if split == "test" and "testgt" in splits else split
    if part not in splits:
        raise FileNotFoundError(f"read_vipriors: root must have a folder {part!r}, got {folder.path!r} without")
    images = folder.inside(part)
    unlabelled = split == "test" and images.folders() == ["imgs"]
    classes = folder.inside("train").classes() if "train" in splits else [] if unlabelled else images.classes()
    if unlabelled:
        paths = sorted(images.images("imgs"), key=_by_number)
        labels = [-1] * len(paths)
    else:
        if others := set(images.classes()) ^ set(classes):
            other = min(others)
            args.fail(f"folder {images.path!r}", "one with the classes of train", f"{other!r} in one of them alone")
        paths, labels = images.labelled(classes)
    files = ImageFiles(paths, labels, classes, **reading)
    if not unlabelled:
        refuse_emptied(args, files)
    if shots is not None and split == "train":
        files = k_shot(files, shots)
    return files


def _by_number(path: str) -> tuple[list[int], str]:
    """``img_2`` before ``img_10``."""
    name = os.path.basename(path)
    return [int(number) for number in re.findall("[0-9]+", name)], name
