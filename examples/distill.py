"""The VIPriors recipe on few labelled images: invariant pretraining, distillation, test-time augmentation, ensemble.

    python examples/distill.py --data folder-with-train-and-test

pretrains a ResNet-18 by IP-IRM on SimCLR without labels (or takes ``--encoder``, a file of ipirm_pretrain.py),
fine-tunes it on ``--images`` labelled ones, and takes that for the teacher of students that start from the same one:

    loss = criterion(student(images), teacher(images), labels)

with each loss of Stage II. Then it merges predictions over flips and crops, and over the models, with weights fitted
on images that no model was trained on. A table, and a picture in runs/distill. A killed run goes on with ``--resume``.
Copy ipirm_pretrain.py, merged_predictions.py and the folder training along with this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import ipirm_pretrain
import timm
import torch
from merged_predictions import Transformed, augmentations, ensembles, measure, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from training import (
    MEAN,
    STD,
    as_program,
    evenly,
    folder_images,
    hash_of,
    load_safely,
    normalized_transform,
    parse,
    precision,
    run_training,
    save_atomically,
    seed_everything,
    test_folder,
    training_images,
    write_atomically,
)

from equireg import (
    ContrastiveDistillation,
    DistillationLoss,
    FeatureDistillation,
    OverhaulDistillation,
)

RECIPES: dict[str, dict[str, Any]] = {
    # Minutes on a CPU: 100 labelled images per class.
    "cifar10-resnet18": {
        "model": "resnet18",
        "stage1": "cifar10-resnet18",
        "image_size": 32,
        "crop_scale": 0.5,
        "images": 1000,
        "epochs": 25,
        "warmup_epochs": 3,
        "batch_size": 100,
        "lr": 1e-3,
        "weight_decay": 0.05,
    },
    # Wang et al., Section 4.2: 50 images per class, 224 pixels, 100 epochs; there by SGD.
    "vipriors-resnet50": {
        "model": "resnet50",
        "stage1": "vipriors-resnet50",
        "image_size": 224,
        "crop_scale": 0.2,
        "images": 0,  # all
        "epochs": 100,
        "warmup_epochs": 10,
        "batch_size": 256,
        "lr": 1e-3,
        "weight_decay": 0.05,
    },
}

TEACHER, SCRATCH, AGAIN = "fine-tuned (the teacher)", "from scratch", "fine-tuned, another seed"
STUDENTS = {
    "KL, logits": "logits",
    "KL, features": "features",
    "OFD, several layers": "ofd",
    "OFD, last layer": "ofd-last",
    "CRD": "crd",
}
# Of the second loss beside the cross entropy; DistillationLoss brings its own.
WEIGHTS = {"features": 10.0, "ofd": 1.0, "ofd-last": 1.0, "crd": 0.1}


# --------------------------------------------------------------------------------------------------------- the models


class BeforeActivation:
    """The inputs of the last ReLU of each stage of a timm ResNet, [B, D, h, w], while it runs: what OFD compares."""

    def __init__(self, model: nn.Module, stages: Iterable[int]):
        self.model, self.stages = model, stages
        self.maps: list[Tensor] = []

    def __enter__(self) -> BeforeActivation:
        self.hooks = []
        for stage in self.stages:
            block = getattr(self.model, f"layer{stage}")[-1]
            activation = block.act3 if hasattr(block, "act3") else block.act2
            # The ReLU works in place.
            self.hooks.append(activation.register_forward_pre_hook(lambda _, x: self.maps.append(x[0].clone())))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def run(model: nn.Module, images: Tensor, stages: Iterable[int] = ()) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, pooled features, and the maps before the activation."""
    with BeforeActivation(model, stages) as before:
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    return model.get_classifier()(pooled).float(), pooled.float(), [part.float() for part in before.maps]


def classifier(options: argparse.Namespace, weights: Path | None, *, strict: bool = True) -> nn.Module:
    """The model with an output for each class, and what it has learned so far."""
    model = timm.create_model(
        options.model, num_classes=len(folder_images(Path(options.data) / "train", options).classes)
    )
    if weights is not None:
        model.load_state_dict(load_safely(weights, sealed=weights != options.encoder), strict=strict)
    return model.to(memory_format=torch.channels_last)


