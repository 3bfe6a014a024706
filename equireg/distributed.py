"""Rows of all processes, gathered with their gradient; and one error for all where they do not fit.

A collective whose sizes differ between processes hangs, aborts or returns garbage. So before each gather the processes
exchange a short header, and where it shows a misfit, or that an argument was refused somewhere, every one of them
raises the same ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MOST_DIMS = 6
_LENGTH = 3 + _MOST_DIMS + 1  # of a header

Result = TypeVar("Result")
Group = Any  # a dist.ProcessGroup, which is not there in builds without torch.distributed; None for all processes


class Processes:
    """The processes whose samples a loss takes: this one alone, all of them, or those of a group.

    What the loss asks of the copies of a row flows back to the process that made it, as a sum over processes, and
    ``total`` is the same number in all of them. Under the mean of DistributedDataParallel the gradients of parameters
    are then those of one process with the whole batch; there is no factor of the world size.
    """

    def __init__(self, function: str, gather_distributed: bool | Group):
        self.function, self.gathers = function, gather_distributed is not False
        self.group: Group = None if isinstance(gather_distributed, bool) else gather_distributed
        if self.group is None:
            return
        # new_group gives a process that is not in the group a stand-in of another type.
        if not dist.is_available() or not isinstance(self.group, dist.ProcessGroup):
            rule = "True, False or an initialised process group that this process is in"
            raise ValueError(f"{function}: gather_distributed must be {rule}, got {gather_distributed!r}")

    @property
    def size(self) -> int:
        return world_size(self.group) if self.gathers else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.size > 1 else 0

    def agree(
        self, name: str, make: Callable[[], Result], gathered: Callable[[Result], Tensor], tag: Callable[[], int] = int
    ) -> Result:
        """What ``make`` gives, once the processes agree on the tensor in it that is to be ``gathered``.

        Reading the header waits for the device.

        Raises:
            ValueError: in every process, where ``make`` failed in one of them, or the tensor's shape, dtype, need of a
                gradient or the ``tag`` differ; the process where it failed raises its own error.
        """
        if self.size == 1:
            return make()

        def checked() -> Result:
            made = make()
            self._check_backend(name, gathered(made))
            return made

        def header(made: Result) -> list[int]:
            return [*_header(gathered(made)), tag()]

        return agree(self.function, name, checked, header, _described, self.group)

    def gather(self, mine: Tensor) -> Tensor:
        """[processes, ...] of a tensor of agreed shape and dtype, in the order of ranks, with its gradient."""
        if self.size == 1:
            return mine[None]
        gathered: Tensor = _Gather.apply(mine, self.group)
        return gathered

    def total(self, mine: Tensor) -> Tensor:
        """The sum over processes, likewise; in the order of ranks, so that it is the same in all to the last bit."""
        return mine if self.size == 1 else self.gather(mine).sum(0)

    def _check_backend(self, name: str, tensor: Tensor) -> None:
        backend = dist.get_backend(self.group)
        wanted = {"nccl": "cuda", "gloo": "cpu"}.get(backend, tensor.device.type)
        if tensor.device.type != wanted:
            got = f"{wanted} for the backend {backend}, got {tensor.device}"
            raise ValueError(f"{self.function}: {name} must be on {got}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self  # a copy of a module talks to the same processes

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError(f"{self.function}: a process group cannot be pickled; give gather_distributed=True")
        return Processes, (self.function, self.gathers)

    def __repr__(self) -> str:
        return str(self.gathers) if self.group is None else f"a group of {self.size}"


def world_size(group: Group = None) -> int:
    """How many processes there are; 1 where none were started."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather_rows(mine: Tensor) -> Tensor:
    """The rows [n, ...] of all processes in the order of ranks, on the CPU, without a gradient; n may differ.

    To be called in all of them, after they agreed on all but n.
    """
    if world_size() == 1:
        return mine
    counts = [numbers[0] for numbers in _exchange([len(mine)], None)]
    padded = mine.new_zeros(max(counts), *mine.shape[1:], device=_device(None))
    padded[: len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([rows[:count].cpu() for rows, count in zip(everyone, counts)])


def agree(
    function: str,
    name: str,
    make: Callable[[], Result],
    header: Callable[[Result], list[int]],
    described: Callable[[list[int]], str] = str,
    group: Group = None,
) -> Result:
    """What ``make`` gives, once every process has made its own with the same ``header`` (at most ten numbers).

    Raises:
        ValueError: in every process, where the headers differ or ``make`` failed in one, which raises its own error.
    """
    if world_size(group) == 1:
        return make()
    try:
        mine = make()
        numbers = header(mine)
    except Exception:
        _exchange([-1] * _LENGTH, group)  # so that the others stop too, instead of waiting for this one
        raise
    headers = _exchange([*numbers, *[0] * (_LENGTH - len(numbers))], group)
    if any(header != headers[0] for header in headers):
        theirs = ", ".join(
            f"rank {r}: {'refused, see the error there' if header[0] < 0 else described(header)}"
            for r, header in enumerate(headers)
        )
        raise ValueError(f"{function}: {name} must be alike in every process, got {theirs}")
    return mine


def from_first(make: Callable[[], Result]) -> Result:
    """What ``make`` gives in the first process, in all of them; where it fails there, all raise the same error."""
    if world_size() == 1:
        return make()
    message: list[Any] = [None]
    if rank() == 0:
        try:
            message = [(make(), None)]
        except (ValueError, FloatingPointError) as error:
            message = [(None, error)]
        except BaseException as error:  # the others have to hear of it before it leaves this process
            dist.broadcast_object_list([(None, RuntimeError(f"rank 0 failed: {error!r}"))], src=0, device=_device(None))
            raise
    dist.broadcast_object_list(message, src=0, device=_device(None))
    result, failure = message[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Group) -> Tensor:
        ctx.group = group
        mine = mine.contiguous()
        everyone = [torch.empty_like(mine) for _ in range(world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        return torch.stack(everyone)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # The sum of what all processes ask of our copy. Every backend can reduce to all; not all can scatter.
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


def _header(tensor: Tensor) -> list[int]:
    """[dtype, gradient, dims, sizes ...] of a tensor."""
    # Where one process has no backward pass to run, the others would wait for it in theirs.
    gradient = int(tensor.requires_grad and torch.is_grad_enabled())
    sizes = list(tensor.shape)
    return [_DTYPES.index(tensor.dtype), gradient, len(sizes), *sizes, *[0] * (_MOST_DIMS - len(sizes))]


def _device(group: Group) -> torch.device:
    """Where the backend wants its tensors."""
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _exchange(header: list[int], group: Group) -> list[list[int]]:
    mine = torch.tensor(header, device=_device(group))
    everyone = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).tolist()


def _described(header: list[int]) -> str:
    dtype, gradient, dims, *sizes, tag = header
    said = f"{sizes[:dims]} {str(_DTYPES[dtype]).removeprefix('torch.')}{'' if gradient else ' without gradient'}"
    return said if tag == 0 else f"{said} ({tag})"
