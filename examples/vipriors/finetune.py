"""Step 3: fine-tuning on few labels, by cross entropy alone or with the one line of EqInv.

    loss = F.cross_entropy(head(irm.mask(f)), y) + irm(f, y, idx)

Two views of each image are one batch, and the rate is divided by ten at 60% and 80% of the epochs (Wang et al., ECCV
2022). A ViT has AdamW, with lower rates for earlier blocks (supplementary B). The classifier's weights are normalised,
as in the paper, or plain, as released by its authors; with a penalty or without, its features have the length 10, as
released.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.transforms import v2

from equireg import ClassWiseIRM, Environments, FeatureMask, ImageFiles, SelfRegLoss, spectral_decoupling
from vipriors.backbone import accuracy, create, encoder_of, frozen_features, is_vit
from vipriors.images import Augmented, colors, measured, names_hash, read
from vipriors.run_folder import finished, fit, hash_of, load, made_with, once, save, warm_cosine
from vipriors.training import TrainingError, seed_everything

OPTIONS: dict[str, tuple[Any, ...]] = {
    "objective": ("paper", "EqInv's: that of the paper, or of its authors' code", ("paper", "released")),
    "penalty": ("rex", "off: cross entropy alone", ("off", "rex", "irmv1")),
    "weight": (
        10.0,
        "λ, of the penalty, to be chosen on validation images, for EqInv contradicts itself: supplementary B prints "
        "2, 10, 100 for 10, 20, 50 images of a class, and that the demand falls with more; 10 is best at 20 in its "
        "Fig. 6a; its authors' commands have 100 at 10, and with RandAugment 10 at all three",
    ),
    "penalty_from": (0.2, "share of the training before the penalty; λ is 0 until then"),
    "contrast_weight": (
        1.0,
        "times the published weight of the contrast, to be chosen on validation images: with two images of a class in "
        "a batch it mostly pushes; with 10 images of a class, SupCon cost two points at 1 and gained 0.4 at 0.1",
    ),
    "scale": (10.0, "length of the features that the classifier sees, with a penalty or without; 0: as they are"),
    "augment": (
        "crop",
        "what cross entropy alone sees: crops and flips, or these and colours and blur as in pretraining (strong), "
        "RandAugment or TrivialAugment",
        ("crop", "strong", "rand", "trivial"),
    ),
    "magnitude": (9, "of RandAugment, 1 to 30"),
    "mixup": (0.0, "of the Beta distribution by which images for cross entropy are mixed; 0: unmixed"),
    "label_smoothing": (0.0, "share of a label that all classes have"),
    "sample_weights": ("0", "sharpness of the weights of Step 2 in cross entropy, a number or auto; 0: all alike"),
    "decoupling": (0.0, "weight of spectral decoupling, a penalty on squared logits that EqInv is compared with"),
    "selfreg": (0.0, "weight of SelfReg, which pulls samples of a class together and EqInv is compared with"),
    "drop_path": (0.0, "share of the residual branches of a vision transformer that are dropped"),
}
HEAD = ("objective", "penalty", "scale")  # what decides the layers of the classifier
LARGEST = {"penalty_from": 1, "label_smoothing": 1, "drop_path": 1, "magnitude": 30}


def check(options: Namespace) -> None:
    if options.warmup_epochs and not is_vit(options.model):
        raise ValueError(
            "--warmup-epochs of fine-tuning goes with a vision transformer; a ResNet's rate falls in steps"
        )
    if sharpness_of(options) and options.mixup:
        raise ValueError(
            "--mixup goes without --sample-weights: a mixed image is two samples, each with its own weight"
        )
    if options.selfreg and options.mixup:
        raise ValueError("--mixup goes without --selfreg: a mixed image is of two classes")


def sharpness_of(options: Namespace) -> float | str:
    """Of the weights of samples; 0 is none."""
    if (given := options.sample_weights) == "auto":
        return given
    try:
        if 0 <= (sharpness := float(given)) < math.inf:
            return sharpness
    except ValueError:
        pass
    raise ValueError(f"--sample-weights must be auto, or a number of at least 0, got {given!r}")


class Normalized(nn.Module):
    """Features of a given length: what ``FeatureMask(scale=)`` does, without a mask."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features, dim=-1, eps=1e-6)


