"""Coloured MNIST: what the two environments of a class differ in, with plain and with adjusted similarity.

Digit i wears colour i in 99.5% of its samples, else any colour. With the plain similarity of features, the samples
nearest to a class are other *digits* that look like it; with the adjusted one, the digits stand even and only the
class's *colour* remains (EqInv, Fig. 5). Features are those of a small CNN trained on the coloured digits. Run it with

    python examples/colored_mnist.py

MNIST is read from --data, or downloaded there; where it is neither, scikit-learn's handwritten digits take its place.
It writes a table, and the bar charts in runs/colored_mnist.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from equireg import Environments

COLORS = "e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 d2f53c aa6e28"  # one for each class
COLORS = torch.tensor(list(bytes.fromhex(COLORS))).view(10, 3) / 255


def gray_digits(folder: Path, source: str) -> tuple[Tensor, Tensor, str]:
    """Images [N, S, S] in 0 .. 1, labels [N], and what they are."""
    if source != "digits":
        from torchvision.datasets import MNIST

        try:
            try:
                mnist = MNIST(str(folder))
            except RuntimeError:  # not on disk
                mnist = MNIST(str(folder), download=True)
            return mnist.data.float() / 255, mnist.targets, "MNIST"
        except Exception as error:  # a download fails in many ways
            if source == "mnist":
                raise
            print(f"MNIST is not in {folder} and cannot be downloaded ({error}); scikit-learn's digits instead.")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target).long(), "digits"


def paint(gray: Tensor, labels: Tensor, unbiased: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [N, 3, S, S] and colours [N]: the colour of the class, or with probability ``unbiased`` any."""
    uniform = torch.randint(10, labels.shape, generator=generator)
    colors = torch.where(torch.rand(labels.shape, generator=generator) < unbiased, uniform, labels)
    return gray[:, None] * COLORS[colors][:, :, None, None], colors


def learned_features(images: Tensor, labels: Tensor, epochs: int) -> Tensor:
    """Features [N, 128] of a small CNN, trained with cross entropy."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    backbone = nn.Sequential(
        *block(3, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    head = nn.Linear(128, 10)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(epochs):
        for batch in tqdm(torch.randperm(len(labels)).split(128), desc="training", leave=False):
            loss = F.cross_entropy(head(backbone(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    backbone.eval()
    with torch.no_grad():
        return torch.cat([backbone(part) for part in images.split(1024)])


def shares(environments: Environments, anchor: int, labels: Tensor, colors: Tensor) -> tuple[list[float], list[float]]:
    """Share of each other digit, and of each colour, that lies in Env#1 of the anchor class; in percent."""
    first, second = environments.members(anchor)

    def share(values: Tensor, value: int) -> float:
        inside, outside = int((values[first] == value).sum()), int((values[second] == value).sum())
        return 100 * inside / max(1, inside + outside)

    return [share(labels, digit) for digit in range(10) if digit != anchor], [share(colors, c) for c in range(10)]


def picture(path: Path, found: dict[str, tuple[list[float], list[float]]], anchor: int, source: str) -> None:
    import matplotlib.pyplot as plt

    names = [str(digit) for digit in range(10) if digit != anchor] + [f"c{color}" for color in range(10)]
    figure, rows = plt.subplots(2, 1, figsize=(10, 5.5), sharex=True, layout="constrained")
    for axes, (name, (digits, colors)) in zip(rows, found.items()):
        values = digits + colors
        edges = ["none"] * len(digits) + ["tab:red" if color == anchor else "none" for color in range(10)]
        fills = ["tab:gray"] * len(digits) + [tuple(color) for color in COLORS.tolist()]
        axes.bar(range(len(values)), values, color=fills, edgecolor=edges, linewidth=2)
        axes.axhline(50, color="black", linewidth=0.8)
        axes.set(ylim=(0, 100), ylabel="in Env#1 (%)", title=f"{name} similarity")
        axes.set_xticks(range(len(values)), names)
    figure.suptitle(f"{source}: who is in the environment that resembles class {anchor}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where MNIST is, or is downloaded to")
    parser.add_argument("--source", choices=("auto", "mnist", "digits"), default="auto")
    parser.add_argument("--samples", type=int, default=10_000, help="how many digits to use, at the most")
    parser.add_argument("--unbiased", type=float, default=0.005, help="share of samples that wear any colour")
    parser.add_argument("--anchor", type=int, default=0, choices=range(10))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("runs/colored_mnist.png"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    gray, labels, source = gray_digits(options.data, options.source)
    chosen = torch.randperm(len(labels), generator=generator)[: options.samples]
    labels = labels[chosen]
    images, colors = paint(gray[chosen], labels, options.unbiased, generator)
    features = learned_features(images, labels, options.epochs)

    found = {}
    for name, adjust in (("plain", False), ("adjusted", True)):
        environments = Environments.split(features, labels, 10, adjust=adjust)
        digits, of_colors = found[name] = shares(environments, options.anchor, labels, colors)
        rest = [share for color, share in enumerate(of_colors) if color != options.anchor]
        print(
            f"{name:9} similarity, in Env#1 of class {options.anchor}: "
            f"{min(digits):.0f} to {max(digits):.0f}% of each other digit, "
            f"{of_colors[options.anchor]:.0f}% of colour {options.anchor}, "
            f"{min(rest):.0f} to {max(rest):.0f}% of each other colour"
        )
    picture(options.picture, found, options.anchor, source)
    print(f"{options.picture}")


if __name__ == "__main__":
    main()
