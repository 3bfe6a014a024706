"""What an encoder can do: classify from few labels, also what is corrupted or moves, and tell where things are."""

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from evidence.corruptions import KINDS, corrupted
from evidence.datasets import Images, folders
from evidence.experiments import Settings
from evidence.finetuning import fine_tuned
from evidence.networks import encode, unit
from evidence.scenes import boxes, classes_of_pixels
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from vipriors.images import NORMALIZE

import equireg

SEVERITIES = range(1, 6)
FOLDERS = {"CIFAR-10": "cifar10", "VIPriors": "tiny-vipriors64"}


def measure(objective: nn.Module, s: Settings, data: Path, split: str, seed: int) -> dict[str, Any]:
    """Accuracies of linear probes and 20 neighbours on ``split``; of the test images also all, or some, of ``told``."""
    found: dict[str, float] = {}
    for name in FOLDERS:
        accuracies, probe = probed(objective, s, data, split, seed, name)
        found |= accuracies
        if name == data_set_of(s):
            last = probe

    def logits(images: Tensor) -> Tensor:
        return torch.from_numpy(last.decision_function(encode(features_of(objective), images))).to(images)

    if not s["told"] or split != "test":  # accuracy alone chooses settings
        return {"accuracy": found}
    if s["told"] is True:
        return {"accuracy": found, **told(objective, logits, s, data, seed)}
    return {"accuracy": found, "told": measured(objective, s, data, s["told"])}


def data_set_of(s: Settings) -> str:
    """Whose images an encoder learnt from."""
    return next(name for name, folder in FOLDERS.items() if folder == s["data"]["folder"])


def features_of(objective: nn.Module) -> Callable[[Tensor], Tensor]:
    return getattr(objective, "probed", objective.backbone)


def probed(
    objective: nn.Module, s: Settings, data: Path, split: str, seed: int, name: str
) -> tuple[dict[str, float], Any]:
    """Accuracies on one data set, and the linear probe that has the most labels."""
    found, folder, features = {}, data / FOLDERS[name], features_of(objective)
    held_out = folders(folder, split, s["image_size"])
    test, width = encode(features, held_out.pixels), objective.network.num_features
    for shots in s["shots"][name]:
        few = folders(folder, "train", s["image_size"], draw=seed, shots=shots)
        x = encode(features, few.pixels)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(x, few.labels)
        found[f"{name}, {shots} per class"] = 100 * probe.score(test, held_out.labels)
    if split == "test":
        mlp = partial(equireg.linear_probe, hidden_dim=512, progress=False)
        found[f"{name}, {shots} per class, MLP"] = 100 * mlp(x, few.labels, test, held_out.labels)
    own = x[:, -width:], few.labels, test[:, -width:], held_out.labels  # of class tokens the last one
    found[f"{name}, k-NN"] = 100 * equireg.knn_accuracy(*own)
    return found, probe


def measure_on_the_way(objective: nn.Module, s: Settings, data: Path, seed: int) -> dict[str, float]:
    """Of a network that is not yet trained to the end: accuracies on its own data set, and the measures ``curve``."""
    found, _ = probed(objective, s, data, "test", seed, data_set_of(s))
    return found | measured(objective, s, data, s["curve"])


def measured(objective: nn.Module, s: Settings, data: Path, names: list[str]) -> dict[str, float]:
    """Some of what ``told`` measures, each by the name that a setting has for it."""
    folder = data / s["data"]["folder"]
    images = folders(folder, "test", s["image_size"])
    measures = {
        "equivariance": lambda: equivariance(objective, images.evenly(128).pixels / 255),
        "quarter turns": lambda: transformations_told(
            objective, images.evenly(s["probe_images"]), "rotation", "quarter turns"
        ),
        "street scenes": lambda: classes_of_pixels(partial(token_map, objective), data),
        "r2": lambda: r2(objective, pairable(folder, s), s["r2_epochs"], KINDS_OF_PAIRS[:3]),
        "r2, blur": lambda: r2(objective, pairable(folder, s), s["r2_epochs"], KINDS_OF_PAIRS[3:]),
    }
    return {measure: value for name in names for measure, value in measures[name]().items()}


