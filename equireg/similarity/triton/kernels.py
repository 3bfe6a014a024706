"""The Triton kernels of ``pair_lse``; ``launch.py`` launches them.

In both, a program owns a block of rows of one side and streams blocks of the other, for one split of the columns. No
two programs write to the same place, so sums have one order. Logits are in base 2, like the hardware's exponential.
Columns beyond the end have no key of their own, so they are always masked by their number.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _block(matrix, index, size, start, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``index`` of a matrix [size, D], WIDTH columns from ``start`` on, zero beyond the edges."""
    inner = start + tl.arange(0, WIDTH)
    inside = (index[:, None] < size) & (inner[None, :] < D)
    return tl.load(matrix + index.to(tl.int64)[:, None] * D + inner[None, :], mask=inside, other=0.0)


@triton.jit
def _products(
    own, own_block, other, other_block, rows, cols, M, N,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products of rows and columns, [ROWS, COLS]; of the blocks, if they hold the whole width."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    if D <= WIDTH:
        total = tl.dot(own_block, tl.trans(other_block), total, input_precision=PRECISION)
    else:
        # Not static_range: the stages of each unrolled step would need shared memory of their own.
        for start in range(0, D, WIDTH):
            left, right = _block(own, rows, M, start, D, WIDTH), _block(other, cols, N, start, D, WIDTH)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def _kept(
    own_group, other_group, own_id, other_id, rows, cols, M, N,
    RELATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Which pairs count, bool [ROWS, COLS]."""
    kept = tl.broadcast_to((cols < N)[None, :], (ROWS, COLS))
    if RELATION != "all":
        left, right = _key(own_group, rows, M)[:, None], _key(other_group, cols, N)[None, :]
        kept = kept & ((left == right) if RELATION == "eq" else (left != right))
    if own_id is not None:
        kept = kept & (_key(own_id, rows, M)[:, None] != _key(other_id, cols, N)[None, :])
    return kept


@triton.jit
def _key(keys, index, size):
    """The keys at ``index``; beyond the end the last key, which leaves a block's smallest and largest key unchanged."""
    return tl.load(keys + tl.minimum(index, size - 1))


@triton.jit
def _meet(own_group, other_group, rows, cols, M, N):
    """Whether the key ranges of rows and columns overlap; if not, no two keys are equal."""
    own, other = _key(own_group, rows, M), _key(other_group, cols, N)
    return (tl.min(own, 0) <= tl.max(other, 0)) & (tl.min(other, 0) <= tl.max(own, 0))


@triton.jit
def _kept_logits(
    own, own_block, other, factor, own_group, other_group, own_id, other_id, rows, cols, M, N, dropped,
    D: tl.constexpr, RELATION: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Logits of one more block of columns, ``dropped`` where no pair is kept; and the block, where it is held whole."""
    block = own_block
    if D <= WIDTH:
        block = _block(other, cols, N, 0, D, WIDTH)
    logits = factor * _products(own, own_block, other, block, rows, cols, M, N, D, ROWS, COLS, WIDTH, PRECISION)
    kept = _kept(own_group, other_group, own_id, other_id, rows, cols, M, N, RELATION, ROWS, COLS)
    return tl.where(kept, logits, dropped), block


@triton.jit
def _forward_step(
    x, x_block, y, factor, row_group, col_group, row_id, col_id, weight, rows, cols, M, N, peak, total, moment,
    D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RELATION: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The online softmax over one more block of columns."""
    # The dropped value is finite, so that its product with a mass of zero is zero.
    logits, _ = _kept_logits(
        x, x_block, y, factor, row_group, col_group, row_id, col_id, rows, cols, M, N, -1e30,
        D, RELATION, PRECISION, ROWS, COLS, WIDTH,
    )  # fmt: skip
    environment = tl.arange(0, EP)[None, :]
    for e in tl.static_range(E):
        own = environment == e
        old = tl.sum(tl.where(own, peak, 0.0), 1)
        # Each environment has its own peak: below a common one, all columns of an environment could underflow.
        if weight is not None:
            part = tl.load(weight + e * N + cols, mask=cols < N, other=0.0)[None, :]
            new = tl.maximum(old, tl.max(tl.where(part == 0, -1e30, logits), 1))
        else:
            new = tl.maximum(old, tl.max(logits, 1))
        exponent = logits - new[:, None]
        if weight is not None:  # where w = 0 a logit may lie above the peak
            mass = part * tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))
        else:
            mass = tl.exp2(exponent)
        fade = tl.exp2(old - new)[:, None]
        total = tl.where(own, total * fade + tl.sum(mass, 1)[:, None], total)
        moment = tl.where(own, moment * fade + tl.sum(mass * logits, 1)[:, None], moment)
        peak = tl.where(own, new[:, None], peak)
    return peak, total, moment


@triton.jit
def forward(
    x, y, scale, row_group, col_group, row_id, col_id, weight, peaks, totals, moments, M, N, per_split,
    D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RELATION: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For each split of the columns, [splits, E, M]: the logits' peak, and the sums of 2^(l - peak) and of l times it.

    Where no pair counts, the peak is -1e30 and the sums are meaningless. EP is E rounded up to a power of two.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    factor = tl.load(scale) * 1.4426950408889634  # log2(e)
    peak = tl.full((ROWS, EP), -1e30, tl.float32)
    total = tl.zeros((ROWS, EP), tl.float32)
    moment = tl.zeros((ROWS, EP), tl.float32)
    x_block = x
    if D <= WIDTH:
        x_block = _block(x, rows, M, 0, D, WIDTH)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, N), COLS):
        cols = first + tl.arange(0, COLS)
        if RELATION == "eq":  # Triton of PyTorch 2.6 evaluates both sides of an "or"
            if _meet(row_group, col_group, rows, cols, M, N):
                peak, total, moment = _forward_step(
                    x, x_block, y, factor, row_group, col_group, row_id, col_id, weight, rows, cols, M, N,
                    peak, total, moment, D, E, EP, RELATION, PRECISION, ROWS, COLS, WIDTH,
                )  # fmt: skip
        else:
            peak, total, moment = _forward_step(
                x, x_block, y, factor, row_group, col_group, row_id, col_id, weight, rows, cols, M, N,
                peak, total, moment, D, E, EP, RELATION, PRECISION, ROWS, COLS, WIDTH,
            )  # fmt: skip
    environment = tl.arange(0, EP)[None, :]
    place = (split.to(tl.int64) * E + environment) * M + rows[:, None]
    inside = (rows[:, None] < M) & (environment < E)
    tl.store(peaks + place, peak, mask=inside)
    tl.store(totals + place, total, mask=inside)
    tl.store(moments + place, moment, mask=inside)


