"""Self-supervised pretraining of a ResNet with and without IP-IRM's partitions: SimCLR, SimSiam, MoCo-v2.

The regularizer is the line

    loss = IPIRMLoss(updater)(z1, z2, indices)

where ``updater``, a ``PartitionUpdater``, holds the partitions found so far. Every few epochs it looks for one more,
on frozen features of two views of the whole dataset: groups whose samples the features take for alike, for a reason
that is still entangled. Run it with

    python examples/ipirm_pretrain.py --data folder-with-train-and-test

which trains a ResNet-18 twice, without and with partitions, and compares them: k-NN and linear accuracy, what was
found, and what samples of each group look like; a table, and two pictures in runs/ipirm. ``--partition on`` trains
once. Several processes: ``torchrun --nproc-per-node 2 examples/ipirm_pretrain.py ...``. The paper's setting:
``--recipe vipriors-resnet50``. A killed run goes on with ``--resume``, its partitions with it. Copy the folder
training along with this file.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from lightly.models.modules.heads import (
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
)
from lightly.models.utils import update_momentum
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm.auto import tqdm
from training import (
    MEAN,
    STD,
    as_program,
    averaged,
    evenly,
    folder_images,
    load_safely,
    normalized_transform,
    parse,
    precision,
    read_log,
    run_training,
    save_atomically,
    seed_everything,
    start_processes,
    test_folder,
    training_images,
)

from equireg import (
    IPIRMLoss,
    MoCoIPIRMLoss,
    PartitionUpdater,
    SimSiamIPIRMLoss,
    WithIndex,
    extract_features,
    knn_accuracy,
    linear_probe,
    mix_images,
)

PARTITIONS = "partitions.pt"

RECIPES: dict[str, dict[str, Any]] = {
    # Minutes on a CPU.
    "cifar10-resnet18": {
        "model": "resnet18",
        "image_size": 32,
        "crop_scale": 0.2,
        "images": 4000,
        "epochs": 24,
        "update_every": 8,
        "warmup_epochs": 2,
        "batch_size": 200,
        "lr": 1e-3,
        "weight_decay": 1e-6,
        "momentum": 0.99,
        "hidden_dim": 512,
        "output_dim": 128,
        "queue_size": 2000,
    },
    # Wang et al., Section 4.2, on the 50,000 images of VIPriors, on several GPUs.
    "vipriors-resnet50": {
        "model": "resnet50",
        "image_size": 224,
        "crop_scale": 0.2,
        "images": 0,  # all
        "epochs": 800,
        "update_every": 50,
        "warmup_epochs": 10,
        "batch_size": 512,
        "lr": 1e-3,
        "weight_decay": 1e-6,
        "momentum": 0.999,
        "hidden_dim": 2048,
        "output_dim": 128,
        "queue_size": 16384,
    },
}


# ---------------------------------------------------------------------------------------------------------- the views


def augmentation(options: argparse.Namespace) -> v2.Compose:
    """SimCLR's, without blur below 64 pixels."""
    size = options.image_size
    steps = [
        v2.RandomResizedCrop(size, scale=(options.crop_scale, 1.0), interpolation=3),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
    ]
    if size >= 64:
        steps.append(v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1)], p=0.5))
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


