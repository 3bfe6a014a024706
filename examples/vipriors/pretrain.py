"""Step 1: self-supervised pretraining by MoCo-v2, SimSiam or SimCLR, with the lines of IP-IRM, SER and reconstruction.

    loss = ssl(z1, z2, indices)                                  # IP-IRM: over all partitions found so far
    loss = loss + weight * ser(map1, map2, g1, g2)               # SER: a part of the batch is turned, not cropped
    loss = loss + weight * head(e1, e2, targets)                 # reconstruction: from one half of the last map

It learns from ``train`` and ``val`` without labels (EqInv, supplementary B). SER reads the map of a ResNet's stage, or
of the blocks of a ViT before its class token; turned images and others share one ``ssl``. Reconstruction transforms the
second view, on top of its crop and colours. Log and curves have the contrast of all images apart from what partitions
add to the loss.
"""

import copy
from argparse import Namespace
from contextlib import ExitStack
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
from tqdm.auto import tqdm

import equireg
from vipriors.backbone import create, frozen_features, is_vit
from vipriors.images import MEAN, NORMALIZE, STD, TO_TENSOR, colors, crop, labelled, names_hash, read, whole
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
    "first_search": (0, "epoch of the first one; 0: before the training, as released"),
    "keep": (0, "newest partitions that count; 0: all"),
    "global_penalty": (0, "1: a squared slope of all images as one group, too, as in the paper's sum", (0, 1)),
    "dummy_scales": ("one", "of all similarities, as in the paper, or of each logit, as released", ("one", "logits")),
    "mix": (0.0, "of the Beta distribution by which SimCLR's first views are mixed within groups; 0: unmixed"),
    "ser": (0.0, "weight of SER, 0.5 in its paper; 0: without"),
    "ratio": (0.5, "share of the batch that SER turns"),
    "base_loss": ("joint", "one over turned images and others, or the sum of both (Eq. 3)", ("joint", "separate")),
    "ser_layers": ("one", "of a vision transformer: SER on one block, or on all", ("one", "all")),
    "ser_temperature": (0.3, "of SER; its paper has 0.5 beside DINO"),
    "reconstruction": (0.0, "its weight, 1 in its paper; 0: without"),
    "num_images": (2, "images half-way that are reconstructed"),
    "optimizer": ("adamw", "optimizer", ("adamw", "sgd")),
}
LAYER = "layer2"  # of a ResNet, whose map SER reads
LARGEST = {"momentum": 1, "ratio": 1}
STRIDES = {LAYER: 8, "layer4": 32}
Turned = tuple[Tensor, Tensor, Tensor, equireg.GridTransform, equireg.GridTransform]


def check(options: Namespace) -> None:
    if is_vit(options.model) and options.ser and not options.late_class_token:
        raise ValueError("--ser on a vision transformer needs --late-class-token, such as 3 of 12 blocks")
    if options.ser_layers == "all" and not is_vit(options.model):
        raise ValueError("--ser-layers all needs a vision transformer, whose maps are all of one width")
    if options.mix and (options.method != "simclr" or options.ser or options.reconstruction):
        raise ValueError("--mix goes with SimCLR alone, without --ser and --reconstruction")
    if options.dummy_scales == "logits" and options.method == "simsiam":
        raise ValueError("--dummy-scales logits needs logits; SimSiam has one similarity for each sample")


def unlabelled(options: Namespace) -> equireg.ImageFiles:
    parts = [read(options, split) for split in ("train", "val")]
    paths = [path for part in parts for path in part.paths]
    return equireg.ImageFiles(paths, torch.cat([part.labels for part in parts]), parts[0].classes)


