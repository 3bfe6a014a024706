"""Tiles of a masked similarity matrix: each is formed, used and discarded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equireg.similarity.dense import Problem, accumulation_dtype
from equireg.similarity.products import times_transposed

# On a CPU, an fp32 tile and its buffer stay near the cache; thinner tiles would slow the matrix product. Both sizes
# hold whole images of 49 or 196 tokens, so that fewer tiles need a mask where groups are images.
ROWS, COLS = 392, 784
# On other devices, a tile must repay the launch of several kernels: 64 MB of fp32.
DEVICE_ROWS, DEVICE_COLS = 2048, 8192


class Gradients(NamedTuple):
    """Accumulators of the backward pass, empty if not needed. Where y is x, the first two are the same tensor."""

    by_row: Tensor
    by_col: Tensor
    by_weight: Tensor


class Tiles:
    """Blocks of the logits ``scale · x yᵀ``; dropped pairs have a very low finite value.

    ``scaled`` is ``scale · x``, if the caller has it already; ``device_rows`` the rows of a tile that is not on a CPU.
    """

    def __init__(self, problem: Problem, scaled: Tensor | None = None, device_rows: int = DEVICE_ROWS):
        x, y, scale, pairs, col_weight, row_select = problem
        dtype = accumulation_dtype(x.dtype)
        self.symmetric = y is None
        y = x if y is None else y
        self.x = x.to(dtype) * scale.to(dtype) if scaled is None else scaled  # scaled once, not in each tile
        self.y = y.to(dtype)
        self.left = self.y if self.symmetric else self.x  # the factor of a column's gradient
        self.pairs = pairs
        self.col_weight = None if col_weight is None else col_weight.to(dtype)
        self.row_select = row_select
        # Finite, so that its product with a zero mass is zero; a row whose peak stays below `empty` has no pair.
        self.low = torch.finfo(dtype).min / 2
        self.empty = self.low / 2
        on_cpu = x.device.type == "cpu"  # elsewhere reading the ranges would wait for the device
        height, width = (ROWS, COLS) if on_cpu else (device_rows, DEVICE_COLS)
        if self.symmetric:  # mirrored tiles need equal blocks; small ones leave less on the diagonal
            width = height
        self.row_blocks = [slice(i, min(i + height, len(x))) for i in range(0, len(x), height)]
        self.col_blocks = [slice(i, min(i + width, len(y))) for i in range(0, len(y), width)]
        self.group_ranges = _Ranges(pairs.row_group, pairs.col_group, self) if on_cpu else None
        self.id_ranges = _Ranges(pairs.row_id, pairs.col_id, self) if on_cpu else None

    def needless(self, rows: slice, cols: slice) -> bool:
        """Whether the relation keeps none of the tile's pairs."""
        return self.pairs.relation == "eq" and not self._groups_meet(rows, cols)

    def logits(self, rows: slice, cols: slice) -> Tensor:
        logits = times_transposed(self.x[rows], self.y[cols])
        ids_meet = self.id_ranges is None or self.id_ranges.overlap(rows, cols)
        if self.pairs.relation == "eq" or self._groups_meet(rows, cols) or ids_meet:
            dropped = self.pairs.dropped(rows, cols)
            if dropped is not None:
                logits.masked_fill_(dropped, self.low)
        return logits

    def _groups_meet(self, rows: slice, cols: slice) -> bool:
        return self.group_ranges is None or self.group_ranges.overlap(rows, cols)

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
    """The smallest and largest key of each block, to rule out quickly that two blocks share a key."""

    def __init__(self, row_key: Tensor | None, col_key: Tensor | None, tiles: Tiles):
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