class TwoViews:
    """Makes a batch: both views of each image, and its place in the dataset."""

    def __init__(self, options: argparse.Namespace, rank: int):
        self.options, self.rank, self.policy = options, rank, augmentation(options)

    def __call__(self, samples: list[tuple[int, Any, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            seed_everything(self.options.seed, samples[0][0], self.rank)
            first, second = (torch.stack([self.policy(sample[1]) for sample in samples]) for _ in range(2))
        return first, second, torch.tensor([sample[3] for sample in samples])


class Pairs(Dataset):
    """The training images as ((view, view), label)."""

    def __init__(self, images: Dataset, policy: v2.Compose):
        self.images, self.policy = images, policy

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:
        image, label = self.images[index]
        return (self.policy(image), self.policy(image)), label


# ----------------------------------------------------------------------------------------------------------- the loss


class Method(nn.Module):
    """A backbone, its head, and the invariant form of the method's loss.

    Without ``backbone`` it is the one that the options name, and without ``images`` they are those of ``--data``.
    """

    clip = 0.0  # largest norm of the gradient; 0 for any

    def __init__(
        self,
        options: argparse.Namespace,
        partitions: PartitionUpdater,
        partition: bool,
        *,
        backbone: nn.Module | None = None,
        images: Dataset | None = None,
    ):
        super().__init__()
        self.options, self.partitions, self.partition = options, partitions, partition
        shared = {"weight": options.weight if partition else 0.0, "gather_distributed": True}
        backbone = timm.create_model(options.model, num_classes=0) if backbone is None else backbone
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.images = training_images(options) if images is None else images
        sizes = self.backbone.num_features, options.hidden_dim, options.output_dim
        self.head: nn.Module = SimCLRProjectionHead(*sizes)
        if options.method == "simclr":
            self.criterion: nn.Module = IPIRMLoss(partitions, **shared)
        elif options.method == "simsiam":
            self.head = SimSiamProjectionHead(*sizes)
            self.predictor = SimSiamPredictionHead(options.output_dim, options.output_dim // 4, options.output_dim)
            self.criterion = SimSiamIPIRMLoss(partitions, **shared)
        else:
            self.head = MoCoProjectionHead(*sizes)
            queue = {"num_features": options.output_dim, "queue_size": options.queue_size}
            self.criterion = MoCoIPIRMLoss(partitions, **shared, **queue)
            self.teacher = copy.deepcopy(nn.ModuleList([self.backbone, self.head])).requires_grad_(False)

    def embed(self, images: Tensor, backbone: nn.Module | None = None, head: nn.Module | None = None) -> Tensor:
        with precision(self.options, images.device):
            features = (backbone or self.backbone)(images.contiguous(memory_format=torch.channels_last))
            return (head or self.head)(features).float()

    def forward(self, first: Tensor, second: Tensor, indices: Tensor) -> Tensor:
        mix = None
        if self.options.mixup and self.options.method == "simclr":
            first, *mix = mix_images(first, alpha=self.options.mixup)
        z1 = self.embed(first)
        if self.options.method == "mocov2":
            with torch.no_grad():
                key = self.embed(second, *self.teacher)
            return self.criterion(z1, key, indices)
        z2 = self.embed(second)
        if self.options.method == "simsiam":
            return self.criterion(self.predictor(z1), self.predictor(z2), z1, z2, indices)
        return self.criterion(z1, z2, indices, mix=mix and tuple(mix))

    def before_step(self, epoch: int) -> None:
        """Before each step of the optimizer."""

    def update(self, step: int, steps: int) -> None:
        """After each step of the optimizer: the teacher, and a new partition as soon as one is due."""
        if self.options.method == "mocov2":
            update_momentum(nn.ModuleList([self.backbone, self.head]), self.teacher, self.options.momentum)
        epochs = min((step + 1) // (steps // self.options.epochs), self.options.epochs - 1)  # none after the last
        due = epochs // self.options.update_every
        # By their number: no step of the optimizer is behind an epoch whose last gradient was not finite.
        if self.partition and len(self.partitions.partitions) <= due:
            self.find_partition(due * self.options.update_every)

    def find_partition(self, epochs: int) -> None:
        """On two views of all training images, of which each process takes its share."""
        rank, world, _ = start_processes()
        seed_everything(self.options.seed, -1 - epochs, rank)
        pairs = WithIndex(Pairs(self.images, augmentation(self.options)))
        loader = DataLoader(Subset(pairs, range(rank, len(pairs), world)), batch_size=self.options.batch_size)
        encoder = nn.Sequential(Channels(), self.backbone, self.head)
        self.partitions.update(loader, encoder=encoder, progress=rank == 0)
        if rank == 0:
            report = self.partitions.reports[-1]
            agreement = ", ".join(f"{value:.2f}" for value in report.agreement[1:]) or "none before"
            tqdm.write(
                f"epoch {epochs}: a partition of {report.group_sizes}, objective {report.objective:.2f} "
                f"(loss {report.loss:.2f}, slopes² {report.penalty:.3f}), agreement with earlier ones: {agreement}"
            )


class Channels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, options: argparse.Namespace, partition: bool):
        super().__init__()
        partitions = PartitionUpdater(len(training_images(options)), options.groups, seed=options.seed)
        self.method = Method(options, partitions, partition)

    def forward(self, first: Tensor, second: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.method(first, second, indices)
        return loss, {"partitions": torch.tensor(float(len(self.method.partitions.partitions)))}


# ------------------------------------------------------------------------------------------------------- the measures


def evaluate(objective: Objective, device: torch.device, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    method = objective.method
    save_atomically(folder / "encoder.pt", method.backbone.state_dict())  # plain timm keys
    parts, transform = [], normalized_transform(options)
    for path in (Path(options.data) / "train", test_folder(options)):
        images = evenly(folder_images(path, options, transform), options.probe_images)
        loader = DataLoader(WithIndex(images), batch_size=256, num_workers=options.workers)
        with precision(options, device):
            features, labels, _ = extract_features(nn.Sequential(Channels(), method.backbone), loader)
        parts += [features.float(), labels]
    save_atomically(folder / PARTITIONS, method.partitions.partitions[1:].clone())
    return {
        "k-NN": 100 * knn_accuracy(*parts),
        "linear": 100 * linear_probe(*parts),
        "reports": [report._asdict() for report in method.partitions.reports],
    }


def report(results: dict[str, dict[str, Any]], logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A table, and beside it a picture: losses and accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    print(f"\n{'':32}" + "".join(f"{name:>22}" for name in results))
    for key in ("k-NN", "linear"):
        print(f"{key + ' accuracy, %':32}" + "".join(f"{found[key]:22.1f}" for found in results.values()))
    for name, found in results.items():
        for i, partition in enumerate(found["reports"], 1):
            agreement = ", ".join(f"{value:.2f}" for value in partition["agreement"][1:]) or "-"
            sizes = " + ".join(map(str, partition["group_sizes"]))
            print(f"{name}, partition {i}: groups of {sizes}, agreement with those before: {agreement}")

    figure, (curves, accuracy) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1.6, 1))
    for name, log in logs.items():
        curves.plot([row["step"] for row in log], averaged([row["loss"] for row in log]), label=name)
    curves.set(xlabel="step", ylabel="loss (partitions add terms)", title="training")
    curves.legend()
    for i, (name, found) in enumerate(results.items()):
        bars = accuracy.bar([j + 0.4 * i for j in range(2)], [found["k-NN"], found["linear"]], 0.38, label=name)
        accuracy.bar_label(bars, fmt="%.1f", fontsize=8)
    accuracy.set_xticks([0.2, 1.2], ["k-NN", "linear"])
    accuracy.set(ylabel="test accuracy, %", title="frozen features")
    accuracy.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"\n{path}")


def report_groups(partitions: Tensor, options: argparse.Namespace, path: Path, each: int = 14) -> None:
    """Samples of each group of each partition, drawn at random."""
    import matplotlib.pyplot as plt

    images, generator = training_images(options), torch.Generator().manual_seed(0)
    rows = [(p, k) for p in range(len(partitions)) for k in range(options.groups)]
    figure, grid = plt.subplots(len(rows), each, figsize=(0.75 * each + 1.4, 0.78 * len(rows)), squeeze=False)
    for row, (p, k) in zip(grid, rows):
        members = (partitions[p] == k).nonzero().squeeze(1)
        chosen = members[torch.randperm(len(members), generator=generator)[:each]].tolist()
        for axes in row:
            axes.set(xticks=[], yticks=[])
        for axes, index in zip(row, chosen):
            axes.imshow(images[index][0])
        row[0].set_ylabel(f"partition {p + 1},\ngroup {k + 1}", rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=110)
    print(path)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=("simclr", "simsiam", "mocov2"), default="simclr")
    parser.add_argument("--partition", dest="variants", choices=("off", "on", "compare"), default="compare")
    parser.add_argument("--groups", type=int, default=2, help="of each partition")
    parser.add_argument("--weight", type=float, default=0.2, help="of the squared slopes")
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha of mixed first views; 0: none (SimCLR alone)")
    parser.add_argument("--out", type=Path, default=Path("runs/ipirm"))


def train(options: argparse.Namespace, partition: bool) -> dict[str, Any]:
    """One training, into ``folder_of``."""
    folder = folder_of(options, partition)
    return run_training(
        options,
        {"partition": partition},
        folder,
        "with partitions" if partition else "without",
        make_objective=partial(Objective, options, partition),
        make_collate=partial(TwoViews, options),
        evaluate=partial(evaluate, options=options, folder=folder),
    )


def folder_of(options: argparse.Namespace, partition: bool) -> Path:
    return options.out / f"{options.method}-{'on' if partition else 'off'}"


def main() -> None:
    options = parse(__doc__.splitlines()[0], RECIPES, add_options)
    if options.mixup and options.method != "simclr":
        raise ValueError(f"--mixup is SimCLR's, got --method {options.method}")
    results, logs = {}, {}
    for partition in {"off": [False], "on": [True], "compare": [False, True]}[options.variants]:
        name = "with partitions" if partition else "without partitions"
        results[name] = train(options, partition)
        logs[name] = read_log(folder_of(options, partition))
    if all(results.values()):
        report(results, logs, options.out / f"{options.method}.png")
        path = folder_of(options, True) / PARTITIONS
        if "with partitions" in results and len(partitions := load_safely(path)):
            report_groups(partitions, options, options.out / f"{options.method}-groups.png")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    as_program(main)
