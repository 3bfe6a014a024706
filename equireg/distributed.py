"""Rows of all processes, gathered with their gradient; and one error for all where they do not fit.

A collective whose sizes differ between processes hangs, aborts or returns garbage. So before each gather the processes
exchange a short header, and where it shows a misfit, or that an argument was refused somewhere, every one of them
raises the same ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

Result = TypeVar("Result")
Group = Any  # a dist.ProcessGroup, a class that builds without torch.distributed lack
Facts = dict[str, Tensor | int | None]  # what has to be alike: the kind of a tensor, or a number

_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_MOST_FACTS, _MOST_DIMS = 8, 6
_NOTHING, _NUMBER, _TENSOR = range(3)
_LENGTH = 4 + _MOST_DIMS  # of a fact in a header


class Processes:
    """The processes whose samples a loss takes: this one alone, all of them, or those of a group.

    What the loss asks of the copies of a row flows back to the process that made it, as a sum over processes, and
    ``total`` is the same number in all of them. Under the mean of DistributedDataParallel the gradients of parameters
    are then those of one process with the whole batch; there is no factor of the world size.
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

    def agree(self, make: Callable[[], Result], facts: Callable[[Result], Facts]) -> Result:
        """What ``make`` gives, once the processes agree on its ``facts``; tensors that these settle can be gathered.

        ``make`` must hold all that can be refused and no collective. Reading the header waits for the device.

        Raises:
            ValueError: in every process, where a fact differs or ``make`` failed in one, which raises its own error.
        """
        if self.size == 1:
            return make()

        def checked(made: Result) -> Facts:
            found = facts(made)
            for name, fact in found.items():
                if isinstance(fact, Tensor):
                    self._check_backend(name, fact)
            return found

        return agree(self.function, make, checked, self.group)

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


def checksum(tensor: Tensor) -> int:
    """A number that tells whole numbers apart, and their order."""
    places = torch.arange(1, tensor.numel() + 1, device=tensor.device)
    return int(((tensor.flatten().long() + 1) * (places * 0x9E3779B1 + 1)).sum())


def settings_of(module: nn.Module) -> int:
    """A number that tells modules of a kind apart by what they show of their settings."""
    return crc32(module.extra_repr().encode())


class Checksum:
    """The checksum of a tensor that seldom changes, computed where it did."""

    def __init__(self) -> None:
        self.seen: tuple[Any, ...] = ()
        self.value = 0

    def of(self, tensor: Tensor) -> int:
        state = (tensor.data_ptr(), tensor._version, tensor.shape, tensor.device)
        if state != self.seen:
            self.seen, self.value = state, checksum(tensor)
        return self.value


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


def agree(function: str, make: Callable[[], Result], facts: Callable[[Result], Facts], group: Group = None) -> Result:
    """What ``make`` gives, once every process has made its own with the same ``facts``.

    Raises:
        ValueError: in every process, where a fact differs or ``make`` failed in one, which raises its own error.
    """
    if world_size(group) == 1:
        return make()
    try:
        mine = make()
        found = facts(mine)
        entries = [_entry(fact) for fact in found.values()]
    except Exception:
        _exchange([0] * (1 + _MOST_FACTS * _LENGTH), group)  # so that the others stop too, and do not wait for this one
        raise
    padding = [0] * ((_MOST_FACTS - len(entries)) * _LENGTH)
    headers = _exchange([1, *(number for entry in entries for number in entry), *padding], group)
    if not all(header[0] for header in headers):
        said = ["accepted" if header[0] else "refused, see the error there" for header in headers]
        raise ValueError(f"{function}: arguments must be alike in every process, got {_by_rank(said)}")
    for k, name in enumerate(found):
        theirs = [header[1 + k * _LENGTH : 1 + (k + 1) * _LENGTH] for header in headers]
        if any(entry != theirs[0] for entry in theirs):
            said = [_described(entry) for entry in theirs]
            raise ValueError(f"{function}: {name} must be alike in every process, got {_by_rank(said)}")
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
        return _SumOfMine.apply(gradient, ctx.group), None


class _SumOfMine(torch.autograd.Function):
    """The sum of what all processes have in the place of this one; each is the other's derivative, again and again."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, group: Group) -> Tensor:
        ctx.group = group
        # Every backend can reduce to all; not all can scatter.
        places = places.contiguous().clone()
        dist.all_reduce(places, group=group)
        return places[dist.get_rank(group)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient, ctx.group), None


def _entry(fact: Tensor | int | None) -> list[int]:
    """A fact as numbers: [kind, value], or [kind, dtype, gradient, dims, sizes ...] of a tensor."""
    if fact is None:
        return [_NOTHING] * _LENGTH
    if not isinstance(fact, Tensor):
        return [_NUMBER, int(fact), *[0] * (_LENGTH - 2)]
    # Where one process has no backward pass to run, the others would wait for it in theirs.
    gradient = int(fact.requires_grad and torch.is_grad_enabled())
    sizes = list(fact.shape)
    return [_TENSOR, _DTYPES.index(fact.dtype), gradient, len(sizes), *sizes, *[0] * (_MOST_DIMS - len(sizes))]


def _described(entry: list[int]) -> str:
    kind, value, gradient, dims, *sizes = entry
    if kind != _TENSOR:
        return "None" if kind == _NOTHING else str(value)
    dtype = _DTYPES[value]
    said = f"{sizes[:dims]} {str(dtype).removeprefix('torch.')}"
    return said if gradient or not dtype.is_floating_point else f"{said} without gradient"


def _by_rank(said: list[str]) -> str:
    return ", ".join(f"rank {r}: {text}" for r, text in enumerate(said))


def _device(group: Group) -> torch.device:
    """Where the backend wants its tensors."""
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _exchange(header: list[int], group: Group) -> list[list[int]]:
    mine = torch.tensor(header, device=_device(group))
    everyone = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).tolist()
