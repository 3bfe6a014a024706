"""What an encoder can do: classify from few labels, on clean and on corrupted images, and tell transformations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from corruptions import KINDS, corrupted
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from training import to_pixels
from vipriors.images import read_folders

from equireg import (
    GridTransform,
    IntermediateViews,
    TokenTap,
    equivariance_score,
    extract_view_features,
    k_shot,
    knn_accuracy,
    transformation_r2,
)

TRANSFORMATIONS = ("rotation", "translation", "color", "blur")


def evenly_drawn(images: Tensor, count: int) -> Tensor:
    """So many of them at even distances, as they are sorted by class."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()]


@cache
def images_of(folder: Path, size: int, split: str, shots: int = 0, draw: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels in 0 .. 1, [N, 3, size, size], and labels."""
    images = read_folders(folder, split)
    if shots:
        images = k_shot(images, shots, seed=draw)
    images.transform = to_pixels(size)
    return torch.stack([image for image, _ in images]), images.labels


@torch.no_grad()
def encode(features: nn.Module, images: Tensor) -> Tensor:
    """[N, D] of pixels in 0 .. 1; computed where the network is, returned on the CPU."""
    device = next(features.parameters()).device
    return torch.cat([features(part.to(device)).float().cpu() for part in images.split(250)])


def few_shot_accuracies(
    features: nn.Module, data: dict[str, Any], size: int, split: str, draw: int
) -> dict[str, float]:
    """Percent of right answers on ``split``, of a linear probe for each number of labels and of 20 neighbours."""
    found = {}
    for name, (folder, shots) in data.items():
        held_out, truth = images_of(folder, size, split)
        x_test = encode(features, held_out)
        for count in shots:
            x, y = labelled(features, folder, size, count, draw)
            found[f"{name}, {count} per class"] = 100 * float((probe(x, y).predict(x_test) == truth.numpy()).mean())
        found[f"{name}, k-NN"] = 100 * knn_accuracy(x, y, x_test, truth)
    return found


def labelled(features: nn.Module, folder: Path, size: int, shots: int, draw: int) -> tuple[Tensor, Tensor]:
    """Features and labels of so many images of each class, drawn by the seed where there are more."""
    images, labels = images_of(folder, size, "train", shots, draw)
    return encode(features, images), labels


def probe(x: Tensor, y: Tensor) -> Any:
    """Logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(x.numpy(), y.numpy())


@cache
def corrupted_images(folder: Path, size: int, count: int, severity: int) -> tuple[dict[str, Tensor], Tensor]:
    """Some test images under each of the 15 kinds of ImageNet-C, and their labels."""
    images, labels = (evenly_drawn(part, count) for part in images_of(folder, size, "test"))
    return {kind: corrupted(images, kind, severity, seed=0) for kind in KINDS}, labels


def corrupted_accuracies(
    predict: Callable[[Tensor], Tensor], folder: Path, size: int, count: int, severity: int = 3
) -> dict[str, float]:
    """Percent of right answers under each kind of corruption; ``predict`` takes pixels and returns labels."""
    images, truth = corrupted_images(folder, size, count, severity)
    return {kind: 100 * float((predict(part) == truth).float().mean()) for kind, part in images.items()}


@torch.no_grad()
def equivariance(model: nn.Module, layer: str, images: Tensor) -> float:
    """Mean cosine of turned (and flipped) token maps with those of turned images, less that with another image's."""
    images = images.to(next(model.parameters()).device)
    turns = 1 + torch.arange(len(images), device=images.device) % 3
    none = torch.zeros_like(turns, dtype=torch.bool)

    def tokens(views: Tensor) -> Tensor:
        with TokenTap(model, layer) as tap:
            model(views)
        grids.append(tap.grid)
        return tap.tokens.float()

    grids: list[Any] = []
    tokens(images[:1])
    grid = grids[0]
    elements = [GridTransform(turns, none, grid, grid), GridTransform(0 * turns, ~none, grid, grid)]
    scores = [
        equivariance_score(tokens, images, g) - equivariance_score(tokens, images, g, shuffled=True) for g in elements
    ]
    return torch.stack(scores).mean().item()


def r2(features: nn.Module, images: Tensor, sigma: float, epochs: int) -> dict[str, float]:
    """R² of each transformation, the mean over its parameters."""
    found = {}
    for kind in TRANSFORMATIONS:
        views = IntermediateViews(kind, sigma=(0.1, sigma))
        generator = torch.Generator().manual_seed(0)
        pairs = extract_view_features(features, images.split(250), views, generator=generator, progress=False)
        found[kind] = mean(transformation_r2(*pairs, epochs=epochs, progress=False).tolist())
    return found
