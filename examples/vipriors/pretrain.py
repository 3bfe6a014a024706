"""Step 1: self-supervised pretraining by MoCo-v2, SimSiam or SimCLR, with the lines of IP-IRM, SER and reconstruction.

    loss = ssl(z1, z2, indices)                                  # IP-IRM: over all partitions found so far
    loss = loss + ssl(b2) + weight * ser(map1, map2, g1, g2)     # SER: b2, a part of the batch, is turned, not cropped
    loss = loss + weight * head(e1, e2, targets)                 # reconstruction: from one half of the last map

It learns from ``train`` and ``val`` without labels (EqInv, supplementary B). SER reads the map of a ResNet's stage, or
of the blocks of a ViT before its class token. Reconstruction transforms the first view into a third one.
"""

import copy
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lightly.models.modules import heads
from lightly.models.utils import update_momentum
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

import equireg
from vipriors.backbone import create, frozen_features, is_vit
from vipriors.images import MEAN, NORMALIZE, STD, TO_TENSOR, crop, labelled, names_hash, read, whole
from vipriors.run_folder import fit, once, save, warm_cosine
from vipriors.training import seed_everything

OPTIONS: dict[str, tuple[Any, ...]] = {
    "method": ("simclr", "self-supervised method", ("simclr", "mocov2", "simsiam")),
    "hidden_dim": (512, "width of the hidden layer of the projection head"),
    "output_dim": (128, "width of the embeddings"),
    "momentum": (0.99, "of MoCo's teacher"),
    "queue_size": (1000, "keys in MoCo's queue"),
    "weight": (0.2, "of IP-IRM's squared slopes; 0: no partitions"),
    "update_every": (8, "epochs between searches for a partition"),
    "ser": (0.0, "weight of SER, 0.5 in its paper; 0: without"),
    "ratio": (0.5, "share of the batch that SER turns"),
    "reconstruction": (0.0, "its weight, 1 in its paper; 0: without"),
    "optimizer": ("adamw", "optimizer", ("adamw", "sgd")),
}
LAYER = "layer2"  # of a ResNet, whose map SER reads
STRIDES = {LAYER: 8, "layer4": 32}
Turned = tuple[Tensor, Tensor, Tensor, equireg.GridTransform, equireg.GridTransform]


def check(options: Namespace) -> None:
    if is_vit(options.model) and options.ser and not options.late_class_token:
        raise ValueError("--ser on a vision transformer needs --late-class-token, such as 3 of 12 blocks")


def unlabelled(options: Namespace) -> equireg.ImageFiles:
    parts = [read(options, split) for split in ("train", "val")]
    paths = [path for part in parts for path in part.paths]
    return equireg.ImageFiles(paths, torch.cat([part.labels for part in parts]), parts[0].classes)


class Views(Dataset):
    """Makes a batch: two views of most images, and of the rest two that known elements turn, flip and stretch."""

    def __init__(self, options: Namespace, images: equireg.ImageFiles):
        self.options, self.images, size = options, images, options.image_size
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        blur = [v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1)], p=0.5)] if size >= 64 else []
        self.policy = v2.Compose([*crop(options), jitter, v2.RandomGrayscale(0.2), *blur, *TO_TENSOR, NORMALIZE])
        self.pixels = v2.Compose(whole(options).transforms[:-1])  # in 0 .. 1
        stride = options.patch_size if is_vit(options.model) else STRIDES[LAYER]
        self.turned = equireg.EquivariantViews(size, stride) if options.ser else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:  # for the search of partitions
        image, label = self.images[index]
        return (self.policy(image), self.policy(image)), label

    def __call__(self, step: int, indices: list[int]) -> tuple[Tensor, Tensor, Tensor, Turned | None]:
        turned, places = None, torch.tensor(indices)
        if self.turned is not None:
            places, rest = equireg.split_batch(places, self.options.ratio)
            images = torch.stack([self.pixels(self.images[index][0]) for index in rest.tolist()])
            # The elements are drawn alike in all processes, so that their maps have one size.
            generator = torch.Generator().manual_seed(7_919 * self.options.seed + step)
            x1, x2, g1, g2 = self.turned(images.clamp(0, 1), generator)
            turned = (NORMALIZE(x1), NORMALIZE(x2), rest, g1, g2)
        first, second = zip(*(self[index][0] for index in places.tolist()))
        return torch.stack(first), torch.stack(second), places, turned


