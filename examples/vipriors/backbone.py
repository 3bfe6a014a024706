"""The network of all steps: a timm ResNet or vision transformer, for images of the recipe's size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from ipirm_pretrain import Channels
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from training import load_safely, precision

from equireg import LateClassToken, WithIndex, extract_features

STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}  # of a ResNet's stages
SAME = ("model", "patch_size", "late_class_token")  # of Step 1 and of the steps that take its encoder


def is_vit(model: str) -> bool:
    """By its name in timm, which must have it."""
    if not timm.is_model(model):
        raise ValueError(f"--model must be the name of a model in timm, got {model!r}")
    return timm.model_entrypoint(model).__module__.endswith(("vision_transformer", "deit"))


def create(options: argparse.Namespace, encoder: Path | str | None = None, num_classes: int = 0) -> nn.Module:
    """The model, with the weights of an encoder where one is given, and an output for each class.

    The class token of a vision transformer enters behind ``--late-class-token`` blocks, by hooks on these.
    """
    sizes: dict[str, Any] = {}
    if is_vit(options.model):
        sizes = {"img_size": options.image_size, "patch_size": options.patch_size, "dynamic_img_size": True}
        sizes["drop_path_rate"] = getattr(options, "drop_path", 0.0)  # in fine-tuning
    model = timm.create_model(options.model, num_classes=0, **sizes)
    if getattr(options, "late_class_token", 0):
        LateClassToken(model, options.late_class_token)
    if encoder is not None:
        check_same(Path(encoder), options)
        ours = Path(encoder).with_name("options.json").exists()
        model.load_state_dict(load_safely(Path(encoder), sealed=ours))
    if num_classes:
        model.reset_classifier(num_classes)
    return model.to(memory_format=torch.channels_last)


def check_same(encoder: Path, options: argparse.Namespace) -> None:
    """Another patch size changes what the weights mean, and another place of the class token no shape tells."""
    beside = encoder.with_name("options.json")
    old = json.loads(beside.read_text()) if beside.exists() else {}
    changed = [name for name in SAME if name in old and old[name] != getattr(options, name, old[name])]
    if changed:
        was = ", ".join(f"{name} {old[name]!r} (now {getattr(options, name)!r})" for name in changed)
        raise ValueError(f"{encoder} was trained with other options: {was}")


def frozen_features(
    model: nn.Module, images: Dataset, options: argparse.Namespace, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features [N, D], or a classifier's logits, and labels [N] of the images."""
    loader = DataLoader(WithIndex(images), batch_size=256, num_workers=options.workers)
    with precision(options, device):
        features, labels, _ = extract_features(nn.Sequential(Channels(), model), loader, progress=False)
    return features.float(), labels
