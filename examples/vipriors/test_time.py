"""The last step: what merging the predictions of flips, crops and models adds, and the challenge's submission file."""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm

from equireg import ImageFiles, ensemble, fit_ensemble_weights
from vipriors.backbone import accuracy, create, frozen_features
from vipriors.finetune import fine_tuned
from vipriors.images import labelled, measured, names_hash, read
from vipriors.run_folder import RESULTS, hash_of, load, made_with, once, save
from vipriors.training import write_file

OPTIONS: dict[str, tuple[Any, ...]] = {}


def measure(model: nn.Module, options: Namespace) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Accuracies of one view and of ten crops; and the predictions and labels."""
    saved: dict[str, Tensor] = {}
    for split in measured(options):
        images = read(options, split)
        logits, saved[split] = frozen_features(model, images, options)
        saved[f"{split} plain"] = logits.softmax(1)
        saved[f"{split} ten"], _ = frozen_features(model, images, options, "ten")
    found = {name: accuracy(scores, saved[name.split()[0]]) for name, scores in saved.items() if " " in name}
    return found, saved


def ensembles(saved: list[dict[str, Tensor]], on: str) -> dict[str, float | None]:
    """Accuracy of all models together; weighted where ``on`` is not "val", where the weights are fitted."""
    rows = {}
    for crops, title in (("plain", "one view"), ("ten", "ten crops")):
        val, merged = (torch.stack([one[f"{part} {crops}"] for one in saved]) for part in ("val", on))
        for merge in ("mean", "gmean", "tsharpen"):
            rows[f"ensemble, {title}, {merge}"] = accuracy(ensemble(merged, merge=merge), saved[0][on])
        if on != "val":
            weights = fit_ensemble_weights(val, saved[0]["val"])
            rows[f"ensemble, {title}, weighted"] = accuracy(ensemble(merged, weights=weights), saved[0][on])
    return rows


def submission(path: Path, images: ImageFiles, probabilities: Tensor) -> None:
    """The challenge's file: a row for each image, with its name and the number of its class, sorted by name, from 0."""
    writer = csv.writer(rows := io.StringIO(), lineterminator="\n")
    writer.writerow(["image", "class"])
    writer.writerows(zip((Path(name).name for name in images.paths), probabilities.argmax(1).tolist()))
    write_file(path, rows.getvalue().encode(errors="surrogateescape"))


def run(options: Namespace) -> dict[str, Any]:
    """``predictions.pt``, ``submission.csv``, and accuracies of crops, and of the ensemble with a student, if there."""
    classes = len(read(options, "train").classes)
    model, student, on = fine_tuned(options, classes), options.out / "distill", labelled(options)[-1]
    made_of = {"model": hash_of(options.out / "finetune" / "model.pt"), "student": None}
    made_of["files"] = names_hash(*(read(options, split) for split in measured(options)))
    if (student / RESULTS).exists():
        if made_with(student, "teacher") == made_of["model"]:
            made_of["student"] = hash_of(student / "model.pt")
        else:
            tqdm.write(f"{student} is left out: its teacher was another fine-tuned model")

    def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        if not PartialState().is_main_process:
            return {}
        (folder / "submission.csv").unlink(missing_ok=True)
        found, saved = measure(model, options)
        save(folder / "predictions.pt", saved)
        models, images = {"fine-tuned": found}, read(options, on)
        rows = {"one view": models["fine-tuned"][f"{on} plain"]}
        rows |= {crops: accuracy(*frozen_features(model, images, options, crops)) for crops in ("flip", "five")}
        rows["ten crops"] = models["fine-tuned"][f"{on} ten"]
        if made_of["student"]:
            distilled = create(options, num_classes=classes)
            distilled.load_state_dict(load(student / "model.pt"))
            models["distilled"], of_student = measure(distilled.eval(), options)  # of the images that are here now
            rows |= ensembles([saved, of_student], on)
        for name, value in rows.items():
            print(f"{name:40}{value:8.1f}")
        if "test" in measured(options):
            submission(folder / "submission.csv", read(options, "test"), saved["test ten"])
        # The result is named before it is measured: not the best one of test images.
        return {"models": models, "merged": rows, f"{on}, ten crops": rows["ten crops"]}

    return once(options, "test", made_of, work)