def pairable(folder: Path, s: Settings) -> Tensor:
    """All images, as pairs of views need no labels."""
    return torch.cat([folders(folder, split, s["image_size"]).pixels for split in ("test", "train", "val")])


def told(
    objective: nn.Module, logits: Callable[[Tensor], Tensor], s: Settings, data: Path, seed: int
) -> dict[str, dict[str, float]]:
    """What has no test of accuracy on clean images; ``logits`` are of images in 0 .. 1."""
    folder, size = data / s["data"]["folder"], s["image_size"]
    some = folders(folder, "test", size).evenly(s["probe_images"])
    kinds = corrupted_images(folder, size, s["probe_images"])
    scores = {key: torch.cat([logits(images) for images, _ in batches(part)]) for key, part in kinds.items()}
    right = {key: among(1, scores[key], part.labels) for key, part in kinds.items()}
    moving, moving_5 = (
        equireg.perturbation_stability(logits, batches(some), frames=s["frames"], top_k=k, progress=False)
        for k in (1, 5)
    )
    return {
        "told": {
            **measured(objective, s, data, ["equivariance", "r2", "r2, blur", "quarter turns", "street scenes"]),
            **joined(objective, s, data, seed),
            "corner error, pixels": corner_error(objective, data / FOLDERS["VIPriors"], size, s["r2_epochs"]),
            "accuracy, moving": mean(found.accuracy for found in moving.values()),
            "flip rate, moving": mean(found.flip_rate for found in moving.values()),
        },
        "corrupted": {kind: mean(right[kind, severity] for severity in SEVERITIES) for kind in KINDS},
        "severities": {f"severity {level}": mean(right[kind, level] for kind in KINDS) for level in SEVERITIES},
        "moving": {kind: 100 * found.accuracy for kind, found in moving.items()},
        "top 5": {
            "corrupted, top 5": mean(among(5, scores[key], part.labels) for key, part in kinds.items()),
            "moving, top 5": 100 * mean(found.accuracy for found in moving_5.values()),
        },
    }


def among(k: int, scores: Tensor, labels: Tensor) -> float:
    """How often, in percent, the class is among the k with the largest scores [N, C]."""
    return 100 * (scores.topk(k).indices == labels[:, None]).any(1).float().mean().item()


def joined(objective: nn.Module, s: Settings, data: Path, seed: int) -> dict[str, float]:
    """The measures that joined ``told`` when runs were finished, which take them from the network that they saved."""
    folder = data / s["data"]["folder"]
    some = folders(folder, "test", s["image_size"]).evenly(s["probe_images"])
    shots = s["shots"][data_set_of(s)][-1]
    return {
        **boxes(partial(token_map, objective), data),
        **transformations_told(objective, some, "flip", "flips"),
        "accuracy, fine-tuned": fine_tuned(objective, s, folder, shots, seed),
    }


def joined_on_the_way(objective: nn.Module, s: Settings, data: Path) -> dict[str, float]:
    """The same of ``measure_on_the_way``."""
    return r2(objective, pairable(data / s["data"]["folder"], s), s["r2_epochs"], ("color",))


JOINED = {"boxes, average precision", "boxes, turned", "accuracy, fine-tuned"}
JOINED |= {f"flips told, {where} layer" for where in ("early", "middle", "last")}
JOINED_ON_THE_WAY = {"R², colour"}


def batches(images: Images) -> list[tuple[Tensor, Tensor]]:
    return [(unit(pixels), labels) for pixels, labels in zip(images.pixels.split(250), images.labels.split(250))]


