"""``pair_lse`` as a registered PyTorch operator, with a fake and an autograd rule.

An ``autograd.Function`` can be silently wrong under ``torch.compile``; a registered operator works with
``fullgraph=True``. Differentiating twice raises; penalties take the derivative that they need from ``mean``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equireg.similarity.dense import Pairs, accumulation_dtype
from equireg.similarity.streamed import chunked
from equireg.similarity.triton import launch

_INPUTS = (
    "Tensor x, Tensor? y, Tensor scale, str relation, Tensor? row_group, Tensor? col_group, "
    "Tensor? row_id, Tensor? col_id, Tensor? col_weight, Tensor? row_select, str backend"
)
Result = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("equireg::pair_lse", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def pair_lse(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    relation: str,
    row_group: Tensor | None,
    col_group: Tensor | None,
    row_id: Tensor | None,
    col_id: Tensor | None,
    col_weight: Tensor | None,
    row_select: Tensor | None,
    backend: str,
) -> Result:
    pairs = Pairs(relation, row_group, col_group, row_id, col_id)
    # Autocast stays active inside an operator and would turn the products to half precision.
    with torch.autocast(x.device.type, enabled=False):
        forward = launch.forward if backend == "triton" else chunked.forward
        return forward(x, y, scale, pairs, col_weight, row_select)


@pair_lse.register_fake
def _(x: Tensor, *others: Any) -> Result:
    col_weight = others[-3]
    environments = 1 if col_weight is None else col_weight.shape[0]
    shape, dtype = (environments, x.shape[0]), accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    "equireg::pair_lse_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor lse, Tensor mean, Tensor grad_lse, Tensor? grad_mean, bool needs_x, "
    "bool needs_y, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor)",
)
def pair_lse_backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    relation: str,
    row_group: Tensor | None,
    col_group: Tensor | None,
    row_id: Tensor | None,
    col_id: Tensor | None,
    col_weight: Tensor | None,
    row_select: Tensor | None,
    backend: str,
    lse: Tensor,
    mean: Tensor,
    grad_lse: Tensor,
    grad_mean: Tensor | None,
    needs_x: bool,
    needs_y: bool,
    needs_weight: bool,
) -> Gradients:
    pairs = Pairs(relation, row_group, col_group, row_id, col_id)
    with torch.autocast(x.device.type, enabled=False):
        backward = launch.backward if backend == "triton" else chunked.backward
        by_row, by_col, by_weight = backward(
            x, y, scale, pairs, col_weight, row_select, lse, mean, grad_lse, grad_mean, needs_x, needs_y, needs_weight
        )
        grad_scale = by_row.new_zeros(())
        if needs_x:
            grad_scale = torch.dot(by_row.flatten(), x.to(by_row.dtype).flatten())
            if y is None:  # each pair counts twice
                grad_scale = grad_scale / 2
            by_row.mul_(scale)
        return by_row, by_col, grad_scale, by_weight


@pair_lse_backward.register_fake
def _(x: Tensor, y: Tensor | None, scale: Tensor, *others: Any) -> Gradients:
    col_weight, (needs_x, needs_y, needs_weight) = others[5], others[-3:]
    dtype = accumulation_dtype(x.dtype)
    weight_shape = col_weight.shape if needs_weight and col_weight is not None else (0,)
    return (
        x.new_empty(x.shape if needs_x else (0,), dtype=dtype),
        x.new_empty(y.shape if y is not None and needs_y else (0,), dtype=dtype),
        x.new_empty((), dtype=dtype),
        x.new_empty(weight_shape, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    x, y, scale, relation, *others, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.relation, ctx.backend = relation, backend
    ctx.save_for_backward(x, y, scale, *others, *output)


def _differentiate(ctx: Any, grad_lse: Tensor | None, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, scale, *others, lse, mean = ctx.saved_tensors
    col_weight = others[4]
    need = ctx.needs_input_grad
    if grad_lse is None:
        if grad_mean is None:
            return (None,) * 11
        grad_lse = torch.zeros_like(lse)
    needs_x, needs_y, needs_weight = need[0] or need[2], need[1], need[8]
    dx, dy, dscale, dweight = pair_lse_backward(
        x, y, scale, ctx.relation, *others, ctx.backend, lse, mean, grad_lse, grad_mean, needs_x, needs_y, needs_weight
    )
    return (
        dx.to(x.dtype) if need[0] else None,
        dy.to(x.dtype) if need[1] else None,
        dscale.to(scale.dtype) if need[2] else None,
        *[None] * 5,
        dweight.to(col_weight.dtype) if needs_weight else None,
        None,
        None,
    )


pair_lse.register_autograd(_differentiate, setup_context=_save)
