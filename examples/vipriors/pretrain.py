"""Step 1: self-supervised pretraining by MoCo-v2, SimSiam or SimCLR, with the lines of IP-IRM, SER and reconstruction.

    loss = ssl(z1, z2, indices)                                  # IP-IRM: over all partitions found so far
    loss = loss + ssl(b2) + weight * ser(map1, map2, g1, g2)     # SER: b2, a part of the batch, is turned, not cropped
    loss = loss + weight * head(e1, e2, targets)                 # reconstruction: from one half of the last map

The images of ``train`` and ``val`` are taken, without their labels (EqInv, supplementary B). SER reads the map of a
ResNet's stage, or of the blocks of a vision transformer that come before its class token. For reconstruction the first
view is transformed into a third one, as the second is a crop of its own; the method has the other half of the features.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ipirm_pretrain import Method, TwoViews
from merged_predictions import UNKNOWN
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from training import MEAN, STD, adamw, evenly, normalized_transform, precision, run_training, save_atomically

from equireg import (
    EquivariantViews,
    GridTransform,
    ImageFiles,
    IntermediateReconstructionHead,
    IntermediateViews,
    PartitionUpdater,
    SERLoss,
    TokenTap,
    knn_accuracy,
    linear_probe,
    split_batch,
)
from vipriors.backbone import STRIDES, create, frozen_features, is_vit
from vipriors.finetune import sgd
from vipriors.images import read

METHODS = ("simclr", "mocov2", "simsiam")
OPTIMIZERS = {"adamw": adamw, "sgd": sgd}

Turned = tuple[Tensor, Tensor, Tensor, GridTransform, GridTransform]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default="simclr")
    parser.add_argument("--weight", type=float, default=0.2, help="of IP-IRM's squared slopes; 0: no partitions")
    parser.add_argument("--groups", type=int, default=2, help="of each partition")
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha of mixed first views; 0: none (SimCLR alone)")
    parser.add_argument("--ser", type=float, default=0.0, help="weight of SER, 0.5 in its paper; 0: without")
    parser.add_argument("--layer", choices=STRIDES, default="layer2", help="of a ResNet, for SER")
    parser.add_argument("--reconstruction", type=float, default=0.0, help="its weight, 1 in its paper; 0: without")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument(
        "--unlabelled", choices=("train", "train+val"), default="train+val", help="images to learn from"
    )


def check(options: argparse.Namespace) -> None:
    if options.mixup and (options.method != "simclr" or options.reconstruction):
        raise ValueError("--mixup is SimCLR's, and mixes what --reconstruction would rebuild; leave one of them out")
    if is_vit(options.model) and options.ser and not options.late_class_token:
        raise ValueError("--ser on a vision transformer needs --late-class-token, such as 3 of 12 blocks")


def unlabelled(options: argparse.Namespace) -> ImageFiles:
    parts = [read(options, split) for split in options.unlabelled.split("+")]
    paths = [path for part in parts for path in part.paths]
    return ImageFiles(paths, torch.cat([part.labels for part in parts]), parts[0].classes)


# ---------------------------------------------------------------------------------------------------------- the views


class Views(TwoViews):
    """Two views of most of a batch, and of the rest two that are turned, flipped and stretched by known elements."""

    def __init__(self, options: argparse.Namespace, rank: int):
        super().__init__(options, rank)
        size = options.image_size
        self.whole = v2.Compose([v2.Resize((size, size), interpolation=3, antialias=True), v2.ToImage()])
        stride = options.patch_size if is_vit(options.model) else STRIDES[options.layer]
        self.turned = EquivariantViews(size, stride) if options.ser else None
        self.normalize = v2.Normalize(MEAN, STD)

    def __call__(self, samples: list[tuple[int, Any, int, int]]) -> tuple[Tensor, Tensor, Tensor, Turned | None]:
        if self.turned is None:
            return (*super().__call__(samples), None)
        some, rest = split_batch(torch.arange(len(samples)), self.options.ratio)
        wholes = [v2.functional.to_dtype(self.whole(samples[i][1]), torch.float32, scale=True) for i in rest]
        # The elements are drawn alike in all processes, so that their maps have one size.
        generator = torch.Generator().manual_seed(7_919 * self.options.seed + samples[0][0])
        x1, x2, g1, g2 = self.turned(torch.stack(wholes).clamp(0, 1), generator)
        places = torch.tensor([samples[i][3] for i in rest])
        turned = (self.normalize(x1), self.normalize(x2), places, g1, g2)
        return (*super().__call__([samples[i] for i in some]), turned)


# ----------------------------------------------------------------------------------------------------------- the loss


class Encoder(nn.Module):
    """The backbone as the method sees it: that part of the features which is the method's."""

    def __init__(self, net: nn.Module, early: str, last: str, num_features: int):
        super().__init__()
        self.net, self.early, self.last, self.num_features = net, early, last, num_features
        self.maps: list[tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def recording(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The token maps [B, T, D] of two layers, of every forward pass for a while."""
        self.maps = []
        try:
            yield self.maps
        finally:
            self.maps = None

    def forward(self, images: Tensor) -> Tensor:
        if self.maps is None:
            return self.net(images)[:, : self.num_features]
        with TokenTap(self.net, self.early) as early, TokenTap(self.net, self.last) as last:
            features = self.net(images)
        self.maps.append((early.tokens.float(), last.tokens.float()))
        return features[:, : self.num_features]


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, options: argparse.Namespace, images: Dataset):
        super().__init__()
        self.options = options
        net, vit = create(options), is_vit(options.model)
        early = f"blocks.{max(0, options.late_class_token - 1)}" if vit else options.layer
        widths = {stage["module"]: stage["num_chs"] for stage in net.feature_info}
        self.ser = SERLoss(widths[early], token_norm=vit, gather_distributed=True) if options.ser else None
        self.views, self.head, width = None, None, net.num_features
        if options.reconstruction:
            self.views = IntermediateViews("all", reconstruct="se2")
            stride = options.patch_size if vit else STRIDES["layer4"]
            size = {"image_size": options.image_size, "patch_size": stride}
            self.head = IntermediateReconstructionHead(width, **size, mean=MEAN, std=STD)
            width -= self.head.equivariant_dim
        encoder = Encoder(net, early, "norm" if vit else "layer4", width)
        partitions = PartitionUpdater(len(images), options.groups, seed=options.seed)
        self.method = Method(options, partitions, options.weight > 0, backbone=encoder, images=images)

    def forward(
        self, first: Tensor, second: Tensor, indices: Tensor, turned: Turned | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts for the log."""
        with self.method.backbone.recording() as maps:
            loss = self.method(first, second, indices)
        parts = {"ssl": loss.detach()}
        if self.head is not None:
            parts["reconstruction"] = reconstruction = self.reconstruction(first, maps[0][1])
            loss = loss + self.options.reconstruction * reconstruction
        if self.ser is not None:
            parts["ssl_b2"], parts["equivariance"] = ssl, equivariance = self.equivariance(*turned)
            loss = loss + ssl + self.options.ser * equivariance
        if self.options.weight > 0:
            parts["partitions"] = torch.tensor(float(len(self.method.partitions.partitions)))
        return loss, {name: part.detach() for name, part in parts.items()}

    def reconstruction(self, first: Tensor, tokens: Tensor) -> Tensor:
        """The loss of what lies between the first view, whose last map is given, and a transformed one."""
        mean, std = (torch.tensor(part, device=first.device).view(1, 3, 1, 1) for part in (MEAN, STD))
        view, targets, _ = self.views((first * std + mean).clamp(0, 1))
        with self.method.backbone.recording() as maps, precision(self.options, first.device):
            self.method.backbone(((view - mean) / std).contiguous(memory_format=torch.channels_last))
            return self.head(self.head.split(tokens)[1], self.head.split(maps[0][1])[1], targets)

    def equivariance(
        self, x1: Tensor, x2: Tensor, indices: Tensor, g1: GridTransform, g2: GridTransform
    ) -> tuple[Tensor, Tensor]:
        """The method's loss of the turned views, and SER's."""
        with self.method.backbone.recording() as maps:
            ssl = self.method(x1, x2, indices)
            if len(maps) < 2:  # MoCo's second view goes through the teacher alone
                self.method.embed(x2)
        return ssl, self.ser(maps[0][0], maps[1][0], g1, g2)


# ------------------------------------------------------------------------------------------------------- the measures


@torch.no_grad()
def evaluate(objective: Objective, device: torch.device, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """k-NN and linear accuracy of the frozen features, in percent, and what partitions were found."""
    net = objective.method.backbone.net
    save_atomically(folder / "encoder.pt", net.state_dict())  # plain timm keys
    reports = [report._asdict() for report in objective.method.partitions.reports]
    splits = [read(options, split) for split in ("train", options.evaluate_on)]
    if (splits[1].labels < 0).any():
        return {"k-NN": UNKNOWN, "linear": UNKNOWN, "partitions": reports}
    parts = []
    for images in splits:
        images.transform = normalized_transform(options)
        parts += frozen_features(net, evenly(images, options.probe_images), options, device)
    return {"k-NN": 100 * knn_accuracy(*parts), "linear": 100 * linear_probe(*parts), "partitions": reports}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One pretraining, into the folder ``pretrain``."""
    images, folder = unlabelled(options), options.out / "pretrain"
    return run_training(
        options,
        {"step": "pretrain"},
        folder,
        "pretraining",
        make_objective=partial(Objective, options, images),
        make_collate=partial(Views, options),
        evaluate=partial(evaluate, options=options, folder=folder),
        make_optimizer=OPTIMIZERS[options.optimizer],
        images=images,
    )
