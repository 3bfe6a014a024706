"""What an encoder can do: classify from few labels, on clean and on corrupted images, and tell transformations."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from evidence.corruptions import KINDS, corrupted
from evidence.datasets import Images, folders
from evidence.experiments import Settings
from evidence.networks import encode
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import equireg

FOLDERS = {"CIFAR-10": "cifar10", "VIPriors": "tiny-vipriors64"}


def measure(objective: nn.Module, s: Settings, data: Path, split: str, seed: int) -> dict[str, Any]:
    """Accuracies of linear probes and 20 neighbours on ``split``; of the test images also what ``told`` says."""
    size, accuracy = s["image_size"], {}
    features, width = getattr(objective, "probed", objective.backbone), objective.network.num_features
    for name, folder in FOLDERS.items():
        held_out = folders(data / folder, split, size)
        test = encode(features, held_out.pixels)
        for shots in s["shots"][name]:
            few = folders(data / folder, "train", size, draw=seed, shots=shots)
            x = encode(features, few.pixels)
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(x, few.labels)
            accuracy[f"{name}, {shots} per class"] = 100 * probe.score(test, held_out.labels)
            if folder == s["data"]["folder"]:
                robust = probe  # the last one has the most labels
        own = x[:, -width:], few.labels, test[:, -width:], held_out.labels  # of class tokens the last one
        accuracy[f"{name}, k-NN"] = 100 * equireg.knn_accuracy(*own)

    def accuracy_of(images: Images) -> float:
        return 100 * robust.score(encode(features, images.pixels), images.labels)

    more = {}
    if s["told"] and split == "test":  # accuracy chooses settings
        more = told(objective, accuracy_of, s, data / s["data"]["folder"])
    return {"accuracy": accuracy, **more}


def told(objective: nn.Module, accuracy_of: Callable[[Images], float], s: Settings, folder: Path) -> dict[str, Any]:
    """Of test images: equivariance, R² of each transformation, and the accuracy under each kind of corruption."""
    images = folders(folder, "test", s["image_size"])
    everything = [images, *(folders(folder, part, s["image_size"]) for part in ("train", "val"))]  # no labels needed
    kinds = corrupted_images(folder, s["image_size"], s["probe_images"])
    return {
        "equivariance": equivariance(objective, images.evenly(128).pixels / 255),
        "r2": r2(objective, torch.cat([part.pixels for part in everything]), s["r2_epochs"]),
        "corrupted": {kind: accuracy_of(part) for kind, part in kinds.items()},
    }


@cache
def corrupted_images(folder: Path, size: int, count: int) -> dict[str, Images]:
    """Some test images under each of the 15 kinds of ImageNet-C, at severity 3."""
    images = folders(folder, "test", size).evenly(count)
    return {kind: Images(corrupted(images.pixels, kind, severity=3, seed=0), images.labels) for kind in KINDS}


def equivariance(objective: nn.Module, images: Tensor) -> float:
    """Mean cosine of turned (and flipped) token maps with those of turned images, less that with another image's."""
    with equireg.TokenTap(objective.network, objective.layer) as tap:

        def tokens(views: Tensor) -> Tensor:
            objective.backbone(views)
            return tap.tokens.float()

        images = images.to(next(objective.parameters()).device)
        tokens(images[:1])
        turns = 1 + torch.arange(len(images), device=images.device) % 3
        elements = [equireg.GridTransform(t, t < 1, tap.grid, tap.grid) for t in (turns, 0 * turns)]  # turned; flipped
        own, other = (
            [equireg.equivariance_score(tokens, images, element, shuffled=shuffled) for element in elements]
            for shuffled in (False, True)
        )
    return (torch.stack(own) - torch.stack(other)).mean().item()


def r2(objective: nn.Module, pixels: Tensor, epochs: int) -> dict[str, float]:
    """From the means of the last map's quarters, and many pairs: of 2,000, and of pooled maps, it comes out lower."""
    network = objective.network

    def quarters(images: Tensor) -> Tensor:
        with equireg.TokenTap(network, "norm" if hasattr(network, "blocks") else "layer4") as tap:
            objective.backbone(images)
        return F.adaptive_avg_pool2d(tap.tokens.float().mT.unflatten(2, tap.grid), 2).flatten(1)

    found = {}
    for kind in ("rotation", "translation", "color", "blur"):
        views = equireg.IntermediateViews(kind, sigma=(0.1, pixels.shape[-1] / 32))
        generator, parts = torch.Generator().manual_seed(0), (part / 255 for part in pixels.split(250))
        pairs = equireg.extract_view_features(quarters, parts, views, generator=generator, progress=False)
        found[kind] = mean(equireg.transformation_r2(*pairs, epochs=epochs, progress=False).tolist())
    return found
