"""One training of each kind, into a folder of its own: the other examples' trainers, measured alike at the end."""

from __future__ import annotations

import argparse
import functools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ipirm_pretrain
import quickstart
import reconstruction_pretrain
import ser_pretrain
import torch
from evidence.measures import (
    corrupted_accuracies,
    encode,
    equivariance,
    evenly_drawn,
    few_shot_accuracies,
    images_of,
    labelled,
    probe,
    r2,
)
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm.auto import tqdm
from training import MEAN, STD, normalized_transform, parse, run_training, save_atomically, start_processes
from vipriors import finetune
from vipriors import images as recipe_images
from vipriors.backbone import create, frozen_features

from equireg import Environments

NORMALIZE = v2.Normalize(MEAN, STD)


class Probes(NamedTuple):
    """What the measures of an encoder take."""

    data: dict[str, Any]  # name of a data set: its folder, and numbers of labels for each class
    robust: str  # the one of them whose test images are corrupted, with the largest number of labels
    split: str
    images: int  # of corrupted ones of each kind
    r2_epochs: int  # of the regressors


class Encoder(NamedTuple):
    """What is measured: pixels to features, and the layer whose map of tokens is looked at."""

    features: nn.Module
    model: nn.Module
    layer: str
    image_size: int


def measure(encoder: Encoder, probes: Probes, seed: int) -> dict[str, Any]:
    """Accuracies from few labels, equivariance, R², and accuracy on corrupted images."""
    size, features = encoder.image_size, encoder.features.eval()
    found: dict[str, Any] = {"accuracy": few_shot_accuracies(features, probes.data, size, probes.split, seed)}
    if probes.split == "val":  # settings are chosen by accuracy
        return found
    folder, shots = probes.data[probes.robust]
    classifier = probe(*labelled(features, folder, size, max(shots), seed))

    def predict(pixels: Tensor) -> Tensor:
        return torch.from_numpy(classifier.predict(encode(features, pixels)))

    return {
        **found,
        **told(encoder, folder, probes.r2_epochs),
        "corrupted": corrupted_accuracies(predict, folder, size, probes.images),
    }


def told(encoder: Encoder, folder: Path, r2_epochs: int) -> dict[str, Any]:
    """Equivariance of some test images, and R² on at most 2,000."""
    size = encoder.image_size
    images = evenly_drawn(images_of(folder, size, "test")[0], 2000)
    score = equivariance(encoder.model, encoder.layer, NORMALIZE(evenly_drawn(images, 128)))
    return {"equivariance": score, "r2": r2(encoder.features, images, size / 32, r2_epochs)}


# ------------------------------------------------------------------------------------------------- self-supervised


class Normalized(nn.Module):
    """An encoder of pixels in 0 .. 1."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(NORMALIZE(pixels).contiguous(memory_format=torch.channels_last))


class Pooled(nn.Module):
    """The features of a backbone that returns tokens besides."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images, return_tokens=True)[0]


def ser_encoder(objective: nn.Module, options: argparse.Namespace) -> Encoder:
    backbone = objective.method.backbone
    layer = f"blocks.{options.layer - 1}"
    return Encoder(Normalized(Pooled(backbone)), backbone.vit, layer, options.image_size)


def reconstruction_encoder(objective: nn.Module, options: argparse.Namespace) -> Encoder:
    backbone = objective.method.backbone
    layer = f"blocks.{len(backbone.vit.blocks) - 1}"
    return Encoder(Normalized(Pooled(backbone)), backbone.vit, layer, options.image_size)


def ipirm_encoder(objective: nn.Module, options: argparse.Namespace) -> Encoder:
    backbone = objective.method.backbone
    return Encoder(Normalized(backbone), backbone, "layer2", options.image_size)


class SelfSupervised(NamedTuple):
    """How a pretraining example is run: its module, what it calls its variants, and its encoder."""

    module: Any
    make_objective: Any
    make_collate: Any
    encoder: Any


def views_of_ser(options: argparse.Namespace, variant: Any) -> Any:
    return partial(ser_pretrain.Views, options, variant)


def views_of_reconstruction(options: argparse.Namespace, variant: Any) -> Any:
    return partial(reconstruction_pretrain.Crops, options)


def views_of_ipirm(options: argparse.Namespace, variant: Any) -> Any:
    return partial(ipirm_pretrain.TwoViews, options)


PRETRAININGS = {
    "ser": SelfSupervised(ser_pretrain, ser_pretrain.Objective, views_of_ser, ser_encoder),
    "reconstruction": SelfSupervised(
        reconstruction_pretrain, reconstruction_pretrain.Objective, views_of_reconstruction, reconstruction_encoder
    ),
    "ipirm": SelfSupervised(ipirm_pretrain, ipirm_pretrain.Objective, views_of_ipirm, ipirm_encoder),
}


