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

Result = TypeVar("Result")


def world_size() -> int:
    """How many processes there are; 1 where none were started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(function: str, name: str, make: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What ``make`` gives in this process, [...], and in all of them, [processes, ...], in the order of ranks.

    The gradient of every copy flows back to the process that made it, as a sum over processes. With each process's loss
    a mean over its own rows and the mean over processes of DistributedDataParallel, the gradients are those of one
    process with the whole batch; there is no factor of the world size.

    Reading the header waits for the device.

    Raises:
        ValueError: in every process, where ``make`` failed in one of them, or its shape, dtype or need of a
            gradient differ; ``name`` says what is gathered. The process where it failed raises its own error.
    """

    def checked() -> Tensor:
        mine = make()
        _check_backend(function, name, mine)
        return mine

    mine = agree(function, name, checked, _header, _described)
    gathered: Tensor = _Gather.apply(mine)
    return mine, gathered


def gather_rows(mine: Tensor) -> Tensor:
    """The rows [n, ...] of all processes in the order of ranks, on the CPU, without a gradient; n may differ.

    To be called in all of them, after they agreed on all but n.
    """
    if world_size() == 1:
        return mine
    counts = [numbers[0] for numbers in _exchange([len(mine)])]
    padded = mine.new_zeros(max(counts), *mine.shape[1:], device=_device())
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
) -> Result:
    """What ``make`` gives, once every process has made its own with the same ``header`` (at most nine numbers).

    Raises:
        ValueError: in every process, where the headers differ or ``make`` failed in one, which raises its own error.
    """
    if world_size() == 1:
        return make()
    try:
        mine = make()
        numbers = header(mine)
    except Exception:
        _exchange(_header(None))  # so that the others stop too, instead of waiting for this one
        raise
    length = 3 + _MOST_DIMS
    headers = _exchange([*numbers, *[0] * (length - len(numbers))])
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
            dist.broadcast_object_list([(None, RuntimeError(f"rank 0 failed: {error!r}"))], src=0, device=_device())
            raise
    dist.broadcast_object_list(message, src=0, device=_device())
    result, failure = message[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        mine = mine.contiguous()
        everyone = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # The sum of what all processes ask of our copy. Every backend can reduce to all; not all can scatter.
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[rank()]


def _check_backend(function: str, name: str, tensor: Tensor) -> None:
    backend = dist.get_backend()
    wanted = {"nccl": "cuda", "gloo": "cpu"}.get(backend, tensor.device.type)
    if tensor.device.type != wanted:
        raise ValueError(f"{function}: {name} must be on {wanted} for the backend {backend}, got {tensor.device}")


def _header(tensor: Tensor | None) -> list[int]:
    """[dtype, gradient, dims, sizes ...] of a tensor, and -1 where there is none."""
    if tensor is None:
        return [-1] * (3 + _MOST_DIMS)
    # Where one process has no backward pass to run, the others would wait for it in theirs.
    gradient = int(tensor.requires_grad and torch.is_grad_enabled())
    sizes = list(tensor.shape)
    return [_DTYPES.index(tensor.dtype), gradient, len(sizes), *sizes, *[0] * (_MOST_DIMS - len(sizes))]


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _exchange(header: list[int]) -> list[list[int]]:
    mine = torch.tensor(header, device=_device())
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def _described(header: list[int]) -> str:
    dtype, gradient, dims, *sizes = header
    return f"{sizes[:dims]} {str(_DTYPES[dtype]).removeprefix('torch.')}{'' if gradient else ' without gradient'}"
