"""How the benchmarks measure: interleaved runs on pinned threads, and peak memory in processes of their own."""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def machine(threads: int) -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name
        )
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, {versions}"


def in_a_process(name: str, repeats: int, threads: int) -> list[dict[str, object]]:
    """The rows of one benchmark, from a process of its own: what ran before leaves its mark on the allocator."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_rows_of, name, repeats, threads).result()


def _rows_of(name: str, repeats: int, threads: int) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    return importlib.import_module(f"tests.benchmarks.{name}").benchmark(repeats, threads)


def medians(runs: dict[str, Callable[[], object]], repeats: int, turn_seconds: float = 0.1) -> dict[str, float]:
    """Median seconds of each, run in turns, so that what slows the machine slows them all; one round to warm up.

    A turn lasts at least ``turn_seconds``: of something fast it holds several runs, and counts their average.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < turn_seconds:
                run()
                count += 1
            if turn:
                seconds[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_megabytes(module: str, name: str, threads: int) -> float:
    """How far a fresh process's memory grows at its peak while ``module.memory_runs()[name]`` runs, in MB (Linux)."""
    command = [sys.executable, "-m", "tests.benchmarks.measure", module, name, str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return float(json.loads(result.stdout.splitlines()[-1]))


def _status(field: str) -> int:
    """A line of the kernel's account of this process, in kB: VmRSS is now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _child(module: str, name: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    small, full = importlib.import_module(module).memory_runs()[name]
    small()  # loads the libraries that the run needs
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here; imports had theirs
    full()
    print(json.dumps((_status("VmHWM") - before) / 1024))


if __name__ == "__main__":
    _child(*sys.argv[1:])
