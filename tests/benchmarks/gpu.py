"""``pair_lse`` where it is to be fast: its kernels on a GPU against dense forms, FlexAttention and the bare products.

How much of the GPU a version uses is counted against the fastest product of two 8,192 × 8,192 matrices of the same
dtype. First other tiles for the kernels; then, in the same harness, the SER loss and NT-Xent, the memory in the shape
of the SER loss up to where the dense form fails, and what else is timed at the sizes of a GPU. Last, the targets of
the SER loss beside what was measured.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.gpu_losses import FAILURES, STEPS, nt_xent, ser_loss
from tests.benchmarks.gpu_shapes import Shape, Version, partition, ser
from tests.benchmarks.gpu_targets import targets
from tests.benchmarks.gpu_tiles import other_tiles
from tests.benchmarks.measure import Row, Settings, compare, difference, peak, reason, synchronize
from tests.benchmarks.ser import precision

# The dtype of the features, how products of fp32 are formed, and how far from the dense form a version may be.
PRECISIONS = {
    "bf16": (torch.bfloat16, "highest", 5e-2),
    "tf32": (torch.float32, "high", 5e-3),
    "fp32": (torch.float32, "highest", 1e-4),
}
COMPILED = ("dense, torch.compile", "FlexAttention")
# Seconds after which nothing new is begun, so that all ends within eight minutes.
BUDGET = 400.0


def step(version: Version, arguments: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Forward and backward; the gradients."""
    learning = [part for part in arguments if part.requires_grad]
    for part in learning:
        part.grad = None
    version(*arguments).mean().backward()
    return [part.grad for part in learning if part.grad is not None]


def able(shape: Shape, dtype: torch.dtype, tolerance: float) -> tuple[dict[str, Version], dict[str, str]]:
    """The versions that give what the dense form gives, with gradients, and of the others why they are left out."""
    small = shape.inputs(shape.small, dtype)
    exact = tuple(part.detach().float().requires_grad_(part.requires_grad) for part in small)

    def values(version: Version, arguments: tuple[Tensor, ...] = small) -> Iterator[Tensor]:
        with torch.no_grad():  # first, so that what cannot be differentiated here is compared nevertheless
            yield version(*arguments)
        yield from step(version, arguments)

    with precision("highest"):
        expected = [part.clone() for part in values(shape.versions["dense eager"], exact)]
    running, failed = {}, {}
    for name, version in shape.versions.items():
        if version is None:
            failed[name] = "not installed"
            continue
        try:
            for got, wanted in zip(values(version), expected):
                if "diagonal" not in name and not difference([got], [wanted]) <= tolerance:  # NaN neither
                    failed[name] = "its values are not those of the dense form"
        except FAILURES as error:
            failed.setdefault(name, reason(error))
        if name not in failed:
            running[name] = version
    return running, failed


