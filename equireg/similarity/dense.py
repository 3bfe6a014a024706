"""The definition: log-sum-exp and softmax mean of a masked, weighted similarity matrix, in plain PyTorch.

Every other implementation is tested against this one. It stores the matrix, so it is for small problems; its
gradients are autograd's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Which pairs (row, column) are kept: by a relation between their groups, and never where their ids are equal."""

    relation: str  # "all", "ne": groups differ, "eq": groups agree
    row_group: Tensor | None  # [M]
    col_group: Tensor | None  # [N]
    row_id: Tensor | None  # [M]
    col_id: Tensor | None  # [N]

    def dropped(self, rows: slice = slice(None), cols: slice = slice(None)) -> Tensor | None:
        """The pairs left out in a block of the matrix, bool [rows, cols]; None where all are kept."""
        drop = None
        if self.row_group is not None and self.col_group is not None:
            same = self.row_group[rows, None] == self.col_group[None, cols]
            drop = same if self.relation == "ne" else ~same
        if self.row_id is not None and self.col_id is not None:
            same = self.row_id[rows, None] == self.col_id[None, cols]
            drop = same if drop is None else drop | same
        return drop


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are formed in fp32, and in fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized(x: Tensor) -> Tensor:
    """Unit length along the last dimension, in fp32 or fp64; a zero vector stays zero and its gradient bounded."""
    # In half precision the usual epsilon of 1e-12 rounds to zero, and a blank patch would give NaN.
    return F.normalize(x.to(accumulation_dtype(x.dtype)), dim=-1, eps=1e-6)


def exponent_limit(dtype: torch.dtype) -> float:
    """The largest exponent used for a pair of weight zero, whose exponential is needed by no sum, only by dw."""
    return math.log(torch.finfo(dtype).max) - 8


def pair_lse(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, col_weight: Tensor | None, row_select: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    if col_weight is None:
        weight = logits.new_ones(1, 1, 1)
    elif row_select is None:
        weight = col_weight.to(dtype)[:, None, :]  # [E, 1, N]
    else:
        weight = col_weight.to(dtype)[:, row_select, :]  # [E, M, N]
    return row_lse(logits, pairs.dropped(), weight)


def row_lse(logits: Tensor, drop: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted log-sum-exp and softmax mean of each row, [E, M], of a matrix of logits that is there.

    ``logits`` [M, N]; ``drop``, bool [M, N], the pairs left out; ``weight`` [E, 1, N], [E, M, N] or one number.
    """
    if drop is not None:
        logits = logits.masked_fill(drop, 0)
        weight = weight.masked_fill(drop, 0)
    if logits.shape[1] == 0:  # one column of weight zero stands for none
        logits, weight = F.pad(logits, (0, 1)), logits.new_zeros(len(weight), 1, 1)

    # The largest logit of each row keeps the exponentials in range. It cancels, so it needs no gradient.
    peak = logits.detach().masked_fill(weight == 0, -math.inf).amax(-1, keepdim=True)  # [E, M, 1]
    empty = peak == -math.inf  # a NaN is not
    exponent = (logits - peak.masked_fill(empty, 0)).clamp(max=exponent_limit(logits.dtype))
    mass = weight * exponent.exp()  # [E, M, N]
    # An empty row divides by one, so that no gradient passes through 0 / 0.
    total = mass.sum(-1, keepdim=True).masked_fill(empty, 1)
    lse = (total.log() + peak).masked_fill(empty, -math.inf)
    mean = ((mass * logits).sum(-1, keepdim=True) / total).masked_fill(empty, 0)
    return lse.squeeze(-1), mean.squeeze(-1)
