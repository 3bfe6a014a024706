"""Optional: distillation. A student starts from Step 1's encoder and learns from the labels and the fine-tuned model.

loss = criterion(student(images), teacher(images), labels)
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torchvision.transforms import v2

from equireg import ContrastiveDistillation, DistillationLoss, FeatureDistillation, ImageFiles, OverhaulDistillation
from vipriors.backbone import create, encoder_of, is_vit
from vipriors.finetune import fine_tuned
from vipriors.images import Augmented, names_hash, read, whole
from vipriors.run_folder import fit, hash_of, once, save, warm_cosine
from vipriors.test_time import measure
from vipriors.training import seed_everything

WEIGHTS = {"features": 10.0, "ofd": 1.0, "crd": 0.1}  # beside the cross entropy; KL brings its own
OPTIONS: dict[str, tuple[Any, ...]] = {
    "method": ("logits", "KL on logits or features, OFD on the stages of a ResNet, or CRD", ("logits", *WEIGHTS)),
    "optimizer": ("adamw", "optimizer", ("adamw", "sgd")),
}


def check(options: Namespace) -> None:
    if options.method == "ofd" and is_vit(options.model):
        raise ValueError(f"--method ofd compares the stages of a ResNet, got --model {options.model}")
    if options.method == "crd" and PartialState().num_processes > 1:
        raise ValueError("--method crd goes in one process: each would fill the memory with its own images alone")


def outputs(model: nn.Module, images: Tensor, stages: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, pooled features, and of each stage the input [B, D, h, w] of its last ReLU, which OFD compares."""
    maps: list[Tensor] = []
    with ExitStack() as hooks:
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4) if stages else ():
            activation = stage[-1].act3 if hasattr(stage[-1], "act3") else stage[-1].act2
            hook = activation.register_forward_pre_hook(lambda _, x: maps.append(x[0].clone()))  # it works in place
            hooks.callback(hook.remove)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    return model.get_classifier()(pooled).float(), pooled.float(), [part.float() for part in maps]


class Student(nn.Module):
    """A classifier and the loss that it learns by."""

    def __init__(self, kind: str, model: nn.Module, teacher: nn.Module, images: ImageFiles, transform: Any):
        super().__init__()
        self.kind, self.model, self.of_teacher = kind, model, [teacher]  # in a list: no part of this module
        self.classify = DistillationLoss(**({} if kind == "logits" else {"beta": 0.0}))
        width, self.stages = model.num_features, kind == "ofd"
        if kind == "features":
            self.distill: nn.Module = FeatureDistillation(width)
        elif kind == "crd":
            self.distill = ContrastiveDistillation(width, width, len(images))
        elif self.stages:
            dims = [stage["num_chs"] for stage in model.feature_info][-4:]
            self.distill = OverhaulDistillation(dims, dims)
            self.distill.fit_margins(self._maps_of_teacher(images, transform))

    @torch.no_grad()
    def _maps_of_teacher(self, images: ImageFiles, transform: Any) -> Iterator[list[Tensor]]:
        for places in torch.arange(len(images)).split(256):
            batch = torch.stack([transform(images[place][0]) for place in places.tolist()])
            yield outputs(self.of_teacher[0], batch, self.stages)[2]

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, features, maps = outputs(self.model, images, self.stages)
        with torch.no_grad():
            theirs = outputs(self.of_teacher[0].to(images.device), images, self.stages)
        loss = self.classify(logits, theirs[0], labels)
        parts = {"classification": loss}
        if self.kind in WEIGHTS:
            given = {"features": (features, theirs[1]), "crd": (features, theirs[1], indices)}
            parts["distillation"] = self.distill(*given.get(self.kind, (maps, theirs[2])))
            loss = loss + WEIGHTS[self.kind] * parts["distillation"]
        return loss, parts


def run(options: Namespace) -> dict[str, Any]:
    """``model.pt``; accuracies of one view and of ten crops, in percent."""
    images, encoder = read(options, "train"), encoder_of(options)
    teacher = fine_tuned(options, len(images.classes))
    made_of = {"encoder": hash_of(encoder), "teacher": hash_of(options.out / "finetune" / "model.pt")}

    def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        seed_everything(options.seed)
        # RandAugment and random erasing: IP-IRM, Section 4.2.
        batches = Augmented(options, images, before=[v2.RandAugment()], after=[v2.RandomErasing(p=0.25)])
        model = create(options, encoder, len(images.classes))
        student = Student(options.method, model, teacher, images, whole(options))
        if not fit(options, folder, settings, student, batches, warm_cosine(options)):
            return {}
        save(folder / "model.pt", model.state_dict())
        return measure(model, options)[0]

    return once(options, "distill", made_of | {"files": names_hash(images)}, work)
