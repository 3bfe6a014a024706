"""Penalties on risks that differ between environments: REx and IRMv1.

Both take a risk and its slope per environment in closed form, so neither differentiates twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equireg._checks import Arguments

__all__ = ["irmv1_penalty", "rex_penalty"]


def rex_penalty(risk: Tensor) -> Tensor:
    r"""Variance of the risks over environments (risk extrapolation, REx).

    .. math:: \text{Var}_e\, \ell(k, e) = \frac{1}{E - 1} \sum_e (\ell(k, e) - \bar\ell(k))^2

    Krueger et al., "Out-of-distribution generalization via risk extrapolation"; Eq. 16 of EqInv (Wang et al., 2022).
    The penalty is quadratic, so a distributed run needs the risks of all processes: the mean of each process's penalty
    is a different number. :class:`ClassWiseIRM` can gather them.

    Args:
        risk: [K, E] or [E]; one row for each class, one column for each environment.

    Returns:
        [K] or 0-d: the unbiased variance, 0 where there is one environment only. Float32 (float64 for float64).

    Raises:
        ValueError: ``risk`` has no environment.

    Example:
        >>> import torch
        >>> rex_penalty(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        tensor([2., 0.])
    """
    risk = _environments("rex_penalty", "risk", risk)
    environments = risk.shape[-1]
    deviation = risk - risk.mean(-1, keepdim=True)
    return deviation.square().sum(-1) / max(environments - 1, 1)


def irmv1_penalty(slope: Tensor) -> Tensor:
    r"""Sum over environments of the squared slope of the risk in a dummy classifier (IRMv1).

    .. math:: \sum_e \left( \left. \frac{\partial \ell(k, e, w)}{\partial w} \right|_{w=1} \right)^2

    Arjovsky et al., "Invariant risk minimization"; Eq. 6 of EqInv (Wang et al., 2022). The dummy classifier is one
    number that multiplies every logit. The penalty is quadratic, so a distributed run needs the slopes of all
    processes, as in :func:`rex_penalty`.

    Args:
        slope: [K, E] or [E]; the derivatives at w = 1.

    Returns:
        [K] or 0-d, in float32 (float64 for float64).

    Raises:
        ValueError: ``slope`` has no environment.

    Example:
        >>> import torch
        >>> irmv1_penalty(torch.tensor([[1.0, -2.0], [0.0, 0.5]]))
        tensor([5.0000, 0.2500])
    """
    slope = _environments("irmv1_penalty", "slope", slope)
    return slope.square().sum(-1)


def _environments(function: str, name: str, value: Tensor) -> Tensor:
    """Values over environments, in float32 or float64."""
    check = Arguments(function)
    check.features(name, value, "E" if isinstance(value, Tensor) and value.dim() == 1 else "K E")
    if check.sizes["E"] == 0:
        check.fail(name, "over at least one environment", list(value.shape))
    return value.to(torch.promote_types(value.dtype, torch.float32))
