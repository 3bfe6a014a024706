"""Two rivals of soft equivariance, on an intermediate layer: EquiMod and AugSelf.

Both were made for the final embedding. Moved to layer 3 of 12 they gain (Lee et al., ICLR 2026, Table 6: EquiMod
68.95 → 69.51, AugSelf 67.55 → 68.23), so these heads take the features of any layer, token maps included.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments
from equireg.similarity import normalized, pair_lse

KINDS = ("regression", "binary", "classification")


class EquiModLoss(nn.Module):
    r"""EquiMod: predict the embedding of a transformed image from that of the image and the transformation.

    With the embedding :math:`e` of an image, :math:`e'` of its transformed view and
    :math:`\hat e' = u(e, \theta)`, a contrastive loss with the other images' views as negatives (Devillers and Lefort,
    ICLR 2023):

    .. math::
        -\frac{1}{B} \sum_i \log \frac{e^{\cos(\hat e'_i, e'_i) / \tau}}{\sum_m e^{\cos(\hat e'_i, e'_m) / \tau}}

    Embeddings are a projection of the features; token maps are averaged over their places first, as the transformation
    belongs to the image. With several transformed views, call it for each and add. The negatives are those of this
    process.

    Args:
        dim: D, the width of the features.
        num_parameters: P, how many numbers describe a transformation.
        projection_dim: width of the embeddings.
        parameter_dim: width of the projected parameters.
        temperature: τ, above 0.

    Raises:
        TypeError, ValueError: a width that is no whole number above 0, a temperature that is not above 0.

    Example:
        >>> loss = EquiModLoss(dim=32, num_parameters=2)
        >>> features, transformed = torch.randn(2, 8, 16, 32)  # of images and their views, 16 tokens each
        >>> loss(features, transformed, torch.rand(8, 2)).shape
        torch.Size([])
    """

    def __init__(
        self,
        dim: int,
        num_parameters: int,
        *,
        projection_dim: int = 128,
        parameter_dim: int = 128,
        temperature: float = 0.2,
    ):
        super().__init__()
        check = Arguments("EquiModLoss")
        widths = {"dim": dim, "num_parameters": num_parameters}
        widths |= {"projection_dim": projection_dim, "parameter_dim": parameter_dim}
        for name, width in widths.items():
            check.count(name, width)
        check.positive("temperature", temperature)
        self.dim, self.num_parameters, self.temperature = dim, num_parameters, temperature
        self.projection = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, projection_dim))
        self.parameters_projection = nn.Linear(num_parameters, parameter_dim)
        self.predictor = nn.Linear(projection_dim + parameter_dim, projection_dim)

    def forward(self, features: Tensor, transformed: Tensor, parameters: Tensor) -> Tensor:
        """The loss, a 0-d tensor.

        Args:
            features: of the images, [B, D] or tokens [B, T, D].
            transformed: of their transformed views, [B, D] or [B, T', D].
            parameters: what the transformations were, floating point [B, P], of order 1.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or devices, a batch of fewer than two images.
        """
        check = Arguments("EquiModLoss")
        check.sizes.update(D=self.dim, P=self.num_parameters)
        before, after = (_pooled(check, *named) for named in (("features", features), ("transformed", transformed)))
        check.features("parameters", parameters, "B P")
        if len(before) < 2:
            check.refuse("features", "of at least 2 images: negatives come from other images", list(features.shape))
        given = torch.cat([self.projection(before), self.parameters_projection(parameters)], dim=1)
        predicted, target = normalized(self.predictor(given)), normalized(self.projection(after))
        image = torch.arange(len(target), device=target.device)
        negatives, _ = pair_lse(
            predicted, target, 1 / self.temperature, relation="ne", row_group=image, col_group=image
        )
        positive = (predicted * target).sum(1) / self.temperature
        return F.softplus(negatives[0] - positive, threshold=50).mean()


class AugSelfLoss(nn.Module):
    r"""AugSelf: predict from two views how their augmentations differ.

    For each augmentation a three-layer MLP on both features, concatenated in either order (Lee et al., NeurIPS 2021):
    ``"regression"`` by squared error after a tanh, ``"binary"`` by cross entropy of one logit, ``"classification"`` by
    that of all. The loss is their sum.

    Under DistributedDataParallel each process takes the mean over its own samples, and the averaged gradients are those
    of the whole batch where all have equally many.

    Args:
        dim: D, the width of the features.
        targets: for each augmentation, by name, what is predicted and how wide it is: ``{"crop": ("regression", 4),
            "flip": ("binary", 1), "rotation": ("classification", 4)}``.
        hidden_dim: width of the hidden layers.

    Raises:
        TypeError, ValueError: no targets, an unknown kind, a width that is no whole number above 0 (1 for "binary").

    Example:
        >>> loss = AugSelfLoss(32, {"scale": ("regression", 2), "rotation": ("classification", 4)})
        >>> features1, features2 = torch.randn(2, 8, 16, 32)
        >>> scale, turns = torch.rand(8, 2) - 0.5, torch.arange(8) % 4  # of view 2 against view 1
        >>> there = {"scale": scale, "rotation": turns}
        >>> back = {"scale": -scale, "rotation": -turns % 4}
        >>> loss(features1, features2, there, back).shape
        torch.Size([])
    """

    def __init__(self, dim: int, targets: Mapping[str, tuple[str, int]], *, hidden_dim: int = 512):
        super().__init__()
        check = Arguments("AugSelfLoss")
        check.count("dim", dim)
        check.count("hidden_dim", hidden_dim)
        if not targets:
            check.refuse("targets", "at least one augmentation", targets)
        for name, (kind, width) in targets.items():
            check.option(f"targets[{name!r}]", kind, KINDS)
            check.count(f"targets[{name!r}]", width)
            if kind == "binary" and width != 1:
                check.refuse(f"targets[{name!r}]", "('binary', 1)", (kind, width))
        self.dim, self.targets = dim, dict(targets)
        self.predictors = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(2 * dim, hidden_dim),
                    nn.ReLU(),
                    nn.Linear(hidden_dim, hidden_dim),
                    nn.ReLU(),
                    nn.Linear(hidden_dim, width),
                )
                for name, (_, width) in targets.items()
            }
        )

    def forward(
        self, features1: Tensor, features2: Tensor, there: Mapping[str, Tensor], back: Mapping[str, Tensor]
    ) -> Tensor:
        """The loss, a 0-d tensor, over both orders of the views.

        Args:
            features1: of the first views, [B, D] or tokens [B, T, D], which are averaged over their places.
            features2: of the second views, likewise.
            there: the differences of view 2 against view 1, by name: floating point [B, width] in -1 .. 1 for
                "regression", bool [B] for "binary", whole numbers [B] for "classification".
            back: those of view 1 against view 2.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or devices, a difference that is missing or out of range.
        """
        check = Arguments("AugSelfLoss")
        check.sizes["D"] = self.dim
        first, second = (_pooled(check, *named) for named in (("features1", features1), ("features2", features2)))
        if not len(first):
            check.refuse("features1", "of at least one image", list(features1.shape))
        both = torch.cat([torch.cat([first, second], 1), torch.cat([second, first], 1)])
        total = both.new_zeros((), dtype=torch.promote_types(both.dtype, torch.float32))
        for name, (kind, width) in self.targets.items():
            wanted = torch.cat([_difference(check, *given, name, kind, width) for given in _both(there, back)])
            predicted = self.predictors[name](both).to(total.dtype)
            if kind == "regression":
                total = total + F.mse_loss(predicted.tanh(), wanted.to(total.dtype))
            elif kind == "binary":
                total = total + F.binary_cross_entropy_with_logits(predicted[:, 0], wanted.to(total.dtype))
            else:
                total = total + F.cross_entropy(predicted, wanted)
        return total


def _pooled(check: Arguments, name: str, features: Tensor) -> Tensor:
    """[B, D], tokens averaged over their places."""
    if check.tensor(name, features).dim() == 3:
        return check.features(name, features, f"B {name}_T D").mean(1)
    return check.features(name, features, "B D")


def _both(there: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> list[tuple[str, Mapping[str, Tensor]]]:
    return [("there", there), ("back", back)]


def _difference(check: Arguments, side: str, given: Mapping[str, Tensor], name: str, kind: str, width: int) -> Tensor:
    label = f"{side}[{name!r}]"
    if name not in given:
        check.refuse(side, f"with the difference {name!r}", sorted(given))
    if kind == "regression":
        check.sizes[name] = width
        return check.features(label, given[name], f"B {name}")
    if kind == "binary":
        return check.booleans(label, given[name], "B")
    wanted = check.integers(label, given[name], "B")
    check.below(label, wanted, width, "classes")
    return wanted
