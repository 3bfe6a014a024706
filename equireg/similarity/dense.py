"""Reference log-sum-exp and softmax mean of a masked, weighted similarity matrix, in plain PyTorch.

Every other implementation is tested against this one. It stores the matrix, so it suits small problems; autograd
computes its gradients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}  # devices


class Pairs(NamedTuple):
    """Which pairs (row, column) are kept, by a relation between their groups; pairs with equal ids never are."""

    relation: str  # "all", "ne": groups differ, "eq": groups agree
    row_group: Tensor | None  # [M]
    col_group: Tensor | None  # [N]
    row_id: Tensor | None  # [M]
    col_id: Tensor | None  # [N]

    def dropped(self, rows: slice, cols: slice) -> Tensor | None:
        """Mask of the pairs left out in a block of the matrix, bool [rows, cols]; None if all are kept."""
        drop = None
        if self.row_group is not None and self.col_group is not None:
            same = self.row_group[rows, None] == self.col_group[None, cols]
            drop = same if self.relation == "ne" else ~same
        if self.row_id is not None and self.col_id is not None:
            same = self.row_id[rows, None] == self.col_id[None, cols]
            drop = same if drop is None else drop | same
        return drop


class Problem(NamedTuple):
    """The arguments of `pair_lse`. Without y, the columns are the rows of x, with the same pairs and weights."""

    x: Tensor  # [M, D]
    y: Tensor | None  # [N, D]
    scale: Tensor
    pairs: Pairs
    col_weight: Tensor | None = None  # [E, N], or [E, S, N] with row_select
    row_select: Tensor | None = None  # [M]

    @property
    def environments(self) -> int:
        return 1 if self.col_weight is None else self.col_weight.shape[0]


class Outcome(NamedTuple):
    """What a backward pass starts from: both results and their gradients, [E, M], and which gradients it returns."""

    lse: Tensor
    mean: Tensor
    grad_lse: Tensor
    grad_mean: Tensor | None
    needs_x: bool
    needs_y: bool
    needs_weight: bool


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exactly(x: Tensor) -> Tensor:
    """In float64; in float32 on a device without it."""
    return x.to(torch.float32 if x.device.type in WITHOUT_FLOAT64 else torch.float64)


def exponent_limit(dtype: torch.dtype) -> float:
    """The largest exponent for a pair of weight zero: only the weight's gradient, and no sum, needs its exponential."""
    return math.log(torch.finfo(dtype).max) - 8


def pair_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    x, y, scale, pairs, col_weight, row_select = problem
    y = x if y is None else y
    dtype = accumulation_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    dropped = pairs.dropped(slice(None), slice(None))
    keep = torch.ones_like(logits, dtype=torch.bool)
    if dropped is not None:  # dropped logits may be NaN or infinite
        keep, logits = ~dropped, logits.masked_fill(dropped, 0)
    weight = None
    if col_weight is not None:
        col_weight = col_weight.to(dtype)
        weight = col_weight[:, None, :] if row_select is None else col_weight[:, row_select, :]
    return _row_lse(logits, keep[None], weight)


def _row_lse(logits: Tensor, keep: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """``lse`` and ``mean`` of logits [M, N]; ``keep`` and ``weight`` are [E, M, N], where E and M broadcast."""
    if logits.shape[1] == 0:  # a maximum needs a column, so add one that is not kept
        logits, keep = F.pad(logits, (0, 1)), F.pad(keep, (0, 1))
        weight = None if weight is None else F.pad(weight, (0, 1))
    kept = keep.to(logits.dtype)
    counted = keep if weight is None else keep & (weight != 0)

    # The largest logit of each row keeps the exponentials in range. It cancels, so it needs no gradient.
    peak = logits.detach().masked_fill(~counted, -math.inf).amax(-1, keepdim=True)  # [E, M, 1]
    empty = peak == -math.inf  # a NaN is not
    peak = peak.masked_fill(empty, 0)
    # A dropped pair gets the exponent 0, which is fast and cannot overflow.
    exponent = (logits - peak).mul_(kept)
    if weight is not None:  # a pair of weight zero still has a gradient, and may lie far above the peak
        limit = exponent_limit(logits.dtype)
        kept, exponent = kept * weight, torch.where(exponent > limit, limit, exponent)  # clamp hides NaN's gradient
    mass = exponent.exp_() * kept  # [E, M, N]
    # An empty row divides by one, so that no gradient passes through 0 / 0.
    total = mass.sum(-1, keepdim=True).masked_fill(empty, 1)
    lse = (total.log() + peak).masked_fill(empty, -math.inf)

    mean = ((mass * logits).sum(-1, keepdim=True) / total).masked_fill(empty, 0)
    return lse.squeeze(-1), mean.squeeze(-1)
