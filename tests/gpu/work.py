"""What is proven on a GPU: the losses that are sums over pairs, each at a tiny size and at that of a training."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg import ClassWiseIRM, GridTransform, IPIRMLoss, SERLoss, pair_lse, soft_info_nce
from equireg.similarity.triton.launch import refusal
from tests.gpu.waits import moved
from tests.similarity.pairs import why_no_triton


@dataclass(frozen=True)
class Precision:
    """The dtype of features, how products of fp32 are formed, and the largest relative errors against float64."""

    dtype: torch.dtype
    products: str
    of_loss: float
    of_gradients: float  # by their norm


PRECISIONS = {
    "fp32": Precision(torch.float32, "highest", 1e-5, 1e-4),
    "tf32": Precision(torch.float32, "high", 5e-3, 3e-2),
    "bf16": Precision(torch.bfloat16, "highest", 1e-2, 5e-2),
    "fp16": Precision(torch.float16, "highest", 2e-3, 1e-2),
}
Case = tuple[Callable[..., Any], tuple[Any, ...]]  # in float64 on the CPU


def rows(count: int, width: int) -> Tensor:
    return F.normalize(torch.randn(count, width, dtype=torch.float64), dim=1).requires_grad_()


def of_pairs(full: bool, backend: str | None = None) -> Case:
    """Of other groups and ids, in two environments."""
    m, n, width = (1500, 2100, 128) if full else (9, 14, 6)
    weight = torch.rand(2, n, dtype=torch.float64).requires_grad_()
    keys = [torch.arange(count) % divisor for divisor in (3, 7) for count in (m, n)]

    absent = why_no_triton() if backend == "triton" else None

    def loss(x: Tensor, y: Tensor, weight: Tensor, *keys: Tensor) -> tuple[Tensor, Tensor]:
        if backend == "triton" and not torch.compiler.is_compiling():
            reason = absent or refusal(x, weight, None)
            if reason is not None:
                pytest.skip(reason)
        named = dict(zip(("row_group", "col_group", "row_id", "col_id"), keys))
        return pair_lse(x, y, 10.0, relation="ne", col_weight=weight, backend=backend, **named)

    return loss, (rows(m, width), rows(n, width), weight, *keys)


def of_tokens(full: bool) -> Case:
    """Views on grids of their own."""
    images, width, side = (32, 128, 14) if full else (4, 8, 3)
    draw = torch.Generator().manual_seed(1)
    views = [GridTransform.random(images, (side, side), generator=draw) for _ in range(2)]
    places = [view.target[0] * view.target[1] for view in views]
    tokens = [torch.randn(images, count, width).double().requires_grad_() for count in places]
    return SERLoss(width, projection_dim=width).double(), (*tokens, *views)


def of_views(full: bool) -> Case:
    count, width = (2048, 128) if full else (8, 6)
    return lambda z1, z2: soft_info_nce(z1, z2, temperature=0.5)[0], (rows(count, width), rows(count, width))


def of_partitions(full: bool) -> Case:
    count, width = (1024, 128) if full else (8, 6)
    partitions = torch.stack([torch.arange(count) % 2, torch.arange(count) // (count // 2)])
    return IPIRMLoss(partitions), (rows(count, width), rows(count, width), torch.randperm(count))


def of_classes(full: bool) -> Case:
    """IRMv1, whose gradients reach the features."""
    count, width, classes = (512, 128, 64) if full else (12, 6, 3)
    labels = torch.arange(4 * count) % classes
    loss = ClassWiseIRM(
        *(width, classes), penalty="irmv1", weight=1.0, projection=nn.Linear(width, width), detach=False
    )
    loss.fit_environments(torch.randn(len(labels), width), labels)
    return loss.double(), (rows(count, width), labels[:count], torch.arange(count))


WORK: dict[str, Callable[[bool], Case]] = {
    "pair_lse": of_pairs,
    "pair_lse, chunked": lambda full: of_pairs(full, "chunked"),
    "pair_lse, triton": lambda full: of_pairs(full, "triton"),
    "SERLoss": of_tokens,
    "NT-Xent": of_views,
    "IPIRMLoss": of_partitions,
    "ClassWiseIRM": of_classes,
}
every_work = pytest.mark.parametrize("name", WORK)


def on(case: Case, device: str, dtype: torch.dtype) -> Case:
    """A copy of the loss, and the arguments, on a device, their floating point numbers in a dtype.

    Of half precision are the layers of ``SERLoss`` alone; those of the others take such features in float32.
    """
    of_layers = dtype if isinstance(case[0], SERLoss) or dtype == torch.float64 else torch.float32

    def to(kind: torch.dtype) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.to(device, kind if tensor.is_floating_point() else tensor.dtype, copy=True)

    return moved(copy.deepcopy(case[0]), case[1], to(dtype), to(of_layers))


def example(name: str, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """Of full size on a GPU, tiny on a CPU."""
    return on(WORK[name](device != "cpu"), device, dtype)
