"""The same sums as ``dense``, streamed: tiles of the matrix are formed, used and forgotten.

Memory is O(M·D + N·D), on any device, for any dtype and width. With logits ``l``, weights ``w`` and the softmax
``p`` over the kept pairs of a row, the backward pass recomputes each tile and uses the closed forms

    dl_ij = p_ij (g_lse_i + g_mean_i (1 + l_ij - mean_i))
    dw_j  = sum_i q_ij (g_lse_i + g_mean_i (l_ij - mean_i)),     q = exp(l - lse), finite where w = 0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equireg.similarity.dense import Pairs, accumulation_dtype, exponent_limit
from equireg.similarity.products import times_transposed

# An fp32 tile and the buffer beside it stay near a CPU's cache, and thinner tiles would starve the matrix product.
# Both hold whole images of 49 or 196 tokens: where groups are images, fewer tiles then need a mask.
ROWS, COLS = 392, 784


def forward(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, col_weight: Tensor | None, row_select: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``lse`` and ``mean``, each [E, M], by the online softmax."""
    tiles = _Tiles(x, y, scale, pairs, col_weight, row_select)
    environments = 1 if col_weight is None else col_weight.shape[0]
    lse = tiles.x.new_empty(environments, len(x))
    mean = torch.empty_like(lse)
    for rows in tiles.row_blocks:
        # Sums over the columns so far, of exp(l - peak) and of l exp(l - peak).
        peak = torch.full_like(lse[:, rows], tiles.low)
        total, moment = torch.zeros_like(peak), torch.zeros_like(peak)
        for cols in tiles.col_blocks:
            logits = tiles.logits(rows, cols)
            if logits is None:
                continue
            for e in range(environments):
                weight = tiles.weight(e, rows, cols)
                kept = logits if weight is None else logits.masked_fill(weight == 0, tiles.low)
                new_peak = torch.maximum(peak[e], kept.amax(1))
                shift = new_peak.masked_fill(new_peak <= tiles.empty, 0)
                mass = torch.exp_(kept - shift[:, None])
                if weight is not None:
                    mass.mul_(weight)
                fade = torch.exp_(peak[e] - new_peak)
                peak[e] = new_peak
                total[e].mul_(fade).add_(mass.sum(1))
                moment[e].mul_(fade).add_(mass.mul_(logits).sum(1))
        empty = peak <= tiles.empty
        lse[:, rows] = (peak + total.log()).masked_fill_(empty, -math.inf)
        mean[:, rows] = (moment / total).masked_fill_(empty, 0)
    return lse, mean


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pairs: Pairs,
    col_weight: Tensor | None,
    row_select: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    grad_lse: Tensor,
    grad_mean: Tensor | None,
    needs_x: bool,
    needs_y: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x and scale (where ``needs_x``), to y and to col_weight; empty where they are not needed."""
    tiles = _Tiles(x, y, scale, pairs, col_weight, row_select)
    environments = len(lse)
    empty = lse == -math.inf
    lse = lse.masked_fill(empty, 0)
    grad_lse = grad_lse.to(lse.dtype).masked_fill(empty, 0)
    constant = grad_lse
    if grad_mean is not None:
        grad_mean = grad_mean.to(lse.dtype).masked_fill(empty, 0)
        constant = grad_lse - grad_mean * mean  # dl = p (constant + g_mean (1 + l)), dw = q (constant + g_mean l)

    by_row = tiles.x.new_zeros(x.shape if needs_x else 0)  # sum_j dl_ij y_j
    by_col = tiles.x.new_zeros(y.shape if needs_y else 0)  # sum_i dl_ij scale x_i
    by_weight = tiles.x.new_zeros(0)
    if col_weight is not None and needs_weight:
        by_weight = col_weight.new_zeros(col_weight.shape, dtype=tiles.x.dtype)
    for rows in tiles.row_blocks:
        for cols in tiles.col_blocks:
            logits = tiles.logits(rows, cols)
            if logits is None:
                continue
            total = None
            for e in range(environments):
                q = logits - lse[e, rows, None]
                weight = tiles.weight(e, rows, cols)
                if weight is not None:  # where w = 0 a logit may lie far above the log-sum-exp
                    q.clamp_(max=exponent_limit(q.dtype))
                q.exp_()
                slope = constant[e, rows, None]
                if grad_mean is not None:
                    # A dropped pair must not multiply its q = 0 by what overflows.
                    slope = slope + grad_mean[e, rows, None] * logits.masked_fill(logits <= tiles.empty, 0)
                if needs_weight:
                    tiles.add_to_weight(by_weight, e, rows, cols, q * slope)
                if needs_x or needs_y:
                    if grad_mean is not None:
                        slope = slope.add_(grad_mean[e, rows, None])
                    if weight is not None:
                        q.mul_(weight)
                    q.mul_(slope)
                    total = q if total is None else total.add_(q)
            if total is None:
                continue
            if needs_x:
                by_row[rows] += times_transposed(total, tiles.y[cols].T)
            if needs_y:
                by_col[cols] += times_transposed(tiles.x[rows].T, total.T).T
    grad_scale = by_row.new_zeros(())
    if needs_x:
        grad_scale = torch.dot(by_row.flatten(), x.to(by_row.dtype).flatten())
        by_row.mul_(scale)
    return by_row, by_col, grad_scale, by_weight


class _Tiles:
    """Blocks of the matrix of logits ``scale · x yᵀ``, dropped pairs at a very low finite value."""

    def __init__(
        self, x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, col_weight: Tensor | None, row_select: Tensor | None
    ):
        dtype = accumulation_dtype(x.dtype)
        self.x = x.to(dtype) * scale.to(dtype)  # scaled once, not in each tile
        self.y = y.to(dtype)
        self.pairs = pairs
        self.col_weight = None if col_weight is None else col_weight.to(dtype)
        self.row_select = row_select
        # Finite, so that its product with a zero mass is zero; a row whose peak stays below `empty` has no pair.
        self.low = torch.finfo(dtype).min / 2
        self.empty = self.low / 2
        self.row_blocks = [slice(i, min(i + ROWS, len(x))) for i in range(0, len(x), ROWS)]
        self.col_blocks = [slice(i, min(i + COLS, len(y))) for i in range(0, len(y), COLS)]
        on_cpu = x.device.type == "cpu"  # elsewhere reading the ranges would wait for the device
        self.group_ranges = _Ranges(pairs.row_group, pairs.col_group, self) if on_cpu else None
        self.id_ranges = _Ranges(pairs.row_id, pairs.col_id, self) if on_cpu else None

    def logits(self, rows: slice, cols: slice) -> Tensor | None:
        """The tile, or None where the relation keeps none of its pairs."""
        groups_meet = self.group_ranges is None or self.group_ranges.overlap(rows, cols)
        ids_meet = self.id_ranges is None or self.id_ranges.overlap(rows, cols)
        if self.pairs.relation == "eq" and not groups_meet:
            return None
        logits = times_transposed(self.x[rows], self.y[cols])
        if self.pairs.relation == "eq" or groups_meet or ids_meet:
            dropped = self.pairs.dropped(rows, cols)
            if dropped is not None:
                logits.masked_fill_(dropped, self.low)
        return logits

    def weight(self, e: int, rows: slice, cols: slice) -> Tensor | None:
        """The weights of environment ``e``, [1, cols], or [rows, cols] where each row selects its own."""
        if self.col_weight is None:
            return None
        if self.row_select is None:
            return self.col_weight[e, None, cols]
        return self.col_weight[e, :, cols][self.row_select[rows]]

    def add_to_weight(self, by_weight: Tensor, e: int, rows: slice, cols: slice, gradient: Tensor) -> None:
        if self.row_select is None:
            by_weight[e, cols] += gradient.sum(0)
        else:
            # A product with the one-hot selection sums in a fixed order; an index_add on a GPU would not.
            chosen = self.row_select[rows] == torch.arange(by_weight.shape[1], device=gradient.device)[:, None]
            by_weight[e, :, cols] += chosen.to(gradient.dtype) @ gradient


class _Ranges:
    """The smallest and largest key of each block, to see at once that two blocks have no key in common."""

    def __init__(self, row_key: Tensor | None, col_key: Tensor | None, tiles: _Tiles):
        self.rows, self.cols = self._of(row_key, tiles.row_blocks), self._of(col_key, tiles.col_blocks)

    @staticmethod
    def _of(key: Tensor | None, blocks: list[slice]) -> dict[int, tuple[int, int]]:
        if key is None:
            return {}
        return {block.start: (int(key[block].min()), int(key[block].max())) for block in blocks}

    def overlap(self, rows: slice, cols: slice) -> bool:
        if not self.rows or not self.cols:
            return False
        (row_low, row_high), (col_low, col_high) = self.rows[rows.start], self.cols[cols.start]
        return row_low <= col_high and col_low <= row_high
