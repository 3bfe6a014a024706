"""What an encoder can do: classify from few labels, on clean and on corrupted images, and tell transformations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from evidence.corruptions import KINDS, corrupted
from evidence.datasets import Images, folders
from evidence.experiments import Settings
from evidence.networks import NORMALIZE, Encoder, encode
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from equireg import (
    GridTransform,
    IntermediateViews,
    TokenTap,
    equivariance_score,
    extract_view_features,
    knn_accuracy,
    transformation_r2,
)

FOLDERS = {"CIFAR-10": "cifar10", "VIPriors": "tiny-vipriors64"}
TRANSFORMATIONS = ("rotation", "translation", "color", "blur")


def measure(encoder: Encoder, s: Settings, data: Path, split: str, seed: int) -> dict[str, Any]:
    """Accuracies of linear probes and 20 neighbours on ``split``; of the test images also what ``told`` says."""
    size, accuracy = s["image_size"], {}
    for name, folder in FOLDERS.items():
        held_out = folders(data / folder, split, size)
        test = encode(encoder.features, held_out.pixels)
        for shots in s["shots"][name]:
            few = folders(data / folder, "train", size, draw=seed, shots=shots)
            x = encode(encoder.features, few.pixels)
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(x, few.labels)
            right = torch.from_numpy(probe.predict(test)) == held_out.labels
            accuracy[f"{name}, {shots} per class"] = 100 * right.float().mean().item()
            if folder == s["data"]:
                robust = probe  # the last one has the most labels
        accuracy[f"{name}, k-NN"] = 100 * knn_accuracy(x, few.labels, test, held_out.labels)
    if split == "val":  # settings are chosen by accuracy
        return {"accuracy": accuracy}

    def predict(pixels: Tensor) -> Tensor:
        return torch.from_numpy(robust.predict(encode(encoder.features, pixels)))

    return {"accuracy": accuracy, **told(encoder, predict, s, data / s["data"])}


def told(encoder: Encoder, predict: Callable[[Tensor], Tensor], s: Settings, folder: Path) -> dict[str, Any]:
    """Equivariance and R² of test images, and how many ``predict`` gets right under each kind of corruption."""
    size = s["image_size"]
    images = folders(folder, "test", size)
    corruptions = corrupted_images(folder, size, s["probe_images"])
    right = {kind: (predict(part.pixels) == part.labels).float().mean().item() for kind, part in corruptions.items()}
    return {
        "equivariance": equivariance(encoder, images.evenly(128).pixels),
        "r2": r2(encoder, images.evenly(2000).pixels, size / 32, s["r2_epochs"]),
        "corrupted": {kind: 100 * share for kind, share in right.items()},
    }


@cache
def corrupted_images(folder: Path, size: int, count: int) -> dict[str, Images]:
    """Some test images under each of the 15 kinds of ImageNet-C, at severity 3."""
    images = folders(folder, "test", size).evenly(count)
    return {kind: Images(corrupted(images.pixels, kind, severity=3, seed=0), images.labels) for kind in KINDS}


@torch.no_grad()
def equivariance(encoder: Encoder, pixels: Tensor) -> float:
    """Mean cosine of turned (and flipped) token maps with those of turned images, less that with another image's."""
    images = NORMALIZE(pixels.to(next(encoder.model.parameters()).device) / 255)

    def tokens(views: Tensor) -> Tensor:
        with TokenTap(encoder.model, encoder.layer) as tap:
            encoder.model(views)
        grids.append(tap.grid)
        return tap.tokens.float()

    grids: list[Any] = []
    tokens(images[:1])
    turns = 1 + torch.arange(len(images), device=images.device) % 3
    none = torch.zeros_like(turns, dtype=torch.bool)
    elements = [GridTransform(t, flip, grids[0], grids[0]) for t, flip in ((turns, none), (0 * turns, ~none))]
    scores = [
        equivariance_score(tokens, images, g) - equivariance_score(tokens, images, g, shuffled=True) for g in elements
    ]
    return torch.stack(scores).mean().item()


def r2(encoder: Encoder, pixels: Tensor, sigma: float, epochs: int) -> dict[str, float]:
    """R² of each transformation, the mean over its parameters."""
    found = {}
    for kind in TRANSFORMATIONS:
        views, generator = IntermediateViews(kind, sigma=(0.1, sigma)), torch.Generator().manual_seed(0)
        batches = (pixels / 255).split(250)
        pairs = extract_view_features(encoder.features, batches, views, generator=generator, progress=False)
        found[kind] = mean(transformation_r2(*pairs, epochs=epochs, progress=False).tolist())
    return found
