"""Labelled image files, read by one rule for every format; broken files are never skipped silently."""

from __future__ import annotations

import copy
import errno
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from equireg._checks import Arguments
from equireg._progress import progress_bar

__all__ = ["ImageFiles"]

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB in RGB
# Pillow's other formats are left out: EPS, for example, would start a PostScript interpreter.
_KINDS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag
_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Reading(TypedDict, total=False):
    """The options of `ImageFiles` that every reader of folders takes and passes on to it."""

    transform: Callable[[Any], Any] | None
    broken: str
    max_broken: float | None
    max_pixels: int
    progress: bool


@dataclass(frozen=True)
class ReadOptions:
    """How files are read: a value for each option of `Reading`."""

    transform: Callable[[Any], Any] | None = None
    broken: str = "raise"
    max_broken: float | None = None
    max_pixels: int = MAX_PIXELS
    progress: bool = True

    @classmethod
    def given(cls, args: Arguments, reading: Reading) -> ReadOptions:
        """The options that a reader's caller gave, checked, and the defaults of the others."""
        unknown = [name for name in reading if name not in cls.__dataclass_fields__]
        if unknown:
            raise TypeError(f"{args.function}() got an unexpected keyword argument {unknown[0]!r}")
        options = cls(**reading)
        options.check(args)
        return options

    def check(self, args: Arguments) -> None:
        args.option("broken", self.broken, ("raise", "skip"))
        if isinstance(self.max_broken, float):
            args.share("max_broken", self.max_broken)
        elif self.max_broken is not None:
            args.count("max_broken", self.max_broken, least=0)
        args.count("max_pixels", self.max_pixels)


class ImageFiles(Dataset[tuple[Any, int]]):
    """Labelled image files; an item is ``(image, label)``.

    Args:
        paths: [N] the files.
        labels: [N] whole numbers in ``0 .. len(classes) - 1``, or -1 where the label is not known.
        classes: the classes' names.
        contexts: [N] whole numbers in ``0 .. len(context_names) - 1``: what the image shows beside its class (a domain,
            a background), if known. Not part of the items.
        context_names: the contexts' names.
        transform: called with every image.
        broken: ``"raise"``: a file that cannot be decoded raises when it is read. ``"skip"`` decodes every file once
            here, leaves out those that fail and lists them in ``skipped``.
        max_broken: with ``"skip"``, how many files may be left out: a count, or a float in 0 .. 1 for a share of all.
            ``None``: any number.
        max_pixels: files with more pixels count as broken and are not decoded. Pillow's own limit
            (``PIL.Image.MAX_IMAGE_PIXELS``, an error at twice that many) also holds.
        progress: whether the check of ``"skip"`` shows a progress bar, where tqdm is installed.

    Every image becomes an RGB ``PIL.Image`` with 8 bits a channel. Its format is read from the file's content, not from
    its name: JPEG, PNG, GIF, BMP, PPM, TIFF, WebP.

    * gray and palette images: the same colours in RGB; CMYK: Pillow's plain conversion, without colour profile
    * 16 bits a channel: divided by 257 for gray, the high byte for colour; floating point gray: 0 .. 1 becomes 0 .. 255
    * transparency: composited over white
    * an EXIF orientation: turned upright
    * animations and files of several pages: the first image

    Attributes: ``paths`` (list), ``labels`` (int64 [N]), ``targets`` (the same as a list), ``classes``, ``contexts``
    (int64 [N] or None), ``context_names`` (or None), ``transform``, ``skipped`` (list of ``(path, reason)``).

    Raises:
        ValueError: labels or contexts do not fit; more than ``max_broken`` files are broken; while reading: a file is
            broken, with its path.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cat, dog = os.path.join(folder, "cat.png"), os.path.join(folder, "dog.png")
        ...     Image.new("L", (6, 4)).save(cat)
        ...     open(dog, "wb").close()
        ...     files = ImageFiles([cat, dog], [0, 1], ["cat", "dog"], broken="skip", progress=False)
        ...     image, label = files[0]
        >>> image.mode, image.size, label, len(files), [os.path.basename(path) for path, reason in files.skipped]
        ('RGB', (6, 4), 0, 1, ['dog.png'])
    """

    def __init__(
        self,
        paths: Sequence[str | bytes | os.PathLike[str]],
        labels: Sequence[int] | Tensor,
        classes: Sequence[str],
        *,
        contexts: Sequence[int] | Tensor | None = None,
        context_names: Sequence[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        broken: str = "raise",
        max_broken: float | None = None,
        max_pixels: int = MAX_PIXELS,
        progress: bool = True,
    ):
        args = Arguments("ImageFiles")
        ReadOptions(transform, broken, max_broken, max_pixels, progress).check(args)
        self.paths = [os.fsdecode(path) for path in paths]
        self.classes = _names(args, "classes", classes)
        self.labels = _numbers(args, "labels", labels, len(self.paths), -1, len(self.classes), "classes")
        if (contexts is None) != (context_names is None):
            args.fail("contexts", "given together with context_names", "one of them alone")
        self.context_names = None if context_names is None else _names(args, "context_names", context_names)
        self.contexts = None
        if contexts is not None and self.context_names is not None:
            names = len(self.context_names)
            self.contexts = _numbers(args, "contexts", contexts, len(self.paths), 0, names, "context_names")
        self.transform = transform
        self.max_pixels = max_pixels
        self.skipped: list[tuple[str, str]] = []
        if broken == "skip":
            self._skip_broken(args, max_broken, progress)

    @property
    def targets(self) -> list[int]:
        return self.labels.tolist()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"ImageFiles: index must be in 0 .. {len(self) - 1}, got {index}")
        image = read_image(self.paths[index], self.max_pixels)
        return image if self.transform is None else self.transform(image), int(self.labels[index])

    def __repr__(self) -> str:
        contexts = "" if self.context_names is None else f", {len(self.context_names)} contexts"
        skipped = f", {len(self.skipped)} files skipped" if self.skipped else ""
        return f"ImageFiles({len(self)} images, {len(self.classes)} classes{contexts}{skipped})"

    def take(self, indices: Sequence[int] | Tensor) -> ImageFiles:
        """The images at ``indices``, in that order; everything else is unchanged."""
        args = Arguments("ImageFiles.take")
        given = torch.as_tensor(indices) if len(indices) else torch.empty(0, dtype=torch.int64)
        chosen = args.integers("indices", given, "N")
        args.below("indices", chosen, len(self), "the number of images")
        taken = copy.copy(self)
        taken.paths = [self.paths[index] for index in chosen.tolist()]
        taken.labels = self.labels[chosen]
        taken.contexts = None if self.contexts is None else self.contexts[chosen]
        taken.skipped = list(self.skipped)
        return taken

    def _skip_broken(self, args: Arguments, max_broken: float | None, progress: bool) -> None:
        whole = []
        for index, path in enumerate(progress_bar(self.paths, "images decoded", shown=progress)):
            try:
                read_image(path, self.max_pixels)
                whole.append(index)
            except ValueError as error:
                self.skipped.append((path, str(error)))
        refuse_many(args, self.skipped, len(self.paths), max_broken)
        self.__dict__.update(self.take(whole).__dict__)


