"""Step 2: the environments of each class, from features of the frozen encoder; and a sheet of what lies in them.

For each class, the half of the other images that resembles it most for reasons other than their own class is Env#1, and
the rest is Env#2 (EqInv, Section 4). The sheet shows the most similar images of Env#1 and the least similar of Env#2,
as the paper's Fig. 7 does.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from matplotlib.figure import Figure

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


def run(options: Namespace) -> dict[str, Any]:
    """``environments.pt``, and the sheet."""
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
        return {"samples": len(labels), "classes": len(images.classes)}

    return once(options, "environments", {"encoder": hash_of(encoder), "files": names_hash(images)}, work)


def names_of(options: Namespace, classes: list[str]) -> list[str]:
    """What to call the classes: by ``classes.txt`` in the data's folder (folder, tab, name), or by their folders."""
    path = options.data / "classes.txt"
    rows = path.read_text(errors="backslashreplace").splitlines() if path.is_file() else []
    named = dict(row.split("\t", 1) for row in rows if "\t" in row)
    return [named.get(name, name).encode(errors="backslashreplace").decode()[:12] for name in classes]


def draw_sheet(environments: Environments, images: ImageFiles, options: Namespace, path: Path) -> None:
    """A row for each anchor class: its own images, the most similar of Env#1, and the least similar of Env#2."""
    names, own, each = names_of(options, images.classes), 5, options.each
    count = min(options.anchors, environments.num_classes)
    anchors = torch.linspace(0, environments.num_classes - 1, count).round().long().tolist()
    figure = Figure(figsize=(0.7 * (own + 2 * each), 0.9 * count + 0.5))
    grid = figure.subplots(count, own + 2 * each, squeeze=False)
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
            axes.set_title(names[images.labels[index]], fontsize=5, pad=2, parse_math=False)  # it may hold a $
    similarity = "plain" if options.plain else "adjusted"
    figure.suptitle(
        f"{own} of the class | {each} most similar, of Env#1 ({similarity}) | {each} least similar, of Env#2"
    )
    with warnings.catch_warnings():  # a script that the font does not have is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, dpi=130, bbox_inches="tight")
