"""Matrix products of rows with rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equireg._checks import refuse_forward_mode

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul_precision(device_type: str) -> str:
    """The setting of ``torch.set_float32_matmul_precision``: "highest", "high" (TF32) or "medium" (bfloat16)."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # raised if a backend's newer attribute set the precision
        backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
        return {"tf32": "high", "bf16": "medium"}.get(backend.matmul.fp32_precision, "highest")


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``, without a gradient.

    On a CPU, fp32 uses oneDNN, which is twice as fast as MKL on AMD processors and as fast on Intel's. With
    ``torch.set_float32_matmul_precision("medium")`` it uses PyTorch's own product, which knows where bf16 is supported.
    """
    ours = a.device.type == "cpu" and a.dtype == torch.float32 and matmul_precision("cpu") != "medium"
    if ours and _HAS_ONEDNN and min(*a.shape, *b.shape) > 0:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.T


def gram(x: Tensor) -> Tensor:
    """All dot products of the rows of ``x`` [N, D] with each other, [N, N].

    Its gradient ``(G + G^T) x`` takes one product where that of ``x @ x.T`` takes two; it can be differentiated again.
    """
    refuse_forward_mode(x)
    products: Tensor = _gram(x)
    return products


@torch.library.custom_op("equireg::gram", mutates_args=(), schema="(Tensor x) -> Tensor")
def _gram(x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return times_transposed(x, x)


@_gram.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):
        # With a graph of its own, so that it can be differentiated again.
        gradient: Tensor = (grad + grad.T) @ x if torch.is_grad_enabled() else _gram_backward(grad, x)
        return gradient


@torch.library.custom_op("equireg::gram_backward", mutates_args=(), schema="(Tensor grad, Tensor x) -> Tensor")
def _gram_backward(grad: Tensor, x: Tensor) -> Tensor:
    return times_transposed(grad + grad.T, x.T)


@_gram_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


_gram.register_autograd(_differentiate, setup_context=_save)
