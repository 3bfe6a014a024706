"""Principal axes of unit variance, for features whose similarities a few directions would decide."""

from __future__ import annotations

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.similarity import accumulation_dtype


@torch.no_grad()
def whitened(check: Arguments, features: Tensor, axes: int) -> Tensor:
    """The features [N, D] on their first principal axes [N, axes], each of mean 0 and variance 1.

    Summed block by block, so that extra memory is that of a [D, D] matrix and of the result.
    """
    check.count("whiten", axes)
    with torch.autocast(features.device.type, enabled=False):
        return _whitened(check, features, axes)


def _whitened(check: Arguments, features: Tensor, axes: int) -> Tensor:
    exact = accumulation_dtype(features.dtype)
    blocks = features.split(4096)
    mean = torch.stack([block.to(exact).sum(0) for block in blocks]).sum(0) / len(features)
    covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for block in blocks:
        centered = block.to(exact) - mean
        covariance += (centered.T @ centered).cpu().double()
    variance, directions = torch.linalg.eigh(covariance / max(len(features) - 1, 1))  # ascending
    rank = int((variance > 1e-7 * variance.clamp(min=0).max()).sum())
    if axes > rank:
        check.fail("whiten", f"at most {rank}, the rank of the features", axes)
    scaled = (directions[:, -axes:] / variance[-axes:].sqrt()).flip(1)
    # The sign of an axis is arbitrary: its largest entry is positive, on every machine.
    scaled *= scaled.gather(0, scaled.abs().argmax(0, keepdim=True)).sign()
    scaled = scaled.to(features.device, exact)
    return torch.cat([(block.to(exact) - mean) @ scaled for block in blocks])
