"""A reader of images with boxes: folders annotated in Pascal VOC's XML."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor
from torch.utils.data import Dataset

from equireg._checks import Arguments
from equireg._progress import progress_bar
from equireg.data.folders import Folder, class_names
from equireg.data.image_files import read_image

__all__ = ["BoxFiles", "read_voc"]

_SIDES = ("xmin", "ymin", "xmax", "ymax")


class BoxFiles(Dataset[tuple[Any, dict[str, Tensor]]]):
    """Image files with the boxes of their objects; an item is ``(image, target)``, as for torchvision's detectors.

    Args:
        paths: [N] the image files; decoded as `ImageFiles` does.
        targets: a dict for each image: "boxes" float32 [K, 4], corners x1, y1, x2, y2 in pixels from the upper left
            corner of the image; "labels" int64 [K]; "difficult" bool [K].
        classes: the classes' names.
        transform: called with every image and its target; returns both. The boxes that it gets are torchvision's
            ``BoundingBoxes``, so ``torchvision.transforms.v2`` resizes or flips them with the image.

    Attributes: ``paths``, ``targets``, ``classes``, ``transform``.

    Raises:
        ValueError: while reading: a file that cannot be decoded, or a box that leaves its image; with its path.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> boxes = {"boxes": torch.tensor([[1.0, 0.0, 5.0, 4.0]]), "labels": torch.tensor([0])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cat = os.path.join(folder, "cat.png")
        ...     Image.new("RGB", (6, 4)).save(cat)
        ...     image, target = BoxFiles([cat], [boxes], ["cat"])[0]
        >>> image.size, target["boxes"].tolist()
        ((6, 4), [[1.0, 0.0, 5.0, 4.0]])
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[dict[str, Tensor]],
        classes: Sequence[str],
        *,
        transform: Callable[[Any, dict[str, Tensor]], tuple[Any, dict[str, Tensor]]] | None = None,
    ):
        if len(paths) != len(targets):
            Arguments("BoxFiles").fail("targets", f"of {len(paths)} images, as paths are", len(targets))
        self.paths, self.targets, self.classes = list(paths), list(targets), list(classes)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Tensor]]:
        from torchvision.tv_tensors import BoundingBoxes

        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"BoxFiles: index must be in 0 .. {len(self) - 1}, got {index}")
        image, target = read_image(self.paths[index]), dict(self.targets[index])
        corners, (width, height) = target["boxes"], image.size
        outside = (corners < 0).any(1) | (corners[:, 2:] > torch.tensor([width, height])).any(1)
        if outside.any():
            rule = f"inside of the image of {width} x {height}"
            Arguments("BoxFiles").fail(f"boxes of {self.paths[index]!r}", rule, corners[outside][0].tolist())
        if self.transform is None:
            return image, target
        target["boxes"] = BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
        return self.transform(image, target)

    def __repr__(self) -> str:
        boxes = sum(len(target["labels"]) for target in self.targets)
        return f"BoxFiles({len(self)} images, {boxes} boxes, {len(self.classes)} classes)"


