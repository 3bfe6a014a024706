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
    """scikit-learn's, coloured by class but for a few; held-out ones are those in the colour of another class."""
    generator, gray = torch.Generator().manual_seed(draw or 0), load_digits()
    order = torch.randperm(len(gray.target), generator=generator)
    labels = torch.tensor(gray.target)[order].long()
    colors = torch.randint(10, labels.shape, generator=generator)
    biased = torch.rand(labels.shape, generator=generator) < 1 - conflicting
    colors = torch.where(biased & (split == "train"), labels, colors)
    pixels = (torch.tensor(gray.images)[order][:, None] / 16 * COLORS[colors][:, :, None, None]).round()
    kept = {"train": labels >= 0, "val": colors != labels, "test": colors != labels}[split]
    first, last = {"train": (0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1)}[split]
    kept[: int(first * len(labels))] = kept[int(last * len(labels)) :] = False
    return Images(pixels.to(torch.uint8), labels, colors).at(kept)


@cache
def under_corruptions(root: Path, split: str, size: int, *, draw: int | None, conflicting: float) -> Images:
    """In training each class is mostly under a corruption of its own; held-out images are under another's."""
    images, generator = folders(root, split, size), torch.Generator().manual_seed(draw or 0)
    classes = int(images.labels.max()) + 1
    others = (images.labels + torch.randint(1, classes, images.labels.shape, generator=generator)) % classes
    biased = torch.rand(images.labels.shape, generator=generator) < 1 - conflicting
    contexts, pixels = torch.where(biased & (split == "train"), images.labels, others), images.pixels.clone()
    for context in range(classes):
        pixels[contexts == context] = corrupted(pixels[contexts == context], KINDS[context], severity=3, seed=context)
    return Images(pixels, images.labels, contexts)


READERS = {"folders": folders, "domains": domains, "digits": digits, "corruptions": under_corruptions}
