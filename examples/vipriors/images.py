"""The labelled images of the recipe, by the layout of their folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from equireg import ImageFiles, k_shot, read_domains, read_nico, read_vipriors

LAYOUTS = ("folders", "nico", "domains")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="folders",
        help="folders: train, val and test of class folders; nico: class/context; domains: domain/class, as PACS",
    )
    parser.add_argument("--shots", type=int, default=0, help="labelled images of each class; 0: all")
    parser.add_argument("--draw", type=int, default=-1, help="seed that draws them; -1: the first ones")
    parser.add_argument("--bias", type=float, default=0.95, help="domains: share of a class in its own domain")


def read(options: argparse.Namespace, split: str) -> ImageFiles:
    """The images of ``train`` (as few of each class as asked for), ``val`` or ``test``."""
    if options.layout == "nico":
        images = read_nico(options.data, split)
    elif options.layout == "domains":
        seed, shots = max(0, options.draw), options.shots or None
        return read_domains(options.data, split, bias=options.bias, held_out=0.3, shots=shots, seed=seed)
    else:
        images = read_folders(Path(options.data), split)
    if split == "train" and options.shots:
        images = k_shot(images, options.shots, seed=None if options.draw < 0 else options.draw)
    return images


def read_folders(root: Path, split: str) -> ImageFiles:
    """Where there is no ``val`` it is the last fifth of each class's training images, and ``train`` the others."""
    if (root / "val").is_dir() or split == "test":
        return read_vipriors(root, split)
    images = read_vipriors(root, "train")
    places = [(images.labels == label).nonzero().squeeze(1) for label in range(len(images.classes))]
    parts = [own[: len(own) * 4 // 5] if split == "train" else own[len(own) * 4 // 5 :] for own in places]
    return images.take(torch.cat(parts))
