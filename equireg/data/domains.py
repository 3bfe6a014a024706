"""Domain-shift splits of folders ``domain/class``, such as PACS: a domain left out, or a domain for each class."""

from __future__ import annotations

import os

from typing_extensions import Unpack  # torch depends on it

from equireg._checks import Arguments
from equireg.data.drawn import drawn_cells, drawn_order
from equireg.data.folders import Folder, refuse_emptied
from equireg.data.image_files import ImageFiles, Reading, ReadOptions

__all__ = ["read_domains"]


def read_domains(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    test_domain: str | None = None,
    bias: float | None = None,
    shots: int | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    follow_links: bool = False,
    **reading: Unpack[Reading],
) -> ImageFiles:
    """Read ``root/<domain>/<class>/*`` with a shift of the domains from training to test.

    Args:
        root: the folder with the domains, each with the same class folders.
        split: ``"train"``, ``"val"`` or ``"test"``; they share no image.
        test_domain: the domain left out of training and validation; all of it is the test. ``None``: training sees
            every domain, and the test takes held-out images of all domains.
        bias: in 0 .. 1; in training, each class is mostly in a domain of its own. The share ``bias`` of its images is
            from that domain (rounded, but at least one of two or more is from another where ``bias < 1``), the rest
            spread evenly over the others. Every class has the same number of images, the largest possible. In
            validation and in a test on held-out images, every class has the same number of images in every domain.
            ``None``: no such shift.
        shots: training images of each class, drawn by ``seed``; fewer shots are a subset of more.
        held_out: in 0 .. 1/2; the share of each domain and class taken for validation, and the same again for the test
            if no domain is left out; at least one image. With ``bias``: this share of the smallest pair of domain and
            class.
        seed: draws the held-out images, the training images and, with ``bias``, the domain of each class. Classes are
            dealt to the domains in turn. The held-out images depend neither on ``shots`` nor on the value of ``bias``.
        transform, broken, max_broken, max_pixels, follow_links, progress: as in `read_image_folder`. Broken files are
            skipped before the split.

    Returns:
        The images, as an `ImageFiles`, with the domains as ``contexts``.

    Raises:
        FileNotFoundError: the folder is missing; with its absolute path.
        ValueError: fewer than two domains (three, with both ``test_domain`` and ``bias``) or classes, a domain without
            one of the classes, an unknown ``test_domain``, too few images for the split or the shots.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for domain in ("photo", "sketch"):
        ...         for name in ("cat", "dog"):
        ...             os.makedirs(os.path.join(root, domain, name))
        ...             for number in range(10):
        ...                 Image.new("RGB", (8, 8)).save(os.path.join(root, domain, name, f"{number}.png"))
        ...     train, test = read_domains(root, bias=1.0), read_domains(root, "test", bias=1.0)
        >>> sorted(set(zip(train.targets, train.contexts.tolist()))), len(train), len(test)
        ([(0, 0), (1, 1)], 12, 8)
    """
    args = Arguments("read_domains")
    args.option("split", split, ("train", "val", "test"))
    if bias is not None:
        args.share("bias", bias)
    if shots is not None:
        args.count("shots", shots)
    args.number("held_out", held_out)
    if not 0 < held_out < 0.5:
        args.fail("held_out", "above 0 and below 0.5", held_out)
    args.count("seed", seed, least=0)
    ReadOptions.given(args, reading)

    folder = Folder("read_domains", root, follow_links)
    domains = folder.classes()
    if test_domain is not None:
        args.option("test_domain", test_domain, tuple(domains))
    if test_domain is not None and bias is not None and len(domains) < 3:
        args.fail("root", "a folder with three domains or more for test_domain and bias", repr(folder.path))
    classes = folder.inside(domains[0]).classes()
    paths, labels, contexts = [], [], []
    for context, domain in enumerate(domains):
        inside = folder.inside(domain)
        if others := set(inside.folders()) ^ set(classes):
            other = min(others)
            args.fail(f"folder {inside.path!r}", f"one with the classes of {domains[0]!r}", f"{other!r} in one alone")
        found, places = inside.labelled(classes)
        paths += found
        labels += places
        contexts += [context] * len(found)
    files = ImageFiles(paths, labels, classes, contexts=contexts, context_names=domains, **reading)
    refuse_emptied(args, files)
    cells = drawn_cells(files, seed)
    for label, name in enumerate(classes):
        for context, domain in enumerate(domains):
            if (label, context) not in cells:
                path = os.path.join(folder.path, domain, name)
                args.fail(f"folder {path!r}", "one with images that can be decoded", "none")
    left_out = None if test_domain is None else domains.index(test_domain)
    if split == "test" and left_out is not None:
        chosen = [index for (_, context), cell in cells.items() if context == left_out for index in cell]
        return files.take(sorted(chosen))

    seen = [context for context in range(len(domains)) if context != left_out]
    parts = 1 if left_out is not None else 2
    cells = {pair: cell for pair, cell in cells.items() if pair[1] in seen}
    smallest = min(cells.values(), key=len)
    chosen = []
    for (label, context), cell in cells.items():
        count = max(1, int(held_out * len(cell if bias is None else smallest)))
        if len(cell) <= parts * count:
            path = os.path.join(folder.path, domains[context], classes[label])
            args.fail(f"folder {path!r}", f"one of more than {parts * count} images", len(cell))
        if split == "train":
            cells[label, context] = cell[parts * count :]
        else:
            chosen += cell[:count] if split == "val" else cell[count : 2 * count]
    if split != "train":
        return files.take(sorted(chosen))
    if bias is None:
        chosen = _unbiased(args, cells, classes, shots, seed)
    else:
        chosen = _biased(args, cells, len(classes), seen, bias, shots, seed)
    return files.take(sorted(chosen))


