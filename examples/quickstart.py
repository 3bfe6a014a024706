"""Coloured digits: a biased training set, plain cross entropy, and one loss line against the bias.

Real handwritten digits (scikit-learn's, 8 x 8) wear a colour. In training 95% wear the colour of their class, so colour
is the easy answer; in the test set any digit wears any colour. We train a small CNN with cross entropy, and again with

    loss = F.cross_entropy(head(irm.mask(f)), y) + irm(f, y, idx)

The environments come from the features of the first network: nobody tells the method what a colour is. Settings were
chosen on a validation split; the test images are read once, at the end. Run it with

    python examples/quickstart.py

which takes one to two minutes on two CPU cores and writes a table, and a picture in runs/quickstart.png.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from equireg import ClassWiseIRM, FeatureMask

COLORS = "e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 d2f53c aa6e28"  # one for each class
COLORS = torch.tensor(list(bytes.fromhex(COLORS))).view(10, 3) / 255
CLASSES, WIDTH, BATCH = 10, 512, 128
WARM_UP = 0.3  # share of the epochs before the penalty joins: it needs features to compare


class Digits(NamedTuple):
    images: Tensor  # [N, 3, 8, 8] in 0 .. 1
    labels: Tensor  # [N]
    colors: Tensor  # [N], index into COLORS


def colored_digits(seed: int, bias: float = 0.95) -> tuple[Digits, Digits, Digits]:
    """Training digits (60%) that wear the colour of their class in ``bias`` of all cases; validation and test: any."""
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    gray = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order].long()
    colors = torch.randint(CLASSES, labels.shape, generator=generator)
    in_training = torch.arange(len(labels)) < int(0.6 * len(labels))
    biased = in_training & (torch.rand(labels.shape, generator=generator) < bias)
    colors = torch.where(biased, labels, colors)
    images = gray[:, None] * COLORS[colors][:, :, None, None]
    sizes = [int(0.6 * len(labels)), int(0.2 * len(labels))]
    sizes.append(len(labels) - sum(sizes))
    return tuple(Digits(*part) for part in zip(images.split(sizes), labels.split(sizes), colors.split(sizes)))


def small_cnn() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(3, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 128), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers)


def train(data: Digits, irm: ClassWiseIRM | None, seed: int, epochs: int, bar: tqdm) -> tuple[nn.Module, nn.Module]:
    """Backbone and classifier, trained with cross entropy and, where ``irm`` is given, the penalty."""
    torch.manual_seed(seed)
    backbone, head = small_cnn(), nn.Linear(WIDTH, CLASSES)
    classifier = head if irm is None else nn.Sequential(irm.mask, head)
    parameters = [*backbone.parameters(), *head.parameters(), *(irm.parameters() if irm else [])]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    steps = len(data.labels) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        for idx in torch.randperm(len(data.labels))[: steps * BATCH].split(BATCH):
            f, y = backbone(data.images[idx]), data.labels[idx]
            loss = F.cross_entropy(classifier(f), y)
            if irm is not None and epoch >= WARM_UP * epochs:
                loss = loss + irm(f, y, idx)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.update()
    return backbone.eval(), classifier.eval()


@torch.no_grad()
def accuracies(backbone: nn.Module, classifier: nn.Module, data: Digits) -> tuple[float, float]:
    """In percent, on digits that wear the colour of their class, and on those that wear another."""
    right = classifier(backbone(data.images)).argmax(1) == data.labels
    aligned = data.colors == data.labels
    return 100 * right[aligned].float().mean().item(), 100 * right[~aligned].float().mean().item()


def regularizer(backbone: nn.Module, data: Digits, control: str | None = None) -> ClassWiseIRM:
    """``ClassWiseIRM`` with the environments of a network's features; or a control with less in it."""
    irm = ClassWiseIRM(
        WIDTH,
        CLASSES,
        weight=0.0 if control == "without the penalty (weight 0)" else 10.0,
        penalty="irmv1",
        temperature=1.0,
        projection=nn.Identity(),  # on the features themselves
        detach=False,  # trained from scratch, so the penalty shapes the backbone too
    )
    irm.mask = FeatureMask(WIDTH, scale=10.0)  # classify normalised features, as the released code does
    with torch.no_grad():
        features = backbone(data.images)
    if control == "random environments":
        features = torch.randn_like(features)
    return irm.fit_environments(features, data.labels)


