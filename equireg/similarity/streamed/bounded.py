"""The same sums for logits within a known bound, such as those of unit vectors at a common temperature.

Then ``exp(l)`` neither overflows nor vanishes: no row needs its maximum, and one exponential serves all environments,
whose sums are products with the weights. Where y is x, a tile above the diagonal is the transpose of the one below.
With ``c = (g_lse - g_mean mean) e^{-lse}`` and ``b = g_mean e^{-lse}``, each [E, M],

    dw_ej = sum_i e^{l_ij} (c_ei + l_ij b_ei)
    dl_ij = e^{l_ij} (sum_e (c_ei + b_ei) w_ej + l_ij sum_e b_ei w_ej)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from equireg.similarity.dense import exponent_limit
from equireg.similarity.products import times_transposed
from equireg.similarity.streamed.exponential import exp_
from equireg.similarity.streamed.tiles import Gradients, Tiles

# e^15 is 3e6 and e^-15 3e-7: with these weights, sums of a hundred thousand stay far from fp32's limits. A bound twice
# as high would also lose digits, because gradients are differences of sums that grow with it.
BOUND = 15.0
_WEIGHTS = (1e-20, 1e15)


def serves(tiles: Tiles) -> bool:
    """Whether these sums are safe; only on a CPU, because reading the values elsewhere waits for the device."""
    if tiles.x.device.type != "cpu" or tiles.row_select is not None or not len(tiles.x) or not len(tiles.y):
        return False
    longest = [float(torch.linalg.vector_norm(part, dim=1).amax()) for part in (tiles.x, tiles.y)]
    if not longest[0] * longest[1] <= BOUND:  # also if one is NaN
        return False
    weight = tiles.col_weight
    return weight is None or bool(((weight == 0) | ((weight >= _WEIGHTS[0]) & (weight <= _WEIGHTS[1]))).all())


def forward(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """``lse`` and ``mean``, each [E, M]."""
    weight = _weight(tiles)
    total = tiles.x.new_zeros(len(weight), len(tiles.x))
    moment = torch.zeros_like(total)
    for rows, cols, mirrored, mass, product in _masses(tiles):
        for sums, part in ((total, mass), (moment, product)):
            # The thin factor is on the left, where it is eight times as fast as on the right.
            sums[:, rows].addmm_(weight[:, cols], part.T)
            if mirrored:
                sums[:, cols].addmm_(weight[:, rows], part)
    return total.log(), (moment / total).masked_fill_(total == 0, 0)


def backward(tiles: Tiles, lse: Tensor, constant: Tensor, grad_mean: Tensor | None, gradients: Gradients) -> None:
    """Add to the gradients; ``constant`` is g_lse - g_mean mean, [E, M]."""
    by_row, by_col, by_weight = gradients
    weight = _weight(tiles)
    inverse = torch.exp((-lse).clamp(max=exponent_limit(lse.dtype)))
    own = inverse * constant
    slope = torch.zeros_like(own) if grad_mean is None else inverse * grad_mean
    # dl_ij = mass_ij <level_i, level'_j> + product_ij <steep_i, steep'_j>; where y is x, from both ends of a pair.
    level, steep = (own + slope, weight), (slope, weight)
    if tiles.symmetric:
        level, steep = ((torch.cat(two), torch.cat(two[::-1])) for two in (level, steep))
    for rows, cols, mirrored, mass, product in _masses(tiles):
        if by_weight.numel():
            for factor, part in ((own, mass), (slope, product)):
                by_weight[:, cols].addmm_(factor[:, rows], part)
                if mirrored:
                    by_weight[:, rows].addmm_(factor[:, cols], part.T)
        if by_row.numel() or by_col.numel():
            total = mass.mul_(level[0][:, rows].T @ level[1][:, cols])
            if grad_mean is not None:
                total += product.mul_(steep[0][:, rows].T @ steep[1][:, cols])
            if by_row.numel():
                by_row[rows] += times_transposed(total, tiles.y[cols].T)
            if by_col.numel() and (mirrored or not tiles.symmetric):
                by_col[cols] += times_transposed(tiles.left[rows].T, total.T).T


def _weight(tiles: Tiles) -> Tensor:
    """The weights of the columns in each environment, [E, N]."""
    return tiles.y.new_ones(1, len(tiles.y)) if tiles.col_weight is None else tiles.col_weight


def _masses(tiles: Tiles) -> Iterator[tuple[slice, slice, bool, Tensor, Tensor]]:
    """The rows, columns, e^l and e^l l of each tile; where y is x, only of tiles on and above the diagonal.

    The third value says whether a tile also stands for its mirror image.
    """
    for rows in tiles.row_blocks:
        for cols in tiles.col_blocks:
            below = tiles.symmetric and rows.start > cols.start
            if not below and not tiles.needless(rows, cols):
                logits = tiles.logits(rows, cols)
                mass = exp_(logits.clone())
                yield rows, cols, tiles.symmetric and rows.start < cols.start, mass, logits.mul_(mass)
