"""Log-sum-exp and softmax mean of each row of a stored matrix, over each of two parts of its columns.

Every pair belongs to one part, so one exponential serves both. A block of rows passes through all steps while it is in
the cache. With e the part of a pair and p the softmax over its row's part, the backward pass is

    dl_ij = p_ij (g_lse_ei + g_mean_ei (1 + l_ij - mean_ei))
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from equireg._checks import refuse_forward_mode
from equireg.similarity.streamed.bounded import BOUND
from equireg.similarity.streamed.exponential import exp_

# Entries of a block of rows: 1 MB of fp32; a CPU's cache holds a few such blocks.
_ENTRIES = 2**18


def split_lse(logits: Tensor, first: Tensor, dropped: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """``lse`` and ``mean``, [2, M], over the columns in the first part and over the others.

    Args:
        logits: [M, N], fp32 or fp64. Differentiable once.
        first: bool [M, N], which pairs are in the first part.
        dropped: bool [M, N], which pairs count in neither.
        bound: largest possible magnitude of a logit; infinity if unknown.

    A part without a pair in a row has ``lse = -inf`` and ``mean = 0`` there, and passes no gradient.
    """
    refuse_forward_mode(logits)
    lse: Tensor
    mean: Tensor
    # Contiguous, so that sums have one order whatever the strides.
    lse, mean = _split_lse(logits.contiguous(), first.contiguous(), dropped.contiguous(), bound <= BOUND)
    return lse, mean


def _blocks(logits: Tensor) -> list[slice]:
    rows, width = logits.shape
    height = max(1, _ENTRIES // max(width, 1)) if logits.device.type == "cpu" else max(rows, 1)
    return [slice(i, min(i + height, rows)) for i in range(0, rows, height)]


@torch.library.custom_op(
    "equireg::split_lse",
    mutates_args=(),
    schema="(Tensor logits, Tensor first, Tensor dropped, bool bounded) -> (Tensor, Tensor)",
)
def _split_lse(logits: Tensor, first: Tensor, dropped: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    lse = logits.new_full((2, len(logits)), -math.inf)
    mean, peak = torch.zeros_like(lse), torch.zeros_like(lse)
    if not logits.numel():
        return lse, mean
    for rows in _blocks(logits):
        parts = _parts(first[rows], dropped[rows], logits.dtype)
        if bounded:
            mass = exp_(logits[rows].clone())
        else:
            low = torch.finfo(logits.dtype).min / 2
            for e, part in enumerate(parts):
                peak[e, rows] = ((1 - part) * low + logits[rows]).amax(1)
            peak[:, rows].masked_fill_(peak[:, rows] <= low / 2, 0)
            # Counted pairs lie below their peak; others might overflow.
            mass = exp_((logits[rows] - _of_part(peak, rows, parts)).clamp_(max=0))
        for e, part in enumerate(parts):
            total = part.mul_(mass).sum(1)
            lse[e, rows] = total.log() + peak[e, rows]
            mean[e, rows] = (part.mul_(logits[rows]).sum(1) / total).masked_fill_(total == 0, 0)
    return lse, mean


def _parts(first: Tensor, dropped: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """1 where a pair counts in a part, else 0: factors to multiply with, because random masks are slow on a CPU."""
    kept = dropped.logical_not().to(dtype)
    one = first.to(dtype).mul_(kept)
    return one, kept.sub_(one)


def _of_part(values: Tensor, rows: slice, parts: tuple[Tensor, Tensor]) -> Tensor:
    """The value [2, M] of each pair's part; exact, because one of two products is zero, and 0 where dropped."""
    return (parts[0] * values[0, rows, None]).add_(parts[1] * values[1, rows, None])


@_split_lse.register_fake
def _(logits: Tensor, first: Tensor, dropped: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    return logits.new_empty(2, logits.shape[0]), logits.new_empty(2, logits.shape[0])


@torch.library.custom_op(
    "equireg::split_lse_backward",
    mutates_args=(),
    schema="(Tensor logits, Tensor first, Tensor dropped, Tensor lse, Tensor mean, Tensor grad_lse, Tensor? grad_mean) "
    "-> Tensor",
)
def _split_lse_backward(
    logits: Tensor,
    first: Tensor,
    dropped: Tensor,
    lse: Tensor,
    mean: Tensor,
    grad_lse: Tensor,
    grad_mean: Tensor | None,
) -> Tensor:
    gradient = torch.empty_like(logits)
    empty = lse == -math.inf
    lse, constant = lse.masked_fill(empty, 0), grad_lse.masked_fill(empty, 0)
    if grad_mean is not None:
        grad_mean = grad_mean.masked_fill(empty, 0)
        constant = constant + grad_mean * (1 - mean)

    for rows in _blocks(logits):
        parts = _parts(first[rows], dropped[rows], logits.dtype)
        share = torch.sub(logits[rows], _of_part(lse, rows, parts), out=gradient[rows])
        exp_(share.clamp_(max=0))
        slope = _of_part(constant, rows, parts)
        if grad_mean is not None:
            slope.add_(_of_part(grad_mean, rows, parts).mul_(logits[rows]))
        share.mul_(slope)  # zero where the pair counts in no part
    return gradient


@_split_lse_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output)


def _differentiate(ctx: Any, grad_lse: Tensor | None, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, first, dropped, lse, mean = ctx.saved_tensors
    if grad_lse is None:
        if grad_mean is None:
            return None, None, None, None
        grad_lse = torch.zeros_like(lse)
    gradient: Tensor = _split_lse_backward(logits, first, dropped, lse, mean, grad_lse, grad_mean)
    return gradient, None, None, None


_split_lse.register_autograd(_differentiate, setup_context=_save)
