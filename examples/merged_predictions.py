"""Predictions of a model over flips and crops, and of several models, merged; to be copied beside distill.py.

``predict_tta`` and ``ensemble`` merge; here stand the accuracies of every way to do it, a table and a picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from training import load_safely, normalized_transform, precision, save_atomically

from equireg import ensemble, fit_ensemble_weights, predict_tta

UNKNOWN = "no labels"  # in the place of an accuracy


class Transformed(Dataset):
    """(image, label) with the image transformed."""

    def __init__(self, images: Dataset, transform: Callable[[Any], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


@torch.no_grad()
def predictions(
    model: nn.Module, images: Dataset, options: argparse.Namespace, device: torch.device, **tta: str
) -> tuple[Tensor, Tensor]:
    """Probabilities and labels; plain, or merged as ``tta`` says."""
    found, labels = [], []
    loader = DataLoader(Transformed(images, normalized_transform(options)), batch_size=250, num_workers=options.workers)
    for batch, truth in tqdm(loader, desc="predictions", leave=False):
        batch = batch.to(device, memory_format=torch.channels_last)
        with precision(options, device):
            answers = predict_tta(model, batch, **tta) if tta else model(batch).float().softmax(1)
        found.append(answers.float().cpu())
        labels.append(truth)
    return torch.cat(found), torch.cat(labels)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """In percent, of scores [N, C]."""
    return 100 * float((probabilities.argmax(1) == labels).float().mean())


def measure(
    model: nn.Module, parts: dict[str, Dataset], options: argparse.Namespace, device: torch.device, folder: Path
) -> dict[str, Any]:
    """Accuracies of one view and of ten crops, where there are labels, and the predictions in a file."""
    saved: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    for name, images in parts.items():
        for how, tta in (("plain", {}), ("ten", {"crops": "ten", "merge": "gmean"})):
            row = f"{name} {how}"
            saved[row], saved[name] = predictions(model, images, options, device, **tta)
            if (saved[name] >= 0).all():
                found[row] = accuracy(saved[row], saved[name])
            else:
                found[name] = UNKNOWN
    save_atomically(folder / "predictions.pt", saved)
    return found


def augmentations(
    model: nn.Module,
    images: Dataset,
    options: argparse.Namespace,
    name: str,
    device: torch.device,
    merges: Iterable[str] = ("mean", "gmean", "tsharpen"),
) -> dict[str, float]:
    """Accuracy of one model for every kind of test-time augmentation."""
    rows = {f"{name}, one view": accuracy(*predictions(model, images, options, device))}
    for crops in ("flip", "five", "ten"):
        for merge in merges:
            found = predictions(model, images, options, device, crops=crops, merge=merge)
            rows[f"{name}, {crops}, {merge}"] = accuracy(*found)
    return rows


def ensembles(folders: dict[str, Path], on: str = "test") -> dict[str, float]:
    """Accuracy of all models together, from their plain and from their ten-crop predictions; on "val" without the
    weights, which are fitted there.
    """
    saved = [load_safely(folder / "predictions.pt") for folder in folders.values()]
    labels, rows = {part: saved[0][part] for part in ("val", on)}, {}
    for how, title in (("plain", "one view"), ("ten", "ten crops")):
        val, merged = (torch.stack([one[f"{part} {how}"] for one in saved]) for part in ("val", on))
        for merge in ("mean", "gmean", "tsharpen"):
            rows[f"ensemble, {title}, {merge}"] = accuracy(ensemble(merged, merge=merge), labels[on])
        if on == "val":
            continue
        weights = fit_ensemble_weights(val, labels["val"])
        rows[f"ensemble, {title}, weighted"] = accuracy(ensemble(merged, weights=weights), labels[on])
        shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(folders, weights.tolist()))
        tqdm.write(f"weights fitted on {len(labels['val'])} images, {title}: {shares}")
    return rows


def report(trained: dict[str, dict[str, Any]], merged: dict[str, float], path: Path, on: str = "test") -> None:
    """A table, and beside it a picture; ``on``: what ``merged`` is about."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    print(f"\n{'accuracy, %':42}{'validation':>12}{'test':>8}")
    for name, found in trained.items():
        cells = (f"{found[row]:.1f}" if row in found else "-" for row in ("val plain", "test plain"))
        print("{:42}{:>12}{:>8}".format(name, *cells))
    print()
    for name, value in merged.items():
        print(f"{name:54}{value:8.1f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1.3))
    for axes, rows in ((left, {name: found[f"{on} plain"] for name, found in trained.items()}), (right, merged)):
        for place, (name, value) in enumerate(reversed(rows.items())):
            color = f"C{('ensemble' in name) + 2 * (axes is left)}"
            axes.plot(value, place, "o", color=color)
            axes.annotate(f"{value:.1f}", (value, place), (6, -3), textcoords="offset points", fontsize=8)
        axes.set_yticks(range(len(rows)), list(rows)[::-1], fontsize=8)
        low, high = min(rows.values()), max(rows.values())
        room = max(high - low, 1)  # for the numbers beside the points
        axes.set(
            xlabel={"val": "validation accuracy, %"}.get(on, "test accuracy, %"),
            xlim=(low - 0.08 * room, high + 0.16 * room),
        )
        axes.grid(axis="y", alpha=0.3)
    left.set_title("fine-tuning and distillation")
    right.set_title("test-time augmentation and ensembles")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"\n{path}")
