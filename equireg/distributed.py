"""Rows of all processes, gathered with their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from equireg._agreement import Agreement, backend_device, exchange, world_size
from equireg._agreement import Group as Group  # a part of the signature of every loss that gathers

Result = TypeVar("Result")


class Processes:
    """The processes whose samples a loss takes: this one alone, all of them, or those of a group.

    Gradients of gathered rows are summed and returned to the rank that owns them, and ``total`` is the same number in
    every process. Under the mean of DistributedDataParallel the gradients of parameters are then those of one process
    with the whole batch; there is no factor of the world size.
    """

    def __init__(self, function: str, gather_distributed: bool | Group):
        self.function, self.gathers = function, gather_distributed is not False
        self.group: Group = None if isinstance(gather_distributed, bool) else gather_distributed
        # new_group gives a process that is not in the group a stand-in of another type.
        is_group = dist.is_available() and isinstance(gather_distributed, dist.ProcessGroup)
        if not isinstance(gather_distributed, bool) and not is_group:
            rule = "True, False or an initialised process group that this process is in"
            raise ValueError(f"{function}: gather_distributed must be {rule}, got {gather_distributed!r}")

    @property
    def size(self) -> int:
        return world_size(self.group) if self.gathers else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.size > 1 else 0

    def alike(self) -> Agreement:
        """``with processes.alike() as facts:`` a block that checks arguments and records what must be alike.

        Tensors recorded in it, as in ``facts["tokens"] = tokens``, can be gathered after it.
        """
        return Agreement(self.function, self.size, self.group)

    def gather(self, mine: Tensor) -> Tensor:
        """[processes, ...] of a tensor of agreed shape and dtype, in the order of ranks, with its gradient."""
        if self.size == 1:
            return mine[None]
        gathered: Tensor = _Gather.apply(mine, self.group)
        return gathered

    def total(self, mine: Tensor) -> Tensor:
        """The sum over processes, likewise; in the order of ranks, so that it is the same in all to the last bit."""
        if self.size == 1:
            return mine
        # As a vector: compiled, gloo gathers no 0-d tensors.
        return self.gather(mine.flatten()).sum(0).view(mine.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self  # a copy of a module talks to the same processes

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError(f"{self.function}: a process group cannot be pickled; give gather_distributed=True")
        return Processes, (self.function, self.gathers)

    def __repr__(self) -> str:
        return str(self.gathers) if self.group is None else f"a group of {self.size}"


def gather_rows(mine: Tensor) -> Tensor:
    """The rows [n, ...] of all processes in the order of ranks, on the CPU, without a gradient; n may differ.

    To be called in all of them, after they agreed on all but n.
    """
    if world_size() == 1:
        return mine
    counts = [numbers[0] for numbers in exchange([len(mine)])]
    padded = mine.new_zeros(max(counts), *mine.shape[1:], device=backend_device())
    padded[: len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([rows[:count].cpu() for rows, count in zip(everyone, counts)])


def broadcast_from_rank0(make: Callable[[], Result]) -> Result:
    """What ``make`` returns in rank 0, in every process. Where it fails there, all raise.

    A ValueError or FloatingPointError is the same in all; of another error the others say what it was.
    """
    if world_size() == 1:
        return make()
    message: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            message = [(make(), None)]
        except (ValueError, FloatingPointError) as error:
            message = [(None, error)]
        except BaseException as error:  # the others have to hear of it before it leaves this process
            failed = RuntimeError(f"rank 0 failed: {error!r}")
            dist.broadcast_object_list([(None, failed)], src=0, device=backend_device())
            raise
    dist.broadcast_object_list(message, src=0, device=backend_device())
    result, failure = message[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """[processes, ...] of everyone's tensor."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Group) -> Tensor:
        ctx.group = group
        mine = mine.contiguous()
        everyone = [torch.empty_like(mine) for _ in range(world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        return torch.stack(everyone)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(gradient, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """The sum over processes of [processes, ...], of which each keeps its own row.

    It and ``_Gather`` are each other's derivative, so any order of differentiation works.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        # Every backend can reduce to all; not all can scatter.
        rows = rows.contiguous().clone()
        dist.all_reduce(rows, group=group)
        return rows[dist.get_rank(group)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient, ctx.group), None
