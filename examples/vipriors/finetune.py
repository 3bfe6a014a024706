"""Step 3: fine-tuning on few labels, by cross entropy alone or with the one line of EqInv.

    loss = F.cross_entropy(head(irm.mask(f)), y) + irm(f, y, idx)

Two views of each image are one batch, the classifier's weights are normalised, and the rate is divided by ten at 60%
and 80% of the epochs (Wang et al., ECCV 2022). A ViT has AdamW, with lower rates for earlier blocks (supplementary B).
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from equireg import ClassWiseIRM, Environments, FeatureMask
from vipriors.backbone import accuracy, create, encoder_of, frozen_features, is_vit
from vipriors.images import Augmented, measured, names_hash, read
from vipriors.run_folder import fit, hash_of, load, made_with, once, save, warm_cosine
from vipriors.training import TrainingError, seed_everything

OPTIONS: dict[str, tuple[Any, ...]] = {
    "penalty": ("rex", "off: cross entropy alone", ("off", "rex", "irmv1")),
    "weight": (10.0, "of the penalty; EqInv, supplementary B: 2, 10, 100 for 10, 20, 50 images of a class"),
    "drop_path": (0.0, "share of the residual branches of a vision transformer that are dropped"),
}


def classifier(options: Namespace, penalty: str, num_classes: int, encoder: Path | None = None) -> nn.Module:
    """The model; its classifier is the mask, where there is a penalty, and a layer of normalised weights."""
    model = create(options, encoder)
    mask = nn.Identity() if penalty == "off" else FeatureMask(model.num_features)
    head = nn.Sequential(mask, weight_norm(nn.Linear(model.num_features, num_classes)))
    setattr(model, model.pretrained_cfg["classifier"], head)
    return model


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, options: Namespace, classes: int, encoder: Path | None = None, environments: Path | None = None):
        super().__init__()
        self.model, self.irm = classifier(options, options.penalty, classes, encoder), None
        if options.penalty != "off":
            how = {"weight": options.weight, "penalty": options.penalty, "gather_distributed": True}
            self.irm = ClassWiseIRM(self.model.num_features, classes, **how)
            self.irm.mask = self.model.get_classifier()[0]
            if environments is not None:
                self.irm.environments = Environments()
                self.irm.environments.load_state_dict(load(environments))

    def forward(self, views: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        f = self.model.forward_head(self.model.forward_features(views), pre_logits=True).float()
        loss = F.cross_entropy(self.model.get_classifier()(f).float(), labels)
        parts = {"classification": loss}
        if self.irm is not None:
            parts["irm"] = self.irm(f, labels, None if self.irm.environments is None else indices)
            loss = loss + parts["irm"]
        return loss, parts


def fine_tuned(options: Namespace, num_classes: int) -> nn.Module:
    """The model that this step left, frozen."""
    path = options.out / "finetune" / "model.pt"
    if not path.exists():
        raise TrainingError(f"{path}: no such file; run Step 3 (finetune) first")
    model = classifier(options, made_with(path.parent, "penalty"), num_classes)
    model.load_state_dict(load(path))
    return model.eval().requires_grad_(False)


def environments_of(options: Namespace, encoder: Path | None) -> Path | None:
    """Those of Step 2, of the same encoder; None, and they are found in each batch, where there are none."""
    path = options.out / "environments" / "environments.pt"
    if options.penalty == "off" or not path.exists():
        return None
    if made_with(path.parent, "encoder") != hash_of(encoder):
        raise TrainingError(f"{path} was made with another encoder than {encoder}; run Step 2 (environments) again")
    return path


def by_layers(objective: Objective, options: Namespace) -> torch.optim.Optimizer:
    """AdamW: the head has the whole rate, and each block 0.65 times that of the block behind it."""
    model, decay = objective.model, options.weight_decay
    groups = param_groups_layer_decay(model, decay, model.no_weight_decay(), layer_decay=0.65)
    if objective.irm is not None:
        groups += param_groups_weight_decay(objective.irm.projection, decay)
    return torch.optim.AdamW(groups, lr=options.lr)


def steps_down(options: Namespace) -> Callable[[int, int], float]:
    """A tenth of the rate from 60% of the epochs on, a hundredth from 80%."""
    return lambda step, steps: options.lr * 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))


def run(options: Namespace) -> dict[str, Any]:
    """``model.pt``; accuracy on validation and test images, in percent."""
    images, encoder = read(options, "train"), encoder_of(options)
    environments = environments_of(options, encoder)
    made_of = {"encoder": hash_of(encoder), "environments": hash_of(environments), "files": names_hash(images)}

    def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        seed_everything(options.seed)
        objective = Objective(options, len(images.classes), encoder, environments)
        vit, batches = is_vit(options.model), Augmented(options, images, views=2)
        rate, optimizer = (warm_cosine if vit else steps_down)(options), by_layers(objective, options) if vit else None
        if not fit(options, folder, settings, objective, batches, rate, optimizer=optimizer):
            return {}
        save(folder / "model.pt", objective.model.state_dict())
        model, splits = objective.model, measured(options)
        return {split: accuracy(*frozen_features(model, read(options, split), options)) for split in splits}

    return once(options, "finetune", made_of, work)
