"""Every data set of the experiments as one uint8 tensor of images, with labels and, where they are known, contexts."""

from colorsys import hsv_to_rgb
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from evidence.corruptions import corrupted
from evidence.experiments import Settings
from quickstart import COLORS
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.transforms.v2.functional import resize
from vipriors.images import read_split

from equireg import k_shot, read_domains


class Images(NamedTuple):
    pixels: Tensor  # uint8 [N, 3, S, S]; where the backbone is frozen, its features [N, D] in their place
    labels: Tensor  # [N]
    contexts: Tensor | None = None  # [N]: a domain, a colour, a kind of corruption

    def evenly(self, count: int) -> "Images":
        """So many of them at even distances, as they are sorted by class."""
        return self.at(torch.linspace(0, len(self.labels) - 1, min(count, len(self.labels))).round().long())

    def at(self, rows: Tensor) -> "Images":
        """Those at indices, or where a mask is true."""
        return Images(*(None if part is None else part[rows] for part in self))

    def conflicting(self, training: "Images") -> Tensor | None:
        """bool [N], those in another context than most training images of their class; None where none has one."""
        if training.contexts is None:
            return None
        table = torch.zeros(int(training.labels.max()) + 1, int(training.contexts.max()) + 1)
        table.index_put_((training.labels, training.contexts), torch.ones(()), accumulate=True)
        most, own = table.max(1)
        return self.contexts != own[self.labels] if (most > 0.5 * table.sum(1)).all() else None


@cache
def folders(
    root: Path, split: str, size: int, draw: int | None = None, shots: int = 0, layout: str = "", bias: float = 0.95
) -> Images:
    """The images of a folder; in training so many ``shots`` of each class, the first ones or drawn by a seed.

    With the layout "domains", as PACS, the share ``bias`` of each class is from a domain of its own in training, and
    held-out images are spread evenly over all domains.
    """
    if layout == "domains":
        files = read_domains(root, split, bias=bias, held_out=0.3, shots=shots or None, seed=draw or 0)
    else:
        files = read_split(root, split)
        files = k_shot(files, shots, seed=draw) if split == "train" and shots else files
    pixels = [np.asarray(image.convert("RGB").resize((size, size), 3)) for image, _ in files]
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), files.labels, files.contexts)


def gray_digits(split: str, draw: int | None) -> tuple[Tensor, Tensor, torch.Generator]:
    """scikit-learn's in 0 .. 1, [N, 1, 8, 8], three fifths of them for training; which, follows from the draw."""
    generator, gray = torch.Generator().manual_seed(draw or 0), load_digits()
    order = torch.randperm(len(gray.target), generator=generator)
    train, val, test = order.tensor_split([int(0.6 * len(order)), int(0.8 * len(order))])
    order = {"train": train, "val": val, "test": test}[split]
    return torch.tensor(gray.images)[order][:, None] / 16, torch.tensor(gray.target)[order].long(), generator


def painted(gray: Tensor, labels: Tensor, colors: Tensor, palette: Tensor) -> Images:
    pixels = gray * 255 * palette[colors][:, :, None, None]
    return Images(pixels.round().to(torch.uint8), labels, colors)


@cache
def digits(root: Path, split: str, size: int, *, draw: int | None, conflicting: float = 0.05) -> Images:
    """scikit-learn's, in ten colours for contexts.

    In training each digit wears its own colour but for the share ``conflicting``; held out, another's.
    """
    gray, labels, generator = gray_digits(split, draw)
    others = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    own = (torch.rand(labels.shape, generator=generator) >= conflicting) & (split == "train")
    return painted(gray, labels, torch.where(own, labels, others), COLORS)


@cache
def tinted(root: Path, split: str, size: int, *, draw: int | None, hues: int) -> Images:
    """scikit-learn's digits, each in one of so many hues at random: a factor that is planted beside the class."""
    gray, labels, generator = gray_digits(split, draw)
    wheel = torch.tensor([hsv_to_rgb(hue / hues, 1, 1) for hue in range(hues)])
    return painted(gray, labels, torch.randint(hues, labels.shape, generator=generator), wheel)


# Ten that differ much from each other, none of them slow; number c is that of class c.
TEN_KINDS = ("gaussian_noise", "impulse_noise", "motion_blur", "snow", "fog", "brightness", "contrast",
             "elastic_transform", "pixelate", "jpeg_compression")  # fmt: skip


@cache
def corrupted_folders(
    root: Path, split: str, size: int, *, draw: int | None, conflicting: float, severity: int, shots: int = 0
) -> Images:
    """Images of ten classes of 32 pixels, corrupted before they are enlarged; the kind is their context.

    In training each class is under a kind of its own but for the share ``conflicting``, which is under another's; held
    out, each kind is drawn alike.
    """
    images, generator = folders(root, split, 32, draw=draw, shots=shots), torch.Generator().manual_seed(draw or 0)
    labels, count = images.labels, (len(images.labels),)
    steps = torch.randint(1, 10, count, generator=generator) * (torch.rand(count, generator=generator) < conflicting)
    kinds = (labels + steps) % 10 if split == "train" else torch.randint(10, count, generator=generator)
    pixels, seed = images.pixels.clone(), 3 * (draw or 0) + ["train", "val", "test"].index(split)
    for number in kinds.unique().tolist():  # with a seed for each split, or they would share their noise
        pixels[kinds == number] = corrupted(pixels[kinds == number], TEN_KINDS[number], severity, seed=seed)
    return Images(resize(pixels, [size, size], interpolation=3), labels, kinds)


READERS = {"folders": folders, "digits": digits, "tinted": tinted, "corrupted": corrupted_folders}


def images_of(s: Settings, data: Path, split: str, seed: int) -> Images:
    """Those of a split, or of several that are joined by ``+``; what is drawn follows from the seed where ``draw``."""
    own = dict(s["data"])
    read, root = READERS[own.pop("reader")], data / own.pop("folder", "")
    found = [read(root, part, s["image_size"], draw=seed if s["draw"] else None, **own) for part in split.split("+")]
    if len(found) == 1:
        return found[0]
    return Images(torch.cat([part.pixels for part in found]), torch.cat([part.labels for part in found]))