@cache
def corrupted_images(folder: Path, size: int, count: int) -> dict[tuple[str, int], Images]:
    """Some test images under each of the 15 kinds of ImageNet-C, at each of its severities."""
    images = folders(folder, "test", size).evenly(count)
    return {
        (kind, severity): Images(corrupted(images.pixels, kind, severity, seed=0), images.labels)
        for kind, severity in product(KINDS, SEVERITIES)
    }


def layers_of(network: nn.Module) -> dict[str, str]:
    """Where a network is looked at: the names of modules after a third, after two thirds, and at its end."""
    if hasattr(network, "blocks"):
        depth = len(network.blocks)
        return {"early": f"blocks.{depth // 3 - 1}", "middle": f"blocks.{2 * depth // 3 - 1}", "last": "norm"}
    return {"early": "layer2", "middle": "layer3", "last": "layer4"}


def token_map(objective: nn.Module, images: Tensor, where: str = "last") -> Tensor:
    """[B, D, h, w]."""
    with equireg.TokenTap(objective.network, layers_of(objective.network)[where]) as tap:
        objective.backbone(images)
    return tap.tokens.float().mT.unflatten(2, tap.grid)


def equivariance(objective: nn.Module, images: Tensor) -> dict[str, float]:
    """Mean cosine of turned (and flipped) token maps with those of turned images, less that with another image's."""
    images, found = images.to(next(objective.parameters()).device), {}
    for where in layers_of(objective.network):

        def tokens(views: Tensor, where: str = where) -> Tensor:
            return token_map(objective, views, where).flatten(2).mT

        grid = tuple(token_map(objective, images[:1], where).shape[2:])
        turns = 1 + torch.arange(len(images), device=images.device) % 3
        elements = [equireg.GridTransform(t, t < 1, grid, grid) for t in (turns, 0 * turns)]  # turned; flipped
        own, other = (
            [equireg.equivariance_score(tokens, images, element, shuffled=shuffled) for element in elements]
            for shuffled in (False, True)
        )
        found[f"equivariance, {where} layer"] = (torch.stack(own) - torch.stack(other)).mean().item()
    return found


KINDS_OF_PAIRS = ("rotation", "translation", "color", "blur")


def r2(objective: nn.Module, pixels: Tensor, epochs: int, kinds: tuple[str, ...] = KINDS_OF_PAIRS) -> dict[str, float]:
    """From the means of the last map's quarters, and many pairs: of 2,000, and of pooled maps, it comes out lower."""

    def quarters(images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(token_map(objective, images), 2).flatten(1)

    found = {}
    for kind in kinds:
        views = equireg.IntermediateViews(kind, sigma=(0.1, pixels.shape[-1] / 32))
        generator, parts = torch.Generator().manual_seed(0), (part / 255 for part in pixels.split(250))
        pairs = equireg.extract_view_features(quarters, parts, views, generator=generator, progress=False)
        name = f"R², {kind}".replace("color", "colour")
        found[name] = mean(equireg.transformation_r2(*pairs, epochs=epochs, progress=False).tolist())
    return found


def transformations_told(objective: nn.Module, images: Images, kind: str, name: str) -> dict[str, float]:
    """How often the number of quarter turns is told, of 4, or a flip, from the mean token of a layer."""
    layers, views = layers_of(objective.network), [NORMALIZE(pixels) for pixels, _ in batches(images)]
    found = equireg.transformation_accuracy(
        objective.network, views, [*layers.values()], transformation=kind, progress=False
    )
    return {f"{name} told, {where} layer": found[layer] for where, layer in layers.items()}


def corner_error(objective: nn.Module, folder: Path, size: int, epochs: int) -> float:
    """Of a random homography of a patch of the network's size, regressed from the last maps of both."""
    pixels = folders(folder, "test", 2 * size).pixels
    loader = (unit(part) for part in pixels.split(250))

    def places(images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(token_map(objective, images), 4).flatten(1)

    return equireg.homography_probe(places, loader, size, epochs=epochs, progress=False)
