"""Step 3: fine-tuning on few labels, by cross entropy alone or with the one line of EqInv.

    loss = F.cross_entropy(head(irm.mask(f)), y) + irm(f, y, idx)

Two views of each image are one batch, the classifier's weights are normalised, and the rate falls to a tenth at 60% and
at 80% of the epochs (Wang et al., ECCV 2022, Sections 4 and 5.2). A vision transformer is trained by AdamW, with a rate
that is lower for earlier blocks (supplementary B).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.transforms import v2
from training import (
    MEAN,
    STD,
    hash_of,
    load_safely,
    normalized_transform,
    precision,
    run_training,
    save_atomically,
    seed_everything,
)

from equireg import ClassWiseIRM, Environments, FeatureMask
from vipriors.backbone import create, frozen_features
from vipriors.images import accuracy, measured, read

PENALTIES = ("off", "rex", "irmv1")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder",
        type=Path,
        help="encoder.pt, of the same --model; default: that of Step 1 in --out, if there; the word none: from scratch",
    )
    parser.add_argument(
        "--environments",
        type=Path,
        help="environments.pt; default: that of Step 2 in --out, if there; the word none: found in each batch",
    )
    parser.add_argument("--penalty", choices=PENALTIES, default="rex", help="off: cross entropy alone")
    parser.add_argument(
        "--weight", type=float, default=10.0, help="of the penalty; the paper: 2, 10, 100 for 10, 20, 50"
    )
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--mask-scale", type=float, default=0.0, help="classify so many times the normalised features")
    parser.add_argument("--open", action="store_true", help="let the penalty train the backbone too")


class Classifier(nn.Module):
    """Images to logits, through the mask where there is one; its state holds no environments."""

    def __init__(self, options: argparse.Namespace, num_classes: int, encoder: Path | None = None):
        super().__init__()
        self.backbone = create(options, encoder)
        width = self.backbone.num_features
        with_mask = options.penalty != "off"
        self.head = weight_norm(nn.Linear(width, num_classes))
        self.mask = FeatureMask(width, scale=options.mask_scale or None) if with_mask else nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.mask(self.features(images)))


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it."""

    clip = 0.0  # largest norm of the gradient; 0 for any

    def __init__(self, options: argparse.Namespace, num_classes: int):
        super().__init__()
        self.options = options
        self.model = Classifier(options, num_classes, options.encoder)
        if options.penalty != "off":
            self.irm = ClassWiseIRM(
                self.model.backbone.num_features,
                num_classes,
                weight=options.weight,
                penalty=options.penalty,
                temperature=options.temperature,
                detach=not options.open,
                gather_distributed=True,
            )
            self.irm.mask = self.model.mask
            if options.environments is not None:
                self.irm.environments = Environments()
                self.irm.environments.load_state_dict(load_safely(options.environments))

    @property
    def method(self) -> Objective:
        return self

    def forward(self, views: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with precision(self.options, views.device):
            f = self.model.features(views).float()
            loss = F.cross_entropy(self.model.head(self.model.mask(f)).float(), labels)
        parts = {"classification": loss.detach()}
        if self.options.penalty != "off":
            irm = self.irm(f, labels, None if self.irm.environments is None else indices)
            loss, parts["irm"] = loss + irm, irm.detach()
        return loss, parts

    def before_step(self, epoch: int) -> None:
        """Before each step of the optimizer."""

    def update(self, step: int, steps: int) -> None:
        """After each step of the optimizer."""


class TwoViews:
    """Makes a batch: two crops of each image, one after the other, with its label and its place in the dataset."""

    def __init__(self, options: argparse.Namespace, rank: int):
        self.options, self.rank = options, rank
        self.policy = v2.Compose(
            [
                v2.RandomResizedCrop(options.image_size, scale=(options.crop_scale, 1.0), interpolation=3),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, samples: list[tuple[int, Any, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            seed_everything(self.options.seed, samples[0][0], self.rank)
            views = torch.stack([self.policy(sample[1]) for _ in range(2) for sample in samples])
        labels, indices = (torch.tensor([sample[place] for sample in samples]) for place in (2, 3))
        return views, labels.repeat(2), indices.repeat(2)


def sgd(objective: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The paper's."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, weight_decay=options.weight_decay)


def adamw_by_layers(objective: Objective, options: argparse.Namespace) -> torch.optim.Optimizer:
    """Of each block ``--layer-decay`` times the rate of the block behind it, and of the last one times the head's."""
    backbone = objective.model.backbone
    groups = param_groups_layer_decay(
        backbone, options.weight_decay, backbone.no_weight_decay(), layer_decay=options.layer_decay
    )
    for group in groups:
        group["lr_scale"] *= options.layer_decay  # timm counts from the last layer of the backbone, which has no head
    inside = {id(p) for p in backbone.parameters()}
    others = [p for p in objective.parameters() if id(p) not in inside and p.requires_grad]
    groups += [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr)


def steps_down(step: int, steps_per_epoch: int, options: argparse.Namespace) -> float:
    """A tenth of the rate from 60% of the epochs on, a hundredth from 80%."""
    progress = step / (options.epochs * steps_per_epoch)
    return options.lr * 0.1 ** ((progress >= 0.6) + (progress >= 0.8))


def evaluate(objective: Objective, device: torch.device, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Accuracy on validation and test images, in percent."""
    save_atomically(folder / "model.pt", objective.model.state_dict())
    results: dict[str, Any] = {}
    for split in measured(options):
        images = read(options, split)
        images.transform = normalized_transform(options)
        results[split] = accuracy(*frozen_features(objective.model, images, options, device))
    return results


def train(
    options: argparse.Namespace, folder: Path, name: str = "", measure: Callable[..., dict[str, Any]] = evaluate
) -> dict[str, Any]:
    """One fine-tuning, into ``folder``."""
    images = read(options, "train")
    sources = {name: getattr(options, name) for name in ("encoder", "environments")}
    by_layers = hasattr(options, "layer_decay")  # of a vision transformer
    return run_training(
        options,
        {name: path and hash_of(path) for name, path in sources.items()},
        folder,
        name,
        make_objective=partial(Objective, options, len(images.classes)),
        make_collate=partial(TwoViews, options),
        evaluate=partial(measure, options=options, folder=folder),
        make_optimizer=adamw_by_layers if by_layers else sgd,
        learning_rate=None if by_layers else steps_down,
        images=images,
    )
