"""How the benchmarks measure: interleaved runs on pinned threads, and peak memory in processes of their own.

A row is a dict: its ``work`` and ``version``, where the work comes in sizes its ``size`` and their ``unit``, and what
was measured (``seconds``, ``megabytes``, ``flops``, ...), or ``not_measured`` with the reason.
"""

import gc
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Row = dict[str, Any]
Runs = dict[str, Callable[[], object]]

# The older name up to PyTorch 2.6.
SIZES_LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Settings:
    """How a benchmark is to run; ``quick`` takes tiny sizes, to see that it runs at all."""

    repeats: int = 9
    threads: int = 1
    device: str = "cpu"
    quick: bool = False


QUICK = Settings(repeats=1, quick=True)


def compiled(function: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """``torch.compile`` of a baseline, each size for itself; a quick run traces and generates no code."""
    allow_sizes()
    return torch.compile(function, fullgraph=True, dynamic=False, backend="eager" if settings.quick else "inductor")


def allow_sizes(count: int = 256) -> None:
    """Past so many sizes (8 unless told) torch.compile runs what it was given uncompiled."""
    setattr(torch._dynamo.config, SIZES_LIMIT, count)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(
    runs: Runs, repeats: int, turn_seconds: float = 0.1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each, run in turns, so that what slows the machine slows them all.

    A turn lasts at least ``turn_seconds``: of something fast it holds several runs, and counts their average. With
    ``time.process_time`` for a clock, the time that other programs take does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), unit="turn", leave=False, disable=None):
        for name, run in runs.items():
            synchronize()
            start, count = clock(), 0
            while count == 0 or clock() - start < turn_seconds:
                run()
                synchronize()
                count += 1
            seconds[name].append((clock() - start) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(
    work: str,
    runs: Runs,
    settings: Settings,
    *,
    repeats: int | None = None,
    memory: Callable[[str], float | None] | None = None,
    may_fail: tuple[type[Exception], ...] = (torch.cuda.OutOfMemoryError,),
    **labels: Any,
) -> Iterator[Row]:
    """A row for each version: the median of interleaved runs and, of what ``memory`` knows, the peak memory.

    A version that raises one of ``may_fail`` has a row that says so.
    """
    failed: dict[str, str] = {}
    for name, run in runs.items():  # once to warm up
        try:
            run()
        except may_fail as error:
            failed[name] = reason(error)
        if name in failed and torch.cuda.is_available():
            torch.cuda.empty_cache()
    running = {name: run for name, run in runs.items() if name not in failed}
    turn_seconds = 0.0 if settings.quick else 0.1
    seconds = medians(running, 1 if settings.quick else repeats or settings.repeats, turn_seconds)
    for name in runs:
        row = {"work": work, "version": name, **labels}
        if name in failed:
            yield {**row, "not_measured": failed[name]}
            continue
        row["seconds"] = seconds[name]
        megabytes = None if memory is None else memory(name)
        yield row if megabytes is None else {**row, "megabytes": megabytes}


def difference(got: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """The largest distance of values and gradients to the expected ones, over the length of those."""
    pairs = [(value.double(), exact.double()) for value, exact in zip(got, expected, strict=True)]
    return float(torch.stack([(value - exact).norm() / exact.norm() for value, exact in pairs]).max())


def reason(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def peak_megabytes(module: str, name: str, settings: Settings) -> float | None:
    """How far memory grows at its peak while ``module.memory_runs(settings)[name]`` runs, in MB.

    On the CPU that of a fresh process (Linux; None elsewhere), on a GPU what its allocator hands out.
    """
    if settings.device != "cpu" or settings.quick:
        return peak(*importlib.import_module(module).memory_runs(settings)[name], settings.device)
    if not _CLEAR_REFS.exists():
        return None
    command = [sys.executable, "-m", "tests.benchmarks.measure", module, name, json.dumps(asdict(settings))]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return float(json.loads(result.stdout.splitlines()[-1]))


def step(version, arguments):
    """Forward and backward: the loss, and its gradients to all arguments."""
    for part in arguments:
        part.grad = None
    loss = version(*arguments)
    loss.backward()
    return loss.detach(), *(part.grad for part in arguments)


def runs_by_size(versions, inputs, sizes, least: int, settings: Settings):
    """What ``memory_runs`` gives for steps of several versions at several sizes.

    A compiled version first runs at full size, so that compiling it is not counted; the others at the size ``least``.
    """
    return {
        f"{name} {size}": (
            lambda v=v, n=size if "compile" in name else least: step(v, inputs(n, settings)),
            lambda v=v, n=size: step(v, inputs(n, settings)),
        )
        for name, v in versions.items()
        for size in sizes
    }


def peak(small: Callable[[], object], full: Callable[[], object], device: str) -> float | None:
    """The growth at the peak of ``full``; ``small`` first loads the libraries that it needs."""
    small()
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        full()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not _CLEAR_REFS.exists():
        return None
    before = _status("VmRSS")
    _CLEAR_REFS.write_text("5")  # the peak starts again from here; imports had theirs
    full()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A line of the kernel's account of this process, in kB: VmRSS is now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _child(module: str, name: str, settings: str) -> None:
    chosen = Settings(**json.loads(settings))
    torch.set_num_threads(chosen.threads)
    print(json.dumps(peak(*importlib.import_module(module).memory_runs(chosen)[name], chosen.device)))


if __name__ == "__main__":
    _child(*sys.argv[1:])
