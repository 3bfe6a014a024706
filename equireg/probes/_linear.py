"""A linear map on frozen features, fitted by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_linear(
    x: Tensor, loss: Callable[[Tensor], Tensor], bias: Tensor, weight_decay: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] of the outputs [N, C] with the least loss; from a weight of zero and ``bias``."""
    # The line search needs full precision, even if the encoder ran under autocast.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        weight = torch.zeros(len(bias), x.shape[1], device=x.device, requires_grad=True)
        bias = bias.detach().clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iterations, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            value = loss(F.linear(x, weight, bias)) + weight_decay / 2 * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(objective)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The fitted map, in full precision likewise."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)
