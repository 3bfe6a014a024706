"""Views of a part of the batch by elements of a group, and what an arm asks of their maps of tokens at one layer."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from evidence.experiments import Settings
from evidence.views import crops
from torch import Tensor, nn
from vipriors.images import NORMALIZE

import equireg
from equireg import GridTransform


class Pair(NamedTuple):
    """Two views of a batch, each in parts that differ in size, and the elements of the last part, if it is turned."""

    views: list[list[Tensor]]
    elements: list[GridTransform]


class TurnedViews(nn.Module):
    """Pairs of views of each image: cropped ones and, of a part of the batch where the arm has ``turned``, turned ones.

    ``turned`` says what is asked of these: "views" nothing, the control, or "ser", "equimod", "augself", "essl". With
    ``local`` there are two pairs more, of small crops. ``layers`` is the number of maps that SER reads.
    """

    def __init__(self, s: Settings, width: int, stride: int, layers: int = 1):
        super().__init__()
        self.s = s
        sizes = [s["image_size"], *[s["image_size"] // 2] * (2 if s.get("local") else 0)]
        how = {"photometric": nn.Identity(), **s.get("elements", {})}
        self.views = [equireg.EquivariantViews(size, stride, **how) for size in sizes]
        self.colors = [equireg.mocov3_photometric(size) for size in sizes]
        differences = {"turns": ("classification", 4), "flip": ("binary", 1), "scale": ("regression", 2)}
        tokens = {"token_norm": True, "temperature": s.get("temperature", 0.3)}
        losses = {
            "ser": lambda: equireg.SERLoss(width, **tokens, layers=layers),
            "equimod": lambda: equireg.EquiModLoss(width, num_parameters=7),
            "augself": lambda: equireg.AugSelfLoss(width, differences),
            "essl": lambda: equireg.ESSLLoss(width, hidden_dim=512),
        }
        self.loss = losses[s["turned"]]() if s["turned"] in losses else None

    def forward(self, images: Tensor) -> list[Pair]:
        """Of images in 0 .. 1 one pair, or a global and two local ones, normalised."""
        cropped, turned = equireg.split_batch(images, self.s["ratio"] if self.s["turned"] else 0.0)
        pairs = []
        for views, colors in zip(self.views, self.colors):
            side, local = views.image_size[0], bool(pairs)
            areas = (0.1, 0.4) if local else (self.s["crop_scale"], 1.0)
            parts, elements = [[crops(cropped, side, *areas)] for _ in range(2)], []
            if len(turned):  # whole, or both of the same small crop
                *of_pair, g1, g2 = views(crops(turned, side, *areas) if local else turned)
                parts, elements = [[*own, part] for own, part in zip(parts, of_pair)], [g1, g2]
            pairs.append(
                Pair([[NORMALIZE(color(part)) for part in own] for color, own in zip(colors, parts)], elements)
            )
        return pairs

    def regularizer(self, maps: list[list[Tensor]], elements: list[GridTransform]) -> Tensor | float:
        """Its weight times the loss on the maps of two turned views, each of one layer or more."""
        if self.loss is None or not elements:
            return 0.0
        (first, second), (g1, g2) = maps, elements
        if self.s["turned"] == "ser":
            return self.s["weight"] * self.loss(first, second, g1, g2)
        (first,), (second,) = first, second
        forward, backward = g2 @ g1.inverse(), g1 @ g2.inverse()
        if self.s["turned"] == "equimod":
            there, back = (numbers(g).to(first) for g in (forward, backward))
            loss = (self.loss(first, second, there) + self.loss(second, first, back)) / 2
        elif self.s["turned"] == "essl":
            loss = (self.loss(first, g1.quarter_turns) + self.loss(second, g2.quarter_turns)) / 2
        else:
            loss = self.loss(first, second, differences(forward), differences(backward))
        return self.s["weight"] * loss


def differences(g: GridTransform) -> dict[str, Tensor]:
    """What AugSelf predicts of an element: its turns, its flip, and the logarithms of its scales."""
    scale = torch.tensor([[new / old for new, old in zip(g.target, g.source)]]).log()
    scale = scale.expand(len(g), 2).clamp(-1, 1).to(g.flip.device)
    return {"turns": g.quarter_turns, "flip": g.flip, "scale": scale}


def numbers(g: GridTransform) -> Tensor:
    """[B, 7], what EquiMod is told of an element."""
    of = differences(g)
    return torch.cat([F.one_hot(of["turns"], 4), of["flip"][:, None], of["scale"]], 1)
