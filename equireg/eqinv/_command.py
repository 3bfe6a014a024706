"""``equireg environments features.npz``: is my data biased? Asked of a file, without code.

Standard output has the report; standard error has one line if something is wrong, and the exit status is 2 for an
argument, 1 for what a file holds. Every file in the folder of ``--out`` is written whole or not at all.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equireg.eqinv.context_weights import SCORES
from equireg.eqinv.environments import Environments
from equireg.eqinv.sheet import weight_sheet

ADJUST: dict[str, bool | str] = {"mean": True, "median": "median", "none": False}
ERRORS = (OSError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    every = parser()
    options = every.parse_args(arguments)
    if options.images and not options.out:
        every.error("--images needs --out, the folder of the sheet")
    try:
        environments_command(options)
    except (*ERRORS, ImportError) as error:
        sys.stderr.write(f"equireg {options.command}: {' '.join(str(error).split())}\n")
        return 1
    return 0


class OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    every = OneLine(prog="equireg", description="Plug-in regularizers: what needs no code.")
    commands = every.add_subparsers(dest="command", required=True)
    text = "Report whether a data set looks biased, from features alone, and write the weights of its samples."
    one = commands.add_parser("environments", description=text, help="is my data biased?")
    text = "arrays features [N, D] and labels [N]; optional: images, [N, C, H, W], [N, H, W] or N paths"
    one.add_argument("file", type=Path, metavar="features.npz", help=text)
    text = "folder for weights.csv, report.png and, where there are images, sheet.png"
    one.add_argument("--out", type=Path, metavar="FOLDER", help=text)
    text = "text file with the path of an image in each line, in the order of the features"
    one.add_argument("--images", type=Path, metavar="FILE", help=text)
    text = "project the features on so many principal axes first; for two or three classes and wide features"
    one.add_argument("--whiten", type=int, metavar="AXES", help=text)
    text = "what the weights rank by; margin goes with --sharpness auto (default: %(default)s)"
    one.add_argument("--score", choices=SCORES, default="similarity", help=text)
    text = "how unlike the weights are: a number, or auto, from the report (default: %(default)s)"
    one.add_argument("--sharpness", type=number_or_auto, default=1.0, help=text)
    text = "scores above it weigh no more (default: %(default)s)"
    one.add_argument("--cap", type=float, default=2.5, help=text)
    text = "what is subtracted from the similarities of each class (default: %(default)s)"
    one.add_argument("--adjust", choices=ADJUST, default="mean", help=text)
    return every


def number_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


def environments_command(options: argparse.Namespace) -> None:
    images: Pictures | Tensor | None = None
    with options.file.open("rb") as file, np.errstate(over="ignore"):  # too large for float32: infinite, and refused
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{options.file}: must be an .npz archive, as numpy.savez writes it")
        file.seek(0)
        archive = np.load(file)
        features = read(options.file, archive, "features", "f", "floating point numbers").astype(np.float32, copy=False)
        labels = read(options.file, archive, "labels", "iu", "whole numbers").astype(np.int64)
        if options.images:
            images = Pictures(options.images.read_text(errors="surrogateescape").splitlines())
        elif options.out and "images" in archive.files:
            images = pictures(options.file, read(options.file, archive, "images", "fiuU", "numbers or paths"))
    if labels.size and labels.max() >= labels.size:  # most of them empty, and each takes memory
        rule = f"class numbers below the number of samples, {labels.size}"
        raise ValueError(f"{options.file}: array 'labels' must hold {rule}, got {labels.max()}")
    try:
        how = {"adjust": ADJUST[options.adjust], "whiten": options.whiten, "score": options.score}
        environments = Environments.split(torch.from_numpy(features), torch.from_numpy(labels), **how)
        report = environments.report()
    except ERRORS as error:
        raise ValueError(f"{options.file}: {error}") from None
    if images is not None and len(images) != len(labels):
        where = options.images or f"{options.file}: array 'images'"
        raise ValueError(f"{where}: must have an image for each of {len(labels)} samples, got {len(images)}")
    shape = {"sharpness": options.sharpness, "cap": options.cap}
    weights = environments.weights(**shape)
    sys.stdout.write(f"{report}\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        columns = labels.tolist(), environments.context().tolist(), weights.tolist()
        rows = [f"{i},{y},{context},{weight:.6g}" for i, (y, context, weight) in enumerate(zip(*columns))]
        write(options.out / "weights.csv", "\n".join(["index,label,context,weight", *rows, ""]).encode())
        write(options.out / "report.png", png(report.picture()))
        if images is not None:
            write(options.out / "sheet.png", png(weight_sheet(environments, images, **shape)))


def read(path: Path, archive: Any, name: str, kinds: str, rule: str) -> Any:
    """An array of the archive, whose dtype is of one of numpy's ``kinds``."""
    if name not in archive.files:
        raise ValueError(f"{path}: must have an array '{name}', got {', '.join(archive.files[:5]) or 'none'}")
    try:
        array = np.asarray(archive[name])
    except Exception as error:  # damage is found by the check sum, or by whatever meets it before
        raise ValueError(f"{path}: array '{name}' cannot be read: {error}") from None
    if array.dtype.kind not in kinds:
        raise TypeError(f"{path}: array '{name}' must hold {rule}, got {array.dtype}")
    return array


def pictures(path: Path, array: Any) -> Pictures | Tensor:
    """What ``weight_sheet`` takes images from."""
    if array.dtype.kind == "U" and array.ndim == 1:
        return Pictures(array.tolist())
    if array.dtype.kind == "U" or not (array.ndim == 3 or (array.ndim == 4 and array.shape[1] in (1, 3))):
        rule = "[N, C, H, W] with 1 or 3 channels, [N, H, W], or N paths"
        raise ValueError(f"{path}: array 'images' must be {rule}, got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32, copy=False))


class Pictures:
    """Images by their paths, read when they are shown, and no larger than that needs."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            with Image.open(self.paths[index]) as opened:
                image = opened.convert("RGB")
        except Exception as error:  # each format of Pillow raises its own
            raise ValueError(f"{self.paths[index]}: cannot be read as an image: {error}") from None
        image.thumbnail((256, 256))
        return image


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """By another name first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    sys.exit(main())
