"""Views of a part of the batch by elements of a group, and what an arm asks of their maps of tokens at one layer."""

import torch
import torch.nn.functional as F
from evidence.experiments import Settings
from evidence.views import crops
from torch import Tensor, nn
from vipriors.images import NORMALIZE

import equireg
from equireg import GridTransform


class TurnedViews(nn.Module):
    """Two views of each image, in parts that differ in size: cropped and, where the arm has ``turned``, turned ones.

    ``turned`` says what is asked of these: "views" nothing, which is the control, "ser", "equimod" or "augself".
    """

    def __init__(self, s: Settings, width: int, stride: int):
        super().__init__()
        self.s, self.colors = s, equireg.mocov3_photometric(s["image_size"])
        self.views = equireg.EquivariantViews(s["image_size"], stride, photometric=nn.Identity())
        differences = {"turns": ("classification", 4), "flip": ("binary", 1), "scale": ("regression", 2)}
        losses = {
            "ser": lambda: equireg.SERLoss(width, token_norm=True),
            "equimod": lambda: equireg.EquiModLoss(width, num_parameters=7),
            "augself": lambda: equireg.AugSelfLoss(width, differences),
        }
        self.loss = losses[s["turned"]]() if s["turned"] in losses else None

    def forward(self, images: Tensor) -> tuple[list[list[Tensor]], list[GridTransform]]:
        """Of images in 0 .. 1 each view's parts, normalised; and the elements of the turned part, if there is one."""
        cropped, turned = equireg.split_batch(images, self.s["ratio"] if self.s["turned"] else 0.0)
        views = [[crops(cropped, self.s["image_size"], self.s["crop_scale"])] for _ in range(2)]
        elements = []
        if len(turned):
            *pair, g1, g2 = self.views(turned)
            views, elements = [[*parts, part] for parts, part in zip(views, pair)], [g1, g2]
        return [[NORMALIZE(color(part)) for part in parts] for color, parts in zip(self.colors, views)], elements

    def regularizer(self, tokens: list[Tensor], elements: list[GridTransform]) -> Tensor | float:
        """Its weight times the loss on the maps of the turned views."""
        if self.loss is None or not elements:
            return 0.0
        (first, second), (g1, g2) = tokens, elements
        forward, backward = g2 @ g1.inverse(), g1 @ g2.inverse()
        if self.s["turned"] == "ser":
            loss = self.loss(first, second, g1, g2)
        elif self.s["turned"] == "equimod":
            there, back = (numbers(g).to(first) for g in (forward, backward))
            loss = (self.loss(first, second, there) + self.loss(second, first, back)) / 2
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
