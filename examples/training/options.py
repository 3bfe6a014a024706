"""The options of a training, and the images that they name."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import math
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from equireg import ImageFiles, read_image_folder
from training.shown_names import visible

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
# How a training is run, not what it computes: these may change on the way.
NOT_IN_THE_RESULT = (
    *("resume", "out", "data", "workers", "variants", "save_every"),
    *("worker_timeout", "max_skipped", "allow_data_change", "traceback"),
)


def parse(
    description: str,
    recipes: dict[str, dict[str, Any]],
    add_options: Callable[[argparse.ArgumentParser], None],
    arguments: list[str] | None = None,
) -> argparse.Namespace:
    """The options of an example, from the command line or a list; ``--recipe`` chooses the defaults of those that the
    recipes name.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument(
        "--recipe", choices=recipes, default=next(iter(recipes)), help="a setting; flags change its parts"
    )
    recipe = recipes[first.parse_known_args(arguments)[0].recipe]
    parser = argparse.ArgumentParser(description=description, parents=[first])
    data = os.environ.get("EQUIREG_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=f"{data}/cifar10" if data else None,
        required=data is None,
        help="a folder with train/<class>/* and test/<class>/* or val/<class>/*",
    )
    add_options(parser)
    parser.add_argument("--evaluate-on", choices=("test", "val"), default="test", help="choose settings on val")
    add_training_options(parser)
    add_values(parser, recipe)
    own_layout = parser.get_default("layout") is not None  # whose reader looks for itself
    return parse_checked(parser, arguments, *([] if own_layout else [check_folders]))


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Those of every training, however it finds its images."""
    parser.add_argument("--amp", choices=("auto", "none", "bf16", "fp16"), default="auto")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, bit for bit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that load and augment images")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints, besides every epoch")
    parser.add_argument("--max-skipped", type=int, default=10, help="steps without a finite gradient in a row")
    parser.add_argument("--worker-timeout", type=int, default=600, help="seconds that --workers may take for a batch")
    parser.add_argument("--allow-data-change", action="store_true", help="go on though the names of the images changed")
    parser.add_argument("--traceback", action="store_true", help="where an error came from, besides what it is")
    parser.add_argument("--broken", choices=("raise", "skip"), default="raise", help="images that cannot be decoded")
    parser.add_argument("--max-bad", type=float, default=0.01, help="share of the images that --broken skip leaves out")
    parser.add_argument("--probe-images", type=int, default=50_000, help="at most so many of train and of test")


def add_values(parser: argparse.ArgumentParser, values: dict[str, Any]) -> None:
    """An option for each value, which is its default."""
    for name, value in values.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)


def parse_checked(
    parser: argparse.ArgumentParser, arguments: list[str] | None, *checks: Callable[[argparse.Namespace], None]
) -> argparse.Namespace:
    """The options, of which each check raises a ValueError or an OSError where they do not go together."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = difflib.get_close_matches(unknown[0], re.findall(r"--[\w-]+", parser.format_usage()), 1)
        parser.error(visible(f"unknown: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else "")))
    try:
        for check in (check_options, *checks):
            check(options)
    except (ValueError, OSError) as error:
        parser.error(visible(error))
    if options.amp == "auto":  # where the device multiplies bf16 in hardware
        cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        options.amp = "bf16" if torch.cuda.is_available() or cpu else "none"
    return options


def check_options(options: argparse.Namespace) -> None:
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag} must be finite, got {value}")
        if name in ("batch_size", "epochs", "image_size", "save_every", "probe_images", "max_skipped") and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
        if name in ("images", "workers", "worker_timeout", "warmup_epochs") and value < 0:
            raise ValueError(f"{flag} must be at least 0, got {value}")


def what_counts(options: argparse.Namespace) -> dict[str, Any]:
    """The options that the result depends on; no paths, which tell of the machine."""
    return {
        name: value
        for name, value in vars(options).items()
        if name not in NOT_IN_THE_RESULT and not isinstance(value, Path)
    }


# ---------------------------------------------------------------------------------------------------------- the images


def training_images(options: argparse.Namespace) -> ImageFiles:
    """Those of ``train``, or as many of them as asked for, evenly over the classes."""
    images = folder_images(Path(options.data) / "train", options)
    return evenly(images, options.images or len(images))


def folder_images(
    folder: Path, options: argparse.Namespace, transform: Callable[[Any], Any] | None = None
) -> ImageFiles:
    """The images of class folders; what is broken raises with its path, or is left out as ``--broken`` says."""
    images = read_once(read_image_folder, folder, broken=options.broken, max_broken=options.max_bad)
    images.transform = transform
    return images


def read_once(reader: Callable[..., ImageFiles], *where: Any, **how: Any) -> ImageFiles:
    """A copy of what was found at the first time: to look for broken images is to decode them all."""
    images = _found(reader, where, tuple(how.items()))
    return images.take(range(len(images)))


@cache
def _found(reader: Callable[..., ImageFiles], where: tuple[Any, ...], how: tuple[tuple[str, Any], ...]) -> ImageFiles:
    images = reader(*where, **dict(how))
    for path, reason in images.skipped:
        tqdm.write(visible(f"left out: {path}: {reason}"))
    return images


def evenly(dataset: Any, count: int) -> Any:
    """At most so many of its samples, at even distances."""
    chosen = torch.linspace(0, len(dataset) - 1, min(len(dataset), count)).round().long().tolist()
    return dataset.take(chosen) if isinstance(dataset, ImageFiles) else Subset(dataset, chosen)


def names_hash(images: ImageFiles) -> str:
    """Of the names of the training images, in their order, wherever their folder lies."""
    names = (os.fsencode("/".join(path.split(os.sep)[-3:])) for path in images.paths)
    return hashlib.sha256(b"\0".join(names)).hexdigest()


def test_folder(options: argparse.Namespace) -> Path:
    """The images that results are about: ``--evaluate-on``, and ``val`` where there is no ``test``."""
    root = Path(options.data)
    return root / "test" if options.evaluate_on == "test" and (root / "test").is_dir() else root / "val"


def check_folders(options: argparse.Namespace) -> None:
    """The same classes, two or more, in both parts, and a file for each: the labels are the places of the classes."""
    root = options.data.absolute()
    if not (root / "train").is_dir() or not test_folder(options).is_dir():
        name = options.evaluate_on
        raise ValueError(f"--data {options.data} must hold the folders train and {name} (or val), got none in {root}")
    found = {}
    for part in (root / "train", test_folder(options).absolute()):
        try:
            folders = [folder for folder in sorted(part.iterdir()) if folder.is_dir()]
            empty = [folder.name for folder in folders if not any(folder.iterdir())]
        except OSError as error:
            raise ValueError(f"--data: {error.filename} cannot be read: {error.strerror}") from error
        if len(folders) < 2:
            raise ValueError(f"--data: {part} must hold a folder for each of two or more classes, got {len(folders)}")
        if empty:
            raise ValueError(f"--data: {part} must hold images of every class, got none of {', '.join(empty[:5])}")
        found[part] = {folder.name for folder in folders}
    first, second = found.values()
    if first != second:
        others = ", ".join(sorted(first ^ second)[:5])
        raise ValueError(f"--data: {' and '.join(map(str, found))} must hold the same classes, got {others} in one")


def into_range(image: Tensor) -> Tensor:
    """Bicubic resizing overshoots, and the jittered hue of a colour outside of 0 .. 1 can be NaN."""
    return image.clamp(0, 1)


def to_pixels(size: int) -> v2.Compose:
    """An image as a tensor [3, size, size] in 0 .. 1."""
    resize = v2.Resize((size, size), interpolation=3, antialias=True)
    return v2.Compose([resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), into_range])


def plain_transform(options: argparse.Namespace) -> v2.Compose:
    """The same, of the size of the training."""
    return to_pixels(options.image_size)


def normalized_transform(options: argparse.Namespace) -> v2.Compose:
    """The same, less the mean of ImageNet's pixels and over their deviation."""
    return v2.Compose([plain_transform(options), v2.Normalize(MEAN, STD)])
