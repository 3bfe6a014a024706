"""The backends of ``pair_lse`` on a GPU, in the shape of the soft equivariance loss; no rows where there is no GPU.

``pair_lse`` may choose a kernel by itself only where it is the faster one here.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from equireg import pair_lse
from tests.benchmarks.measure import medians

TOKENS, TEMPERATURE = 196, 0.3
SIZES = [(images, width, dtype) for images in (16, 64) for width in (64, 128, 256, 512)
         for dtype in (torch.bfloat16, torch.float16, torch.float32)]  # fmt: skip


def step(backend, gradient, x, y, image, weight):
    """The log-sum-exp alone, with gradients to the features, or with gradients to the weights."""
    leaves = {"none": [], "features": [x, y], "weights": [weight]}[gradient]
    for tensor in (x, y, weight):
        tensor.requires_grad_(any(tensor is leaf for leaf in leaves))
    lse, mean = pair_lse(
        x, y, 1 / TEMPERATURE, relation="ne", row_group=image, col_group=image, col_weight=weight, backend=backend
    )
    if leaves:
        torch.autograd.grad(lse.mean() + mean.mean(), leaves)
    torch.cuda.synchronize()


def megabytes(run):
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def benchmark(repeats: int, threads: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    if not torch.cuda.is_available():
        return rows
    torch.set_float32_matmul_precision("high")
    for images, width, dtype in SIZES:
        x, y = (F.normalize(torch.randn(images * TOKENS, width, device="cuda"), dim=1).to(dtype) for _ in range(2))
        image = torch.arange(images, device="cuda").repeat_interleave(TOKENS)
        weight = torch.rand(2, len(y), device="cuda")
        for gradient in ("none", "features", "weights"):
            arguments = (gradient, x, y, image, weight)
            runs = {backend: functools.partial(step, backend, *arguments) for backend in ("chunked", "triton")}
            seconds = medians(runs, repeats)
            work = f"{torch.cuda.get_device_name()}, {images} x {TOKENS} tokens, D = {width}, {dtype}, {gradient}"
            rows += [
                {"work": work, "version": backend, "seconds": seconds[backend], "megabytes": megabytes(run)}
                for backend, run in runs.items()
            ]
    return rows
