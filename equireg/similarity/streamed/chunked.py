"""The same sums as ``dense``, streamed: each tile of the matrix is formed, used and discarded.

Memory is O(M·D + N·D), on any device, for any dtype and width. With logits ``l``, weights ``w`` and the softmax
``p`` over the kept pairs of a row, the backward pass recomputes each tile and uses the closed forms

    dl_ij = p_ij (g_lse_i + g_mean_i (1 + l_ij - mean_i))
    dw_j  = sum_i q_ij (g_lse_i + g_mean_i (l_ij - mean_i)),     q = exp(l - lse), finite where w = 0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equireg.similarity.dense import Outcome, Problem, exponent_limit
from equireg.similarity.products import times_transposed
from equireg.similarity.streamed import bounded
from equireg.similarity.streamed.exponential import exp_
from equireg.similarity.streamed.tiles import Gradients, Tiles


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """``lse`` and ``mean``, each [E, M], by the online softmax."""
    tiles = Tiles(problem)
    if bounded.serves(tiles):
        return bounded.forward(tiles)
    lse = tiles.x.new_empty(problem.environments, len(tiles.x))
    mean = torch.empty_like(lse)
    for rows in tiles.row_blocks:
        # Sums over the columns so far, of exp(l - peak) and of l exp(l - peak).
        peak = torch.full_like(lse[:, rows], tiles.low)
        total, moment = torch.zeros_like(peak), torch.zeros_like(peak)
        for cols in tiles.col_blocks:
            if tiles.needless(rows, cols):
                continue
            logits = tiles.logits(rows, cols)
            for e in range(problem.environments):
                weight = tiles.weight(e, rows, cols)
                kept = logits if weight is None else logits.masked_fill(weight == 0, tiles.low)
                new_peak = torch.maximum(peak[e], kept.amax(1))
                shift = new_peak.masked_fill(new_peak <= tiles.empty, 0)
                mass = exp_(kept - shift[:, None])
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


def backward(problem: Problem, outcome: Outcome) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, without the factor of the scale, to y and to col_weight; empty where they are not needed."""
    x, y, col_weight = problem.x, problem.y, problem.col_weight
    lse, mean, grad_lse, grad_mean, needs_x, needs_y, needs_weight = outcome
    tiles = Tiles(problem)
    empty = lse == -math.inf
    lse = lse.masked_fill(empty, 0)
    grad_lse = grad_lse.to(lse.dtype).masked_fill(empty, 0)
    constant = grad_lse
    if grad_mean is not None:
        grad_mean = grad_mean.to(lse.dtype).masked_fill(empty, 0)
        constant = grad_lse - grad_mean * mean  # dl = p (constant + g_mean (1 + l)), dw = q (constant + g_mean l)

    by_row = tiles.x.new_zeros(x.shape if needs_x else 0)  # sum_j dl_ij y_j; where y is x also sum_j dl_ji x_j
    by_col = tiles.x.new_zeros(y.shape if y is not None and needs_y else 0)  # sum_i dl_ij scale x_i
    by_weight = tiles.x.new_zeros(0)
    if col_weight is not None and needs_weight:
        by_weight = col_weight.new_zeros(col_weight.shape, dtype=tiles.x.dtype)
    gradients = Gradients(by_row, by_row if y is None else by_col, by_weight)
    if bounded.serves(tiles):
        bounded.backward(tiles, lse, constant, grad_mean, gradients)
    else:
        _backward(tiles, lse, constant, grad_mean, gradients)
    return by_row, by_col, by_weight


def _backward(tiles: Tiles, lse: Tensor, constant: Tensor, grad_mean: Tensor | None, gradients: Gradients) -> None:
    by_row, by_col, by_weight = gradients
    for rows in tiles.row_blocks:
        for cols in tiles.col_blocks:
            if tiles.needless(rows, cols):
                continue
            logits = tiles.logits(rows, cols)
            total = None
            for e in range(len(lse)):
                q = logits - lse[e, rows, None]
                weight = tiles.weight(e, rows, cols)
                if weight is not None:  # where w = 0 a logit may lie far above the log-sum-exp
                    q.clamp_(max=exponent_limit(q.dtype))
                exp_(q)
                slope = constant[e, rows, None]
                if grad_mean is not None:
                    # A dropped pair must not multiply its q = 0 by an overflow.
                    slope = slope + grad_mean[e, rows, None] * logits.masked_fill(logits <= tiles.empty, 0)
                if by_weight.numel():
                    tiles.add_to_weight(by_weight, e, rows, cols, q * slope)
                if by_row.numel() or by_col.numel():
                    if grad_mean is not None:
                        slope = slope.add_(grad_mean[e, rows, None])
                    if weight is not None:
                        q.mul_(weight)
                    q.mul_(slope)
                    total = q if total is None else total.add_(q)
            if total is None:
                continue
            if by_row.numel():
                by_row[rows] += times_transposed(total, tiles.y[cols].T)
            if by_col.numel():
                by_col[cols] += times_transposed(tiles.left[rows].T, total.T).T
