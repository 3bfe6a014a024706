"""A small MLP on frozen features: three layers, fitted by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._progress import progress_bar


def fit_mlp(
    x: Tensor,
    t: Tensor,
    rows: Tensor,
    outputs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    hidden_dim: int,
    epochs: int,
    weight_decay: float,
    generator: torch.Generator,
    *,
    progress: bool,
) -> list[Tensor]:
    """Fit an MLP from x to t on some of their rows, in random order; return its weights, then its biases.

    The epoch that is best on the first tenth of the rows, which train nothing, is kept.
    """
    chosen, fitted = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    sizes = [x.shape[1], hidden_dim, hidden_dim, outputs]
    weights = [math.sqrt(2 / a) * torch.randn(b, a, generator=generator) for a, b in pairwise(sizes)]
    layers = [layer.to(x.device).requires_grad_() for layer in (*weights, *map(torch.zeros, sizes[1:]))]
    batch_size = min(256, max(8, len(fitted) // 20))  # few rows need as many steps
    optimizer = torch.optim.AdamW(layers, lr=1e-3, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(fitted) / batch_size))
    least, best = math.inf, layers
    for _ in progress_bar(range(epochs), "MLP on frozen features", shown=progress):
        for part in fitted[torch.randperm(len(fitted), generator=generator)].split(batch_size):
            with torch.enable_grad():
                error = loss(mlp(x[part], layers), t[part])
                optimizer.zero_grad()
                error.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        left_out = float(loss(mlp(x[chosen], layers), t[chosen]))
        if left_out < least:
            least, best = left_out, [layer.detach().clone() for layer in layers]
    return best


def mlp(x: Tensor, layers: list[Tensor]) -> Tensor:
    """Apply an MLP, given as its weights and then as many biases."""
    half = len(layers) // 2
    for depth, (weight, bias) in enumerate(zip(layers[:half], layers[half:])):
        x = F.linear(x if depth == 0 else x.relu(), weight, bias)
    return x
