"""``pair_lse`` where it is to be fast: its kernels on a GPU against dense forms, FlexAttention and the bare products.

Two shapes: that of the SER loss, forward and backward to the features, and that of the search for a partition (IP-IRM),
forward and backward to the weights. How much of the GPU a version uses is counted against the fastest product of two
8,192 × 8,192 matrices of the same dtype. Last the memory of the SER shape, up to where the dense form fails.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg import pair_lse
from tests.benchmarks import flex
from tests.benchmarks.floor import bare_products
from tests.benchmarks.measure import Row, Settings, compare, compiled, difference, peak, reason, synchronize
from tests.benchmarks.ser import precision

SER_SCALE, PARTITION_SCALE, GROUPS = 1 / 0.3, 1 / 0.5, 2
# The dtype of the features, and how products of fp32 are formed.
PRECISIONS = {"bf16": (torch.bfloat16, "highest"), "tf32": (torch.float32, "high"), "fp32": (torch.float32, "highest")}
Version = Callable[..., Tensor]


def sizes(settings: Settings) -> dict[str, tuple[int, ...]]:
    if settings.quick:
        return {"ser": (2, 8, 16), "curve": (2, 4, 6, 8, 16), "partition": (64, 8), "ceiling": (64,)}
    return {
        "ser": (64, 256, 512, 196, 256),  # images, then tokens of each and their width
        "curve": (8, 16, 32, 64, 128, 256, 512, 1024),
        "partition": (100_000, 128),  # rows and their width
        "ceiling": (8192,),
    }


def ser_inputs(images: int, tokens: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, int]:
    torch.manual_seed(0)
    x, y = (torch.randn(n * images * tokens, width, device=device) for n in (1, 2))
    return *(F.normalize(part, dim=1).to(dtype).requires_grad_() for part in (x, y)), tokens


def ser_dense(x: Tensor, y: Tensor, tokens: int) -> Tensor:
    image = torch.arange(len(x), device=x.device) // tokens
    logits = (x @ y.T * SER_SCALE).masked_fill((image[:, None] == image).repeat(1, 2), -torch.inf)
    return logits.logsumexp(1)


def ser_streamed(backend: str) -> Version:
    def version(x: Tensor, y: Tensor, tokens: int) -> Tensor:
        image = torch.arange(len(x), device=x.device) // tokens
        groups = {"row_group": image, "col_group": image.repeat(2)}
        return pair_lse(x, y, SER_SCALE, relation="ne", **groups, backend=backend)[0][0]

    return version


def partition_inputs(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = F.normalize(torch.randn(rows, width, device=device), dim=1).to(dtype)
    weights = torch.randn(rows // 2, GROUPS, device=device).softmax(1).T.repeat_interleave(2, 1)
    return x, weights.contiguous().requires_grad_()


def partition_dense(x: Tensor, weights: Tensor) -> Tensor:
    sample = torch.arange(len(x), device=x.device) // 2
    mass = (x @ x.T * PARTITION_SCALE).exp().masked_fill(sample[:, None] == sample, 0)
    return (weights @ mass.to(weights.dtype).T).log()


def partition_streamed(backend: str) -> Version:
    def version(x: Tensor, weights: Tensor) -> Tensor:
        ids = torch.arange(len(x), device=x.device) // 2
        return pair_lse(x, x, PARTITION_SCALE, row_id=ids, col_id=ids, col_weight=weights, backend=backend)[0]

    return version


def versions(dense: Version, streamed: Callable[[str], Version], by_flex: Version, settings: Settings):
    return {
        "dense eager": dense,
        "dense, torch.compile": compiled(dense, settings),
        "FlexAttention": by_flex,
        "pair_lse, chunked": streamed("chunked"),
        "pair_lse, triton": streamed("triton"),
    }


def step(version: Version, arguments: tuple) -> list[Tensor]:
    """Forward and backward; the gradients."""
    learning = [part for part in arguments if isinstance(part, Tensor) and part.requires_grad]
    for part in learning:
        part.grad = None
    version(*arguments).mean().backward()
    return [part.grad for part in learning]


def able(found: dict[str, Version], small: tuple, tolerance: float) -> tuple[dict[str, Version], dict[str, str]]:
    """The versions that give what the dense form gives, with gradients, and of the others why they are left out."""

    def values(version: Version) -> Iterator[Tensor]:
        with torch.no_grad():  # first, so that what cannot be differentiated here is compared nevertheless
            yield version(*small)
        yield from step(version, small)

    expected, running, failed = [part.detach().clone() for part in values(found["dense eager"])], {}, {}
    for name, version in found.items():
        try:
            for got, exact in zip(values(version), expected):
                if not difference([got], [exact]) <= tolerance:  # NaN neither
                    failed[name] = "its values are not those of the dense form"
        except RuntimeError as error:
            failed.setdefault(name, reason(error))
        if name not in failed:
            running[name] = version
    return running, failed


def similarities_twice(x: Tensor) -> None:
    """The floor where only the weights learn: forward pass and gradient form the similarities of rows with rows."""
    for block in x.split(8192):
        x @ block.T
        x @ block.T


@contextlib.contextmanager
def out_of_memory_is_an_answer() -> Iterator[None]:
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ceiling(dtype: torch.dtype, settings: Settings) -> float:
    """FLOP/s of the fastest of several products of two large square matrices."""
    (side,) = sizes(settings)["ceiling"]
    a, b = (torch.randn(side, side, device=settings.device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3 if settings.quick else 30):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def timed(work: str, found: dict[str, Version], failed: dict[str, str], arguments: tuple, flops: float, top: float,
          settings: Settings, products: Callable[[], object], **labels: object) -> Iterator[Row]:  # fmt: skip
    """Time, memory and the share of the ceiling of each version of one shape; the products in it give the floor."""
    for name, why in failed.items():
        yield {"work": work, "version": name, **labels, "not_measured": why}
    runs = {name: lambda v=v: step(v, arguments) for name, v in found.items()}

    def memory(name: str) -> float | None:
        return peak(runs[name], runs[name], settings.device) if name in found else None

    runs = {**runs, "the bare products": products}
    for row in compare(work, runs, settings, memory=memory, may_fail=(RuntimeError,), **labels):
        if "seconds" in row:
            rate = flops / row["seconds"]
            row |= {"rate": rate, "of_ceiling": rate / top}
        yield row


def benchmark(settings: Settings) -> Iterator[Row]:
    chosen, device = sizes(settings), settings.device
    *images, tokens, width = chosen["ser"]
    ser = versions(ser_dense, ser_streamed, lambda x, y, t: flex.lse_of_other_images(x, y, t, SER_SCALE), settings)
    partition = versions(
        partition_dense, partition_streamed, lambda x, w: flex.lse_with_weights(x, w, PARTITION_SCALE), settings
    )
    for kind, (dtype, products_in) in PRECISIONS.items():
        with precision(products_in):
            top = ceiling(dtype, settings)
            tolerance = 5e-2 if dtype == torch.bfloat16 else 5e-3
            kind_and_top = f"{kind}, ceiling {top / 1e12:,.0f} TFLOP/s"
            running, failed = able(ser, ser_inputs(2, tokens, width, dtype, device), tolerance)
            for count in images:
                arguments = ser_inputs(count, tokens, width, dtype, device)
                x, y = (part.detach() for part in arguments[:2])
                work = f"SER shape, {tokens} tokens an image, D = {width}, {kind_and_top}, forward + backward"
                yield from timed(
                    work, running, failed, arguments, 4 * 2 * len(x) * len(y) * width, top, settings,
                    lambda x=x, y=y: bare_products(x, y), size=count, unit="images", rows=len(x),
                )  # fmt: skip
            rows, width_of_rows = chosen["partition"]
            running, failed = able(partition, partition_inputs(64, width_of_rows, dtype, device), tolerance)
            arguments = partition_inputs(rows, width_of_rows, dtype, device)
            work = f"IP-IRM shape, {rows:,} rows, D = {width_of_rows}, K = {GROUPS}, {kind_and_top}, to the weights"
            yield from timed(
                work, running, failed, arguments, 2 * 2 * rows**2 * width_of_rows, top, settings,
                lambda x=arguments[0]: similarities_twice(x),
            )  # fmt: skip
    yield from memory_curve(ser, tokens, width, settings)


def memory_curve(ser: dict[str, Version], tokens: int, width: int, settings: Settings) -> Iterator[Row]:
    """Peak memory with growing numbers of images; a version that has failed is not asked for more."""
    running, _ = able(ser, ser_inputs(2, tokens, width, torch.bfloat16, settings.device), 5e-2)
    for images in sizes(settings)["curve"]:
        labels = {"size": images, "unit": "images", "rows": images * tokens}
        for name in list(running):
            row = {"work": f"Memory of the SER shape, {tokens} tokens an image, D = {width}, bf16", "version": name}
            megabytes = None
            with out_of_memory_is_an_answer():
                arguments = ser_inputs(images, tokens, width, torch.bfloat16, settings.device)
                megabytes = peak(lambda: None, lambda v=running[name], a=arguments: step(v, a), settings.device)
            if megabytes is None and settings.device == "cuda":
                del running[name]
                yield {**row, **labels, "not_measured": "out of memory"}
            elif megabytes is not None:
                yield {**row, **labels, "megabytes": megabytes}
