"""Classifiers from few or biased labels: cross entropy, and what an arm adds to it, ``ClassWiseIRM`` or weights."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evidence.datasets import Images, images_of
from evidence.experiments import Settings
from evidence.measures import told
from evidence.networks import create, encode, fit
from evidence.views import crops
from quickstart import balanced, shuffled
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from vipriors.backbone import accuracy
from vipriors.images import NORMALIZE
from vipriors.training import seed_everything

from equireg import ClassWiseIRM, Environments, FeatureMask

IRM = {"weight", "penalty", "temperature", "detach", "contrast", "penalty_on", "risk_weight", "sample_weights"}


class Objective(nn.Module):
    """``(weights[idx] * cross_entropy(head(mask(f)), y)).mean() + irm(f, y, idx)``, each part where the arm has it."""

    layer = "layer2"  # whose map of tokens is looked at

    def __init__(self, s: Settings, num_classes: int, num_samples: int):
        super().__init__()
        self.s, self.network = s, create(s)
        width = self.network.num_features
        self.backbone = self.network if s["model"] == "digits" else nn.Sequential(NORMALIZE, self.network)
        self.backbone.requires_grad_(not s["frozen"])
        self.head = nn.Linear(width, num_classes)
        if s["weight_norm"]:
            self.head = weight_norm(self.head)
        self.register_buffer("weights", torch.ones(num_samples))
        self.irm = None
        if s.get("irm") == "released":
            self.irm = ClassWiseIRM.released(width, num_classes, weight=s["weight"])
        elif s["environments"]:
            own = {name: value for name, value in s.items() if name in IRM}
            projection = nn.Identity() if s.get("projection") == "identity" else None
            self.irm = ClassWiseIRM(width, num_classes, projection=projection, **own)
            self.irm.mask = FeatureMask(width, scale=s["scale"] or None)

    def classify(self, f: Tensor) -> Tensor:
        if self.irm is not None:
            return self.head(self.irm.mask(f))
        return self.head(self.s["scale"] * F.normalize(f, dim=1) if self.s["scale"] else f)

    def logits(self, pixels: Tensor) -> Tensor:
        return self.classify(self.backbone(pixels))

    def forward(self, pixels: Tensor, labels: Tensor, indices: Tensor, progress: float) -> Any:
        self.backbone.train(not self.s["frozen"])
        views = pixels / 255
        if self.s["crop_scale"]:  # two views of each image
            views = torch.cat([crops(views, self.s["image_size"], self.s["crop_scale"]) for _ in range(2)])
            labels, indices = labels.repeat(2), indices.repeat(2)
        f = self.backbone(views)
        loss = (self.weights[indices] * F.cross_entropy(self.classify(f), labels, reduction="none")).mean()
        if self.irm is not None and progress >= self.s["irm_from"]:
            self.irm.weight = self.s["weight"] * (progress >= self.s.get("penalty_from", 0.0))
            loss = loss + self.irm(f, labels, indices)
        return loss, {}


def weights_of(features: Tensor, images: Images, s: Settings) -> Tensor:
    """Of each sample in cross entropy, 1 in the mean over its class: found, shuffled, or balancing true contexts."""
    if s["weights"] == "contexts":
        return balanced(images.labels, images.contexts)
    weights = Environments.split(features, images.labels).weights(sharpness=s["sharpness"])
    return shuffled(weights, images.labels) if s["weights"] == "shuffled" else weights


def prepare(s: Settings, data: Path, runs: Path, folder: Path, seed: int) -> tuple[Objective, Images]:
    """The objective, on first weights that all arms have of one seed, and the training images.

    Environments and weights are found in the features of the pretrained encoder or, where there is none, of cross
    entropy after ``fit_epochs``.
    """
    images = images_of(s, data, "train", seed)
    seed_everything(seed, "weights")
    objective = Objective(s, int(images.labels.max()) + 1, len(images.labels))
    if s["encoder"]:
        saved = runs / s["encoder"] / "off" / "0" / "encoder.pt"
        objective.network.load_state_dict(torch.load(saved, weights_only=True))
    if s["environments"] or s["weights"]:
        encoder = objective.backbone
        if not s["encoder"]:
            plain = {**s, "environments": "", "irm": "", "weights": "", "scale": 0.0, "epochs": s["fit_epochs"]}
            first, _ = prepare(plain, data, runs, folder, seed)
            fit(first, images, plain, folder / "encoder", seed)
            encoder = first.backbone
        features = encode(encoder.eval(), images.pixels)
        seed_everything(seed, "environments")
        if s["environments"]:
            found = torch.randn_like(features) if s["environments"] == "random" else features
            objective.irm.fit_environments(found, images.labels, adjust=s["environments"] != "plain")
        if s["weights"]:
            objective.weights = weights_of(features, images, s)
    return objective, images


def results(objective: Objective, s: Settings, data: Path, folder: Path, split: str, seed: int) -> dict[str, Any]:
    """Accuracy in percent on validation images, and on the test's if ``split`` is that; there also what is ``told``."""
    objective.eval()

    def accuracy_of(images: Images) -> float:
        return accuracy(encode(objective.logits, images.pixels), images.labels)

    parts = {name: images_of(s, data, name, seed) for name in dict.fromkeys(("val", split))}
    found = {"accuracy": {name: accuracy_of(part) for name, part in parts.items()}}
    if s["told"] and split == "test":
        found |= told(objective, accuracy_of, s, data / s["data"]["folder"])
    return found
