"""Every data set of the experiments as one uint8 tensor of images, with labels and, where they are known, contexts."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from evidence.experiments import Settings
from quickstart import COLORS
from sklearn.datasets import load_digits
from torch import Tensor
from vipriors.images import read_split

from equireg import k_shot, read_domains


class Images(NamedTuple):
    pixels: Tensor  # uint8 [N, 3, S, S]
    labels: Tensor  # [N]
    contexts: Tensor | None = None  # [N]: a domain, a colour

    def evenly(self, count: int) -> "Images":
        """So many of them at even distances, as they are sorted by class."""
        places = torch.linspace(0, len(self.labels) - 1, min(count, len(self.labels))).round().long()
        return Images(self.pixels[places], self.labels[places])


@cache
def folders(root: Path, split: str, size: int, draw: int | None = None, shots: int = 0, layout: str = "") -> Images:
    """The images of a folder; in training so many ``shots`` of each class, the first ones or drawn by a seed.

    With the layout "domains", as PACS, each class is mostly in a domain of its own in training, and held-out images
    are spread evenly over all domains.
    """
    if layout == "domains":
        files = read_domains(root, split, bias=0.95, held_out=0.3, shots=shots or None, seed=draw or 0)
    else:
        files = read_split(root, split)
        files = k_shot(files, shots, seed=draw) if split == "train" and shots else files
    pixels = [np.asarray(image.convert("RGB").resize((size, size), 3)) for image, _ in files]
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), files.labels, files.contexts)


@cache
def digits(root: Path, split: str, size: int, *, draw: int | None, conflicting: float = 0.05) -> Images:
    """scikit-learn's, in ten colours for contexts.

    In training each digit wears its own colour but for the share ``conflicting``; held out, another's.
    """
    generator, gray = torch.Generator().manual_seed(draw or 0), load_digits()
    order = torch.randperm(len(gray.target), generator=generator)
    train, val, test = order.tensor_split([int(0.6 * len(order)), int(0.8 * len(order))])
    order = {"train": train, "val": val, "test": test}[split]
    labels = torch.tensor(gray.target)[order].long()
    others = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    own = (torch.rand(labels.shape, generator=generator) >= conflicting) & (split == "train")
    colors = torch.where(own, labels, others)
    pixels = torch.tensor(gray.images)[order][:, None] / 16 * 255 * COLORS[colors][:, :, None, None]
    return Images(pixels.round().to(torch.uint8), labels, colors)


READERS = {"folders": folders, "digits": digits}


def images_of(s: Settings, data: Path, split: str, seed: int) -> Images:
    """Those of a split, or of several that are joined by ``+``; what is drawn follows from the seed where ``draw``."""
    own = dict(s["data"])
    read, root = READERS[own.pop("reader")], data / own.pop("folder", "")
    found = [read(root, part, s["image_size"], draw=seed if s["draw"] else None, **own) for part in split.split("+")]
    return Images(torch.cat([part.pixels for part in found]), torch.cat([part.labels for part in found]), found[0].contexts)
