"""The self-supervised base methods, on lightly's heads and losses, and the one line that each regularizer adds."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evidence.datasets import Images, images_of
from evidence.experiments import Settings
from evidence.measures import JOINED, JOINED_ON_THE_WAY, joined, joined_on_the_way, measure, measure_on_the_way
from evidence.networks import create, encode
from evidence.planted import planted
from evidence.teachers import DINO, MoCoV3
from evidence.turned import TurnedViews
from evidence.views import crops, moved, simclr_colors
from lightly.loss import BarlowTwinsLoss, VICRegLoss
from lightly.models.modules import heads
from mae_pretrain import MAE
from torch import Tensor, nn
from vipriors.images import NORMALIZE
from vipriors.training import seed_everything

import equireg


class BarlowTwins(nn.Module):
    """Zbontar et al., 2021, on a residual network."""

    def __init__(self, s: Settings, samples: int):
        super().__init__()
        self.s, self.network, self.layer = s, create(s), f"layer{s['layer']}"  # whose map turns
        self.backbone = nn.Sequential(NORMALIZE, self.network)
        self.projection = heads.BarlowTwinsProjectionHead(self.network.num_features, s["hidden_dim"], s["hidden_dim"])
        stage = self.network.feature_info[s["layer"]]
        self.turned = TurnedViews(s, stage["num_chs"], stage["reduction"] // (4 if s.get("stem") == "cifar" else 1))
        self.loss = BarlowTwinsLoss()

    def forward(self, pixels: Tensor, labels: Tensor, indices: Tensor, progress: float) -> tuple[Tensor, dict]:
        [(views, elements)] = self.turned(pixels / 255)
        features, tokens = [], []
        with equireg.TokenTap(self.network, self.layer) as tap:
            for parts in views:
                features.append(torch.cat([self.network(part) for part in parts]))
                tokens.append([tap.tokens])  # of the last part
        loss = self.loss(*(self.projection(f).float() for f in features)) / self.s["hidden_dim"]
        return loss + self.turned.regularizer(tokens, elements), {}


class VICReg(nn.Module):
    """Bardes, Ponce and LeCun, 2022; with ``images`` half-way between its views, rebuilt from part of the features."""

    def __init__(self, s: Settings, samples: int):
        super().__init__()
        self.s, self.network, size, images = s, create(s), s["image_size"], s["images"]
        self.backbone = nn.Sequential(NORMALIZE, self.network)
        shown = {"num_intermediate": images or 1, "reconstruct": s.get("reconstruct", "se2")}
        self.views = equireg.IntermediateViews("all", **shown, sigma=(0.1, size / 32))
        width = self.network.embed_dim
        if images:
            # So wide that VICReg keeps its own width (the paper's linear head).
            share = s.get("share", 0.5)
            shape = {"image_size": size, "patch_size": s["patch_size"], "num_images": images}
            shape |= {"head_dim": round(width / (1 - share)), "equivariant_fraction": share}
            self.head = equireg.IntermediateReconstructionHead(width, **shape, mean=NORMALIZE.mean, std=NORMALIZE.std)
        self.projection = heads.VICRegProjectionHead(width, s["hidden_dim"], s["hidden_dim"])
        # Its 25 : 25 : 1, on a scale where a regularizer of weight 1 counts; Adam does not mind.
        self.loss = VICRegLoss(lambda_param=1.0, mu_param=1.0, nu_param=0.04)

    def forward(self, pixels: Tensor, labels: Tensor, indices: Tensor, progress: float) -> tuple[Tensor, dict]:
        size = self.s["image_size"], self.s["crop_scale"]
        first, second = (simclr_colors(crops(pixels / 255, *size)) for _ in range(2))
        _, targets, parameters = self.views(first)
        second = self.views.transform(second, parameters)  # on top of its own crop and colours
        prefix = self.network.num_prefix_tokens
        tokens = [self.network.forward_features(NORMALIZE(view))[:, prefix:] for view in (first, second)]
        if not self.s["images"]:
            return self.loss(*(self.projection(part.mean(1)) for part in tokens)), {}
        invariant, equivariant = zip(*map(self.head.split, tokens))
        loss = self.loss(*(self.projection(part.mean(1)) for part in invariant))
        return loss + self.s["weight"] * self.head(*equivariant, targets), {}


class MaskedAutoencoder(nn.Module):
    """He et al., 2022: that of the example."""

    def __init__(self, s: Settings, samples: int):
        super().__init__()
        self.s, self.network = s, create(s).to(memory_format=torch.contiguous_format)  # which lightly asks for
        self.backbone = nn.Sequential(NORMALIZE, self.network)
        self.mae = MAE(self.network, hidden=0.75)

    def forward(self, pixels: Tensor, labels: Tensor, indices: Tensor, progress: float) -> tuple[Tensor, dict]:
        view = crops(pixels / 255, self.s["image_size"], self.s["crop_scale"])
        predicted, true, _ = self.mae(NORMALIZE(view))
        return F.mse_loss(predicted, true), {}


class Partitioned(nn.Module):
    """A base method whose loss is to be the same over the groups of ``partitions`` that are random or found."""

    def __init__(self, s: Settings, samples: int, loss: type[nn.Module]):
        super().__init__()
        self.s, self.network = s, create(s)
        self.backbone = nn.Sequential(NORMALIZE, self.network)
        self.partitions = equireg.PartitionUpdater(samples, s.get("num_groups", 2), weight=s.get("search_weight", 0.5))
        self.loss = loss(self.partitions, weight=s["weight"] if s["partitions"] else 0.0)  # without: the base method

    def embed(self, images: Tensor) -> Tensor:
        """The projections of a random view."""
        if self.s["data"]["reader"] == "tinted":
            view = moved(images)
        else:
            view = simclr_colors(crops(images, self.s["image_size"], self.s["crop_scale"]))
        return self.projection(self.backbone(view)).float()

    def forward(self, pixels: Tensor, labels: Tensor, indices: Tensor, progress: float) -> tuple[Tensor, dict]:
        views = self.predicted(*(self.embed(pixels / 255) for _ in range(2)))
        parts = self.loss.parts(*views, indices)
        risk, penalty = parts.of_groups  # a partition that joins adds them: no explosion of the contrast
        return parts.loss, {"contrast": parts.global_risk, "group_contrast": risk, "group_penalty": penalty}

    def before_epoch(self, epoch: int, images: Images) -> None:
        """Before the first epoch and every few more one partition: drawn, or found on two views of all images.

        Or before the first one that of true contexts, which is a ceiling.
        """
        if not self.s["partitions"] or epoch % self.s["update_every"]:
            return
        if self.s["partitions"] == "contexts":
            if epoch == 0:
                self.partitions.add(images.contexts)
        elif self.s["partitions"] == "random":
            groups = torch.randint(self.partitions.num_groups, (len(images.labels),))
            self.partitions.add(groups.to(self.partitions.partitions.device))
        else:
            self.eval()
            self.partitions.update(*(encode(self.embed, images.pixels) for _ in range(2)), progress=False)


class SimCLR(Partitioned):
    """Chen et al., 2020."""

    def __init__(self, s: Settings, samples: int):
        super().__init__(s, samples, equireg.IPIRMLoss)
        self.projection = heads.SimCLRProjectionHead(self.network.num_features, s["hidden_dim"], 128)

    def predicted(self, *projections: Tensor) -> tuple[Tensor, ...]:
        return projections


class SimSiam(Partitioned):
    """Chen and He, 2021."""

    def __init__(self, s: Settings, samples: int):
        super().__init__(s, samples, equireg.SimSiamIPIRMLoss)
        hidden = s["hidden_dim"]
        self.projection = heads.SimSiamProjectionHead(self.network.num_features, hidden, hidden)
        self.prediction = heads.SimSiamPredictionHead(hidden, hidden // 4, hidden)

    def predicted(self, *projections: Tensor) -> tuple[Tensor, ...]:
        return *(self.prediction(z).float() for z in projections), *projections


METHODS = {"mocov3": MoCoV3, "dino": DINO, "barlow": BarlowTwins, "vicreg": VICReg, "mae": MaskedAutoencoder,
           "simclr": SimCLR, "simsiam": SimSiam}  # fmt: skip


def prepare(s: Settings, data: Path, runs: Path, folder: Path, seed: int) -> tuple[nn.Module, Images]:
    images = images_of(s, data, s["split"], seed).evenly(s["samples"])
    seed_everything(seed, "weights")
    return METHODS[s["method"]](s, len(images.labels)), images


def results(
    objective: nn.Module, s: Settings, data: Path, runs: Path, folder: Path, split: str, seed: int
) -> dict[str, Any]:
    """The measures of the backbone, whose network is saved as ``encoder.pt``, and some of those of its snapshots."""
    torch.save(objective.eval().network.state_dict(), folder / "encoder.pt")
    if s["data"]["reader"] == "tinted":
        return planted(objective, s, data, split, seed)
    found = measure(objective, s, data, split, seed)
    if split == "test":
        found["curve"] = {}
        for path in folder.glob("encoder-*.pt"):
            objective.network.load_state_dict(torch.load(path, weights_only=True))
            found["curve"][path.stem.removeprefix("encoder-")] = measure_on_the_way(objective, s, data, seed)
    return found


def add_what_joined(
    found: dict[str, Any], lacking: set[str], objective: nn.Module, s: Settings, data: Path, folder: Path, seed: int
) -> None:
    """Measures that joined since ``found`` was written, of the networks that ``results`` saved and read."""

    def load(name: str) -> None:
        objective.eval().network.load_state_dict(torch.load(folder / name, weights_only=True))

    if lacking & JOINED:
        load("encoder.pt")
        found["told"] |= joined(objective, s, data, seed)
    for steps, values in found["curve"].items() if lacking & JOINED_ON_THE_WAY else ():
        load(f"encoder-{steps}.pt")
        values |= joined_on_the_way(objective, s, data)
