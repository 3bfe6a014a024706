"""Step 2: the environments of each class, from features of the frozen encoder; and a sheet of what lies in them.

For each class, the half of the other images that resembles it most for reasons other than their own class is Env#1, and
the rest is Env#2 (EqInv, Section 4). Weights rank the images by the margin (``Environments.split``). The sheet shows
the images of some classes that weigh most, and least.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from equireg import Environments, weight_sheet
from vipriors.backbone import create, encoder_of, frozen_features
from vipriors.images import names_hash, read
from vipriors.run_folder import hash_of, once, save
from vipriors.training import TrainingError

OPTIONS: dict[str, tuple[Any, ...]] = {}


def run(options: Namespace) -> dict[str, Any]:
    """``environments.pt``, and the sheet."""
    encoder, images = encoder_of(options), read(options, "train")
    if encoder is None:
        raise TrainingError("no encoder.pt; run Step 1 (pretrain) first, or give --encoder")

    def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        if not PartialState().is_main_process:
            return {}
        features, labels = frozen_features(create(options, encoder), images, options)
        environments = Environments.split(features, labels, len(images.classes), score="margin")
        save(folder / "environments.pt", environments.state_dict())
        weight_sheet(environments, images, class_names=images.classes).savefig(folder / "weight-sheet.png")
        return {"samples": len(labels), "classes": len(images.classes)}

    return once(options, "environments", {"encoder": hash_of(encoder), "files": names_hash(images)}, work)
