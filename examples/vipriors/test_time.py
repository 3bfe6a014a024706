"""Optional: what merging the predictions of flips, crops and models adds, without any training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from merged_predictions import augmentations, ensembles, measure, report
from training import hash_of, names_hash, start_processes, what_counts

from vipriors.distillation import fine_tuned
from vipriors.images import measured, read
from vipriors.results import RESULTS, done_before, keep, made_with

FINE_TUNED, DISTILLED = "fine-tuned", "distilled"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-folder", type=Path, help="of a fine-tuning; default: that of Step 3 in --out")
    parser.add_argument("--merge", choices=("mean", "gmean", "tsharpen"), default="gmean", help="of flips and crops")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One view, flips and crops of the fine-tuned model, and its ensemble with its student where that is there.

    The weights of the ensemble are fitted on validation images. Where test images have no labels all accuracies are of
    validation images, and ``predictions.pt`` holds the probabilities.
    """
    folder, distilled = options.out / "test", options.out / "distill"
    source = options.model_folder or options.out / "finetune"
    _, _, device = start_processes()
    parts = {split: read(options, split) for split in measured(options)}
    on = "test" if "test" in parts and (parts["test"].labels >= 0).all() else "val"
    model = fine_tuned(options, source, len(parts["val"].classes)).to(device)
    made_of = {**what_counts(options), "model": hash_of(source / "model.pt"), "student": None}
    made_of["files"] = {split: names_hash(images) for split, images in parts.items()}
    if (distilled / RESULTS).exists():
        if made_with(distilled, "teacher") == made_of["model"]:
            made_of["student"] = hash_of(distilled / "model.pt")
        else:
            print(f"{distilled} is left out: another model than that of {source} was its teacher", flush=True)
    if (found := done_before(folder, options, made_of)) is not None:
        return found

    folder.mkdir(parents=True, exist_ok=True)
    trained = {FINE_TUNED: measure(model, parts, options, device, folder)}
    merged = augmentations(model, parts[on], options, FINE_TUNED, device, merges=(options.merge,))
    if made_of["student"] is not None:
        trained[DISTILLED] = json.loads((distilled / RESULTS).read_text())
        merged.update(ensembles({FINE_TUNED: folder, DISTILLED: distilled}, on))
    report(trained, merged, folder / "test.png", on)
    results = {"models": trained, "on": on, "result": f"{FINE_TUNED}, ten, {options.merge}", "merged": merged}
    keep(folder, made_of, results)
    return results