class Views(Dataset):
    """Makes a batch: two views of most images, and of the rest two that known elements turn, flip and stretch."""

    def __init__(self, options: Namespace, images: equireg.ImageFiles):
        self.options, self.images, size = options, images, options.image_size
        self.policy = v2.Compose([*crop(options), *colors(options), *TO_TENSOR, NORMALIZE])
        self.pixels = v2.Compose(whole(options).transforms[:-1])  # in 0 .. 1
        stride = options.patch_size if is_vit(options.model) else STRIDES[LAYER]
        like_the_others = v2.Compose(colors(options))  # else colours tell which part of a batch an image is of
        self.turned = equireg.EquivariantViews(size, stride, photometric=like_the_others) if options.ser else None

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
    """The part of a backbone's features that is the method's; ``maps`` are its early token maps, and the last."""

    def __init__(self, net: nn.Module, early: list[str], last: str, reconstruct: nn.Module | None):
        super().__init__()
        self.net, self.early, self.last, self.reconstruct = net, early, last, reconstruct
        self.maps: tuple[list[Tensor], Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        with ExitStack() as stack:
            *early, last = (stack.enter_context(equireg.TokenTap(self.net, name)) for name in (*self.early, self.last))
            features = self.net(images)
        self.maps = [tap.tokens.float() for tap in early], last.tokens.float()
        return features if self.reconstruct is None else self.reconstruct.split(features)[0]


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, options: Namespace, samples: int):
        super().__init__()
        self.options = options
        net, vit = create(options), is_vit(options.model)
        early = [f"blocks.{max(0, options.late_class_token - 1)}" if vit else LAYER]
        if options.ser_layers == "all":
            early = [f"blocks.{block}" for block in range(len(net.blocks))]
        self.ser = reconstruct = None
        if options.ser:
            widths = {stage["module"]: stage["num_chs"] for stage in net.feature_info}
            own = {"temperature": options.ser_temperature, "token_norm": vit, "layers": len(early)}
            self.ser = equireg.SERLoss(widths[early[0]], gather_distributed=True, **own)
        width = net.num_features
        if options.reconstruction:
            self.views = equireg.IntermediateViews("all", num_intermediate=options.num_images, reconstruct="se2")
            size = {"image_size": options.image_size, "patch_size": options.patch_size if vit else STRIDES["layer4"]}
            # Twice the width, so that the method keeps its own (the paper's linear head).
            size |= {"head_dim": 2 * width, "num_images": options.num_images}
            reconstruct = equireg.IntermediateReconstructionHead(width, **size, mean=MEAN, std=STD)
        self.encoder = Encoder(net, early, "norm" if vit else "layer4", reconstruct)
        self.partitions = equireg.PartitionUpdater(samples, keep=options.keep or None, seed=options.seed)
        sizes = (width, options.hidden_dim, options.output_dim)
        shared = {"weight": options.weight, "gather_distributed": True, "global_penalty": bool(options.global_penalty)}
        scales = {"dummy_scales": options.dummy_scales}
        if options.method == "simclr":
            self.head: nn.Module = heads.SimCLRProjectionHead(*sizes)
            self.criterion: nn.Module = equireg.IPIRMLoss(self.partitions, **shared, **scales)
        elif options.method == "simsiam":
            self.head = heads.SimSiamProjectionHead(*sizes)
            self.predictor = heads.SimSiamPredictionHead(sizes[2], sizes[2] // 4, sizes[2])
            self.criterion = equireg.SimSiamIPIRMLoss(self.partitions, **shared)
        else:
            self.head = heads.MoCoProjectionHead(*sizes)
            shared |= {"num_features": options.output_dim, "queue_size": options.queue_size}
            self.criterion = equireg.MoCoIPIRMLoss(self.partitions, **shared, **scales)
            self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)

    @property
    def reconstruct(self) -> nn.Module | None:
        return self.encoder.reconstruct

    def encoded(self, parts: list[Tensor]) -> tuple[Tensor, list[Any]]:
        """The projected features of parts that may differ in size, and the maps of each."""
        found = [(self.encoder(part), self.encoder.maps) for part in parts]
        return self.head(torch.cat([features for features, _ in found])).float(), [maps for _, maps in found]

    def method(self, first: list[Tensor], second: list[Tensor], indices: Tensor) -> tuple[Any, list[Any], list[Any]]:
        """The method's loss in its parts, and the maps of the views, of the second ones unless the teacher saw them."""
        mix: tuple[Tensor, ...] = ()
        if self.options.mix:
            groups = self.partitions.partitions[1:, indices]
            mixed, *mix = equireg.mix_images(first[0], alpha=self.options.mix, groups=groups)
            first = [mixed]
        z1, maps1 = self.encoded(first)
        if self.options.method == "mocov2":
            with torch.no_grad():
                encoder, head = self.teacher
                key = head(torch.cat([encoder(part) for part in second])).float()
            return self.criterion.parts(z1, key, indices), maps1, [None] * len(second)
        z2, maps2 = self.encoded(second)
        if self.options.method == "simsiam":
            p1, p2 = self.predictor(z1).float(), self.predictor(z2).float()
            return self.criterion.parts(p1, p2, z1, z2, indices), maps1, maps2
        return self.criterion.parts(z1, z2, indices, tuple(mix) or None), maps1, maps2

    def forward(self, first: Tensor, second: Tensor, indices: Tensor, turned: Turned | None) -> tuple[Tensor, Any]:
        """The loss, and its parts for the log."""
        if self.reconstruct is not None:
            mean, std = (torch.tensor(part, device=first.device).view(1, 3, 1, 1) for part in (MEAN, STD))
            pixels = [(view * std + mean).clamp(0, 1) for view in (first, second)]
            _, targets, parameters = self.views(pixels[0])
            second = (self.views.transform(pixels[1], parameters) - mean) / std
        batches = [([first], [second], indices)]
        if self.ser is not None:
            x1, x2, places, g1, g2 = turned
            batches.append(([x1], [x2], places))
            if self.options.base_loss == "joint":  # one loss, in which all images count alike
                batches = [([first, x1], [second, x2], torch.cat([indices, places]))]
        found = [self.method(*batch) for batch in batches]
        risks = [risk for risk, *_ in found]
        maps1, maps2 = ([maps for one in found for maps in one[view]] for view in (1, 2))  # of both parts, in order
        loss = sum(risk.loss for risk in risks)
        parts = {"contrast": sum(risk.global_risk for risk in risks)}
        parts["group_contrast"], parts["group_penalty"] = (sum(part) for part in zip(*(r.of_groups for r in risks)))
        if self.reconstruct is not None:
            last = maps1[0][1], self.maps_of(second, maps2[0])[1]
            e1, e2 = (self.reconstruct.split(tokens)[1] for tokens in last)
            parts["reconstruction"] = self.reconstruct(e1, e2, targets)
            loss = loss + self.options.reconstruction * parts["reconstruction"]
        if self.ser is not None:
            parts["equivariance"] = self.ser(maps1[-1][0], self.maps_of(x2, maps2[-1])[0], g1, g2)
            loss = loss + self.options.ser * parts["equivariance"]
        parts["partitions"] = torch.tensor(float(len(self.partitions.partitions)))
        return loss, parts

    def maps_of(self, view: Tensor, maps: Any) -> Any:
        """Those that are there; of a view that went through MoCo's teacher alone, the student's."""
        return maps or (self.encoder(view), self.encoder.maps)[1]

    def find_partition(self, views: Views, epoch: int) -> None:
        """Every few epochs one more, on two views of all images, of which each process takes its share."""
        since = epoch - self.options.first_search
        if self.options.weight and since >= 0 and since % self.options.update_every == 0:
            state, samples = PartialState(), equireg.WithIndex(views)
            share = Subset(samples, range(state.process_index, len(views), state.num_processes))
            loader = DataLoader(share, batch_size=self.options.batch_size)  # without workers: alike for any --workers
            student = nn.Sequential(self.encoder, self.head)
            self.partitions.update(loader, encoder=student, progress=state.is_main_process)
            if state.is_main_process:
                tqdm.write(f"partition {len(self.partitions.reports)}: {self.partitions.reports[-1]}")

    def follow(self, step: int) -> None:
        """MoCo's teacher."""
        if self.options.method == "mocov2":
            update_momentum(nn.Sequential(self.encoder, self.head), self.teacher, self.options.momentum)


