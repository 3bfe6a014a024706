"""Coloured digits: find the few that do not follow the bias, and weigh them up with one line.

Real handwritten digits (scikit-learn's, 8 x 8) wear a colour. In training 95% wear the colour of their class, so colour
is the easy answer; in the test set any digit wears any colour. A small CNN is trained for three epochs, which is enough
for its features to show who does not follow the bias. Then it is trained anew with

    loss = (environments.weights(idx) * F.cross_entropy(logits, y, reduction="none")).mean()

Nobody tells it what a colour is. Beside it: plain cross entropy; the same weights shuffled within each class, the control
that a gain must beat; ``ClassWiseIRM`` on top; and the ceiling, weights from the true colours. Run it with

    python examples/quickstart.py

which takes about three minutes on two CPU cores and writes a table, and two pictures in runs/quickstart: the accuracies,
and the digits of each class with the largest and the smallest weights. The sharpness was chosen on validation images.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from equireg import ClassWiseIRM, Environments, weight_sheet

COLORS = "e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 d2f53c aa6e28"  # one for each class
COLORS = torch.tensor(list(bytes.fromhex(COLORS))).view(10, 3) / 255
CLASSES, WIDTH, BATCH, EARLY, SHARPNESS = 10, 512, 128, 3, 1.5


class Digits(NamedTuple):
    images: Tensor  # [N, 3, 8, 8] in 0 .. 1
    labels: Tensor  # [N]
    colors: Tensor  # [N], index into COLORS


def colored_digits(seed: int, bias: float) -> tuple[Digits, Digits, Digits]:
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


def train(
    data: Digits, weights: Tensor, seed: int, epochs: int, bar: tqdm, irm: ClassWiseIRM | None = None
) -> tuple[nn.Module, nn.Module]:
    """Backbone and classifier. ``weights`` [N] are those of the samples; 1 for plain cross entropy."""
    torch.manual_seed(seed)
    backbone, head = small_cnn(), nn.Linear(WIDTH, CLASSES)
    parameters = [*backbone.parameters(), *head.parameters(), *(irm.parameters() if irm else [])]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    steps = len(data.labels) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for idx in torch.randperm(len(data.labels))[: steps * BATCH].split(BATCH):
            f, y = backbone(data.images[idx]), data.labels[idx]
            logits = head(f if irm is None else irm.mask(f))
            loss = (weights[idx] * F.cross_entropy(logits, y, reduction="none")).mean()  # the one line
            if irm is not None:
                loss = loss + irm(f, y, idx)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.update()
    return backbone.eval(), (head if irm is None else irm.fold_into(head)).eval()


@torch.no_grad()
def accuracies(backbone: nn.Module, head: nn.Module, data: Digits) -> tuple[float, float]:
    """In percent, on digits that wear the colour of their class, and on those that wear another."""
    right = head(backbone(data.images)).argmax(1) == data.labels
    aligned = data.colors == data.labels
    return 100 * right[aligned].float().mean().item(), 100 * right[~aligned].float().mean().item()


def shuffled(weights: Tensor, labels: Tensor) -> Tensor:
    """The same weights, given to other samples of the same class."""
    order = torch.randperm(len(labels))
    mixed = torch.empty_like(weights)
    mixed[labels.argsort(stable=True)] = weights[order[labels[order].argsort(stable=True)]]
    return mixed


def balanced(labels: Tensor, colors: Tensor) -> Tensor:
    """Weights by which each colour counts alike within each class: what one would do who knew the colours."""
    table = F.one_hot(labels * CLASSES + colors, CLASSES**2).sum(0).view(CLASSES, CLASSES)
    weights = 1 / table[labels, colors]
    return weights * (table.sum(1) / (table > 0).sum(1))[labels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--bias", type=float, default=0.95, help="share of the training digits in their class's colour")
    parser.add_argument("--sharpness", type=float, default=SHARPNESS)
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="what the table is about")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()

    table: dict[str, list[tuple[float, float]]] = {}
    with tqdm(total=options.seeds * (5 * options.epochs + EARLY), unit="epoch") as bar:
        for seed in range(options.seeds):
            data, validation, test = colored_digits(seed, options.bias)
            plain = torch.ones(len(data.labels))
            early, _ = train(data, plain, seed, EARLY, bar)
            with torch.no_grad():
                features = early(data.images)
            environments = Environments.split(features, data.labels)
            weights = environments.weights(sharpness=options.sharpness)
            irm = ClassWiseIRM(WIDTH, CLASSES, risk_weight=0.1).fit_environments(features, data.labels)
            arms = {
                "cross entropy": (plain, None),
                "+ weights": (weights, None),
                "control: weights shuffled": (shuffled(weights, data.labels), None),
                "+ weights + ClassWiseIRM": (weights, irm),
                "ceiling: true colours": (balanced(data.labels, data.colors), None),
            }
            for name, (of_samples, penalty) in arms.items():
                bar.set_description(f"seed {seed}: {name}")
                trained = train(data, of_samples, seed, options.epochs, bar, penalty)
                found = accuracies(*trained, test if options.split == "test" else validation)
                table.setdefault(name, []).append(found)

    print(f"\n{environments.report()}\n\nAccuracy on {options.split} images (%), mean ± std over {options.seeds} seeds")
    print(f"{'':32}{'bias-aligned':>16}{'bias-conflicting':>20}")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for place, (name, runs) in enumerate(table.items()):
        cells = [(statistics.mean(values), statistics.pstdev(values)) for values in zip(*runs)]
        print(f"{name:32}" + "".join(f"{mean:>{width}.1f} ± {std:.1f}" for (mean, std), width in zip(cells, (10, 14))))
        axes.bar_label(axes.barh(place, cells[1][0], xerr=cells[1][1], color=f"C{place}"), fmt="%.1f", padding=6)
    axes.set_yticks(range(len(table)), table)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="test accuracy on digits that wear another class's colour (%)")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "accuracy.png", dpi=130)
    weight_sheet(environments, data.images, classes=[0, 3, 7], count=8).savefig(options.out / "sheet.png", dpi=130)
    print(f"\n{options.out / 'accuracy.png'}  {options.out / 'sheet.png'}")


if __name__ == "__main__":
    main()
