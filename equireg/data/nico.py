"""NICO's animals in contexts, with training contexts "adjusted": long-tailed, unseen, or different for each class."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from typing_extensions import Unpack  # torch depends on it

from equireg._checks import Arguments
from equireg.data.drawn import drawn_cells
from equireg.data.folders import Folder, refuse_emptied
from equireg.data.image_files import ImageFiles, Reading, ReadOptions, refuse_many
from equireg.data.nico_contexts import context_name, training_orders

__all__ = ["read_nico"]

_SETTINGS = ("adjusting", "long-tailed", "zero-shot", "orthogonal")
_SPLITS = ("train", "val", "test")
_NAMED = "named <class number>_<context number>_<number>.<ending>, the numbers those of label_file"


def read_nico(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    setting: str = "adjusting",
    training_contexts: Mapping[str, Sequence[str]] | None = None,
    imbalance: float = 0.02,
    held_out: int = 13,
    seed: int = 0,
    follow_links: bool = False,
    **reading: Unpack[Reading],
) -> ImageFiles:
    """Read NICO's animals with adjusted training contexts, as in Wang et al. (2021, CaaM) and EqInv.

    Args:
        root: NICO itself, ``root/<class>/<context>/*`` (or ``root/Animal/<class>/<context>/*``), or CaaM's release of
            it, ``root/multi_classification/{train,val,test}/<class number>_<context number>_<number>.<ending>`` with
            the numbers' names in ``root/label_file/{Animal,Context}_name2label.json``.
        split: ``"train"``, ``"val"`` or ``"test"``; they share no image.
        setting: which contexts training sees. ``"long-tailed"``: every context, in numbers that fall along one order
            for all classes, so that a context says nothing about the class. ``"orthogonal"``: the same, but each class
            has its own order; as far as possible, no two classes share their head. ``"zero-shot"``: some contexts of a
            class are only in validation and test, the others in full. ``"adjusting"``: all three.
        training_contexts: the contexts of each class in training, from head to tail. ``None`` takes those that CaaM
            published, 7 of 10 for each animal, if the folder has them all. Otherwise they are chosen: a large context
            of its own as each class's head, the others ordered by ``seed``; the last three in ten are not trained on.
        imbalance: the share of the tail's images that is kept, above 0 and at most 1. Of n images in the i-th of k
            contexts (i = 0 the head) training keeps ``n imbalance^(i / (k - 1))``, rounded down, at least one.
        held_out: how many images of each class and context are for validation, and as many for the test; each is at
            most a third of the available images. CaaM's release has validation and test folders of its own.
        seed: draws which images are held out, which ones training keeps, and orders of contexts that are not given.
        transform, broken, max_broken, max_pixels, follow_links, progress: as in `read_image_folder`. Broken files are
            skipped before the split; in CaaM's release, so are files with names of another form.

    CaaM draws the training images with NumPy's generator in the order of a directory listing; here their numbers are
    the same, but the images differ. Context names are in lower case, with ``_`` for a space.

    Returns:
        The images, as an `ImageFiles` with ``contexts``. Classes and contexts are sorted by name.

    Raises:
        FileNotFoundError: the folder is missing; with its absolute path.
        ValueError: the folder is in neither form; a class has one context only; ``training_contexts`` names an unknown
            class or context.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for animal in ("cat", "dog"):
        ...         for context in ("at home", "in water", "on grass"):
        ...             os.makedirs(os.path.join(root, animal, context))
        ...             for number in range(20):
        ...                 Image.new("RGB", (8, 8)).save(os.path.join(root, animal, context, f"{number}.png"))
        ...     order = {"cat": ["at home", "in water"], "dog": ["on grass", "at home"]}
        ...     train = read_nico(root, training_contexts=order, imbalance=0.25, held_out=4)
        ...     len(train), len(read_nico(root, "test", held_out=4)), train.context_names
        (30, 24, ['at_home', 'in_water', 'on_grass'])
    """
    args = Arguments("read_nico")
    args.option("split", split, _SPLITS)
    args.option("setting", setting, _SETTINGS)
    args.share("imbalance", imbalance)
    if imbalance == 0:
        args.fail("imbalance", "above 0", imbalance)
    args.count("held_out", held_out)
    args.count("seed", seed, least=0)
    options = ReadOptions.given(args, reading)

    folder = Folder("read_nico", root, follow_links)
    released = "multi_classification" in folder.folders()
    misnamed: list[tuple[str, str]] = []
    if released:
        triples, misnamed, everywhere = _released(folder, split)
        if misnamed and options.broken == "raise":
            args.fail(f"file {misnamed[0][0]!r}", _NAMED, "another name")
    else:
        triples = everywhere = _plain(folder.inside("Animal") if "Animal" in folder.folders() else folder)
    classes = sorted({name for _, name, _ in everywhere})
    names = sorted({context for _, _, context in everywhere})
    files = ImageFiles(
        [path for path, _, _ in triples],
        [classes.index(name) for _, name, _ in triples],
        classes,
        contexts=[names.index(context) for _, _, context in triples],
        context_names=names,
        **reading,
    )
    files.skipped = misnamed + files.skipped
    refuse_many(args, files.skipped, len(files) + len(files.skipped), options.max_broken)
    if len(classes) < 2:
        args.fail(f"root {folder.path!r}", "a folder with images of two classes or more", classes)
    refuse_emptied(args, files)
    if released and split != "train":
        return files

    cells = drawn_cells(files, seed)
    held = {pair: 0 if released else min(held_out, len(cell) // 3) for pair, cell in cells.items()}
    if split != "train":
        start = 0 if split == "val" else 1
        chosen = [i for pair, cell in cells.items() for i in cell[start * held[pair] : (start + 1) * held[pair]]]
        return files.take(sorted(chosen))
    sizes: dict[str, dict[str, int]] = {name: {} for name in classes}
    for (label, context), cell in cells.items():
        sizes[classes[label]][names[context]] = len(cell)
    orders = training_orders(args, sizes, setting, training_contexts, seed)
    chosen = []
    for label, name in enumerate(classes):
        for place, kept_context in enumerate(orders[name]):
            pair = (label, names.index(kept_context))
            cell = cells[pair][2 * held[pair] :]
            kept = 1.0 if setting == "zero-shot" else imbalance ** (place / max(1, len(orders[name]) - 1))
            chosen += cell[: max(1, int(len(cell) * kept))]
    return files.take(sorted(chosen))


def _plain(folder: Folder) -> list[tuple[str, str, str]]:
    """Path, class and context of every image of ``<class>/<context>/*``."""
    triples = []
    for name in folder.classes():
        inside = folder.inside(name)
        contexts = inside.folders()
        if len({context_name(context) for context in contexts}) < 2:
            folder.args.fail(f"folder {inside.path!r}", "one with folders for two contexts or more", contexts)
        for context in contexts:
            triples += [(path, name, context_name(context)) for path in inside.images(context)]
    return triples


def _released(
    folder: Folder, split: str
) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]], list[tuple[str, str, str]]]:
    """The same for one split of CaaM's release; its files with names of another form, and why; and all splits."""
    classes = _numbered(folder, "Animal_name2label.json")
    contexts = _numbered(folder, "Context_name2label.json")
    images = folder.inside("multi_classification")
    triples: dict[str, list[tuple[str, str, str]]] = {part: [] for part in _SPLITS}
    misnamed = []
    for part in _SPLITS:
        for path in images.images(part):
            parts = os.path.splitext(os.path.basename(path))[0].split("_")
            if len(parts) == 3 and parts[0] in classes and parts[1] in contexts:
                triples[part].append((path, classes[parts[0]], context_name(contexts[parts[1]])))
            elif part == split:
                misnamed.append((path, f"read_nico: file {path!r} must be {_NAMED}, got another name"))
    return triples[split], misnamed, [triple for part in _SPLITS for triple in triples[part]]


def _numbered(folder: Folder, name: str) -> dict[str, str]:
    """The name of every number in ``label_file``."""
    path = os.path.join(folder.inside("label_file").path, name)
    try:
        with open(path, encoding="utf-8") as file:
            numbers = json.load(file)
        return {str(int(number)): str(key) for key, number in numbers.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"read_nico: root must hold the file {path!r}, got no such file") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        folder.args.fail(f"file {path!r}", "a JSON object of names and their numbers", error)
