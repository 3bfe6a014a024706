"""Standardise frozen features for a fit, whatever their scale and dtype and the mode they were computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def standardized(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Standardise each column by its mean and standard deviation over ``train``; fp32, outside of any graph.

    A column that is constant in ``train`` becomes 0 everywhere, because a fit would find any weight for it.
    """
    with torch.inference_mode(False), torch.no_grad():
        exact = train.double()  # in fp32 the mean of a constant column is off by its last digit
        mean, std = exact.mean(0), exact.std(0, correction=0)
        varies = std > 1e-6 * exact.abs().amax(0)
        inverse = torch.where(varies, 1 / torch.where(varies, std, 1), 0)
        return [((part.double() - mean) * inverse).float() for part in (train, *others)]