@triton.jit
def _share(logits, lse, WEIGHTED: tl.constexpr):
    """2^(l - lse), the softmax before a column's weight."""
    exponent = logits - lse
    if WEIGHTED:  # where w = 0 a logit may lie far above the log-sum-exp; this is exponent_limit(float32) in base 2
        exponent = tl.minimum(exponent, 116.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(exponent)


@triton.jit
def _backward_step(
    own, own_block, other, factor, own_group, other_group, own_id, other_id, own_weight, other_weight,
    own_lse, own_constant, own_steep, other_lse, other_constant, other_steep, normalizer,
    rows, cols, M, N, features, weights,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RELATION: tl.constexpr,
    PRECISION: tl.constexpr, BY_OWN: tl.constexpr, BY_OTHER: tl.constexpr, FEATURES: tl.constexpr,
    WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # A dropped logit may be NaN or infinite. This value has a softmax of zero, and no product with it overflows.
    logits, other_block = _kept_logits(
        own, own_block, other, factor, own_group, other_group, own_id, other_id, rows, cols, M, N, -1e20,
        D, RELATION, PRECISION, ROWS, COLS, WIDTH,
    )  # fmt: skip
    has_row, has_col = rows < M, cols < N
    environment = tl.arange(0, EP)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for e in tl.static_range(E):
        if BY_OWN:
            at = e * M + rows
            share = _share(logits, tl.load(own_lse + at, mask=has_row, other=0.0)[:, None], other_weight is not None)
            if other_weight is not None:
                share = share * tl.load(other_weight + e * N + cols, mask=has_col, other=0.0)[None, :]
            slope = tl.load(own_constant + at, mask=has_row, other=0.0)
            if own_steep is not None:
                steep = tl.load(own_steep + at, mask=has_row, other=0.0)
                total += share * ((slope + steep * 1.4426950408889634)[:, None] + steep[:, None] * logits)
            else:
                total += share * slope[:, None]
        if BY_OTHER:
            at = e * N + cols
            share = _share(logits, tl.load(other_lse + at, mask=has_col, other=0.0)[None, :], own_weight is not None)
            slope = tl.load(other_constant + at, mask=has_col, other=0.0)[None, :]
            rise = 0.0
            if other_steep is not None:
                steep = tl.load(other_steep + at, mask=has_col, other=0.0)[None, :]
                slope, rise = slope + steep * logits, steep * 1.4426950408889634
            if WEIGHTS:
                part = tl.sum(share * slope, 1)
                weights = tl.where(environment == e, weights + part[:, None], weights)
            if FEATURES:
                if own_weight is not None:
                    share = share * tl.load(own_weight + e * M + rows, mask=has_row, other=0.0)[:, None]
                total += share * (slope + rise)
    if FEATURES:
        if normalizer is not None:
            total = total * tl.load(normalizer)
        if D > WIDTH:
            other_block = _block(other, cols, N, 0, D, PADDED)
        features = tl.dot(total.to(other_block.dtype), other_block, features, input_precision=PRECISION)
    return features, weights


@triton.jit
def backward(
    own, other, scale, own_group, other_group, own_id, other_id, own_weight, other_weight,
    own_lse, own_constant, own_steep, other_lse, other_constant, other_steep, normalizer,
    by_own, by_weight, M, N, per_split,
    D: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RELATION: tl.constexpr,
    PRECISION: tl.constexpr, BY_OWN: tl.constexpr, BY_OTHER: tl.constexpr, FEATURES: tl.constexpr,
    WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For each split of the columns: sum_j dl_ij other_j, [splits, M, D], and own_weight's gradient, [splits, E, M].

    BY_OWN: the pair counts in own's log-sum-exp, with other's weight. BY_OTHER: in other's, with own's weight. If own
    is other, both hold: a block of logits then serves as its mirror image too. PADDED is D rounded up.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    factor = tl.load(scale) * 1.4426950408889634  # log2(e)
    own_block = own
    if D <= WIDTH:
        own_block = _block(own, rows, M, 0, D, WIDTH)
    features = tl.zeros((ROWS, PADDED if FEATURES else 1), tl.float32)
    weights = tl.zeros((ROWS, EP), tl.float32)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, N), COLS):
        cols = first + tl.arange(0, COLS)
        if RELATION == "eq":
            if _meet(own_group, other_group, rows, cols, M, N):
                features, weights = _backward_step(own, own_block, other, factor, own_group, other_group, own_id,
                    other_id, own_weight, other_weight, own_lse, own_constant, own_steep, other_lse, other_constant,
                    other_steep, normalizer, rows, cols, M, N, features, weights, D, PADDED, E, EP, RELATION, PRECISION,
                    BY_OWN, BY_OTHER, FEATURES, WEIGHTS, ROWS, COLS, WIDTH)  # fmt: skip
        else:
            features, weights = _backward_step(own, own_block, other, factor, own_group, other_group, own_id,
                other_id, own_weight, other_weight, own_lse, own_constant, own_steep, other_lse, other_constant,
                other_steep, normalizer, rows, cols, M, N, features, weights, D, PADDED, E, EP, RELATION, PRECISION,
                BY_OWN, BY_OTHER, FEATURES, WEIGHTS, ROWS, COLS, WIDTH)  # fmt: skip
    split = split.to(tl.int64)
    if FEATURES:
        inner = tl.arange(0, PADDED)[None, :]
        place = (split * M + rows[:, None]) * D + inner
        tl.store(by_own + place, features, mask=(rows[:, None] < M) & (inner < D))
    if WEIGHTS:
        environment = tl.arange(0, EP)[None, :]
        place = (split * E + environment) * M + rows[:, None]
        tl.store(by_weight + place, weights, mask=(rows[:, None] < M) & (environment < E))


INTERPRETED = not isinstance(forward, triton.runtime.JITFunction)