def run(options: Namespace) -> dict[str, Any]:
    """``encoder.pt``; k-NN and linear accuracy of its features on each labelled split, in percent; partitions."""
    images = unlabelled(options)

    def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        seed_everything(options.seed)
        objective, views = Objective(options, len(images)), Views(options, images)
        hooks = {"before_epoch": partial(objective.find_partition, views), "after_step": objective.follow}
        if not fit(options, folder, settings, objective, views, warm_cosine(options), **hooks):
            return {}
        net = objective.encoder.net
        save(folder / "encoder.pt", net.state_dict())  # plain timm keys
        (x, y), found = frozen_features(net, read(options, "train"), options, probed=True), {}
        for split in labelled(options):
            held_out, labels = frozen_features(net, read(options, split), options, probed=True)
            own = [part[:, -net.num_features :] for part in (x, held_out)]  # of a ViT the last class token
            found[f"k-NN, {split}"] = 100 * equireg.knn_accuracy(own[0], y, own[1], labels, k=min(20, len(y)))
            found[f"linear, {split}"] = 100 * equireg.linear_probe(x, y, held_out, labels)
        reports = [report._asdict() | {"at_the_bound": report.at_the_bound} for report in objective.partitions.reports]
        return found | {"partitions": reports}

    return once(options, "pretrain", {"files": names_hash(images)}, work)
