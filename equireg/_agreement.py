"""Processes check their arguments together: an error in one of them, or a fact that differs, is raised in all.

A collective whose sizes differ between processes hangs, aborts or returns garbage. So before the first one the
processes exchange a short header: whether each accepted its arguments, and a digest of the facts that must be alike.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from hashlib import blake2b
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # a dist.ProcessGroup; a PyTorch built without torch.distributed has no such class
Fact = Tensor | float | str | None | list[Any] | dict[str, Any] | Callable[[], int]
Facts = dict[str, Fact]


class Agreement:
    """A ``with`` block that checks the arguments of a call and records the facts that must be alike in every process.

    A tensor stands for its shape, its dtype and whether it gets a gradient; once agreed on it can be gathered. Numbers,
    strings, None, and lists and dicts of these stand for themselves. A function stands for what it returns; it is
    called only where there are other processes. The end of the block compares the facts, which waits for the device;
    the block must hold no collective. In a single process nothing is compared.

    Raises:
        ValueError: in every process, where a fact differs, or where the block of another process raised an error.
    """

    def __init__(self, function: str, size: int, group: Group = None):
        self.function, self.size, self.group = function, size, group
        self.facts: Facts = {}

    def __enter__(self) -> Facts:
        return self.facts

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.size == 1 or (error is not None and not isinstance(error, Exception)):
            return
        mine, mistake = {}, error
        if mistake is None:
            try:
                mine = self._in_words()
            except Exception as raised:  # the others have to hear of it before it leaves this process
                mistake = raised
        headers = exchange([mistake is None, _digest(mine)], self.group)
        if mistake is not None and mistake is not error:
            raise mistake
        if error is not None:
            return  # and Python raises it again
        if not all(accepted for accepted, _ in headers):
            said = ["accepted" if accepted else "refused, see the error there" for accepted, _ in headers]
            raise self._differing("arguments", said)
        if any(header != headers[0] for header in headers):
            everyone: list[Any] = [None] * self.size
            dist.all_gather_object(everyone, mine, group=self.group)
            raise next(
                self._differing(name, values)
                for name in {name: None for facts in everyone for name in facts}
                if len(set(values := [facts.get(name, "nothing") for facts in everyone])) > 1
            )

    def _in_words(self) -> dict[str, str]:
        """Every fact in words. Raises ValueError for a tensor that lies where the backend cannot gather it."""
        gathered = _gathered(self.group)
        for name, fact in self.facts.items():
            if isinstance(fact, Tensor) and fact.device.type not in gathered:
                got = f"{' or '.join(gathered)} for the process group, got {fact.device}"
                raise ValueError(f"{self.function}: {name} must be on {got}")
        return {name: _described(fact() if callable(fact) else fact) for name, fact in self.facts.items()}

    def _differing(self, name: str, values: list[str]) -> ValueError:
        got = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
        return ValueError(f"{self.function}: {name} must be alike in every process, got {got}")


class Checksum:
    """The ``checksum`` of a tensor that seldom changes, computed again only after it changed."""

    def __init__(self) -> None:
        # Held, as a new tensor may lie where one that is gone has lain.
        self.seen: tuple[Tensor, int] | None = None
        self.value = 0

    def of(self, tensor: Tensor) -> int:
        if self.seen is None or self.seen[0] is not tensor or self.seen[1] != tensor._version:
            self.seen, self.value = (tensor, tensor._version), checksum(tensor)
        return self.value

    def __getstate__(self) -> dict[str, Any]:
        return {"seen": None, "value": 0}


def checksum(tensor: Tensor) -> int:
    """A number that depends on the whole numbers in ``tensor`` and on their order."""
    places = torch.arange(1, tensor.numel() + 1, device=tensor.device)
    return int(((tensor.flatten().long() + 1) * (places * 0x9E3779B1 + 1)).sum())


def world_size(group: Group = None) -> int:
    """How many processes there are; 1 where none were started."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def backend_device(group: Group = None) -> torch.device:
    """Where the processes can exchange tensors: on the CPU if they can, else on their accelerator."""
    gathered = _gathered(group)
    if "cpu" in gathered:
        return torch.device("cpu")
    return torch.device(gathered[0], torch.get_device_module(gathered[0]).current_device())


def _gathered(group: Group) -> list[str]:
    """The kinds of device whose tensors the group can gather; its backend may differ between them."""
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return [device for device, backend in pairs if backend != "gloo" or device == "cpu"]  # of a GPU gloo gathers none


def exchange(header: list[int], group: Group = None) -> list[list[int]]:
    """The whole numbers of every process, equally many of each, in the order of ranks."""
    mine = torch.tensor(header, dtype=torch.int64, device=backend_device(group))
    everyone = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).tolist()  # type: ignore[no-any-return]


def _described(fact: object) -> str:
    """A fact in words: equal facts have equal words."""
    if isinstance(fact, Tensor):
        said = f"{list(fact.shape)} {str(fact.dtype).removeprefix('torch.')}"
        # Where one process has no backward pass to run, the others would wait for it in theirs.
        learns = not fact.is_floating_point() or (fact.requires_grad and torch.is_grad_enabled())
        return said if learns else f"{said} without gradient"
    if isinstance(fact, Mapping):
        return ", ".join(f"{name}={_described(value)}" for name, value in fact.items())
    if isinstance(fact, numbers.Real) and not isinstance(fact, numbers.Integral):
        return repr(float(fact))  # every digit of it, and those of a NumPy scalar are the same
    return str(fact)


def _digest(facts: dict[str, str]) -> int:
    """56 bits of a cryptographic hash, alike in every process and every run."""
    text = "\n".join(f"{name}: {said}" for name, said in facts.items())
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")