class Encoder(nn.Module):
    """The part of a backbone's features that is the method's; ``maps`` are its token maps of two layers."""

    def __init__(self, net: nn.Module, early: str, last: str, width: int):
        super().__init__()
        self.net, self.early, self.last, self.width = net, early, last, width
        self.maps: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        with equireg.TokenTap(self.net, self.early) as early, equireg.TokenTap(self.net, self.last) as last:
            features = self.net(images)
        self.maps = early.tokens.float(), last.tokens.float()
        return features[:, : self.width]


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, options: Namespace, samples: int):
        super().__init__()
        self.options = options
        net, vit = create(options), is_vit(options.model)
        early = f"blocks.{max(0, options.late_class_token - 1)}" if vit else LAYER
        widths = {stage["module"]: stage["num_chs"] for stage in net.feature_info}
        self.ser = equireg.SERLoss(widths[early], token_norm=vit, gather_distributed=True) if options.ser else None
        self.reconstruct, width = None, net.num_features
        if options.reconstruction:
            self.views = equireg.IntermediateViews("all", reconstruct="se2")
            size = {"image_size": options.image_size, "patch_size": options.patch_size if vit else STRIDES["layer4"]}
            self.reconstruct = equireg.IntermediateReconstructionHead(width, **size, mean=MEAN, std=STD)
            width -= self.reconstruct.equivariant_dim
        self.encoder = Encoder(net, early, "norm" if vit else "layer4", width)
        self.partitions = equireg.PartitionUpdater(samples, seed=options.seed)
        sizes = (width, options.hidden_dim, options.output_dim)
        shared = {"weight": options.weight, "gather_distributed": True}
        if options.method == "simclr":
            self.head: nn.Module = heads.SimCLRProjectionHead(*sizes)
            self.criterion: nn.Module = equireg.IPIRMLoss(self.partitions, **shared)
        elif options.method == "simsiam":
            self.head = heads.SimSiamProjectionHead(*sizes)
            self.predictor = heads.SimSiamPredictionHead(sizes[2], sizes[2] // 4, sizes[2])
            self.criterion = equireg.SimSiamIPIRMLoss(self.partitions, **shared)
        else:
            self.head = heads.MoCoProjectionHead(*sizes)
            shared |= {"num_features": options.output_dim, "queue_size": options.queue_size}
            self.criterion = equireg.MoCoIPIRMLoss(self.partitions, **shared)
            self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)

    def method(self, first: Tensor, second: Tensor, indices: Tensor) -> tuple[Tensor, list[Any]]:
        """The method's loss, and the token maps of the views that the student saw."""
        z1, maps = self.head(self.encoder(first)).float(), [self.encoder.maps]
        if self.options.method == "mocov2":
            with torch.no_grad():
                key = self.teacher(second).float()
            return self.criterion(z1, key, indices), maps
        z2 = self.head(self.encoder(second)).float()
        maps.append(self.encoder.maps)
        if self.options.method == "simsiam":
            p1, p2 = self.predictor(z1).float(), self.predictor(z2).float()
            return self.criterion(p1, p2, z1, z2, indices), maps
        return self.criterion(z1, z2, indices), maps

    def forward(self, first: Tensor, second: Tensor, indices: Tensor, turned: Turned | None) -> tuple[Tensor, Any]:
        """The loss, and its parts for the log."""
        loss, maps = self.method(first, second, indices)
        parts = {"ssl": loss}
        if self.reconstruct is not None:
            mean, std = (torch.tensor(part, device=first.device).view(1, 3, 1, 1) for part in (MEAN, STD))
            view, targets, _ = self.views((first * std + mean).clamp(0, 1))
            self.encoder((view - mean) / std)
            e1, e2 = (self.reconstruct.split(tokens)[1] for tokens in (maps[0][1], self.encoder.maps[1]))
            parts["reconstruction"] = self.reconstruct(e1, e2, targets)
            loss = loss + self.options.reconstruction * parts["reconstruction"]
        if self.ser is not None:
            x1, x2, places, g1, g2 = turned
            parts["ssl_b2"], maps = self.method(x1, x2, places)
            if len(maps) < 2:  # MoCo's second view goes through the teacher alone
                self.encoder(x2)
                maps.append(self.encoder.maps)
            parts["equivariance"] = self.ser(maps[0][0], maps[1][0], g1, g2)
            loss = loss + parts["ssl_b2"] + self.options.ser * parts["equivariance"]
        parts["partitions"] = torch.tensor(float(len(self.partitions.partitions)))
        return loss, parts

    def find_partition(self, views: Views, epoch: int) -> None:
        """Every few epochs one more, on two views of all images, of which each process takes its share."""
        if self.options.weight and epoch and epoch % self.options.update_every == 0:
            state, samples = PartialState(), equireg.WithIndex(views)
            share = Subset(samples, range(state.process_index, len(views), state.num_processes))
            loader = DataLoader(share, batch_size=self.options.batch_size)
            student = nn.Sequential(self.encoder, self.head)
            self.partitions.update(loader, encoder=student, progress=state.is_main_process)

    def follow(self, step: int) -> None:
        """MoCo's teacher."""
        if self.options.method == "mocov2":
            update_momentum(nn.Sequential(self.encoder, self.head), self.teacher, self.options.momentum)


def run(options: Namespace) -> dict[str, Any]:
    """``encoder.pt``; k-NN and linear accuracy of the frozen features, in percent, and what partitions were found."""
    images = unlabelled(options)

    def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        seed_everything(options.seed)
        objective, views = Objective(options, len(images)), Views(options, images)
        hooks = {"before_epoch": partial(objective.find_partition, views), "after_step": objective.follow}
        if not fit(options, folder, settings, objective, views, warm_cosine(options), **hooks):
            return {}
        net = objective.encoder.net
        save(folder / "encoder.pt", net.state_dict())  # plain timm keys
        splits = [read(options, split) for split in ("train", labelled(options))]
        parts = [part for images in splits for part in frozen_features(net, images, options)]
        found = {"k-NN": 100 * equireg.knn_accuracy(*parts), "linear": 100 * equireg.linear_probe(*parts)}
        return found | {"partitions": [report._asdict() for report in objective.partitions.reports]}

    return once(options, "pretrain", {"files": names_hash(images)}, work)
