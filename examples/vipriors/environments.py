"""Step 2: the environments of each class, from features of the frozen encoder; and a sheet of what lies in them.

For each class, the half of the other images that resembles it most for reasons other than their own class is Env#1, and
the rest is Env#2 (EqInv, Section 4). The sheet shows the most similar images of Env#1 and the least similar of Env#2,
as the paper's Fig. 7 does.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from equireg import Environments, ImageFiles
from vipriors.backbone import create, frozen_features
from vipriors.images import names_hash, read
from vipriors.run_folder import hash_of, once, save
from vipriors.training import TrainingError

OPTIONS: dict[str, tuple[Any, ...]] = {
    "encoder": (None, "encoder.pt; by default that of Step 1"),
    "plain": (False, "similarity without the adjustment, the paper's ablation"),
    "anchors": (6, "classes on the sheet, evenly over all"),
    "each": (10, "images of each environment on the sheet"),
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """``environments.pt``, the sheet, and how evenly the environments divide each of the other classes."""
    encoder, images = options.encoder or options.out / "pretrain" / "encoder.pt", read(options, "train")
    if not encoder.exists():
        raise TrainingError(f"{encoder}: no such file; run Step 1 (pretrain) first, or give --encoder")

    def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        if not PartialState().is_main_process:
            return {}
        features, labels = frozen_features(create(options, encoder), images, options)
        environments = Environments.split(features, labels, len(images.classes), adjust=not options.plain)
        save(folder / "environments.pt", environments.state_dict())
        draw_sheet(environments, images, options, folder / "contact-sheet.png")
        shares = shares_in_first(environments, labels)
        found = {"least": shares.min(), "most": shares.max(), "deviation from a half": (shares - 0.5).abs().mean()}
        return {
            "samples": len(labels),
            "classes": len(images.classes),
            "share of another class in Env#1, %": {name: 100 * float(share) for name, share in found.items()},
        }

    return once(options, "environments", {"encoder": hash_of(encoder), "files": names_hash(images)}, work)


def shares_in_first(environments: Environments, labels: Tensor) -> Tensor:
    """Of each class and each other class, the share that is in Env#1: [C (C - 1)], a half where only context tells."""
    classes = torch.arange(environments.num_classes)
    similar = environments.similar(classes, torch.arange(len(labels))).float()
    member = torch.nn.functional.one_hot(labels, len(classes)).float()
    shares = similar @ member / member.sum(0)
    return shares[~torch.eye(len(classes), dtype=torch.bool) & (member.sum(0) > 0)]


def names_of(options: argparse.Namespace, classes: list[str]) -> list[str]:
    """What to call the classes: by ``classes.txt`` in the data's folder (folder, tab, name), or by their folders."""
    path = options.data / "classes.txt"
    rows = path.read_text(errors="backslashreplace").splitlines() if path.is_file() else []
    named = dict(row.split("\t", 1) for row in rows if "\t" in row)
    return [named.get(name, name) for name in classes]


def short(name: str, most: int = 11) -> str:
    whole = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return whole if len(whole) <= most else whole[: most - 1] + "…"


def draw_sheet(environments: Environments, images: ImageFiles, options: argparse.Namespace, path: Path) -> None:
    """A row for each anchor class: its own images, the most similar of Env#1, and the least similar of Env#2."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, own, each = names_of(options, images.classes), 5, options.each
    count = min(options.anchors, environments.num_classes)
    anchors = torch.linspace(0, environments.num_classes - 1, count).round().long().tolist()
    size = {"figsize": (0.7 * (own + 2 * each), 0.9 * count + 0.5), "squeeze": False}
    figure, grid = plt.subplots(count, own + 2 * each, **size)
    for axes in grid.flat:
        axes.axis("off")
    for row, k in zip(grid, anchors):
        first, second = environments.members(k)
        own_images = (images.labels == k).nonzero().squeeze(1)
        columns = ((0, own_images[:own]), (own, first[:each]), (own + each, second.flip(0)[:each]))
        for axes, index in (
            (row[start + i], index) for start, part in columns for i, index in enumerate(part.tolist())
        ):
            axes.imshow(images[index][0].resize((96, 96)))
            axes.set_title(short(names[images.labels[index]]), fontsize=5, pad=2, parse_math=False)  # it may hold a $
    similarity = "plain" if options.plain else "adjusted"
    figure.suptitle(
        f"{own} of the class | {each} most similar, of Env#1 ({similarity}) | {each} least similar, of Env#2"
    )
    with warnings.catch_warnings():  # a script that the font does not have is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
