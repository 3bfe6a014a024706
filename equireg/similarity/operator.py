"""``pair_lse`` as a registered PyTorch operator, with a fake and an autograd rule.

An ``autograd.Function`` can be silently wrong under ``torch.compile``; a registered operator works with
``fullgraph=True``. Differentiating twice raises; penalties take the derivative that they need from ``mean``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equireg.similarity import choice
from equireg.similarity.dense import Outcome, Pairs, Problem, accumulation_dtype
from equireg.similarity.streamed import chunked
from equireg.similarity.triton import launch

_INPUTS = (
    "Tensor x, Tensor? y, Tensor scale, str relation, Tensor? row_group, Tensor? col_group, "
    "Tensor? row_id, Tensor? col_id, Tensor? col_weight, Tensor? row_select, str backend"
)
Result = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def streamed(problem: Problem, backend: str) -> Result:
    """``lse`` and ``mean``, each [E, M], by ``"chunked"``, ``"triton"`` or the one of them that was measured faster."""
    x, y, scale, pairs, col_weight, row_select = problem
    lse: Tensor
    mean: Tensor
    lse, mean = pair_lse(x, y, scale, *pairs, col_weight, row_select, backend)
    return lse, mean


def _nested(x: Tensor, y: Tensor | None, scale: Tensor, *others: Any) -> tuple[Problem, str, tuple[Any, ...]]:
    """The problem and the backend of an operator's inputs, which a schema needs flat; and the inputs after them."""
    pairs, (col_weight, row_select, backend), rest = Pairs(*others[:5]), others[5:8], others[8:]
    return Problem(x, y, scale, pairs, col_weight, row_select), backend, rest


@torch.library.custom_op("equireg::pair_lse", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def pair_lse(*inputs: Any) -> Result:
    problem, backend, _ = _nested(*inputs)
    # Autocast stays active inside an operator and would turn the products to half precision.
    with torch.autocast(problem.x.device.type, enabled=False):
        return launch.forward(problem) if choice.measured(backend, problem) == "triton" else chunked.forward(problem)


@pair_lse.register_fake
def _(*inputs: Any) -> Result:
    problem, *_ = _nested(*inputs)
    shape, dtype = (problem.environments, problem.x.shape[0]), accumulation_dtype(problem.x.dtype)
    return problem.x.new_empty(shape, dtype=dtype), problem.x.new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    "equireg::pair_lse_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor lse, Tensor mean, Tensor grad_lse, Tensor? grad_mean, bool needs_x, "
    "bool needs_y, bool needs_weight) -> (Tensor, Tensor, Tensor, Tensor)",
)
def pair_lse_backward(*inputs: Any) -> Gradients:
    problem, backend, rest = _nested(*inputs)
    x, outcome = problem.x, Outcome(*rest)
    with torch.autocast(x.device.type, enabled=False):
        backward = launch.backward if choice.measured(backend, problem) == "triton" else chunked.backward
        by_row, by_col, by_weight = backward(problem, outcome)
        grad_scale = by_row.new_zeros(())
        if outcome.needs_x:
            grad_scale = torch.dot(by_row.flatten(), x.to(by_row.dtype).flatten())
            if problem.y is None:  # each pair counts twice
                grad_scale = grad_scale / 2
            by_row.mul_(problem.scale)
        return by_row, by_col, grad_scale, by_weight


@pair_lse_backward.register_fake
def _(*inputs: Any) -> Gradients:
    problem, _, rest = _nested(*inputs)
    x, y, col_weight, outcome = problem.x, problem.y, problem.col_weight, Outcome(*rest)
    dtype = accumulation_dtype(x.dtype)
    weight_shape = col_weight.shape if outcome.needs_weight and col_weight is not None else (0,)
    return (
        x.new_empty(x.shape if outcome.needs_x else (0,), dtype=dtype),
        x.new_empty(y.shape if y is not None and outcome.needs_y else (0,), dtype=dtype),
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
