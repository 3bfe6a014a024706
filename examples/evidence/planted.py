"""What features tell of a factor that was planted beside the class, and of the class where the factor misleads."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence.datasets import Images, images_of
from evidence.experiments import Settings
from evidence.networks import encode
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

import equireg


def planted(objective: nn.Module, s: Settings, data: Path, split: str, seed: int) -> dict[str, Any]:
    """Accuracies of linear probes on ``split``, and how far the best of the partitions is that of the factor."""
    train, held_out = images_of(s, data, s["split"], seed).evenly(s["samples"]), images_of(s, data, split, seed)
    x, test = (encode(objective.backbone, part.pixels) for part in (train, held_out))

    def probe(rows: Tensor, what: str) -> float:
        return 100 * equireg.linear_probe(x[rows], getattr(train, what)[rows], test, getattr(held_out, what))

    everything = torch.arange(len(x))
    half = train.contexts * 2 // (int(train.contexts.max()) + 1)  # of the hues
    found = {
        "digits": probe(everything, "labels"),
        "digits, 10 labels of each": probe(few(train), "labels"),
        "digits, k-NN": 100 * equireg.knn_accuracy(x, train.labels, test, held_out.labels),
        # Odd ones in one half of the hues, even ones in the other: a probe that reads the hue errs on half of the rest.
        "digits, labels of half the hues": probe((train.labels % 2 == half).nonzero()[:, 0], "labels"),
    }
    agreement = partial(adjusted_rand_score, train.contexts)
    indices = [agreement(partition.cpu()) for partition in objective.partitions.partitions[1:]] or [0.0]
    told = {"hues told": probe(everything, "contexts") / 100}
    told |= {"adjusted Rand index, first partition": indices[0], "adjusted Rand index, last partition": indices[-1]}
    return {"accuracy": found, "told": told}


def few(images: Images) -> Tensor:
    """The first ten of each class."""
    return torch.cat([(images.labels == label).nonzero()[:10, 0] for label in images.labels.unique()])