class Student(nn.Module):
    """A classifier and the loss that it learns by; ``method`` is itself, as the shared training loop wants it."""

    clip = 5.0  # largest norm of the gradient

    def __init__(
        self, options: argparse.Namespace, kind: str, model: nn.Module, teacher: nn.Module | None, images: Dataset
    ):
        super().__init__()
        self.options, self.kind, self.of_teacher = options, kind, [teacher]  # in a list: no part of this module
        self.model = model
        self.classify = DistillationLoss(beta=0.0) if kind != "logits" else DistillationLoss()
        channels = [stage["num_chs"] for stage in self.model.feature_info][-4:]
        width = self.model.num_features
        self.stages = {"ofd": (1, 2, 3, 4), "ofd-last": (4,)}.get(kind, ())
        if kind == "features":
            self.distill: nn.Module = FeatureDistillation(width)
        elif self.stages:
            dims = [channels[stage - 1] for stage in self.stages]
            self.distill = OverhaulDistillation(dims, dims)
            self.distill.fit_margins(self._teachers_maps(images))
        elif kind == "crd":
            self.distill = ContrastiveDistillation(width, width, len(images))

    @property
    def method(self) -> Student:
        return self

    def _teachers_maps(self, images: Dataset) -> Iterable[list[Tensor]]:
        for batch, _ in DataLoader(Transformed(images, normalized_transform(self.options)), batch_size=256):
            with torch.no_grad():
                yield run(self.of_teacher[0].cpu(), batch, self.stages)[2]

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        images = images.contiguous(memory_format=torch.channels_last)
        teacher = self.of_teacher[0]
        with precision(self.options, images.device):
            logits, features, maps = run(self.model, images, self.stages)
            if teacher is None:
                theirs = logits.detach(), features, maps
            else:
                with torch.no_grad():
                    theirs = run(teacher.to(images.device), images, self.stages)
        loss = self.classify(logits, theirs[0], labels)
        parts = {"classification": loss.detach()}
        if self.kind in WEIGHTS:
            pairs = {"features": (features, theirs[1]), "crd": (features, theirs[1], indices)}
            extra = self.distill(*pairs.get(self.kind, (maps, theirs[2])))
            loss, parts["distillation"] = loss + WEIGHTS[self.kind] * extra, extra.detach()
        return loss, parts

    def before_step(self, epoch: int) -> None:
        """Before each step of the optimizer."""

    def update(self, step: int, steps: int) -> None:
        """After each step of the optimizer."""


def student(options: argparse.Namespace, kind: str, encoder: Path | None, teacher: nn.Module | None) -> Student:
    model = classifier(options, encoder, strict=False)  # an encoder has no classes yet
    return Student(options, kind, model, teacher, training_images(options))


# ------------------------------------------------------------------------------------------------------------ the data


