"""EquiMod on an intermediate layer.

It was made for the final embedding. Moved to layer 3 of 12 it gains (Lee et al., ICLR 2026, Table 6: 68.95 → 69.51), so
this head takes the features of any layer, token maps included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.baselines._pooled import pooled_pairs
from equireg.similarity import normalized, pair_lse

__all__ = ["EquiModLoss"]


class EquiModParts(NamedTuple):
    """``EquiModLoss`` and what it is made of, means over images: log_denominator - alignment / temperature."""

    loss: Tensor
    alignment: Tensor  # cosine similarity of the predicted embedding with that of the view
    log_denominator: Tensor  # logarithm of the sum of exponentials over all views


class EquiModLoss(nn.Module):
    r"""EquiMod: predict the embedding of a transformed image from that of the image and the transformation.

    With the embedding :math:`e` of an image, :math:`e'` of its transformed view and
    :math:`\hat e' = u(e, \theta)`, a contrastive loss with the other images' views as negatives (Devillers and Lefort,
    ICLR 2023):

    .. math::
        -\frac{1}{B} \sum_i \log \frac{e^{\cos(\hat e'_i, e'_i) / \tau}}{\sum_m e^{\cos(\hat e'_i, e'_m) / \tau}}

    Embeddings are a projection of the features; token maps are averaged over their places first, as the transformation
    belongs to the image. With several transformed views, call it for each and add. The negatives are those of this
    process. The released code also takes both views as anchors and other predictions as negatives, and its heads have
    BatchNorm.

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
        return self.parts(features, transformed, parameters).loss

    def parts(self, features: Tensor, transformed: Tensor, parameters: Tensor) -> EquiModParts:
        """The loss and, detached, what it is made of: ``.loss``, ``.alignment`` and ``.log_denominator``."""
        check = Arguments("EquiModLoss").beside(self)
        check.sizes.update(D=self.dim, P=self.num_parameters)
        before, after = pooled_pairs(check, features, transformed, parameters, "negatives come from other images")
        before, after, parameters = (for_layers(self.projection, x) for x in (before, after, parameters))
        given = torch.cat([self.projection(before), self.parameters_projection(parameters)], dim=1)
        predicted, target = normalized(self.predictor(given)), normalized(self.projection(after))
        image = torch.arange(len(target), device=target.device)
        negatives, _ = pair_lse(
            predicted, target, 1 / self.temperature, relation="ne", row_group=image, col_group=image
        )
        alignment = (predicted * target).sum(1)
        loss = F.softplus(negatives[0] - alignment / self.temperature, threshold=50).mean()
        average = alignment.detach().mean()
        return EquiModParts(loss, average, (loss + average / self.temperature).detach())
