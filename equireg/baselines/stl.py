"""STL on any layer: what a transformation is, is told by another pair of images that underwent it.

The paper takes the backbone's output. Taking tokens of an intermediate layer is an addition here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.baselines._hypernetwork import Hypernetwork
from equireg.baselines._pooled import pooled
from equireg.similarity import mean_contrast, normalized

__all__ = ["STLLoss"]


class STLParts(NamedTuple):
    """``STLLoss``: equivariance + transformation_weight · transformation."""

    loss: Tensor
    equivariance: Tensor  # contrast of the moved features with those of the transformed images
    transformation: Tensor  # contrast of the representations of a transformation, from two pairs of images


class STLLoss(nn.Module):
    r"""STL: move features by a transformation that is known only from another pair of images.

    The batch is aligned: in each row an image :math:`x` and another, :math:`\tilde x`, undergo the same transformation,
    of which no parameters are given. With their features :math:`y, y', \tilde y, \tilde y'` before and after, an MLP
    represents the transformation, :math:`t = m([y, y'])` and :math:`\tilde t = m([\tilde y, \tilde y'])`, and a
    hypernetwork makes it a matrix, which moves the features of the *other* image (Yu et al., "Self-supervised
    Transformation Learning for Equivariant Representations", NeurIPS 2024, arXiv:2501.08712):

    .. math::
        L = \ell\bigl(p(W(\tilde t)\, y),\ p(y')\bigr) + \lambda\, \ell\bigl(q(t),\ q(\tilde t)\bigr),
        \qquad W(t) = \textstyle\sum_k t_k W_k

    where :math:`\ell` is SimCLR's contrast at temperature τ: in both directions, against all other rows of both
    sides. All that the batch offers is taken, as in the released code: both images, and both directions of the
    transformation (that of :math:`[y', y]` takes :math:`y'` back to :math:`y`).

    The weights, widths and contrasts are those of the released code, which decides where the paper's summary leaves
    room; its third term, the invariance of the images, is your self-supervised loss. Unlike that code, the MLPs
    :math:`m, p, q` have a bias and no BatchNorm, and token maps are averaged over their places first.

    Rows that happen to undergo equal transformations repel each other, so draw transformations that hardly repeat:
    from a continuum, not from eight elements. Negatives are those of this process. The matrices have
    ``transformation_dim`` · D² parameters.

    Args:
        dim: D, the width of the features.
        transformation_dim: width of the representation of a transformation.
        projection_dim: width of the embeddings that are compared.
        temperature: τ, above 0.
        transformation_weight: λ, at least 0; 0 leaves what represents a transformation to the first term.

    Raises:
        TypeError, ValueError: a width that is no whole number above 0, a temperature or weight out of range.

    Example:
        >>> loss = STLLoss(dim=32)
        >>> images, others = torch.randn(2, 8, 16, 32)  # features of two images in each row, 16 tokens each
        >>> transformed, others_transformed = torch.randn(2, 8, 16, 32)  # both after the row's transformation
        >>> loss(images, transformed, others, others_transformed).shape
        torch.Size([])
    """

    def __init__(
        self,
        dim: int,
        *,
        transformation_dim: int = 128,
        projection_dim: int = 128,
        temperature: float = 0.2,
        transformation_weight: float = 0.1,
    ):
        super().__init__()
        check = Arguments("STLLoss")
        widths = {"dim": dim, "transformation_dim": transformation_dim, "projection_dim": projection_dim}
        for name, width in widths.items():
            check.count(name, width)
        check.positive("temperature", temperature)
        check.not_negative("transformation_weight", transformation_weight)
        self.dim, self.temperature, self.transformation_weight = dim, temperature, transformation_weight
        self.transformation = _mlp(2 * dim, transformation_dim, transformation_dim)
        self.hypernetwork = Hypernetwork(transformation_dim, dim)
        self.projection = _mlp(dim, 4 * projection_dim, projection_dim)
        self.transformation_projection = _mlp(transformation_dim, transformation_dim, projection_dim)

    def forward(self, features: Tensor, transformed: Tensor, others: Tensor, others_transformed: Tensor) -> Tensor:
        """The loss, a 0-d tensor.

        Args:
            features: of the images, [B, D] or tokens [B, T, D].
            transformed: of the images after the transformation of their row, [B, D] or [B, T', D].
            others: of another image in each row, as ``features``.
            others_transformed: of the other images after the same transformation.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or devices, a batch of fewer than two rows.
        """
        return self.parts(features, transformed, others, others_transformed).loss

    def parts(self, features: Tensor, transformed: Tensor, others: Tensor, others_transformed: Tensor) -> STLParts:
        """The loss and, detached, both terms: ``.equivariance`` and ``.transformation``, which is not yet weighted."""
        check = Arguments("STLLoss").beside(self)
        check.sizes["D"] = self.dim
        given = {"features": features, "transformed": transformed}
        given |= {"others": others, "others_transformed": others_transformed}
        rows = (pooled(check, *named) for named in given.items())
        x, x_after, other, other_after = (for_layers(self.projection, part) for part in rows)
        if len(x) < 2:
            check.fail(
                "features", "of at least 2 rows: negatives come from other transformations", list(features.shape)
            )
        # Each pair, from where it starts to where it ends: there and back, of the images and of the others.
        starts, ends = torch.cat([x, x_after, other, other_after]), torch.cat([x_after, x, other_after, other])
        of_images, of_others = self.transformation(torch.cat([starts, ends], 1)).chunk(2)
        moved = self.hypernetwork(torch.cat([of_others, of_images]), starts)
        equivariance = self._contrast(self.projection(moved), self.projection(ends))
        transformation = self._contrast(*map(self.transformation_projection, (of_images, of_others)))
        loss = equivariance + self.transformation_weight * transformation
        return STLParts(loss, equivariance.detach(), transformation.detach())

    def _contrast(self, one: Tensor, other: Tensor) -> Tensor:
        """SimCLR's, of rows that belong together; it normalises them."""
        pair, one, other = torch.arange(len(one), device=one.device), normalized(one), normalized(other)
        rows, positives = torch.cat([one, other]), torch.cat([other, one])
        return mean_contrast(rows, positives, (one, other), self.temperature, pair.repeat(2), pair)


def _mlp(dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))
