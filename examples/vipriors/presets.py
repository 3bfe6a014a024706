"""The values of the recipe: ``vipriors10``, ``20``, ``50`` as published (λ of EqInv is a choice between several
that were), and ``tiny10``, ``20``, ``50`` for a CPU.

The number is that of labelled images in each class. Flags change the parts of a preset.
"""

from typing import Any

from vipriors.backbone import is_vit

TRAINING: dict[str, tuple[Any, ...]] = {  # the flags of every training
    "epochs": (20, "passes over the images"),
    "warmup_epochs": (0, "of a rate that rises from nothing"),
    "batch_size": (100, "images of a step, of all processes together"),
    "lr": (1e-3, "the largest learning rate"),
    "weight_decay": (1e-6, "of the optimizer"),
    "accumulate": (1, "parts of a batch whose gradients are added up"),
}
Values = dict[str, dict[str, Any]]
# 224 pixels and a ResNet-50, on several GPUs.
PAPER: Values = {
    "all": {"model": "resnet50", "image_size": 224, "crop_scale": 0.2, "patch_size": 16},
    # 800 epochs and a queue of 16,384 (EqInv, supplementary B); Adam at 1e-3, 128 dimensions, a partition every 50
    # epochs, λ₁ 0.2 (IP-IRM, Section 4.2), the first before the training, as released; SER of 1% of the batch.
    "pretrain": {"epochs": 800, "warmup_epochs": 10, "batch_size": 512, "lr": 1e-3, "weight_decay": 1e-6}
    | {"momentum": 0.999, "hidden_dim": 2048, "queue_size": 16384, "update_every": 50, "ratio": 0.01},
    # EqInv, Section 5.2: SGD, the rate a tenth from epochs 30 and 40 on; RandAugment after pretraining (its Table 1).
    # The paper contradicts itself on λ: supplementary B prints 2, 10, 100 for 10, 20, 50 images of a class, and beside
    # it that the demand falls with more of them; in Fig. 6a, 10 is best at 20 images. The released commands have 100 at
    # 10 images, and with RandAugment, as here, 10 at all three.
    "finetune": {"epochs": 50, "batch_size": 128, "lr": 0.05, "weight_decay": 1e-4, "augment": "rand", "weight": 10.0},
    # IP-IRM, Section 4.2: a rate of 0.1 for 160 images; the best loss of its Table 4.
    "distill": {"epochs": 100, "warmup_epochs": 10, "batch_size": 160, "lr": 0.1, "weight_decay": 1e-4}
    | {"method": "ofd", "optimizer": "sgd"},
}
# What MoCo-v2 and SimSiam were published with, where that is another setting than SimCLR's in IP-IRM.
OWN: Values = {
    "mocov2": (sgd := {"optimizer": "sgd", "weight_decay": 1e-4, "batch_size": 256, "warmup_epochs": 0}) | {"lr": 0.03},
    "simsiam": {**sgd, "lr": 0.05, "output_dim": 2048},
}
# 64 pixels and a ResNet of ten layers: minutes on a CPU. What is missing has the default of its flag.
TINY: Values = {
    "all": {"model": "resnet10t"},
    "pretrain": {"epochs": 20, "warmup_epochs": 2, "batch_size": 100, "lr": 1e-3, "weight_decay": 1e-6},
    "finetune": {"epochs": 30, "batch_size": 50, "lr": 0.05, "weight_decay": 1e-4},
    "distill": {"epochs": 30, "warmup_epochs": 3, "batch_size": 50, "lr": 1e-3, "weight_decay": 0.05},
}
# A vision transformer's fine-tuning (EqInv, supplementary B), by AdamW along a cosine.
VIT = {"lr": 5e-4, "weight_decay": 0.05, "warmup_epochs": 5, "drop_path": 0.1}
# No paper distils one; OFD compares the stages of a ResNet.
VIT_STUDENT = {"method": "logits", "optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.05}
PRESETS = tuple(f"{family}{shots}" for family in ("tiny", "vipriors") for shots in (10, 20, 50))


def values(preset: str, step: str, *, method: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Those of a step, or of "all"; ``method`` of pretraining and ``model`` decide some of them."""
    published, shots = preset.startswith("vipriors"), int(preset[-2:])
    family = PAPER if published else TINY
    vit = is_vit(model or family["all"]["model"])
    chosen = family.get(step, {})
    if step == "all":
        return chosen | {"shots": shots}
    if step == "pretrain" and published:
        return chosen | OWN.get(method or "", {})
    if step == "finetune":
        return chosen | (VIT if vit else {}) | ({"batch_size": 256} if vit and published else {})
    return chosen | (VIT_STUDENT if step == "distill" and vit and published else {})
