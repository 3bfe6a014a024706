"""A linear map of features whose matrix depends on something else."""

from __future__ import annotations

from torch import Tensor, nn


class Hypernetwork(nn.Module):
    r"""Features [B, D] moved by matrices that are linear in conditions [B, K]: :math:`\sum_k c_k W_k x`, without bias.

    A condition cannot be ignored: there is no matrix that is the same for all. One product over all :math:`c_k x_d`
    computes it, so that no image has a matrix of its own in memory.
    """

    def __init__(self, condition_dim: int, dim: int):
        super().__init__()
        self.matrices = nn.Linear(condition_dim * dim, dim, bias=False)

    def forward(self, conditions: Tensor, x: Tensor) -> Tensor:
        moved: Tensor = self.matrices((conditions.to(x.dtype)[:, :, None] * x[:, None]).flatten(1))
        return moved