def classifier(options: Namespace, how: dict[str, Any], num_classes: int, encoder: Path | None = None) -> nn.Module:
    """The model, whose classifier is the mask, where there is a penalty, and a linear layer, as ``HEAD`` says."""
    model, scale = create(options, encoder), how["scale"] or None
    linear = nn.Linear(model.num_features, num_classes)  # drawn before the mask: alike with a penalty and without
    linear = linear if how["objective"] == "released" else weight_norm(linear)
    if how["penalty"] == "off":
        before: nn.Module = Normalized(scale) if scale else nn.Identity()
    else:
        before = FeatureMask(model.num_features, scale=scale)
    setattr(model, model.pretrained_cfg["classifier"], nn.Sequential(before, linear))
    return model


class Views:
    """Makes a batch: two views of each image for cross entropy, and two for EqInv, or None where they are the same.

    EqInv compares plain views, whatever cross entropy sees: the sample of a mixed one would be in no environment.
    """

    def __init__(self, options: Namespace, images: ImageFiles):
        self.images, self.steps = images, len(images) // options.batch_size * options.epochs
        policies = {"crop": [], "strong": colors(options), "trivial": [v2.TrivialAugmentWide()]}
        policies["rand"] = [v2.RandAugment(magnitude=options.magnitude)]
        more = policies[options.augment]
        self.classified, self.compared = Augmented(options, images, views=2, before=more), None
        if options.penalty != "off" and (more or options.mixup):
            self.compared = Augmented(options, images, views=2)

    def __call__(self, step: int, indices: list[int]) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
        """Both, labels, places in the dataset, and the share of the training that is over."""
        classified, labels, places = self.classified(step, indices)
        compared = None if self.compared is None else self.compared(step, indices)[0]
        return classified, compared, labels, places, step / self.steps


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, options: Namespace, classes: int, encoder: Path | None = None, environments: Path | None = None):
        super().__init__()
        self.options, self.irm, weights = options, None, None
        self.mix = v2.MixUp(alpha=options.mixup, num_classes=classes) if options.mixup else None
        self.model = classifier(options, vars(options), classes, encoder)
        self.selfreg = SelfRegLoss(self.model.num_features) if options.selfreg else None
        if options.penalty != "off":
            make = ClassWiseIRM.released if options.objective == "released" else ClassWiseIRM
            self.irm = make(self.model.num_features, classes, weight=options.weight, gather_distributed=True)
            self.irm.mask, self.irm.penalty = self.model.get_classifier()[0], options.penalty
            self.irm.risk_weight *= options.contrast_weight
        if environments is not None:
            found = Environments()
            found.load_state_dict(load(environments))
            if self.irm is not None:
                self.irm.environments = found
            if sharpness := sharpness_of(options):
                weights = found.weights(sharpness=sharpness)
        self.register_buffer("weights", weights)

    def features(self, views: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(views), pre_logits=True).float()

    def forward(
        self, classified: Tensor, compared: Tensor | None, labels: Tensor, indices: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a batch of ``Views``. λ follows from ``progress`` alone, so that a killed run goes on alike."""
        mixed = self.training and self.mix is not None
        classified, targets = self.mix(classified, labels) if mixed else (classified, labels)
        f = self.features(classified)
        before, linear = self.model.get_classifier()
        logits = linear(seen := before(f)).float()
        how = {"reduction": "none", "label_smoothing": self.options.label_smoothing}
        losses = F.cross_entropy(logits, targets, **how)
        loss = (losses if self.weights is None else self.weights[indices] * losses).mean()
        parts = {"classification": loss}
        if self.options.decoupling:
            parts["decoupling"] = spectral_decoupling(logits, weight=self.options.decoupling)
            loss = loss + parts["decoupling"]
        if self.selfreg is not None:  # scaled by min(1, cross entropy), as published
            pull = parts["classification"].detach().clamp(max=1) * self.options.selfreg
            parts["selfreg"] = pull * self.selfreg(seen.float(), logits, labels)
            loss = loss + parts["selfreg"]
        if self.irm is not None:
            self.irm.weight = self.options.weight if progress >= self.options.penalty_from else 0.0
            f = f if compared is None else self.features(compared)
            parts["irm"] = self.irm(f, labels, None if self.irm.environments is None else indices)
            loss = loss + parts["irm"]
        return loss, parts


def fine_tuned(options: Namespace, num_classes: int) -> nn.Module:
    """The model that this step left, frozen."""
    path = options.out / "finetune" / "model.pt"
    if not finished(path):
        raise TrainingError(f"{path}: no such file; run Step 3 (finetune) first")
    how = {name: made_with(path.parent, name) for name in HEAD}
    if None in how.values():
        raise TrainingError(f"{path.parent} does not tell how its classifier was made; run Step 3 (finetune) again")
    model = classifier(options, how, num_classes)
    model.load_state_dict(load(path))
    return model.eval().requires_grad_(False)


def environments_of(options: Namespace, encoder: Path | None, images: ImageFiles) -> Path | None:
    """Those of Step 2, of the same encoder and images; None, and they are found in each batch, where there are none."""
    path, weighted = options.out / "environments" / "environments.pt", bool(sharpness_of(options))
    found = finished(path)
    if not found and weighted:
        raise TrainingError(f"{path}: no such file; run Step 2 (environments) first, or leave --sample-weights out")
    if not found or (options.penalty == "off" and not weighted):
        return None
    if made_with(path.parent, "encoder") != hash_of(encoder):
        raise TrainingError(f"{path} was made with another encoder than {encoder}; run Step 2 (environments) again")
    if made_with(path.parent, "files") != names_hash(images):  # an index would mean another image
        raise TrainingError(f"{path} was made of other training images; run Step 2 (environments) again")
    return path


def by_layers(objective: Objective, options: Namespace) -> torch.optim.Optimizer:
    """AdamW: the head has the whole rate, and each block 0.65 times that of the block behind it."""
    model, decay = objective.model, options.weight_decay
    groups = param_groups_layer_decay(model, decay, model.no_weight_decay(), layer_decay=0.65)
    for module in (getattr(objective.irm, "projection", None), objective.selfreg):
        if module is not None:
            groups += param_groups_weight_decay(module, decay)
    return torch.optim.AdamW(groups, lr=options.lr)


def steps_down(options: Namespace) -> Callable[[int, int], float]:
    """A tenth of the rate from 60% of the epochs on, a hundredth from 80%."""
    return lambda step, steps: options.lr * 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))


def run(options: Namespace) -> dict[str, Any]:
    """``model.pt``; accuracy on validation and test images, in percent."""
    images, encoder = read(options, "train"), encoder_of(options)
    environments = environments_of(options, encoder, images)
    made_of = {"encoder": hash_of(encoder), "environments": hash_of(environments), "files": names_hash(images)}

    def work(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        seed_everything(options.seed)
        objective = Objective(options, len(images.classes), encoder, environments)
        vit, batches = is_vit(options.model), Views(options, images)
        rate, optimizer = (warm_cosine if vit else steps_down)(options), by_layers(objective, options) if vit else None
        if not fit(options, folder, settings, objective, batches, rate, optimizer=optimizer):
            return {}
        save(folder / "model.pt", objective.model.state_dict())
        model, splits = objective.model, measured(options)
        return {split: accuracy(*frozen_features(model, read(options, split), options)) for split in splits}

    return once(options, "finetune", made_of, work)
