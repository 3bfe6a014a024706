"""The last step: what merging the predictions of flips, crops and models adds, and the challenge's submission file."""

from __future__ import annotations

import csv
import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm

from equireg import ImageFiles, ensemble, fit_ensemble_weights, predict_tta
from vipriors.backbone import frozen_features
from vipriors.images import labelled, measured, names_hash, read
from vipriors.run_folder import RESULTS, hash_of, load, made_with, once, save
from vipriors.training import write_file

UNKNOWN = "no labels"  # in the place of an accuracy
MERGES = ("mean", "gmean", "tsharpen")
OPTIONS: dict[str, tuple[Any, ...]] = {
    "model_folder": (None, "folder of a fine-tuning; by default that of Step 3"),
    "merge": ("gmean", "how the predictions of flips and crops are merged", MERGES),
}


def accuracy(scores: Tensor, labels: Tensor) -> float | str:
    """In percent, of scores [N, C]; the challenge's test images have no labels."""
    return 100 * float((scores.argmax(1) == labels).float().mean()) if (labels >= 0).all() else UNKNOWN


class Merged(nn.Module):
    """Images to probabilities, merged over ``crops``; of one view where these are "plain"."""

    def __init__(self, model: nn.Module, crops: str, merge: str):
        super().__init__()
        self.model, self.crops, self.merge = model, crops, merge

    def forward(self, images: Tensor) -> Tensor:
        if self.crops == "plain":
            return self.model(images).float().softmax(1)
        return predict_tta(self.model, images, crops=self.crops, merge=self.merge)


def measure(model: nn.Module, options: Namespace, folder: Path, merge: str = "gmean") -> dict[str, Any]:
    """Accuracies of one view and of ten crops, and the predictions and labels in ``predictions.pt``."""
    saved: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    for split in measured(options):
        images = read(options, split)
        saved[split] = images.labels
        for crops in ("plain", "ten"):
            saved[f"{split} {crops}"], _ = frozen_features(Merged(model, crops, merge), images, options)
            found[f"{split} {crops}"] = accuracy(saved[f"{split} {crops}"], images.labels)
    save(folder / "predictions.pt", saved)
    return found


def ensembles(folders: dict[str, Path], on: str) -> dict[str, float]:
    """Accuracy of all models together; weighted where ``on`` is not "val", where the weights are fitted."""
    saved, rows = [load(folder / "predictions.pt") for folder in folders.values()], {}
    for crops, title in (("plain", "one view"), ("ten", "ten crops")):
        val, merged = (torch.stack([one[f"{part} {crops}"] for one in saved]) for part in ("val", on))
        for merge in MERGES:
            rows[f"ensemble, {title}, {merge}"] = accuracy(ensemble(merged, merge=merge), saved[0][on])
        if on != "val":
            weights = fit_ensemble_weights(val, saved[0]["val"])
            rows[f"ensemble, {title}, weighted"] = accuracy(ensemble(merged, weights=weights), saved[0][on])
    return rows


def draw(rows: dict[str, float], path: Path, on: str) -> None:
    """A table, and the same as a picture."""
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (name, value) in enumerate(rows.items()):
        print(f"{name:54}{value:8.1f}")
        axes.plot(value, -place, "o", color=f"C{int('ensemble' in name)}")
        axes.annotate(f"{value:.1f}", (value, -place), (6, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(0, -len(rows), -1), list(rows), fontsize=8)
    axes.set_xlabel(f"accuracy on {on} images, %")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)


def submission(path: Path, images: ImageFiles, probabilities: Tensor) -> None:
    """The challenge's file: a row for each image, with its name and the number of its class, sorted by name, from 0."""
    writer = csv.writer(rows := io.StringIO(), lineterminator="\n")
    writer.writerow(["image", "class"])
    writer.writerows(zip((Path(name).name for name in images.paths), probabilities.argmax(1).tolist()))
    write_file(path, rows.getvalue().encode(errors="surrogateescape"))


def run(options: Namespace) -> dict[str, Any]:
    """``predictions.pt``, ``submission.csv`` where there are test images, and accuracies where there are labels.

    They are of one view, flips and crops of the fine-tuned model, and of its ensemble with its student where that is
    there, with weights that are fitted on validation images.
    """
    from vipriors.finetune import fine_tuned  # which measures by this file

    source, student, on = options.model_folder or options.out / "finetune", options.out / "distill", labelled(options)
    model = fine_tuned(options, source, len(read(options, "train").classes))
    made_of = {"model": hash_of(source / "model.pt"), "student": None}
    made_of["files"] = names_hash(*(read(options, split) for split in measured(options)))
    if (student / RESULTS).exists():
        if made_with(student, "teacher") == made_of["model"]:
            made_of["student"] = hash_of(student / "model.pt")
        else:
            tqdm.write(f"{student} is left out: another model than that of {source} was its teacher")

    def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        if not PartialState().is_main_process:
            return {}
        models, images = {"fine-tuned": measure(model, options, folder, options.merge)}, read(options, on)
        rows = {"fine-tuned, one view": models["fine-tuned"][f"{on} plain"]}
        for crops in ("flip", "five"):
            found = frozen_features(Merged(model, crops, options.merge), images, options)
            rows[f"fine-tuned, {crops}, {options.merge}"] = accuracy(*found)
        rows[f"fine-tuned, ten, {options.merge}"] = models["fine-tuned"][f"{on} ten"]
        if made_of["student"]:
            models["distilled"] = json.loads((student / RESULTS).read_text())
            rows |= ensembles({"fine-tuned": folder, "distilled": student}, on)
        draw(rows, folder / "test.png", on)
        if "test" in measured(options):
            submission(folder / "submission.csv", read(options, "test"), load(folder / "predictions.pt")["test ten"])
        return {"models": models, "on": on, "result": f"fine-tuned, ten, {options.merge}", "merged": rows}

    return once(options, "test", made_of, work)
