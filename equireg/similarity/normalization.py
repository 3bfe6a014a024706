"""Normalisation to unit length, with its gradient in closed form, computed in blocks of rows.

With ``y = x / |x|`` the gradient is ``(g - y <g, y>) / |x|``. Autograd's gradient of the quotient takes five times the
passes over memory and keeps intermediate copies of ``x``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equireg._checks import refuse_forward_mode
from equireg.similarity.dense import accumulation_dtype

# Entries of a block of rows: 512 KB of fp32. Smaller inputs use plain autograd.
_ENTRIES = 2**17


def normalized(x: Tensor, source: torch.dtype | None = None) -> Tensor:
    """Scale to unit length along the last dimension, contiguous, in fp32 or fp64; differentiable any number of times.

    A vector shorter than 1e-6 (1e-3 in fp16) is divided by that number instead, so zero stays zero and gradients stay
    bounded. ``source`` is the dtype that the gradient is finally cast to, if it is not that of ``x``.
    """
    x, eps = _prepared(x, source)
    if torch.compiler.is_compiling() or x.numel() <= _ENTRIES:  # small inputs do not repay an operator's cost
        return _formula(x, eps)
    refuse_forward_mode(x)
    y: Tensor = _normalized(x, eps)
    return y


def inverse_length(x: Tensor) -> Tensor:
    """The factor [..., 1] that ``normalized`` scales by, in fp32 or fp64: the products have the same bits."""
    return _inverse_length(*_prepared(x, None))


def _prepared(x: Tensor, source: torch.dtype | None) -> tuple[Tensor, float]:
    # The usual epsilon of 1e-12 rounds to zero in fp16, so a blank patch would give NaN; with 1e-6 its gradient could
    # reach 1e6, and fp16 ends at 65,504.
    eps = 1e-3 if torch.float16 in (x.dtype, source) else 1e-6
    # Contiguous, so that products of the result give the same bits whatever the strides.
    return x.to(accumulation_dtype(x.dtype)).contiguous(), eps


def _inverse_length(x: Tensor, eps: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.clamp_min(eps).reciprocal()


def _formula(x: Tensor, eps: float) -> Tensor:
    return x * _inverse_length(x, eps)


@torch.library.custom_op("equireg::normalized", mutates_args=(), schema="(Tensor x, float eps) -> Tensor")
def _normalized(x: Tensor, eps: float) -> Tensor:
    return _formula(x, eps)


@_normalized.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(
    "equireg::normalized_backward", mutates_args=(), schema="(Tensor gradient, Tensor x, float eps) -> Tensor"
)
def _normalized_backward(gradient: Tensor, x: Tensor, eps: float) -> Tensor:
    result = torch.empty_like(x)
    width = max(x.shape[-1], 1)
    height = max(1, _ENTRIES // width) if x.device.type == "cpu" else max(1, x.numel())
    blocks = (part.reshape(-1, width).split(height) for part in (gradient, x, result))
    for of_gradient, of_x, of_result in zip(*blocks):
        of_result.copy_(_gradient(of_gradient, of_x, eps))
    return result


@_normalized_backward.register_fake
def _(gradient: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _gradient(gradient: Tensor, x: Tensor, eps: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = length.clamp_min(eps).reciprocal()
    y = x * inverse
    along = (gradient * y).sum(-1, keepdim=True) * (length >= eps)  # a shorter vector is divided by a constant
    result: Tensor = (gradient - y * along) * inverse
    return result


def _save(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    # With a graph of its own, so that it can be differentiated again.
    of_x = _gradient if torch.is_grad_enabled() else _normalized_backward
    return of_x(gradient, x, ctx.eps), None


_normalized.register_autograd(_differentiate, setup_context=_save)
