"""The images of the recipe, by the layout of their folder, and how they become tensors."""

from __future__ import annotations

import hashlib
import os
import re
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm.auto import tqdm

from equireg import ImageFiles, k_shot, read_domains, read_nico, read_vipriors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
LAYOUTS = ("folders", "nico", "domains")
OPTIONS: dict[str, tuple[Any, ...]] = {
    "layout": ("folders", "folders: split/class, test also flat; nico: class/context; domains: domain/class", LAYOUTS),
    "shots": (0, "labelled images of each class; 0: all"),
    "draw": (-1, "seed that draws them; -1: the first ones"),
    "bias": (0.95, "domains: share of a class in its own domain"),
    "broken": ("raise", "what is done with images that cannot be decoded", ("raise", "skip")),
    "max_bad": (0.01, "share of the images that may be skipped"),
    "probe_images": (50_000, "at most so many images of a split are used by k-NN and linear probe"),
    "evaluate_on": ("test", "val: leave the test images alone, to choose settings", ("test", "val")),
}


def read(options: Namespace, split: str) -> ImageFiles:
    """The images of ``train`` (as few of each class as asked for), ``val`` or ``test``."""
    root, broken = options.data.absolute(), {"broken": options.broken, "max_broken": options.max_bad}
    if options.layout == "nico":
        images = _read_once(read_nico, root, split, **broken)
    elif options.layout == "domains":
        drawn = {"shots": options.shots or None, "seed": max(0, options.draw)}
        return _read_once(read_domains, root, split, **broken, bias=options.bias, held_out=0.3, **drawn)
    else:
        images = _read_folders(_root(options), split, broken)
    if split == "train" and options.shots:
        images = k_shot(images, options.shots, seed=None if options.draw < 0 else options.draw)
    return images


def measured(options: Namespace) -> tuple[str, ...]:
    """The splits that accuracies are about: ``val``, and ``test`` where it is there and to be looked at."""
    there = options.layout != "folders" or any((_root(options) / name).is_dir() for name in ("test", "testgt"))
    return ("val", "test") if there and options.evaluate_on == "test" else ("val",)


def labelled(options: Namespace) -> str:
    """The last of these that has labels."""
    return next(split for split in reversed(measured(options)) if (read(options, split).labels >= 0).all())


def _root(options: Namespace) -> Path:
    root = options.data.absolute()
    inner = root / "imagenet_50"  # as the challenge's script leaves it
    return inner if inner.is_dir() and not (root / "train").is_dir() else root


def _read_folders(root: Path, split: str, broken: dict[str, Any]) -> ImageFiles:
    """Where there is no ``val`` it is the last fifth of each class's training images, and ``train`` the others."""
    test = root / "test"
    if (
        split == "test"
        and test.is_dir()
        and not (root / "testgt").is_dir()
        and not any(p.is_dir() for p in test.iterdir())
    ):
        files = [path for path in test.iterdir() if path.suffix.lower() in IMG_EXTENSIONS and path.name[0] != "."]
        files.sort(key=lambda path: ([int(number) for number in re.findall("[0-9]+", path.name)], path.name))
        if not files:
            raise ValueError(f"{test} must hold images or a folder of them for each class, got neither")
        return ImageFiles(files, [-1] * len(files), read_vipriors(root, "train", progress=False).classes, **broken)
    if split == "test" or (root / "val").is_dir():
        return _read_once(read_vipriors, root, split, **broken)
    images = _read_once(read_vipriors, root, "train", **broken)
    places = [(images.labels == label).nonzero().squeeze(1) for label in range(len(images.classes))]
    parts = [own[: len(own) * 4 // 5] if split == "train" else own[len(own) * 4 // 5 :] for own in places]
    return images.take(torch.cat(parts))


@cache
def _read_once(reader: Callable[..., ImageFiles], root: Path, split: str, **how: Any) -> ImageFiles:
    """To look for broken images is to decode them all."""
    images = reader(root, split, **how)
    for path, reason in images.skipped:
        tqdm.write(f"left out: {path!r}: {reason}")
    return images


def evenly(images: ImageFiles, count: int) -> ImageFiles:
    """At most so many of them, at even distances."""
    return images.take(torch.linspace(0, len(images) - 1, min(len(images), count)).round().long())


def names_hash(*parts: ImageFiles) -> str:
    """SHA-256 of the names of the images, in their order, wherever their folder lies."""
    names = (os.fsencode("/".join(path.split(os.sep)[-3:])) for images in parts for path in images.paths)
    return hashlib.sha256(b"\0".join(names)).hexdigest()


def to_tensor(*last: Any) -> v2.Compose:
    """Normalised, between what comes before and ``last``."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), *last])


def pixels(options: Namespace) -> v2.Compose:
    """The whole image in 0 .. 1."""
    resize = v2.Resize((options.image_size,) * 2, interpolation=3, antialias=True)
    return v2.Compose([resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def whole(options: Namespace) -> v2.Compose:
    """The same, normalised: what is measured on."""
    return v2.Compose([pixels(options), v2.Normalize(MEAN, STD)])


def crop(options: Namespace) -> list[Any]:
    """The first steps of every augmentation."""
    resized = v2.RandomResizedCrop(options.image_size, scale=(options.crop_scale, 1.0), interpolation=3)
    return [resized, v2.RandomHorizontalFlip()]