def options_of(trainer: str, flags: dict[str, Any], seed: int, folder: Path) -> argparse.Namespace:
    """Those of the example with its flags changed."""
    module = PRETRAININGS[trainer].module
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    arguments += ["--seed", str(seed), "--out", str(folder), "--resume"]
    return parse("", module.RECIPES, module.add_options, arguments)


def pretrain(
    trainer: str, flags: dict[str, Any], variant: Any, seed: int, folder: Path, probes: Probes
) -> dict[str, Any]:
    """An encoder from images without labels, and its measures."""
    kind, options = PRETRAININGS[trainer], options_of(trainer, flags, seed, folder)

    def evaluate(objective: nn.Module, device: torch.device) -> dict[str, Any]:
        encoder = kind.encoder(objective, options)
        save_atomically(folder / "encoder.pt", encoder.model.state_dict())
        return measure(encoder, probes, seed)

    make = partial(kind.make_objective, options, variant)
    return run_training(options, {"variant": variant}, folder, "", make, kind.make_collate(options, variant), evaluate)


# ----------------------------------------------------------------------------------------------------- fine-tuning

FINETUNING = {
    "model": "resnet10t",
    "image_size": 32,
    "crop_scale": 0.3,
    "epochs": 20,
    "batch_size": 128,
    "lr": 0.05,
    "weight_decay": 1e-4,
}


def finetuning_options(flags: dict[str, Any], seed: int) -> argparse.Namespace:
    def add_options(parser: argparse.ArgumentParser) -> None:
        recipe_images.add_options(parser)
        finetune.add_options(parser)
        parser.add_argument("--method", default="eqinv")

    arguments = ["--seed", str(seed), "--resume"]
    for name, value in flags.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return parse("", {"report": FINETUNING}, add_options, arguments)


def fine_tune(
    flags: dict[str, Any], similarity: str | None, seed: int, folder: Path, probes: Probes | None
) -> dict[str, Any]:
    """A classifier from few labels, by cross entropy or with EqInv on environments of the encoder's features."""
    options = finetuning_options(flags, seed)
    if similarity is not None:
        options.environments = folder / "environments.pt"
        folder.mkdir(parents=True, exist_ok=True)
        save_atomically(folder / "environments.pt", environments(options, similarity).state_dict())

    def measured(
        objective: nn.Module, device: torch.device, options: argparse.Namespace, folder: Path
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"accuracy": finetune.evaluate(objective, device, options, folder)}
        if probes is not None:
            model, place = objective.model.eval(), probes.data[probes.robust][0]
            encoder = Encoder(Normalized(model.backbone), model.backbone, "layer2", options.image_size)

            def predict(pixels: Tensor) -> Tensor:
                return encode(Normalized(model), pixels).argmax(1)

            found |= told(encoder, place, probes.r2_epochs)
            found["corrupted"] = corrupted_accuracies(predict, place, options.image_size, probes.images)
        return found

    return finetune.train(options, folder, measure=measured)


@torch.no_grad()
def environments(options: argparse.Namespace, similarity: str) -> Environments:
    """Step 2: of the features of the frozen encoder; ``adjusted``, ``plain``, or ``random`` for a control."""
    images, device = recipe_images.read(options, "train"), start_processes()[2]
    images.transform = normalized_transform(options)
    features, labels = frozen_features(create(options, options.encoder).to(device), images, options, device)
    if similarity == "random":
        features = torch.randn(features.shape, generator=torch.Generator().manual_seed(options.seed))
    return Environments.split(features, labels, len(images.classes), adjust=similarity != "plain")


# ------------------------------------------------------------------------------------------------- coloured digits


@functools.cache
def digits_encoder(seed: int, epochs: int) -> tuple[nn.Module, nn.Module]:
    """Cross entropy on coloured digits: the base of the comparison, and the features of the environments."""
    with tqdm(total=epochs, desc="digits", leave=False) as bar:
        return quickstart.train(quickstart.colored_digits(seed)[0], None, seed, epochs, bar)


def train_digits(control: str | None, seed: int, epochs: int) -> dict[str, Any]:
    """Accuracy on digits that wear another class's colour; ``control`` as in the quickstart, ``base`` without EqInv."""
    training, validation, test = quickstart.colored_digits(seed)
    plain = digits_encoder(seed, epochs)
    trained = plain
    if control != "base":
        torch.manual_seed(seed)
        irm = quickstart.regularizer(plain[0], training, control)
        with tqdm(total=epochs, desc="digits", leave=False) as bar:
            trained = quickstart.train(training, irm, seed, epochs, bar)
    conflicting = {
        name: quickstart.accuracies(*trained, part)[1] for name, part in (("val", validation), ("test", test))
    }
    return {"accuracy": conflicting}
