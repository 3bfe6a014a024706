"""All four regularizers in one training: a small network on few real images, with cross entropy and four lines more.

    python examples/all_four.py --data folder-with-train-and-test

trains by cross entropy alone, and with all four added, and prints a table; the picture is runs/all_four.png.
``--without ser eqinv`` leaves lines out. The data: ``train`` and ``test`` (or ``val``) with a folder for each class. It
shows how they go together, in some minutes on two CPU cores, and not that they add up: look at the table. The weights
were chosen by hand, on a few runs of one seed, and are no better founded than that; choose others with ``--evaluate-on
val``, which takes the folder ``val``, or where there is none the last fifth of the training images of each class, which
are not trained on then.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm.auto import tqdm

from equireg import (
    ClassWiseIRM,
    EquivariantViews,
    ImageFiles,
    IntermediateReconstructionHead,
    IntermediateViews,
    IPIRMLoss,
    PartitionUpdater,
    SERLoss,
    TokenTap,
    k_shot,
    read_image_folder,
    split_batch,
)

NAMES = ("eqinv", "ser", "reconstruction", "ipirm")
WIDTHS = (3, 32, 64, 128, 256)
EARLY, LAST = "stages.2", "stages.3"  # strides of 4 and of 8 pixels


class Network(nn.Module):
    """Four convolutional stages and the mean over the last map: features [B, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(inside, outside, 3, stride=1 if inside == 3 else 2, padding=1, bias=False),
                    nn.BatchNorm2d(outside),
                    nn.ReLU(),
                )
                for inside, outside in pairwise(WIDTHS)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images).mean((2, 3))


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norm goes by the batch as ever, and what it will go by in use stays that of the images themselves: turned
    and half-way ones are never seen in use.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def train(
    images: Tensor, labels: Tensor, classes: int, on: set[str], options: argparse.Namespace, bar: tqdm
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The classifier, and the parts of the loss in each step."""
    torch.manual_seed(options.seed)
    size, width = images.shape[-1], WIDTHS[-1]
    network, head = Network(), nn.Linear(width, classes)
    projector = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 64))

    irm = ClassWiseIRM(width, classes, weight=10.0)
    ser = SERLoss(WIDTHS[3], projection_dim=128)
    turn = EquivariantViews(size, 4, photometric=nn.Identity())
    rebuild = IntermediateReconstructionHead(width, image_size=size, patch_size=8, equivariant_fraction=0.5)
    halfway = IntermediateViews("se2")
    partitions = PartitionUpdater(len(images), seed=options.seed, max_passes=20)
    ipirm = IPIRMLoss(partitions, weight=0.2)

    modules = nn.ModuleList([network, head, projector, irm, ser, rebuild])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=2e-3, weight_decay=0.05)
    steps = options.epochs * (len(images) // options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    log = []

    for epoch in range(options.epochs):
        if epoch == options.warmup and "eqinv" in on:  # there are features to compare now
            irm.fit_environments(features_of(network, images), labels)
        if epoch in (options.epochs // 3, 2 * options.epochs // 3) and "ipirm" in on:
            z1, z2 = (projector(features_of(network, augment(images))) for _ in range(2))
            partitions.update(z1.detach(), z2.detach(), progress=False)

        order = torch.randperm(len(images)).split(options.batch_size)
        for i in [batch for batch in order if len(batch) == options.batch_size]:
            x1, x2, y = augment(images[i]), augment(images[i]), labels[i]
            with TokenTap(network, LAST) as last:
                f1, tokens1 = network(x1), last.tokens
                f2 = network(x2)

            parts = {}
            f, yy = torch.cat([f1, f2]), y.repeat(2)
            parts["cross entropy"] = F.cross_entropy(head(irm.mask(f) if "eqinv" in on else f), yy)

            if "eqinv" in on and epoch >= options.warmup:
                parts["eqinv"] = 0.03 * irm(f, yy, i.repeat(2))

            if "ser" in on:
                _, b2 = split_batch(images[i], options.ratio)
                turned1, turned2, g1, g2 = turn(b2)
                with TokenTap(network, EARLY) as early, statistics_kept(network):
                    early1, early2 = ((network(view), early.tokens)[1] for view in (turned1, turned2))
                parts["ser"] = 0.03 * ser(early1, early2, g1, g2)

            if "reconstruction" in on:
                view, targets, _ = halfway(x1)
                with TokenTap(network, LAST) as last, statistics_kept(network):
                    network(view)
                e1, e2 = (rebuild.split(tokens)[1] for tokens in (tokens1, last.tokens))
                parts["reconstruction"] = 1.0 * rebuild(e1, e2, targets)

            if "ipirm" in on:
                parts["ipirm"] = 0.03 * ipirm(projector(f1), projector(f2), i)

            loss = sum(parts.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            log.append({name: part.item() for name, part in parts.items()})
            bar.set_postfix({name: f"{value:.2f}" for name, value in log[-1].items()})
            bar.update()
    return nn.Sequential(network, irm.mask if "eqinv" in on else nn.Identity(), head).eval(), log


# ----------------------------------------------------------------------------------------------------------- the images


def find(data: Path, part: str, per_class: int) -> tuple[ImageFiles, ImageFiles]:
    """The first few training images of each class, and those to measure on: ``part`` is "test" or "val"."""
    train = read_image_folder(data / "train", progress=False)
    other = {"test": ("test", "val"), "val": ("val",)}[part]
    folder = next((data / name for name in other if (data / name).is_dir()), None)
    if folder is not None:
        seen = read_image_folder(folder, class_list=train.classes, progress=False)
    elif part == "val":
        own = [(train.labels == label).nonzero().squeeze(1) for label in range(len(train.classes))]
        cuts = [len(places) * 4 // 5 for places in own]
        seen = train.take(torch.cat([places[cut:] for places, cut in zip(own, cuts)]))
        train = train.take(torch.cat([places[:cut] for places, cut in zip(own, cuts)]))
    else:
        raise FileNotFoundError(f"{data} must hold the folder test (or val)")
    return k_shot(train, min(per_class, int(train.labels.bincount().min()))), seen


def pixels(images: ImageFiles, size: int) -> Tensor:
    """[N, 3, size, size] in 0 .. 1."""
    resize = v2.Resize((size, size), antialias=True)
    images.transform = v2.Compose([resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return torch.stack([image for image, _ in images])


def augment(images: Tensor) -> Tensor:
    """Moved by up to an eighth of the side, mirrored, brighter or darker; each image by itself."""
    count, _, size, _ = images.shape
    room = size // 8
    padded = F.pad(images, (room,) * 4, mode="reflect")
    y, x = torch.randint(2 * room + 1, (2, count, 1))
    rows, columns = y + torch.arange(size), x + torch.arange(size)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    moved = padded[torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None], rows[:, None, :, None],
                   columns[:, None, None, :]]  # fmt: skip
    return (moved * (0.7 + 0.6 * torch.rand(count, 1, 1, 1))).clamp(0, 1)


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    found = torch.cat([model(batch) for batch in images.split(500)])
    model.train()
    return found


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((features_of(model, images).argmax(1) == labels).float().mean())


# ----------------------------------------------------------------------------------------------------------- the report


def report(found: dict[str, float], logs: dict[str, list[dict[str, float]]], path: Path, what: str) -> None:
    """A table, and beside it a picture: the parts of the loss, and the accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    print(f"\n{'':48}{what + ' accuracy, %':>24}")
    for name, value in found.items():
        print(f"{name:48}{value:24.1f}")
    parts = list(dict.fromkeys(name for log in logs.values() for row in log for name in row))
    figure, places = plt.subplots(1, len(parts) + 1, figsize=(3 * len(parts) + 3.4, 3))
    for axes, part in zip(places, parts):
        for color, log in enumerate(logs.values()):
            curve = [(step, row[part]) for step, row in enumerate(log) if part in row]
            if curve:
                axes.plot(*zip(*curve), f"C{color}", linewidth=0.8)
        axes.set(title=part, xlabel="step")
    bars = places[-1].bar(range(len(found)), found.values(), 0.6, color=[f"C{i}" for i in range(len(found))])
    places[-1].bar_label(bars, fmt="%.1f")
    places[-1].set_xticks(range(len(found)), [name.replace(" + ", "\n+ ") for name in found], fontsize=7)
    places[-1].margins(y=0.12)
    places[-1].set_title(f"{what} accuracy, %")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\n{path}")


def main() -> None:
    data = os.environ.get("EQUIREG_DATA")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=data and Path(data) / "cifar10", required=data is None)
    parser.add_argument("--evaluate-on", choices=("test", "val"), default="test", help="choose settings on val")
    parser.add_argument("--without", nargs="+", choices=NAMES, default=[], help="lines to leave out")
    parser.add_argument("--image-size", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--per-class", type=int, default=100, help="training images of each class, at most")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=8, help="epochs before EqInv's environments")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of a batch for SER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/all_four.png"))
    options = parser.parse_args()
    try:
        train_files, seen_files = find(options.data, options.evaluate_on, options.per_class)
        if len(train_files) < options.batch_size:
            raise ValueError(f"--batch-size must be at most {len(train_files)}, the images, got {options.batch_size}")
        images, seen = (pixels(files, options.image_size) for files in (train_files, seen_files))
    except (ValueError, OSError) as error:
        parser.error(f"--data: {error}")
    labels, truth, classes = train_files.labels, seen_files.labels, len(train_files.classes)

    chosen = [name for name in NAMES if name not in options.without]
    found, logs = {}, {}
    for name, on in (("cross entropy", set()), (" + ".join(["cross entropy", *chosen]), set(chosen))):
        if on or not found:
            with tqdm(total=options.epochs * (len(images) // options.batch_size), desc=name) as bar:
                model, logs[name] = train(images, labels, classes, on, options, bar)
            found[name] = accuracy(model, seen, truth)
    report(found, logs, options.out, {"test": "test", "val": "validation"}[options.evaluate_on])


if __name__ == "__main__":
    main()
