"""Every data set of the experiments as one uint8 tensor of images, with labels and, where they are known, contexts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from evidence.corruptions import KINDS, corrupted
from sklearn.datasets import load_digits
from torch import Tensor

from equireg import ImageFiles, k_shot, read_domains, read_vipriors

COLORS = "e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 d2f53c aa6e28"  # one for each class
COLORS = torch.tensor(list(bytes.fromhex(COLORS))).view(10, 3)


class Images(NamedTuple):
    pixels: Tensor  # uint8 [N, 3, S, S]
    labels: Tensor  # [N]
    contexts: Tensor | None = None  # [N]: a domain, a colour, a corruption

    def at(self, places: Tensor) -> Images:
        return Images(*(part if part is None else part[places] for part in self))

    def evenly(self, count: int) -> Images:
        """So many of them at even distances, as they are sorted by class."""
        return self.at(torch.linspace(0, len(self.labels) - 1, min(count, len(self.labels))).round().long())


def pixels_of(files: ImageFiles, size: int) -> Images:
    pixels = [np.asarray(image.convert("RGB").resize((size, size), 3)) for image, _ in files]
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), files.labels, files.contexts)


@cache
def folders(root: Path, split: str, size: int, *, draw: int | None = None, shots: int = 0) -> Images:
    """A folder for each class; in training so many ``shots`` of each, the first ones or drawn by a seed.

    Where there is no ``val`` it is the last fifth of each class's training images, and ``train`` the others.
    """
    whole = split == "test" or (root / "val").is_dir()
    files = read_vipriors(root, split if whole else "train")
    if not whole:
        rank = torch.cat([torch.arange(n) / n for n in files.labels.bincount()])  # within its class, as they are sorted
        files = files.take((rank < 0.8 if split == "train" else rank >= 0.8).nonzero().squeeze(1))
    return pixels_of(k_shot(files, shots, seed=draw) if shots and split == "train" else files, size)


@cache
def domains(root: Path, split: str, size: int, *, draw: int | None, shots: int, bias: float = 0.95) -> Images:
    """As PACS. In training each class is mostly in a domain of its own; held-out images are evenly in all domains."""
    return pixels_of(read_domains(root, split, bias=bias, held_out=0.3, shots=shots, seed=draw or 0), size)


@cache
def digits(root: Path, split: str, size: int, *, draw: int | None, conflicting: float = 0.05) -> Images:
    """scikit-learn's, in ten colours for contexts."""
    generator, gray = torch.Generator().manual_seed(draw or 0), load_digits()
    order = torch.randperm(len(gray.target), generator=generator)
    first, last = {"train": (0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1)}[split]
    order = order[int(first * len(order)) : int(last * len(order))]
    labels = torch.tensor(gray.target)[order].long()
    colors = biased(labels, split, conflicting, generator)
    pixels = torch.tensor(gray.images)[order][:, None] / 16 * COLORS[colors][:, :, None, None]
    return Images(pixels.round().to(torch.uint8), labels, colors)


@cache
def under_corruptions(root: Path, split: str, size: int, *, draw: int | None, conflicting: float) -> Images:
    """A folder for each class, and a kind of corruption for each context."""
    images, generator = folders(root, split, size), torch.Generator().manual_seed(draw or 0)
    contexts, pixels = biased(images.labels, split, conflicting, generator), images.pixels.clone()
    for context in contexts.unique().tolist():
        own = contexts == context
        pixels[own] = corrupted(pixels[own], KINDS[context], severity=3, seed=context)
    return Images(pixels, images.labels, contexts)


def biased(labels: Tensor, split: str, conflicting: float, generator: torch.Generator) -> Tensor:
    """In training each class is in a context of its own but for the share ``conflicting``; held out, in another's."""
    classes = int(labels.max()) + 1
    others = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    own = (torch.rand(labels.shape, generator=generator) >= conflicting) & (split == "train")
    return torch.where(own, labels, others)


READERS = {"folders": folders, "domains": domains, "digits": digits, "corruptions": under_corruptions}
