"""The log-sum-exp of masked similarities by FlexAttention, the fused kernel that PyTorch itself brings.

Attention that is asked for its log-sum-exp alone: the values are zeros, as narrow as its kernels take them. The masks
are computed from the indices, so that a block that is kept whole costs nothing; they are made once, before the clock.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.benchmarks.measure import allow_sizes

try:  # the older way of asking, return_lse=True, is to go
    from torch.nn.attention.flex_attention import AuxRequest
except ImportError:  # PyTorch before 2.9
    AuxRequest = None

NARROW = 16


@cache
def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    allow_sizes()
    return torch.compile(function, dynamic=False)


def _lse(query: Tensor, key: Tensor, scale: float, **options: object) -> Tensor:
    """[1, heads, rows] of queries [1, heads, rows, D]; on a CPU, where only its forward exists, as it is."""
    attention = _compiled(flex_attention) if query.is_cuda else flex_attention
    values = key.new_zeros(*key.shape[:-1], NARROW)
    if AuxRequest is None:
        return attention(query, key, values, scale=scale, return_lse=True, **options)[1]
    return attention(query, key, values, scale=scale, return_aux=AuxRequest(lse=True), **options)[1].lse


def _mask(keep, rows: int, cols: int, device: str):
    # Compiled it never forms the [rows, cols] matrix of the mask.
    make = _compiled(create_block_mask) if device == "cuda" else create_block_mask
    return make(keep, None, None, rows, cols, device=device)


@cache
def other_images(rows: int, tokens: int, device: str):
    """Of rows against twice as many columns, both views: pairs of different images."""

    def keep(batch, head, row, col):
        return row // tokens != (col % rows) // tokens

    return _mask(keep, rows, 2 * rows, device)


@cache
def other_samples(rows: int, device: str):
    """Of rows against themselves, the two views of a sample side by side: pairs of different samples."""

    def keep(batch, head, row, col):
        return row // 2 != col // 2

    return _mask(keep, rows, rows, device)


def lse_of_other_images(x: Tensor, y: Tensor, tokens: int, scale: float) -> Tensor:
    """[rows] of rows [rows, D] and columns [2 rows, D]."""
    mask = other_images(len(x), tokens, x.device.type)
    return _lse(x[None, None], y[None, None], scale, block_mask=mask)[0, 0]


def lse_with_weights(x: Tensor, weights: Tensor, scale: float) -> Tensor:
    """[K, rows] of rows against themselves, the columns weighted by [K, rows]: a group is a head."""
    log_weights = weights.log()

    def weighted(score, batch, head, row, col):
        return score + log_weights[head, col]

    heads = x.expand(1, len(weights), *x.shape)
    mask = other_samples(len(x), x.device.type)
    return _lse(heads, heads, scale, score_mod=weighted, block_mask=mask)[0]