def read_voc(
    root: str | os.PathLike[str],
    split: str | None = None,
    *,
    class_list: str | os.PathLike[str] | Sequence[str] | None = None,
    first_pixel: int = 1,
    transform: Callable[[Any, dict[str, Tensor]], tuple[Any, dict[str, Tensor]]] | None = None,
    follow_links: bool = False,
    progress: bool = True,
) -> BoxFiles:
    """Read images with boxes: ``root/JPEGImages/*`` or ``root/images/*``, and ``root/Annotations/<same name>.xml``.

    This is Pascal VOC's layout, and that of tools for annotation which write its XML.

    Args:
        root: the folder: ``VOC2012``, for example.
        split: the name of a list of images, ``root/ImageSets/Main/<split>.txt``, with a name on each line. ``None``:
            all images.
        class_list: the classes in the order of their labels, as for `read_image_folder`. ``None``: all names that occur
            in the images that are read, sorted; so give it where a split may lack one.
        first_pixel: the number of the first pixel in a row: 1 in Pascal VOC, whose boxes name the first and the last
            pixel that belong to the object. 0 for files that hold the corners themselves, counted from 0.
        transform: as in `BoxFiles`.
        follow_links: whether symbolic links may lead out of ``root``.
        progress: whether to show a bar, where tqdm is installed.

    Objects marked as difficult are read like all others, and flagged in the target's "difficult".

    Returns:
        The images, sorted by name or in the order of the split, as `BoxFiles`.

    Raises:
        FileNotFoundError: the folder, the list or an image's annotation is missing; with its path.
        ValueError: an annotation that is no XML, an object without a name or corners, a box without width or height or
            before the first pixel, a class that is not in the list, an image of the split that is not there.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> xml = '''<annotation><object><name>cat</name>
        ...   <bndbox><xmin>2</xmin><ymin>1</ymin><xmax>5</xmax><ymax>4</ymax></bndbox></object></annotation>'''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("images", "Annotations"):
        ...         os.mkdir(os.path.join(folder, name))
        ...     Image.new("RGB", (6, 4)).save(os.path.join(folder, "images", "1.png"))
        ...     with open(os.path.join(folder, "Annotations", "1.xml"), "w") as file:
        ...         _ = file.write(xml)
        ...     found = read_voc(folder, progress=False)
        ...     found, found[0][1]["boxes"].tolist()
        (BoxFiles(1 images, 1 boxes, 1 classes), [[1.0, 0.0, 5.0, 4.0]])
    """
    args = Arguments("read_voc")
    args.option("first_pixel", first_pixel, (0, 1))
    folder = Folder("read_voc", root, follow_links)
    folder.inside("Annotations")
    images = "JPEGImages" if "JPEGImages" in folder.folders() else "images"
    names = [os.path.relpath(path, os.path.join(folder.path, images)) for path in folder.images(images)]
    if split is not None:
        names = _listed(args, os.path.join(folder.path, "ImageSets", "Main", f"{split}.txt"), names)
    objects = [
        _objects(args, os.path.join(folder.path, "Annotations", f"{os.path.splitext(name)[0]}.xml"), first_pixel)
        for name in progress_bar(names, "annotations", shown=progress)
    ]
    occurring = sorted({kind for of_image in objects for kind, _, _ in of_image})
    classes = occurring if class_list is None else class_names(args, class_list)
    if not occurring:
        args.fail("root", "a folder with at least one box in its annotations", f"{folder.path!r} without")
    numbers = {kind: number for number, kind in enumerate(classes)}
    for name, of_image in zip(names, objects):
        for kind, _, _ in of_image:
            if kind not in numbers:
                args.fail(f"an object of {name!r}", "of a class in class_list", repr(kind))
    targets = [
        {
            "boxes": torch.tensor([box for _, box, _ in of_image], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([numbers[kind] for kind, _, _ in of_image], dtype=torch.int64),
            "difficult": torch.tensor([difficult for _, _, difficult in of_image], dtype=torch.bool),
        }
        for of_image in objects
    ]
    return BoxFiles([os.path.join(folder.path, images, name) for name in names], targets, classes, transform=transform)


def _listed(args: Arguments, path: str, names: list[str]) -> list[str]:
    """The images, of those with the given names, whose names without ending stand in a text file."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{args.function}: split must be the name of a list, got none at {path!r}") from None
    known = {os.path.splitext(name)[0]: name for name in names}
    listed = [line if line in known else line.split()[0] for line in lines]  # lists of one class add a number
    for name in listed:
        if name not in known:
            args.fail(f"file {path!r}", "a list of images in root", repr(name))
    return [known[name] for name in listed]


def _objects(args: Arguments, path: str, first_pixel: int) -> list[tuple[str, list[float], bool]]:
    """The class, corners and difficulty of each object in an annotation."""
    try:
        tree = ElementTree.parse(path)  # noqa: S314  # expat itself stops entities that multiply
    except FileNotFoundError:
        raise FileNotFoundError(f"{args.function}: every image must have an annotation, got none at {path!r}") from None
    except ElementTree.ParseError as error:
        args.fail(f"file {path!r}", "an annotation in XML", error)
    found = []
    for thing in tree.getroot().findall("object"):
        name = (thing.findtext("name") or "").strip()
        try:
            x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{side}") or "") for side in _SIDES)
        except ValueError:
            name = ""
        if not name:
            got = ElementTree.tostring(thing, "unicode").strip()
            args.fail(f"an object of {path!r}", f"one with a name and a bndbox of {', '.join(_SIDES)}", got)
        box = [x1 - first_pixel, y1 - first_pixel, x2, y2]
        if not (0 <= box[0] < x2 < math.inf and 0 <= box[1] < y2 < math.inf):
            rule = f"one whose first pixel is {first_pixel} or above, and the last one not before it"
            args.fail(f"a box of {path!r}", rule, [x1, y1, x2, y2])
        found.append((name, box, (thing.findtext("difficult") or "").strip() == "1"))
    return found
