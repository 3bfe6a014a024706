"""Draws the picture of the idea of each method:  python docs/pictures.py

From scikit-learn's digits and sample photographs; what can be computed is computed by the package, not drawn by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from equireg import Environments, GridTransform, IntermediateViews, class_wise_risks

COLOURS = torch.tensor([[0.90, 0.10, 0.10], [0.15, 0.35, 0.90]])  # red, blue
INK, FIRST, SECOND = "#333333", "#D55E00", "#0072B2"  # Okabe and Ito's, which the colour-blind tell apart


def digits(classes: tuple[int, ...], each: int) -> tuple[Tensor, Tensor]:
    """Gray digits [N, 8, 8] in 0 .. 1 and their classes [N]."""
    data = load_digits()
    labels = torch.tensor(data.target)
    chosen = torch.cat([(labels == k).nonzero().flatten()[:each] for k in classes])
    return torch.tensor(data.images)[chosen].float() / 16, labels[chosen]


def photographs(side: int) -> Tensor:
    """The two sample photographs, the middle of each, [2, 3, side, side] in 0 .. 1."""
    images = torch.stack([torch.tensor(image[:, 100:527]) for image in load_sample_images().images])
    return interpolate(images.permute(0, 3, 1, 2).float() / 255, (side, side), mode="area")


def show(axis: Axes, image: Tensor, title: str = "", grid: int = 0) -> None:
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9, color=INK)
    for line in range(1, grid):
        axis.axhline(line * image.shape[1] / grid - 0.5, color="white", linewidth=0.4)
        axis.axvline(line * image.shape[2] / grid - 0.5, color="white", linewidth=0.4)


def strip(figure: Figure, place: tuple[float, float, float, float], images: Tensor, title: str, colour: str) -> None:
    """Images side by side in a frame, with a title above."""
    axis = figure.add_axes(place)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)
    axis.imshow(torch.cat(list(padded), dim=2).permute(1, 2, 0), interpolation="nearest", aspect="equal")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9, color=colour, loc="left")
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=1.5)


def arrow(figure: Figure, start: tuple[float, float], end: tuple[float, float], text: str = "", above: float = 0.03):
    axis = figure.add_axes((0, 0, 1, 1), facecolor="none")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.axis("off")
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.3})
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above)
    axis.text(*middle, text, fontsize=9, color=INK, ha="center", va="bottom")


def eqinv() -> Figure:
    """A red class, the two environments found for it, and the risk in each of a feature that is colour or shape."""
    gray, labels = digits((0, 3, 7), each=40)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(2, labels.shape, generator=generator)
    colour = torch.where(labels == 0, 0, drawn)  # class 0 wears red, the others any colour
    tint = COLOURS[colour]
    images = gray[:, None] * tint[:, :, None, None]
    environments = Environments.split(images.flatten(1), labels)
    env1, env2 = environments.members(0)

    batch = torch.arange(len(labels))
    similar = environments.similar(labels, batch)
    features = {"colour": tint - 0.4, "shape": gray.flatten(1)}
    risks = {}
    for name, z in features.items():
        found = class_wise_risks(z, labels, similar, temperature=0.5)
        risks[name] = found.risk[list(found.classes).index(0)]

    figure = plt.figure(figsize=(10, 3.1))
    own = images[labels == 0][:5]
    strip(figure, (0.01, 0.34, 0.22, 0.26), own, "class 0: by chance all red", INK)
    strip(figure, (0.34, 0.62, 0.26, 0.26), images[env1[:6]], "Env#1: others most like it", FIRST)
    strip(figure, (0.34, 0.10, 0.26, 0.26), images[env2[-6:]], "Env#2: the rest", SECOND)
    arrow(figure, (0.24, 0.52), (0.33, 0.70))
    arrow(figure, (0.24, 0.42), (0.33, 0.26))
    arrow(figure, (0.61, 0.48), (0.67, 0.48))
    axis = figure.add_axes((0.73, 0.19, 0.26, 0.58))
    for place, risk in enumerate(risks.values()):
        axis.bar([place - 0.18, place + 0.18], risk, 0.34, color=[FIRST, SECOND])
        variance = risk.var(correction=0)
        axis.text(place, float(risk.max()) + 0.08, f"variance {variance:.2f}", ha="center", fontsize=9, color=INK)
    axis.set_xticks(range(2), [f"a feature\nthat is {name}" for name in risks], fontsize=9)
    axis.set_ylabel("risk of class 0", fontsize=9)
    axis.set_ylim(0, 1.25 * max(float(risk.max()) for risk in risks.values()))
    axis.set_title("the penalty: how much they differ", fontsize=9, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def ser() -> Figure:
    """A photograph and its token map, both turned, and what each token is told apart from."""
    pixels, grid = 112, 14
    images = photographs(pixels)
    turn = GridTransform(torch.tensor([1, 1]), torch.tensor([False, False]), (grid, grid), (grid, grid))
    tokens = avg_pool2d(images, pixels // grid)  # a stand-in for features: the mean colour of each patch
    moved = turn.on_tokens(tokens.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(tokens)
    views, maps = [images, turn.on_images(images, pixels // grid)], [tokens, moved]

    figure = plt.figure(figsize=(10, 4.9))
    place = (4, 9)  # of one token: after a quarter turn counter-clockwise it is in row 13 - 9, column 4
    for row, bottom in enumerate((0.53, 0.02)):
        words = "" if row == 0 else ", turned"
        left, middle = (figure.add_axes((x, bottom, 0.2, 0.41)) for x in (0.01, 0.33))
        show(left, views[row][1], f"a view{words}", grid)
        show(middle, maps[row][1], f"its tokens{words}", grid)
        column, line = (place[1], place[0]) if row == 0 else (place[0], grid - 1 - place[1])
        middle.add_patch(Rectangle((column - 0.5, line - 0.5), 1, 1, fill=False, edgecolor=SECOND, linewidth=2.5))
        arrow(figure, (0.22, bottom + 0.2), (0.32, bottom + 0.2), "first blocks", 0.01)
    show(figure.add_axes((0.78, 0.53, 0.2, 0.41)), maps[0][0], "tokens of other images", grid)
    show(figure.add_axes((0.78, 0.02, 0.2, 0.41)), maps[1][0], "and of their other views", grid)
    arrow(figure, (0.55, 0.57), (0.55, 0.39), "")
    figure.text(0.565, 0.48, "the same place: alike", fontsize=9, color=SECOND, va="center")
    arrow(figure, (0.56, 0.72), (0.77, 0.72), "unlike", 0.01)
    arrow(figure, (0.56, 0.2), (0.77, 0.2), "unlike", 0.01)
    return figure


def reconstruction() -> Figure:
    """An image, its view, the features of both in two parts, and the images half-way that one part has to tell."""
    views = IntermediateViews("rotation", degrees=(60, 60))
    view, targets, _ = views(photographs(96)[1:])

    figure = plt.figure(figsize=(10, 4.2))
    shown = [(photographs(96)[1], "the image", 0.56), (view[0], "its view, by 60°", 0.04)]
    for picture, words, bottom in shown:
        show(figure.add_axes((0.01, bottom, 0.16, 0.38)), picture, words)
        arrow(figure, (0.175, bottom + 0.19), (0.265, bottom + 0.19), "encoder", 0.01)
        axis = figure.add_axes((0.27, bottom + 0.13, 0.24, 0.12))
        axis.set(xlim=(0, 2), ylim=(0, 1), xticks=[], yticks=[])
        for start, part, colour in ((0, "invariant", SECOND), (1, "equivariant", FIRST)):
            axis.add_patch(Rectangle((start, 0), 1, 1, facecolor=colour, edgecolor="white"))
            axis.text(start + 0.5, 0.5, part, color="white", fontsize=9, ha="center", va="center")
        axis.axis("off")
    # Between the two bars: what each pair of halves is for.
    arrow(figure, (0.33, 0.68), (0.33, 0.30), "")
    figure.text(0.34, 0.49, "alike:\nyour loss", fontsize=9, color=SECOND, va="center")
    arrow(figure, (0.52, 0.70), (0.655, 0.55), "")
    arrow(figure, (0.52, 0.28), (0.655, 0.43), "")
    figure.text(0.61, 0.49, "two weak\ndecoders", fontsize=9, color=FIRST, ha="right", va="center")
    for target, words, left in ((targets[0][0], "a third of the way", 0.66), (targets[1][0], "two thirds", 0.83)):
        show(figure.add_axes((left, 0.30, 0.16, 0.38)), target, words)
    return figure


def ipirm() -> Figure:
    """Digits by two factors, and two partitions of them: along the one, then along the other."""
    gray, labels = digits((1, 0), each=18)
    generator = torch.Generator().manual_seed(3)
    colour = torch.arange(len(gray)) % 2
    seat = torch.arange(len(gray)) // 2 % 9  # of nine of a kind, in three rows, so that none covers another
    jitter = 0.12 * torch.rand(2, len(gray), generator=generator)
    across, up = 1.3 * colour + 0.4 * (seat % 3) + jitter[0], 1.3 * labels + 0.4 * (seat // 3) + jitter[1]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    titles = ["first: all in one group", "a partition, by what is easiest", "the next one, by what was left"]
    groups: list[list[tuple[tuple[float, float], float, float]]] = [[] for _ in titles]
    groups[1] = [((-0.3, -0.3), 1.45, 3), ((1.15, -0.3), 1.45, 3)]
    groups[2] = [((-0.3, -0.3), 3, 1.45), ((-0.3, 1.15), 3, 1.45)]
    for axis, title, parts in zip(axes, titles, groups):
        axis.set(xlim=(-0.3, 2.6), ylim=(-0.3, 2.6), xticks=[], yticks=[])
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_xlabel("what features hold on to: colour", fontsize=9)
        for (corner, width, height), face in zip(parts, (FIRST, SECOND)):
            axis.add_patch(Rectangle(corner, width, height, facecolor=face, alpha=0.22))
        for x, y, picture, tint in zip(across, up, gray, COLOURS[colour]):
            inked = torch.cat([tint.expand(8, 8, 3), picture[..., None]], dim=-1)
            axis.add_artist(AnnotationBbox(OffsetImage(inked.numpy(), zoom=2.4), (x, y), frameon=False))
    axes[0].set_ylabel("and shape", fontsize=9)
    return figure


PICTURES = {"eqinv": eqinv, "ser": ser, "reconstruction": reconstruction, "ipirm": ipirm}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(folder / f"{name}-idea.png", dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
