"""AugSelf on an intermediate layer.

It was made for the final embedding. Moved to layer 3 of 12 it gains (Lee et al., ICLR 2026, Table 6: 67.55 → 68.23), so
this head takes the features of any layer, token maps included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers, values_visible
from equireg.baselines._pooled import pooled
from equireg.similarity import accumulation_dtype

__all__ = ["AugSelfLoss"]

Targets = Mapping[str, Tensor]  # of each augmentation, by name


class AugSelfParts(NamedTuple):
    """``AugSelfLoss`` and the losses it is the sum of."""

    loss: Tensor
    losses: dict[str, Tensor]  # of each augmentation, by name


class AugSelfLoss(nn.Module):
    r"""AugSelf: predict from two views how their augmentations differ.

    With the features :math:`f, f'` of two views, for each augmentation :math:`t` its differences :math:`\omega_t` of
    view 2 against view 1 and :math:`\omega'_t` of view 1 against view 2, and a three-layer MLP :math:`p_t` on both
    features, concatenated in either order (Lee et al., "Improving Transferability of Representations via
    Augmentation-Aware Self-Supervision", NeurIPS 2021), the mean over images of

    .. math:: \frac{1}{2} \sum_t \ell_t(p_t([f, f']), \omega_t) + \ell_t(p_t([f', f]), \omega'_t)

    :math:`\ell_t` is for ``"regression"`` the squared error after a tanh, for ``"binary"`` the cross entropy of one
    logit, for ``"classification"`` that of all. The released MLPs have BatchNorm, these have none.

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
        >>> forward_targets = {"scale": scale, "rotation": turns}
        >>> backward_targets = {"scale": -scale, "rotation": -turns % 4}
        >>> loss(features1, features2, forward_targets, backward_targets).shape
        torch.Size([])
    """

    def __init__(self, dim: int, targets: Mapping[str, tuple[str, int]], *, hidden_dim: int = 512):
        super().__init__()
        check = Arguments("AugSelfLoss")
        check.count("dim", dim)
        check.count("hidden_dim", hidden_dim)
        if not targets:
            check.fail("targets", "at least one augmentation", targets)
        for name, kind_and_width in targets.items():
            if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
                check.fail("targets", "named by strings that can name modules, as 'flip'", repr(name))
            if not isinstance(kind_and_width, (tuple, list)) or len(kind_and_width) != 2:
                check.fail(f"targets[{name!r}]", "(kind, width)", kind_and_width)
            kind, width = kind_and_width
            check.option(f"targets[{name!r}]", kind, tuple(_LOSSES))
            check.count(f"targets[{name!r}]", width)
            if kind == "binary" and width != 1:
                check.fail(f"targets[{name!r}]", "('binary', 1)", (kind, width))
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
        self, features1: Tensor, features2: Tensor, forward_targets: Targets, backward_targets: Targets
    ) -> Tensor:
        """The loss, a 0-d tensor, over both orders of the views.

        Args:
            features1: of the first views, [B, D] or tokens [B, T, D], which are averaged over their places.
            features2: of the second views, likewise.
            forward_targets: the differences of view 2 against view 1, by name: floating point [B, width] in -1 .. 1 for
                "regression", bool [B] for "binary", whole numbers [B] for "classification".
            backward_targets: those of view 1 against view 2.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or devices, a difference that is missing or out of range.
        """
        return self.parts(features1, features2, forward_targets, backward_targets).loss

    def parts(
        self, features1: Tensor, features2: Tensor, forward_targets: Targets, backward_targets: Targets
    ) -> AugSelfParts:
        """The loss, and in ``.losses`` that of each augmentation, detached, by name."""
        first, second, targets = self._checked(features1, features2, forward_targets, backward_targets)
        first, second = (for_layers(self.predictors, x) for x in (first, second))
        both = torch.cat([torch.cat([first, second], 1), torch.cat([second, first], 1)])
        total, losses = both.new_zeros((), dtype=accumulation_dtype(both.dtype)), {}
        for name, (kind, _) in self.targets.items():
            loss = _LOSSES[kind](self.predictors[name](both).to(total.dtype), targets[name])
            total, losses[name] = total + loss, loss.detach()
        return AugSelfParts(total, losses)

    def _checked(
        self, features1: Tensor, features2: Tensor, forward_targets: Targets, backward_targets: Targets
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Both features [B, D], averaged over their places; and of each augmentation the targets in both orders."""
        check = Arguments("AugSelfLoss").beside(self)
        check.sizes["D"] = self.dim
        first, second = (pooled(check, *named) for named in (("features1", features1), ("features2", features2)))
        if not len(first):
            check.fail("features1", "of at least one image", list(features1.shape))
        sides, targets = (("forward_targets", forward_targets), ("backward_targets", backward_targets)), {}
        for name, (kind, width) in self.targets.items():
            targets[name] = torch.cat([_checked_target(check, *side, name, kind, width) for side in sides])
        return first, second, targets


def _regression(predicted: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(predicted.tanh(), targets.to(predicted.dtype))


def _binary(predicted: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(predicted[:, 0], targets.to(predicted.dtype))


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "regression": _regression,
    "binary": _binary,
    "classification": F.cross_entropy,
}


def _checked_target(check: Arguments, side: str, given: Targets, name: str, kind: str, width: int) -> Tensor:
    if not isinstance(given, Mapping):
        check.fail_type(side, "a dictionary of tensors", type(given).__name__)
    if name not in given:
        check.fail(side, f"with the difference {name!r}", sorted(given))
    label, value = f"{side}[{name!r}]", given[name]
    if kind == "regression":
        check.sizes["width"] = width
        differences = check.features(label, value, "B width")
        if values_visible(differences) and differences.abs().amax() > 1 + 1e-3:  # but for rounding
            check.fail(label, "in -1 .. 1: a tanh predicts them", f"up to {float(differences.abs().amax()):g}")
        return differences
    if kind == "binary":
        return check.booleans(label, value, "B")
    classes = check.integers(label, value, "B")
    check.below(label, classes, width, "classes")
    return classes
