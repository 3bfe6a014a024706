"""The labelled images of the recipe, by the layout of their folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import merged_predictions
import torch
from torch import Tensor
from training import read_once

from equireg import ImageFiles, k_shot, read_domains, read_nico, read_vipriors

LAYOUTS = ("folders", "nico", "domains")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="folders",
        help="folders: train, val and test of class folders, or the challenge's; nico: class/context; "
        "domains: domain/class, as PACS",
    )
    parser.add_argument("--shots", type=int, default=0, help="labelled images of each class; 0: all")
    parser.add_argument("--draw", type=int, default=-1, help="seed that draws them; -1: the first ones")
    parser.add_argument("--bias", type=float, default=0.95, help="domains: share of a class in its own domain")


def check(options: argparse.Namespace) -> None:
    """Whether all images are there that the steps take.

    Raises:
        ValueError, OSError: they are not, with the folder's path.
    """
    for split in ("train", *measured(options)):
        read(options, split)


def measured(options: argparse.Namespace) -> tuple[str, ...]:
    """The splits that accuracies are about; ``--evaluate-on val`` leaves the test images alone."""
    return ("val",) if options.evaluate_on == "val" else ("val", "test")


def accuracy(predicted: Tensor, labels: Tensor) -> float | str:
    """In percent, of scores [N, C]; the challenge's test images have no labels."""
    known = bool((labels >= 0).all())
    return merged_predictions.accuracy(predicted, labels) if known else merged_predictions.UNKNOWN


def read(options: argparse.Namespace, split: str) -> ImageFiles:
    """The images of ``train`` (as few of each class as asked for), ``val`` or ``test``."""
    root, broken = Path(options.data).absolute(), {"broken": options.broken, "max_broken": options.max_bad}
    if options.layout == "nico":
        images = read_once(read_nico, root, split, **broken)
    elif options.layout == "domains":
        drawn = {"shots": options.shots or None, "seed": max(0, options.draw)}
        return read_once(read_domains, root, split, **broken, bias=options.bias, held_out=0.3, **drawn)
    else:
        images = read_folders(root, split, **broken)
    if split == "train" and options.shots:
        images = k_shot(images, options.shots, seed=None if options.draw < 0 else options.draw)
    return images


def read_folders(root: Path, split: str, **broken: str | float) -> ImageFiles:
    """Where there is no ``val`` it is the last fifth of each class's training images, and ``train`` the others."""
    inner = root / "imagenet_50"  # as the challenge's script leaves it
    root = inner if inner.is_dir() and not (root / "train").is_dir() else root
    if (root / "val").is_dir() or split == "test":
        return read_once(read_vipriors, root, split, **broken)
    images = read_once(read_vipriors, root, "train", **broken)
    places = [(images.labels == label).nonzero().squeeze(1) for label in range(len(images.classes))]
    parts = [own[: len(own) * 4 // 5] if split == "train" else own[len(own) * 4 // 5 :] for own in places]
    return images.take(torch.cat(parts))
