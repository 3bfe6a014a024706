"""E-SSL on any layer: the features of a turned image tell by how much it was turned.

The paper predicts from the backbone's output. Taking tokens of an intermediate layer is an addition here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.baselines._pooled import pooled
from equireg.similarity import accumulation_dtype

__all__ = ["ESSLLoss"]

_TURNS = 4


class ESSLParts(NamedTuple):
    """``ESSLLoss``, the mean of the losses of all images, and how often the turn is told."""

    loss: Tensor
    losses: Tensor  # cross entropy of each image, [B]
    accuracy: Tensor  # share of the images whose turn has the largest logit; 0.25 by chance


class ESSLLoss(nn.Module):
    r"""E-SSL: predict which of the four quarter turns an image was turned by, from its features.

    With the features :math:`f(T_k(x))` of an image under :math:`k` quarter turns, and a predictor :math:`p` of four
    logits, the mean over images of the cross entropy (Dangovski et al., "Equivariant Contrastive Learning", ICLR 2022)

    .. math:: -\log \frac{e^{p_k(f(T_k(x)))}}{\sum_{j=0}^3 e^{p_j(f(T_k(x)))}}

    The predictor is an MLP of three layers, with LayerNorm and ReLU after the first two, as released for CIFAR-10. The
    paper adds the loss with weight 0.4 to SimCLR's, and gives it all four turns of a small crop of each image, as the
    example does. Token maps are averaged over their places.

    Under DistributedDataParallel each process takes the mean over its own images, and the averaged gradients are those
    of the whole batch where all have equally many.

    Args:
        dim: D, the width of the features.
        hidden_dim: width of the hidden layers.

    Raises:
        TypeError, ValueError: a width that is no whole number above 0.

    Example:
        >>> import torch
        >>> from equireg import GridTransform
        >>> small = torch.rand(8, 3, 16, 16)  # a small crop of each image
        >>> turns = torch.arange(4).repeat_interleave(8)
        >>> turned = GridTransform(turns, turns < 0, (4, 4), (4, 4)).on_images(small.repeat(4, 1, 1, 1), patch_size=4)
        >>> encode = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 32))  # yours
        >>> loss = ESSLLoss(dim=32)
        >>> loss(encode(turned), turns).shape
        torch.Size([])
    """

    def __init__(self, dim: int, *, hidden_dim: int = 2048):
        super().__init__()
        check = Arguments("ESSLLoss")
        check.count("dim", dim)
        check.count("hidden_dim", hidden_dim)
        self.dim = dim
        self.predictor = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, _TURNS),
        )

    def forward(self, features: Tensor, quarter_turns: Tensor) -> Tensor:
        """The loss, a 0-d tensor.

        Args:
            features: of the turned images, [B, D] or tokens [B, T, D].
            quarter_turns: by how many each was turned, whole numbers [B] in 0 .. 3.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or devices, turns out of range, an empty batch.
        """
        return self.parts(features, quarter_turns).loss

    def parts(self, features: Tensor, quarter_turns: Tensor) -> ESSLParts:
        """The loss and, detached, that of each image and the share of the turns that are told."""
        check = Arguments("ESSLLoss").beside(self)
        check.sizes["D"] = self.dim
        given = pooled(check, "features", features)
        turns = check.integers("quarter_turns", quarter_turns, "B")
        check.below("quarter_turns", turns, _TURNS, "quarter turns")
        if not len(given):
            check.fail("features", "of at least one image", list(features.shape))
        logits = self.predictor(for_layers(self.predictor, given))
        losses = F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), turns, reduction="none")
        told = (logits.detach().argmax(1) == turns).to(losses.dtype)
        return ESSLParts(losses.mean(), losses.detach(), told.mean())
