"""Classifiers from few or biased labels: cross entropy, and what an arm adds to it, ``ClassWiseIRM`` or weights."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evidence.datasets import Images, images_of
from evidence.experiments import Settings
from evidence.frozen import features_of, raw_features
from evidence.neighbours import Anchor, GroupDRO, afr_weights, eiil_environments, jtt_weights
from evidence.networks import create, encode, fit, unit
from evidence.views import crops
from quickstart import balanced, shuffled
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from vipriors.backbone import accuracy
from vipriors.images import NORMALIZE
from vipriors.training import seed_everything

from equireg import ClassWiseIRM, Environments, FeatureMask, SelfRegLoss, spectral_decoupling

IRM = {"weight", "risk_weight", "sample_weights", "detach"}
PLAIN = {"environments": "", "irm": "", "weights": "", "groups": "", "retrained": False, "scale": 0.0}


class Objective(nn.Module):
    """``(weights[idx] * cross_entropy(head(mask(f)), y)).mean() + irm(f, y, idx)``, each part where the arm has it.

    Group DRO has its mean of the losses; where the last layer is trained anew, the backbone stays as it is. Spectral
    decoupling and SelfReg come after cross entropy.
    """

    def __init__(self, s: Settings, num_classes: int, num_samples: int):
        super().__init__()
        self.s, self.network = s, create(s)
        width = self.network.num_features
        as_it_is = s["frozen"] or s["model"] == "digits"
        self.backbone = self.network if as_it_is else nn.Sequential(NORMALIZE, self.network)
        self.head = nn.Linear(width, num_classes)
        if s["weight_norm"]:
            self.head = weight_norm(self.head)
        self.register_buffer("weights", torch.ones(num_samples))
        self.irm = self.dro = self.anchor = None
        self.selfreg = SelfRegLoss(width) if "selfreg" in s else None
        if s.get("irm") == "released":
            self.irm = ClassWiseIRM.released(width, num_classes, weight=s["weight"])
        elif s["environments"]:
            own = {name: value for name, value in s.items() if name in IRM}
            self.irm = ClassWiseIRM(width, num_classes, **own)
            self.irm.mask = FeatureMask(width, scale=s["scale"] or None)

    def retrain(self, first: "Objective", weights: Tensor) -> None:
        """From now on the head of ``first`` alone learns."""
        self.load_state_dict(first.state_dict())
        self.backbone.requires_grad_(False)
        self.weights, self.anchor = weights, Anchor(self.head, self.s["pull"])

    def classify(self, f: Tensor) -> Tensor:
        if self.irm is not None:
            return self.head(self.irm.mask(f))
        return self.head(self.s["scale"] * F.normalize(f, dim=1) if self.s["scale"] else f)

    def logits(self, pixels: Tensor) -> Tensor:
        return self.classify(self.backbone(pixels))

    def forward(self, pixels: Tensor, labels: Tensor, indices: Tensor, progress: float) -> Any:
        self.backbone.train(self.anchor is None)
        views = unit(pixels)
        if self.s["crop_scale"]:  # two views of each image
            size = self.s.get("crop_size", self.s["image_size"])
            views = torch.cat([crops(views, size, self.s["crop_scale"]) for _ in range(2)])
            labels, indices = labels.repeat(2), indices.repeat(2)
        f = self.backbone(views)
        logits = self.classify(f)
        losses = F.cross_entropy(logits, labels, reduction="none")
        loss = (self.weights[indices] * losses).mean() if self.dro is None else self.dro(losses, indices)
        if self.anchor is not None:
            loss = loss + self.anchor(self.head)
        if "decoupling" in self.s:
            loss = loss + spectral_decoupling(logits, weight=self.s["decoupling"])
        if self.selfreg is not None:
            loss = loss + loss.detach().clamp(max=1) * self.s["selfreg"] * self.selfreg(f, logits, labels)
        if self.irm is not None:
            self.irm.weight = self.s["weight"] * (progress >= self.s.get("penalty_from", 0.0))
            loss = loss + self.irm(f, labels, indices)
        return loss, {}


def weights_of(features: Tensor | None, images: Images, s: Settings, logits: Tensor | None = None) -> Tensor:
    """Of each sample in cross entropy, 1 in the mean: found, shuffled, balancing true contexts, or for errors."""
    if s["weights"] == "contexts":
        return balanced(images.labels, images.contexts)
    if s["weights"] == "errors":
        return jtt_weights(logits, images.labels, s["factor"])
    environments = Environments.split(features, images.labels, score=s.get("score", "similarity"))
    weights = environments.weights(sharpness=s["sharpness"])
    return shuffled(weights, images.labels) if s["weights"] == "shuffled" else weights


def groups_of(features: Tensor | None, images: Images, s: Settings, logits: Tensor | None = None) -> Tensor:
    """[N], 0 .. G - 1: a class in one of its contexts, which are true or found, or in an environment of EIIL."""
    contexts, labels = images.contexts, images.labels
    if s["groups"] == "found":
        contexts = Environments.split(features, labels).context()
    elif s["groups"] == "eiil":
        contexts = eiil_environments(logits, labels)
    return (labels * (1 + contexts.max()) + contexts).unique(return_inverse=True)[1]


def read(s: Settings, data: Path, runs: Path, split: str, seed: int) -> Images:
    """A split as a run is given it: images, or features of the frozen backbone."""
    return features_of(s, data, runs, split, seed) if s["frozen"] else images_of(s, data, split, seed)


def prepare(s: Settings, data: Path, runs: Path, folder: Path, seed: int) -> tuple[Objective, Images]:
    """The objective, on first weights that all arms have of one seed, and the training images.

    Environments, weights and contexts are found in the raw features of the frozen backbone, in those of the pretrained
    encoder or, where there is neither, of cross entropy after ``fit_epochs``; neighbours look at the logits of that.
    """
    images = read(s, data, runs, "train", seed)
    seed_everything(seed, "weights")
    objective = Objective(s, int(images.labels.max()) + 1, len(images.labels))
    if s["encoder"]:
        saved = runs / s["encoder"] / "off" / "0" / "encoder.pt"
        objective.network.load_state_dict(torch.load(saved, weights_only=True))
    if s["retrained"]:  # the last layer, on the fifth that the first network has not seen
        held_out = torch.arange(len(images.labels)) % 5 == 0
        first = first_network(images.at(~held_out), s, data, runs, folder, seed)
        images = images.at(held_out)
        objective.retrain(first, afr_weights(encode(first.logits, images.pixels), images.labels, s["gamma"]))
        return objective, images
    asked, first, features, logits = {s["weights"], s["groups"]}, objective, None, None
    by_logits, by_features = asked & {"errors", "eiil"}, s["environments"] or asked & {"found", "shuffled"}
    if by_logits or (by_features and not (s["encoder"] or s["frozen"])):
        first = first_network(images, s, data, runs, folder, seed)
    if by_logits:
        logits = encode(first.logits, images.pixels)
    if by_features and s["frozen"]:
        features = raw_features(s, data, runs, "train", seed).pixels
    elif by_features:
        features = encode(first.backbone.eval(), images.pixels)
    seed_everything(seed, "environments")
    if s["environments"]:
        ranked = torch.randn_like(features) if s["environments"] == "random" else features
        objective.irm.fit_environments(ranked, images.labels, adjust=s["environments"] != "plain")
    if s["weights"]:
        objective.weights = weights_of(features, images, s, logits)
    if s["groups"]:
        objective.dro = GroupDRO(groups_of(features, images, s, logits), s["step"])
    return objective, images


def first_network(images: Images, s: Settings, data: Path, runs: Path, folder: Path, seed: int) -> Objective:
    """Cross entropy alone on these images, after ``fit_epochs``."""
    plain = {**s, **PLAIN, "epochs": s["fit_epochs"]}
    objective, _ = prepare(plain, data, runs, folder, seed)
    fit(objective, images, plain, folder / "encoder", seed)
    return objective.eval()


def results(
    objective: Objective, s: Settings, data: Path, runs: Path, folder: Path, split: str, seed: int
) -> dict[str, Any]:
    """Accuracy in percent on validation images, and on the test's if ``split`` is that.

    Where each class has a context of its own in training, it is that on images in other contexts; ``overall`` is that
    on all, and ``usual`` that on the others, where there are any.
    """
    objective.eval()
    found: dict[str, Any] = {"accuracy": {}}
    for name in dict.fromkeys(("val", split)):
        part = read(s, data, runs, name, seed)
        logits = encode(objective.logits, part.pixels)
        rows = part.conflicting(read(s, data, runs, "train", seed))
        if rows is None or rows.all():
            found["accuracy"][name] = accuracy(logits, part.labels)
        else:
            found["accuracy"][name] = accuracy(logits[rows], part.labels[rows])
            found.setdefault("overall", {})[name] = accuracy(logits, part.labels)
            found.setdefault("usual", {})[name] = accuracy(logits[~rows], part.labels[~rows])
    return found