def picture(path: Path, table: dict[str, list[tuple[float, float]]], data: Digits, irm: ClassWiseIRM) -> None:
    """The accuracies as bars, and for three classes the ends of their two environments."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    axes = left.subplots()
    for place, runs in enumerate(table.values()):
        for kind, color in enumerate(("tab:gray", "tab:blue")):
            values = [run[kind] for run in runs]
            x = place + 0.4 * kind - 0.2
            spread = statistics.stdev(values) if len(values) > 1 else 0
            axes.bar(x, statistics.mean(values), 0.36, yerr=spread, color=color, capsize=3)
            axes.text(x, 2, f"{statistics.mean(values):.1f}", ha="center", color="white")
    axes.set_xticks(range(len(table)), [name.replace(" (", "\n(") for name in table], fontsize=8)
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("gray: bias-aligned    blue: bias-conflicting", fontsize=10)

    anchors = (0, 3, 7)
    right.suptitle("What is similar to a class, beyond its own samples: ten from each end", fontsize=10)
    grid = right.subplots(2 * len(anchors), 11, gridspec_kw={"wspace": 0.05, "hspace": 0.15})
    for row in range(2 * len(anchors)):
        k, env = anchors[row // 2], row % 2
        members = irm.environments.members(k)[env]
        own = (data.labels == k).nonzero()[0]
        chosen = torch.cat([own, members[:10] if env == 0 else members[-10:]])
        for axis, image in zip(grid[row], data.images[chosen]):
            axis.imshow(image.permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
        grid[row, 0].set_ylabel(f"class {k}\n{'most' if env == 0 else 'least'}\nEnv#{env + 1}", fontsize=7)
        for spine in grid[row, 0].spines.values():
            spine.set(edgecolor="tab:red", linewidth=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--controls", action="store_true", help="also train with weight 0 and random environments")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="what the table is about")
    parser.add_argument("--picture", type=Path, default=Path("runs/quickstart.png"))
    options = parser.parse_args()

    controls = ["without the penalty (weight 0)", "random environments"] if options.controls else []
    table: dict[str, list[tuple[float, float]]] = {}
    with tqdm(total=options.seeds * (2 + len(controls)) * options.epochs, unit="epoch") as bar:
        for seed in range(options.seeds):
            training, validation, test = colored_digits(seed)
            held_out = test if options.split == "test" else validation
            bar.set_description(f"seed {seed}: cross entropy")
            plain = train(training, None, seed, options.epochs, bar)
            table.setdefault("cross entropy", []).append(accuracies(*plain, held_out))
            for control in [None, *controls]:
                name = "+ ClassWiseIRM" if control is None else control
                bar.set_description(f"seed {seed}: {name}")
                torch.manual_seed(seed)
                irm = regularizer(plain[0], training, control)
                trained = train(training, irm, seed, options.epochs, bar)
                table.setdefault(name, []).append(accuracies(*trained, held_out))
                if control is None:
                    shown = irm

    print(f"\nAccuracy on {options.split} images (%), mean ± std over {options.seeds} seeds")
    print(f"{'':32}{'bias-aligned':>16}{'bias-conflicting':>20}")
    for name, runs in table.items():
        cells = []
        for values in zip(*runs):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        print(f"{name:32}{cells[0]:>16}{cells[1]:>20}")
    picture(options.picture, table, training, shown)
    print(f"\n{options.picture}")


if __name__ == "__main__":
    main()