def ceiling(dtype: torch.dtype, settings: Settings) -> float:
    """FLOP/s of the fastest of several products of two large square matrices."""
    side, turns = (64, 3) if settings.quick else (8192, 30)
    a, b = (torch.randn(side, side, device=settings.device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(turns):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def peak_of(version: Version, shape: Shape, size: int, dtype: torch.dtype, settings: Settings) -> float | str | None:
    """MB of a step with inputs and gradients of its own, or why there is none."""

    def run() -> None:
        step(version, shape.inputs(size, dtype))

    try:
        return peak(run, run, settings.device)  # what the first run compiles is not counted
    except FAILURES as error:
        why = reason(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return why


def benchmark(settings: Settings, budget: float = BUDGET) -> Iterator[Row]:
    rows = []
    for row in within(budget, parts(settings)):
        rows.append(row)
        yield row
    yield from targets(rows, torch.cuda.get_device_name() if settings.device == "cuda" else "a CPU")


def parts(settings: Settings) -> Iterator[tuple[str, Iterator[Row]]]:
    """In order of worth, for what is left when the time is spent is not measured; but tiles serve all that follows."""
    both = ser(settings), partition(settings)
    yield "Tiles", other_tiles(settings)
    yield "pair_lse in bf16", in_precision("bf16", both, settings)
    yield "SER loss in bf16", in_precision("bf16", [ser_loss(settings)], settings)
    yield "Training step with SER", STEPS["Training step with SER"](settings)
    yield "NT-Xent in tf32", in_precision("tf32", [nt_xent(settings)], settings)
    yield "Memory", memory_curve(ser(settings), settings)
    for title in list(STEPS)[1:]:
        yield title, STEPS[title](settings)
    for kind in ("tf32", "fp32"):
        rest = [*both, ser_loss(settings), *([nt_xent(settings)] if kind == "fp32" else [])]
        yield f"The others in {kind}", in_precision(kind, [smaller(shape) for shape in rest], settings)


def smaller(shape: Shape) -> Shape:
    """At one size, without what has to be compiled for each and takes longest to prepare."""
    kept = {name: version for name, version in shape.versions.items() if name not in COMPILED}
    return replace(shape, versions=kept, sizes=shape.sizes[:1])


def within(
    budget: float, parts: Iterable[tuple[str, Iterator[Row]]], clock: Callable[[], float] = time.monotonic
) -> Iterator[Row]:
    """The rows of the parts until so many seconds are spent; a row for what is left of a part, and why."""
    start, spent = clock(), f"the {budget:g} seconds of this benchmark were spent"
    for title, rows in parts:
        left = spent if clock() - start > budget else None
        try:
            for row in rows if left is None else ():
                yield row
                if clock() - start > budget:
                    left = spent
                    break
        except Exception as error:  # what was measured, and what can still be, is worth keeping
            traceback.print_exc()
            left = reason(error)
        if left is not None:
            yield {"work": f"{title}, what is left", "version": "all", "not_measured": left}


def in_precision(kind: str, shapes: Iterable[Shape], settings: Settings) -> Iterator[Row]:
    dtype, products, tolerance = PRECISIONS[kind]
    with precision(products):
        top = ceiling(dtype, settings)
        for shape in shapes:
            running, failed = able(shape, dtype, tolerance)
            work = f"{shape.title}, {kind}, ceiling {top / 1e12:,.0f} TFLOP/s"
            for size in shape.sizes:
                labels = {"size": size, "unit": shape.unit}
                labels |= {"learns": shape.learns, "precision": kind, "width": shape.width}
                for name, why in failed.items():
                    yield {"work": work, "version": name, **labels, "not_measured": why}
                yield from timed(work, shape, running, size, dtype, top, settings, labels)


def timed(
    work: str,
    shape: Shape,
    running: dict[str, Version],
    size: int,
    dtype: torch.dtype,
    top: float,
    settings: Settings,
    labels: dict[str, Any],
) -> Iterator[Row]:
    """Time, memory and the share of the ceiling of each version."""
    arguments = shape.inputs(size, dtype)

    def memory(name: str) -> float | None:
        found = peak_of(running[name], shape, size, dtype, settings) if name in running else None
        return None if isinstance(found, str) else found

    runs: dict[str, Any] = {name: lambda v=version: step(v, arguments) for name, version in running.items()}
    runs["the bare products"] = lambda: shape.floor(*(part.detach() for part in arguments))
    repeats = 5 if size == shape.sizes[0] else 2  # the largest takes seconds
    for row in compare(work, runs, settings, repeats=repeats, memory=memory, may_fail=FAILURES, **labels):
        if "seconds" in row:
            rate = shape.flops(size) / row["seconds"]
            row |= {"rate": rate, "of_ceiling": rate / top}
        yield row


def memory_curve(shape: Shape, settings: Settings) -> Iterator[Row]:
    """Peak memory with growing numbers of images; a version that has failed is not asked for more."""
    dtype, _, tolerance = PRECISIONS["bf16"]
    running, _ = able(smaller(shape), dtype, tolerance)
    for images in (2, 4, 6, 8, 16) if settings.quick else (8, 16, 32, 64, 128, 256, 512, 1024):
        for name in list(running):
            row = {"work": f"Memory, {shape.title}, bf16", "version": name, "size": images, "unit": shape.unit}
            found = peak_of(running[name], shape, images, dtype, settings)
            if isinstance(found, str):
                del running[name]
                yield {**row, "not_measured": found}
            elif found is not None:
                yield {**row, "megabytes": found}
