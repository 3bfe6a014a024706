"""SelfReg: samples of one class are pulled together, without negatives. EqInv's Table 2 compares with it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.similarity import accumulation_dtype

__all__ = ["SelfRegLoss"]


class SelfRegParts(NamedTuple):
    """``SelfRegLoss`` and the two dissimilarities that it weighs."""

    loss: Tensor
    features: Tensor  # of the features and the projected features of the partners
    logits: Tensor  # of the logits and those of the partners


class SelfRegLoss(nn.Module):
    r"""SelfReg: pull features and logits of a sample to those of others of its class, and to mixtures of these.

    Sample :math:`i` has two partners :math:`j, k` of its class. With the mean squared difference :math:`d`, over
    samples and entries, a share :math:`\gamma` drawn from Beta(½, ½) at each call, the features :math:`z`, the logits
    :math:`h` and a projection :math:`p`, the class-specific domain perturbation layer (Kim et al., ICCV 2021):

    .. math::
        S(a, b) &= \gamma\, d(a_i, b_j) + (1 - \gamma)\, d(a_i, \gamma b_j + (1 - \gamma) b_k) \\
        L &= \lambda_f\, S(z, p(z)) + \lambda_h\, S(h, h)

    Add it to the cross entropy :math:`L_c` as the authors' code does, scaled by :math:`\min(1, L_c)`, which gets no
    gradient. Distances are means over entries, also as there.

    The partners are the next sample of the class in the batch, and the one behind that, in a circle: as random as the
    batch, whereas the authors draw two orders of each class. A sample that is alone in its class is its own partner:
    its logits add nothing, and its features are compared with their own projection. Each process takes the partners
    and statistics of its own samples.

    Args:
        dim: D, the width of the features.
        feature_weight: λ_f, finite and at least 0.
        logit_weight: λ_h, likewise.
        projection: p, from [B, D] to [B, D]; None is that of the authors: three linear layers to 2 D, 2 D and D, each
            with a BatchNorm, and ReLUs between them.

    Raises:
        TypeError, ValueError: a width that is no whole number above 0, a weight that is no such number, a projection
            that is no module or, when called, gives another shape.

    Example:
        >>> selfreg = SelfRegLoss(dim=32)
        >>> features, logits, labels = torch.randn(8, 32), torch.randn(8, 2), torch.arange(8) % 2
        >>> loss = F.cross_entropy(logits, labels)
        >>> (loss + loss.detach().clamp(max=1) * selfreg(features, logits, labels)).shape
        torch.Size([])
    """

    def __init__(
        self,
        dim: int,
        *,
        feature_weight: float = 0.3,
        logit_weight: float = 1.0,
        projection: nn.Module | None = None,
    ):
        super().__init__()
        check = Arguments("SelfRegLoss")
        check.count("dim", dim)
        check.not_negative("feature_weight", feature_weight)
        check.not_negative("logit_weight", logit_weight)
        if projection is not None and not isinstance(projection, nn.Module):
            check.fail_type("projection", "a module or None", type(projection).__name__)
        self.dim, self.feature_weight, self.logit_weight = dim, feature_weight, logit_weight
        self.projection = _projection(dim) if projection is None else projection

    def forward(
        self,
        features: Tensor,
        logits: Tensor,
        labels: Tensor,
        share: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss, a 0-d tensor.

        Args:
            features: floating point [B, D], those that the classifier gets.
            logits: floating point [B, C].
            labels: whole numbers [B].
            share: γ in 0 .. 1; None draws it.
            generator: source of γ, on the CPU; None draws from the global one.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or devices, a share out of range, no sample; in training, one
                alone where the projection has a BatchNorm.
        """
        return self.parts(features, logits, labels, share, generator).loss

    def parts(
        self,
        features: Tensor,
        logits: Tensor,
        labels: Tensor,
        share: float | None = None,
        generator: torch.Generator | None = None,
    ) -> SelfRegParts:
        """The loss and, detached, what it is made of: the dissimilarities ``.features`` and ``.logits``."""
        labels = self._checked(features, logits, labels)
        if share is not None:
            Arguments("SelfRegLoss").share("share", share)
        of_call: float | Tensor = _drawn_share(generator, features.dtype) if share is None else share
        features, logits = features.contiguous(), logits.contiguous()  # the same bits whatever the strides
        following = _next_of_class(labels)
        partners = following, following[following]
        projected = self.projection(for_layers(self.projection, features))
        if projected.shape != features.shape:
            Arguments("SelfRegLoss").fail("projection", "from [B, D] to [B, D]", list(projected.shape))
        of_features = _dissimilarity(features, projected, partners, of_call)
        of_logits = _dissimilarity(logits, logits, partners, of_call)
        loss = self.feature_weight * of_features + self.logit_weight * of_logits
        return SelfRegParts(loss, of_features.detach(), of_logits.detach())

    def _checked(self, features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The labels, as int64."""
        check = Arguments("SelfRegLoss").beside(self)
        check.sizes["D"] = self.dim
        check.features("features", features, "B D")
        check.features("logits", logits, "B C")
        if not len(features):
            check.fail("features", "of at least one sample", list(features.shape))
        normalising = self.training and any(isinstance(layer, nn.BatchNorm1d) for layer in self.projection.modules())
        if len(features) == 1 and normalising:
            check.fail("features", "of at least 2 samples, for the projection's BatchNorm", list(features.shape))
        return check.integers("labels", labels, "B")


def _projection(dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in (
        (dim, 2 * dim),
        (2 * dim, 2 * dim),
        (2 * dim, dim),
    ):  # a bias before BatchNorm does nothing
        layers += [nn.Linear(width, following, bias=False), nn.BatchNorm1d(following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _drawn_share(generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """From Beta(½, ½), a uniform number on its arc; a 0-d tensor, as a compiled step cannot read one."""
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    return (math.pi / 2 * uniform).sin().square().to(accumulation_dtype(dtype))


def _dissimilarity(of: Tensor, to: Tensor, partners: tuple[Tensor, Tensor], share: float | Tensor) -> Tensor:
    """S(of, to): to the first partner, and to a mixture of both."""
    exact = accumulation_dtype(of.dtype)
    first, second = (to.to(exact)[partner] for partner in partners)
    mixed = share * first + (1 - share) * second
    return share * F.mse_loss(of.to(exact), first) + (1 - share) * F.mse_loss(of.to(exact), mixed)


def _next_of_class(labels: Tensor) -> Tensor:
    """For each sample the next one of its class, and for the last of a class the first; int64 [B]."""
    order = labels.argsort(stable=True)  # one class after the other, each as in the batch
    by_class = labels[order]
    start, end = (torch.searchsorted(by_class, by_class, right=right) for right in (False, True))
    place = torch.arange(len(labels), device=labels.device) + 1
    following = order[torch.where(place < end, place, start)]
    return torch.empty_like(order).index_copy(0, order, following)