class Augmented:
    """Makes a batch: crops, flips, RandAugment and random erasing, as in the report."""

    def __init__(self, options: argparse.Namespace, rank: int):
        self.options, self.rank = options, rank
        self.policy = v2.Compose(
            [
                v2.RandomResizedCrop(options.image_size, scale=(options.crop_scale, 1.0), interpolation=3),
                v2.RandomHorizontalFlip(),
                v2.RandAugment(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
                v2.RandomErasing(p=0.25),
            ]
        )

    def __call__(self, samples: list[tuple[int, Any, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            seed_everything(self.options.seed, samples[0][0], self.rank)
            images = torch.stack([self.policy(sample[1]) for sample in samples])
        return images, torch.tensor([sample[2] for sample in samples]), torch.tensor([sample[3] for sample in samples])


def validation_images(options: argparse.Namespace) -> Dataset:
    """The folder ``val`` beside ``test``, or as many training images that no model is trained on with their labels."""
    root = Path(options.data)
    if (root / "val").is_dir() and (root / "test").is_dir():
        return folder_images(root / "val", options)
    used, every = training_images(options), folder_images(root / "train", options)
    paths = set(used.paths)
    rest = [place for place, path in enumerate(every.paths) if path not in paths]
    if not rest:
        raise ValueError(f"--images must leave some of the {len(used)} training images for validation, or give a val/")
    return evenly(every.take(rest), min(len(rest), options.probe_images, 1000))


# ------------------------------------------------------------------------------------------------------- the measures


def evaluate(objective: Student, device: torch.device, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Accuracies, the predictions for what comes after, and the model."""
    parts = {"val": validation_images(options), "test": test_images(options)}
    found = measure(objective.model, parts, options, device, folder)
    save_atomically(folder / "model.pt", objective.model.state_dict())
    return found


def test_images(options: argparse.Namespace) -> Dataset:
    return evenly(folder_images(test_folder(options), options), options.probe_images)


# ------------------------------------------------------------------------------------------------------------- the run


def stage_one(options: argparse.Namespace) -> Path:
    """The file of the encoder: the one that was given, or trained here."""
    if options.encoder is not None:
        return options.encoder
    shared = {key: value for key, value in vars(options).items() if key not in ("variants", "recipe")}
    own = {"method": "simclr", "groups": 2, "weight": 0.2, "mixup": 0.0, "out": options.out / "stage1"}
    recipe = dict(ipirm_pretrain.RECIPES[options.stage1])
    if options.stage1_epochs:
        recipe["epochs"], recipe["update_every"] = options.stage1_epochs, max(1, options.stage1_epochs // 3)
    for name in ("model", "image_size"):
        recipe[name] = getattr(options, name)
    if options.stage1_images:
        recipe["images"] = options.stage1_images
        recipe["batch_size"] = min(recipe["batch_size"], options.stage1_images)
    stage = argparse.Namespace(**{**shared, **recipe, **own})
    ipirm_pretrain.train(stage, True)
    return ipirm_pretrain.folder_of(stage, True) / "encoder.pt"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", type=Path, help="encoder.pt of ipirm_pretrain.py, of the same --model")
    parser.add_argument("--stage1-epochs", type=int, default=0, help="of pretraining; 0: the recipe's")
    parser.add_argument("--stage1-images", type=int, default=0, help="of pretraining; 0: the recipe's")
    parser.add_argument("--method", choices=(*STUDENTS.values(), "all"), default="all", help="of distillation")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))


def main() -> None:
    options = parse(__doc__.splitlines()[0], RECIPES, add_options)
    encoder = stage_one(options)
    trained, folders = {}, {}

    def train(name: str, kind: str, seed: int, start: Path | None, teacher: nn.Module | None) -> dict[str, float]:
        own = argparse.Namespace(**{**vars(options), "seed": seed, "method": name})
        folders[name] = folder = options.out / f"{kind}-{seed}"
        variant = {"kind": kind, "encoder": start and hash_of(start), "students": options.method}
        make = partial(student, own, kind, start, teacher)
        measure = partial(evaluate, options=own, folder=folder)
        trained[name] = run_training(own, variant, folder, "", make, partial(Augmented, own), measure)
        return trained[name]

    train(SCRATCH, "scratch", options.seed, None, None)
    train(TEACHER, "plain", options.seed, encoder, None)
    train(AGAIN, "plain", options.seed + 1, encoder, None)
    teacher = classifier(options, folders[TEACHER] / "model.pt").eval().requires_grad_(False)
    for name, kind in STUDENTS.items():
        if options.method in (kind, "all"):
            train(name, kind, options.seed + 1, encoder, teacher)

    if all(trained.values()):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pretrained = {name: folder for name, folder in folders.items() if name != SCRATCH}
        best = max(pretrained, key=lambda name: trained[name]["val plain"])
        model = classifier(options, folders[best] / "model.pt").eval().to(device)
        merged = {**augmentations(model, test_images(options), options, best, device), **ensembles(pretrained)}
        report(trained, merged, options.out / "distill.png")
        write_atomically(options.out / "merged.json", (json.dumps(merged, indent=2) + "\n").encode())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    as_program(main)