def _unbiased(
    args: Arguments, cells: dict[tuple[int, int], list[int]], classes: list[str], shots: int | None, seed: int
) -> list[int]:
    """The training images: ``shots`` of each class, whatever their context."""
    chosen = []
    for label, name in enumerate(classes):
        together = sorted(index for pair, cell in cells.items() if pair[0] == label for index in cell)
        if shots is not None and shots > len(together):
            args.fail("shots", f"at most {len(together)}, the training images of class {name!r}", shots)
        order = drawn_order([f"train {name} {place}" for place in range(len(together))], seed)
        chosen += [together[place] for place in order[:shots]]
    return chosen


def _biased(
    args: Arguments,
    cells: dict[tuple[int, int], list[int]],
    num_classes: int,
    seen: list[int],
    bias: float,
    shots: int | None,
    seed: int,
) -> list[int]:
    """The training images: ``shots`` of each class, the share ``bias`` in a context of its own."""
    heads = drawn_order([f"own domain {context}" for context in seen], seed)

    def counts(label: int, total: int) -> dict[int, int]:
        head = heads[label % len(seen)]
        others = total - round(bias * total)
        if bias < 1 and total > 1:
            others = max(1, others)
        rest = [seen[(head + step) % len(seen)] for step in range(1, len(seen))]
        spread = {context: others // len(rest) + (place < others % len(rest)) for place, context in enumerate(rest)}
        return {seen[head]: total - others, **spread}

    def enough(total: int) -> bool:
        return all(
            count <= len(cells[label, context])
            for label in range(num_classes)
            for context, count in counts(label, total).items()
        )

    most = 0
    while enough(most + 1):
        most += 1
    total = most if shots is None else shots
    if not 0 < total <= most:
        args.fail("shots", f"in 1 .. {most}, what every class has images for with bias={bias}", total)
    return [
        index
        for label in range(num_classes)
        for context, count in counts(label, total).items()
        for index in cells[label, context][:count]
    ]
