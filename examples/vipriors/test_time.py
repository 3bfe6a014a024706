"""Optional: what merging the predictions of flips, crops and models adds, without any training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from backbone import as_json
from distill import augmentations, ensembles, measure, report
from distillation import fine_tuned
from images import read
from training import start_processes, write_atomically

FINE_TUNED, DISTILLED = "fine-tuned", "distilled"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-folder", type=Path, help="of a fine-tuning; default: that of Step 3 in --out")
    parser.add_argument("--merge", choices=("mean", "gmean", "tsharpen"), default="gmean", help="of flips and crops")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One view, flips and crops of the fine-tuned model, and its ensemble with the distilled one where that is there.

    The weights of the ensemble are fitted on validation images.
    """
    folder = options.out / "test"
    _, _, device = start_processes()
    val, test = (read(options, split) for split in ("val", "test"))
    source = options.model_folder or options.out / "finetune"
    model = fine_tuned(options, source, len(test.classes)).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    trained = {FINE_TUNED: measure(model, val, test, options, device, folder)}
    merged = augmentations(model, test, options, FINE_TUNED, device, merges=(options.merge,))
    distilled = options.out / "distill"
    if (distilled / "results.json").exists():
        trained[DISTILLED] = json.loads((distilled / "results.json").read_text())
        merged.update(ensembles({FINE_TUNED: folder, DISTILLED: distilled}))
    report(trained, merged, folder / "test.png")
    results = {"models": trained, "merged": merged}
    write_atomically(folder / "options.json", as_json(options).encode())
    write_atomically(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    return results
