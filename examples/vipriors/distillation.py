"""Optional: distillation. A student starts from Step 1's encoder and learns from the labels and the fine-tuned model.

    loss = criterion(student(images), teacher(images), labels)

The losses, the augmentation and the measures are those of distill.py.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distill import STUDENTS, Augmented, Student
from merged_predictions import measure
from torch import nn
from torch.utils.data import Dataset
from training import (
    hash_of,
    load_safely,
    run_training,
    save_atomically,
)

from vipriors.backbone import create, is_vit
from vipriors.finetune import Classifier
from vipriors.images import measured, read
from vipriors.pretrain import OPTIMIZERS
from vipriors.results import given_or_made


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder", type=Path, help="encoder.pt; default: Step 1's in --out, if there; the word none: from scratch"
    )
    parser.add_argument("--teacher", type=Path, help="folder of a fine-tuning; default: that of Step 3 in --out")
    parser.add_argument("--method", choices=STUDENTS.values(), default="logits")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")


def check(options: argparse.Namespace) -> None:
    if options.method.startswith("ofd") and is_vit(options.model):
        raise ValueError(f"--method {options.method} compares the stages of a ResNet, got --model {options.model}")


def fine_tuned(options: argparse.Namespace, folder: Path, num_classes: int) -> Classifier:
    """The model of Step 3, frozen."""
    path = folder / "model.pt"
    if not path.exists():
        raise ValueError(f"{path}: no such file; run Step 3 (finetune) first")
    own = json.loads((folder / "options.json").read_text())
    kind = {name: own.get(name) for name in ("penalty", "mask_scale")}
    classifier = Classifier(argparse.Namespace(**{**vars(options), **kind}), num_classes)
    classifier.load_state_dict(load_safely(path))
    return classifier.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def in_one(classifier: Classifier) -> nn.Module:
    """The same as one timm model, whose classifier is the mask and the head."""
    model = classifier.backbone
    setattr(model, model.pretrained_cfg["classifier"], nn.Sequential(classifier.mask, classifier.head))
    return model


def make_student(
    options: argparse.Namespace, encoder: Path | None, teacher: nn.Module, images: Dataset, num_classes: int
) -> Student:
    return Student(options, options.method, create(options, encoder, num_classes), teacher, images)


def evaluate(student: Student, device: torch.device, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Accuracies of one view and of ten crops, in percent."""
    save_atomically(folder / "model.pt", student.model.state_dict())
    return measure(student.model, {split: read(options, split) for split in measured(options)}, options, device, folder)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One student, into the folder ``distill``."""
    images, folder = read(options, "train"), options.out / "distill"
    encoder = given_or_made(options.encoder, options.out / "pretrain" / "encoder.pt")
    from_step_three = options.teacher or options.out / "finetune"
    teacher = in_one(fine_tuned(options, from_step_three, len(images.classes)))
    return run_training(
        options,
        {"encoder": encoder and hash_of(encoder), "teacher": hash_of(from_step_three / "model.pt")},
        folder,
        "distillation",
        make_objective=partial(make_student, options, encoder, teacher, images, len(images.classes)),
        make_collate=partial(Augmented, options),
        evaluate=partial(evaluate, options=options, folder=folder),
        make_optimizer=OPTIMIZERS[options.optimizer],
        images=images,
    )
