"""Step 2: the environments of each class, from features of the frozen encoder; and a sheet of what lies in them.

For each class, the half of the other images that resembles it most for reasons other than their own class is Env#1, and
the rest is Env#2 (EqInv, Section 4). The sheet follows the paper's Fig. 7, "the top-10 images of Env#1 and Env#2",
which does not say by what order: here they are the most similar of Env#1, and of Env#2 the least similar, as those most
similar lie at the border of the two.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from training import (
    hash_of,
    names_hash,
    normalized_transform,
    save_atomically,
    start_processes,
    visible,
    what_counts,
)

from equireg import Environments
from vipriors.backbone import create, frozen_features
from vipriors.images import read
from vipriors.results import done_before, keep


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", type=Path, help="encoder.pt; default: that of Step 1 in --out")
    parser.add_argument("--plain", action="store_true", help="similarity without the adjustment, the paper's ablation")
    parser.add_argument("--anchors", type=int, default=6, help="classes on the sheet, evenly over all")
    parser.add_argument("--each", type=int, default=10, help="images of each environment on the sheet")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """``environments.pt``, the sheet, and how evenly the environments divide each of the other classes."""
    folder = options.out / "environments"
    encoder = options.encoder or options.out / "pretrain" / "encoder.pt"
    if not encoder.exists():
        raise ValueError(f"{encoder}: no such file; run Step 1 (pretrain) first, or give --encoder")
    _, _, device = start_processes()
    images = read(options, "train")
    made_of = {**what_counts(options), "encoder": hash_of(encoder), "files": names_hash(images)}
    if (found := done_before(folder, options, made_of)) is not None:
        return found
    images.transform = normalized_transform(options)
    model = create(options, encoder).to(device)
    features, labels = frozen_features(model, images, options, device)
    environments = Environments.split(features, labels, len(images.classes), adjust=not options.plain)

    folder.mkdir(parents=True, exist_ok=True)
    save_atomically(folder / "environments.pt", environments.state_dict())
    shares = shares_in_first(environments, labels)
    results = {
        "samples": len(labels),
        "classes": len(images.classes),
        "share of another class in Env#1, %": {
            "least": 100 * float(shares.min()),
            "most": 100 * float(shares.max()),
            "deviation from a half": 100 * float((shares - 0.5).abs().mean()),
        },
    }
    images.transform = None
    draw_sheet(environments, images, labels, names_of(options, images.classes), options, folder / "contact-sheet.png")
    keep(folder, made_of, results)
    return results


def shares_in_first(environments: Environments, labels: Tensor) -> Tensor:
    """Of each class and each other class, the share that is in Env#1: [C (C - 1)], a half where only context tells."""
    classes = torch.arange(environments.num_classes)
    similar = environments.similar(classes, torch.arange(len(labels))).float()
    member = torch.nn.functional.one_hot(labels, len(classes)).float()
    shares = similar @ member / member.sum(0)
    return shares[~torch.eye(len(classes), dtype=torch.bool) & (member.sum(0) > 0)]


# ----------------------------------------------------------------------------------------------------------- the sheet


def names_of(options: argparse.Namespace, classes: list[str]) -> list[str]:
    """What to call the classes: by ``classes.txt`` in the data's folder (folder, tab, name), or by their folders."""
    path = Path(options.data) / "classes.txt"
    rows = path.read_text(errors="backslashreplace").splitlines() if path.is_file() else []
    named = dict(row.split("\t", 1) for row in rows if "\t" in row)
    return [named.get(name, name) for name in classes]


def short(name: str, most: int) -> str:
    whole = visible(name)
    return whole if len(whole) <= most else whole[: most - 1] + "…"


def draw_sheet(
    environments: Environments,
    images: Dataset,
    labels: Tensor,
    names: list[str],
    options: argparse.Namespace,
    path: Path,
    own: int = 5,
) -> None:
    """A row for each anchor class: its own images, the most similar of Env#1, and the least similar of Env#2."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = min(options.anchors, environments.num_classes)
    anchors = torch.linspace(0, environments.num_classes - 1, count).round().long().tolist()
    starts = (0, own + 0.5, own + options.each + 1)
    width, step = starts[2] + options.each, 1.22
    figure, axes = plt.subplots(figsize=(0.62 * width + 1.5, 0.62 * step * count + 0.5))
    plain = {"parse_math": False}  # a name may hold a $
    for row, k in enumerate(anchors):
        first, second = environments.members(k)
        of_class = (labels == k).nonzero().squeeze(1)
        axes.text(-0.15, row * step + 0.5, short(names[k], 18), ha="right", va="center", fontsize=9, **plain)
        for start, members in zip(starts, (of_class[:own], first[: options.each], second.flip(0)[: options.each])):
            for place, index in enumerate(members.tolist()):
                x, y = start + place, row * step
                tile = images[index][0].convert("RGB").resize((96, 96))
                axes.imshow(tile, extent=(x + 0.02, x + 0.98, y + 1, y))
                if start:
                    name = short(names[labels[index]], 11)
                    axes.text(x + 0.5, y + 1.03, name, ha="center", va="top", fontsize=5, **plain)
    similarity = "plain" if options.plain else "adjusted"
    titles = ("the class", f"most similar, of Env#1 ({similarity} similarity)", "least similar, of Env#2")
    for start, title in zip(starts, titles):
        axes.text(start, -0.15, title, fontsize=9)
    axes.set(xlim=(-0.1, width), ylim=(step * count, -0.1))
    axes.axis("off")
    with warnings.catch_warnings():  # a script that the font does not have is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
