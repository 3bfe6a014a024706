"""One benchmark, in a process of its own: what ran before leaves its mark on the allocator."""

import concurrent.futures
import importlib
import multiprocessing

import torch

from tests.benchmarks import page, record
from tests.benchmarks.measure import Row, Settings


def in_a_process(name: str, settings: Settings) -> tuple[str, list[Row]]:
    """Machine and rows of the benchmark; each is printed as it comes."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, name, settings).result()


def _run(name: str, settings: Settings) -> tuple[str, list[Row]]:
    torch.set_num_threads(settings.threads)
    module = importlib.import_module(f"tests.benchmarks.{name}")
    machine = record.machine(settings.device, settings.threads, getattr(module, "PACKAGES", ()))
    print(f"\n{record.TITLES[name]} ({machine})", flush=True)
    rows: list[Row] = []
    for row in module.benchmark(settings):
        if not rows or rows[-1]["work"] != row["work"]:
            print(f" {row['work']}", flush=True)
        print(page.line(row), flush=True)
        rows.append(row)
    return machine, rows