def refuse_many(args: Arguments, skipped: list[tuple[str, str]], count: int, max_broken: float | None) -> None:
    """Raise if more files were left out than ``max_broken`` allows."""
    if max_broken is None:
        return
    if len(skipped) > (max_broken * count if isinstance(max_broken, float) else max_broken):
        first = "; ".join(reason for _, reason in skipped[:3])
        rule = f"a set of {count} files of which at most max_broken={max_broken} are broken"
        args.fail("the data set", rule, f"{len(skipped)}, first of all: {first}")


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> Image:
    """The file's image in RGB by the rule of `ImageFiles`.

    Raises:
        ValueError: the file is no image that can be decoded; with its path.
    """
    from PIL import Image, UnidentifiedImageError

    args, name, rule = Arguments("ImageFiles"), f"file {path!r}", "an image that can be decoded"
    try:
        with open(path, "rb") as file, Image.open(file, formats=_KINDS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return _rgb(image)
    except UnidentifiedImageError:
        args.fail(name, rule, "no image of a known kind")
    except Exception as error:  # decoders fail in many ways
        if isinstance(error, OSError) and error.errno in _NOT_THE_FILE:
            raise
        args.fail(name, rule, f"{type(error).__name__}: {error}")
    args.fail(name, f"of at most max_pixels={max_pixels} pixels", f"{width} x {height}")


def _rgb(image: Image) -> Image:
    from PIL import Image

    image.load()  # this turns a TIFF and drops its tag; a PNG's tag may follow the pixels
    orientation = _orientation(image)
    if image.mode.startswith("I"):
        # Through 32 bits, because Pillow's releases convert 16 to 8 bits differently.
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif image.mode == "F":
        image = image.point(lambda value: value * 255.0 + 0.5).convert("L")
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _orientation(image: Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a broken tag beside a sound image
        return None


def _names(args: Arguments, name: str, values: Sequence[str]) -> list[str]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        args.fail_type(name, "a list of names", f"{type(values).__name__} {values!r}")
    return list(values)


def _numbers(
    args: Arguments, name: str, values: Sequence[int] | Tensor, length: int, least: int, limit: int, what: str
) -> Tensor:
    """The labels or contexts as int64 [N] on the CPU, a copy."""
    try:
        tensor = torch.as_tensor(values).detach().cpu() if length else torch.zeros(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        args.fail_type(name, "whole numbers", error)
    tensor = args.integers(name, tensor, "N").clone()
    if len(tensor) != length:
        args.fail(name, f"[{length}], one for each path", list(tensor.shape))
    wrong = (tensor < least) | (tensor >= limit)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        args.fail(name, f"in {least} .. {limit - 1} ({what})", f"{int(tensor[place])} at position {place}")
    return tensor
