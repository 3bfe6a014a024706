"""The values of the recipe: ``vipriors10``, ``20``, ``50`` as published, and ``tiny10``, ``20``, ``50`` for a CPU.

The number is that of labelled images in each class. Flags change the parts of a preset.
"""

from __future__ import annotations

from typing import Any

from ipirm_pretrain import RECIPES

from vipriors.backbone import is_vit

PENALTY = {10: 2.0, 20: 10.0, 50: 100.0}  # λ of EqInv by the number of images in a class (supplementary B)

# 800 epochs and a queue of 16,384 (EqInv, supplementary B); Adam at 1e-3, 128 dimensions, a partition every 50 epochs
# (IP-IRM, Section 4.2).
IPIRM = dict(RECIPES["vipriors-resnet50"])
del IPIRM["images"]  # all of them
NETWORK = {name: IPIRM.pop(name) for name in ("model", "image_size", "crop_scale")}

# 224 pixels and a ResNet-50, on several GPUs.
PAPER: dict[str, dict[str, Any]] = {
    "all": {**NETWORK, "patch_size": 16, "late_class_token": 0},
    # λ₁ 0.2 (IP-IRM, Section 4.2); SER of 1% of the batch (its Section 4.1).
    "pretrain": {**IPIRM, "weight": 0.2, "ratio": 0.01},
    # EqInv, Section 5.2: SGD, the rate a tenth from epochs 30 and 40 on.
    "finetune": {"epochs": 50, "batch_size": 128, "lr": 0.05, "weight_decay": 1e-4},
    # IP-IRM, Section 4.2: a rate of 0.1 for 160 images, label smoothing; the best loss of its Table 4.
    "distill": {
        "epochs": 100,
        "warmup_epochs": 10,
        "batch_size": 160,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "method": "ofd",
        "optimizer": "sgd",
    },
}

# What MoCo-v2 and SimSiam were published with, where that is another setting than SimCLR's in IP-IRM.
OWN: dict[str, dict[str, Any]] = {
    "mocov2": {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "batch_size": 256, "warmup_epochs": 0},
    "simsiam": {
        "optimizer": "sgd",
        "lr": 0.05,
        "weight_decay": 1e-4,
        "batch_size": 256,
        "warmup_epochs": 0,
        "output_dim": 2048,
    },
}

# 64 pixels and a ResNet of ten layers: minutes on a CPU.
TINY: dict[str, dict[str, Any]] = {
    "all": {"model": "resnet10t", "image_size": 64, "patch_size": 8, "late_class_token": 0, "crop_scale": 0.3},
    "pretrain": {
        "epochs": 20,
        "warmup_epochs": 2,
        "batch_size": 100,
        "lr": 1e-3,
        "weight_decay": 1e-6,
        "hidden_dim": 512,
        "output_dim": 128,
        "momentum": 0.99,
        "queue_size": 1000,
        "update_every": 8,
        "weight": 0.2,
        "ratio": 0.5,  # a small share is a small contrast, see docs/ser.md
    },
    "finetune": {"epochs": 30, "batch_size": 50, "lr": 0.05, "weight_decay": 1e-4},
    "distill": {"epochs": 30, "warmup_epochs": 3, "batch_size": 50, "lr": 1e-3, "weight_decay": 0.05},
}

# A vision transformer's fine-tuning (EqInv, supplementary B), by AdamW along a cosine.
VIT = {"lr": 5e-4, "weight_decay": 0.05, "warmup_epochs": 5, "layer_decay": 0.65, "drop_path": 0.1}
# No paper distils one; OFD compares the stages of a ResNet.
VIT_STUDENT = {"method": "logits", "optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.05}

FAMILIES = {"tiny": TINY, "vipriors": PAPER}
PRESETS = tuple(f"{family}{shots}" for family in FAMILIES for shots in PENALTY)


def values(preset: str, step: str, *, method: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Those of a step; ``method`` of pretraining and ``model`` are the ones chosen, which decide some of them."""
    family = next(name for name in FAMILIES if preset.startswith(name))
    shots = int(preset[len(family) :])
    chosen = {**FAMILIES[family]["all"], "shots": shots, **FAMILIES[family].get(step, {})}
    published = family == "vipriors"
    if step == "pretrain" and published:
        chosen.update(OWN.get(method or "", {}))
    if step == "finetune":
        chosen["weight"] = PENALTY[shots]
    if is_vit(model or chosen["model"]):
        if step == "finetune":
            chosen.update(VIT, **({"batch_size": 256} if published else {}))
        elif step == "distill" and published:
            chosen.update(VIT_STUDENT)
    return chosen
