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

    def dropped(self, rows: slice, cols: slice) -> Tensor | None:
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


def exponent_limit(dtype: torch.dtype) -> float:
    """The largest exponent used for a pair of weight zero, whose exponential is needed by no sum, only by dw."""
    return math.log(torch.finfo(dtype).max) - 8


def pair_lse(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, col_weight: Tensor | None, row_select: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    dropped = pairs.dropped(slice(None), slice(None))
    keep = torch.ones_like(logits, dtype=torch.bool)
    if dropped is not None:  # what is left out may be NaN or infinite
        keep, logits = ~dropped, logits.masked_fill(dropped, 0)
    weight = None
    if col_weight is not None:
        col_weight = col_weight.to(dtype)
        weight = col_weight[:, None, :] if row_select is None else col_weight[:, row_select, :]
    return _row_lse(logits, keep[None], weight)


def _row_lse(logits: Tensor, keep: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of a matrix of logits [M, N]; ``keep`` and ``weight`` [E, M, N], where sizes of 1 among E and M hold for all."""
    if logits.shape[1] == 0:  # one column that is not kept stands for none
        logits, keep = F.pad(logits, (0, 1)), F.pad(keep, (0, 1))
        weight = None if weight is None else F.pad(weight, (0, 1))
    kept = keep.to(logits.dtype)
    counted = keep if weight is None else keep & (weight != 0)

    # The largest logit of each row keeps the exponentials in range. It cancels, so it needs no gradient.
    peak = logits.detach().masked_fill(~counted, -math.inf).amax(-1, keepdim=True)  # [E, M, 1]
    empty = peak == -math.inf  # a NaN is not
    peak = peak.masked_fill(empty, 0)
    # Of a pair that is left out the exponential is taken of 0: it is fast, and cannot overflow.
    exponent = (logits - peak).mul_(kept)
    if weight is not None:  # one of weight zero has a gradient, so its own is needed, and may lie far above the peak
        kept, exponent = kept * weight, exponent.clamp(max=exponent_limit(logits.dtype))
    mass = exponent.exp_() * kept  # [E, M, N]
    # An empty row divides by one, so that no gradient passes through 0 / 0.
    total = mass.sum(-1, keepdim=True).masked_fill(empty, 1)
    lse = (total.log() + peak).masked_fill(empty, -math.inf)

    mean = ((mass * logits).sum(-1, keepdim=True) / total).masked_fill(empty, 0)
    return lse.squeeze(-1), mean.squeeze(-1)
