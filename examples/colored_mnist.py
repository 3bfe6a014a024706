"""Coloured MNIST: what tells the two environments of a class apart, with plain and with adjusted similarity.

    python examples/colored_mnist.py

A digit i has colour i in 99.5% of the images, and any colour in the others. A small CNN learns the classes, and
``Environments`` ranks the images of the other classes by how similar their features are to a class. By plain
similarity, the nearer half holds the *digits* that look like it. By adjusted similarity, every digit is split evenly,
and the nearer half holds the images of the class's *colour* (EqInv, Fig. 5).
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.datasets import MNIST
from tqdm.auto import tqdm

from equireg import Environments

COLORS = "e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 d2f53c aa6e28"  # one for each class
COLORS = torch.tensor(list(bytes.fromhex(COLORS))).view(10, 3) / 255
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gray_digits(folder: Path, source: str) -> tuple[Tensor, Tensor, str]:
    """Images [N, S, S] in 0 .. 1, labels [N], and what they are."""
    if source != "digits":
        try:
            mnist = MNIST(str(folder), download=True)  # which looks into the folder first
            return mnist.data.float() / 255, mnist.targets, "MNIST"
        except (OSError, RuntimeError) as error:
            if source == "mnist":
                raise
            print(f"MNIST is not in {folder} and cannot be downloaded ({error}); scikit-learn's digits instead.")
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target).long(), "digits"


def paint(gray: Tensor, labels: Tensor, unbiased: float) -> tuple[Tensor, Tensor]:
    """Images [N, 3, S, S] and colours [N]: the colour of the class, or with probability ``unbiased`` any."""
    colors = torch.where(torch.rand(labels.shape) < unbiased, torch.randint(10, labels.shape), labels)
    return gray[:, None] * COLORS[colors][:, :, None, None], colors


def learned_features(images: Tensor, labels: Tensor, epochs: int) -> Tensor:
    """Features [N, 128] of a small CNN, trained with cross entropy."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    layers = [*block(3, 32), pool, *block(32, 64), pool, *block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    backbone, head = nn.Sequential(*layers).to(DEVICE), nn.Linear(128, 10).to(DEVICE)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3)
    for epoch in range(epochs):
        for batch in tqdm(torch.randperm(len(labels)).split(128), desc=f"epoch {epoch + 1}", leave=False):
            loss = F.cross_entropy(head(backbone(images[batch].to(DEVICE))), labels[batch].to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    backbone.eval()
    with torch.no_grad():
        return torch.cat([backbone(part.to(DEVICE)).cpu() for part in images.split(1024)])


def shares(environments: Environments, anchor: int, values: Tensor) -> list[float]:
    """Of each of the values 0 .. 9, a digit or a colour, the share that lies in Env#1 of the anchor class; percent."""
    first, second = (torch.bincount(values[members], minlength=10) for members in environments.members(anchor))
    return (100 * first / (first + second).clamp(min=1)).tolist()


def report(found: dict[str, tuple[list[float], list[float]]], anchor: int, source: str, path: Path) -> None:
    heading = (f"in Env#1 of class {anchor}, %", "each other digit", f"colour {anchor}", "each other colour")
    print("\n{:24}{:>18}{:>11}{:>19}".format(*heading))
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    figure.suptitle(f"{source}: who is in the environment that resembles class {anchor}")
    others = [value for value in range(10) if value != anchor]
    names = [*(f"digit {digit}" for digit in others), *(f"colour {color}" for color in range(10))]
    for axes, (name, (of_digits, of_colors)) in zip(figure.subplots(2, 1, sharex=True), found.items()):
        digits, colors = [of_digits[digit] for digit in others], [of_colors[color] for color in others]
        ranges = [f"{min(values):.0f} to {max(values):.0f}" for values in (digits, colors)]
        print(f"{name + ' similarity':24}{ranges[0]:>18}{of_colors[anchor]:11.0f}{ranges[1]:>19}")
        axes.bar(names, digits + of_colors, color=["tab:gray"] * 9 + [tuple(color) for color in COLORS.tolist()])
        axes.axhline(50, color="black", linewidth=0.8)
        axes.set(ylim=(0, 100), ylabel="in Env#1, %", title=f"{name} similarity")
        axes.tick_params(axis="x", rotation=60)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where MNIST is, or is downloaded to")
    parser.add_argument("--source", choices=("auto", "mnist", "digits"), default="auto")
    parser.add_argument("--samples", type=int, default=10_000, help="how many digits to use at most")
    parser.add_argument("--unbiased", type=float, default=0.005, help="share of the images that have any colour")
    parser.add_argument("--anchor", type=int, default=0, choices=range(10), help="the class")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/colored_mnist"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    gray, labels, source = gray_digits(options.data, options.source)
    chosen = torch.randperm(len(labels))[: options.samples]
    labels = labels[chosen]
    images, colors = paint(gray[chosen], labels, options.unbiased)
    features = learned_features(images, labels, options.epochs)
    found = {}
    for name, adjust in (("plain", False), ("adjusted", True)):
        environments = Environments.split(features, labels, num_classes=10, adjust=adjust)
        found[name] = tuple(shares(environments, options.anchor, values) for values in (labels, colors))
    report(found, options.anchor, source, options.out / "colored_mnist.png")


if __name__ == "__main__":
    main()
