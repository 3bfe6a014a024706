"""The loss of soft equivariance in its own shape, against the dense matrix in eager PyTorch and compiled."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from equireg import patch_nt_xent
from equireg.similarity import times_transposed
from tests.benchmarks.measure import medians, peak_megabytes

TOKENS, WIDTH, TEMPERATURE = 196, 256, 0.3


def inputs(images, tokens=TOKENS, width=WIDTH):
    torch.manual_seed(0)
    return [torch.randn(images, tokens, width, requires_grad=True) for _ in range(2)]


def dense_eager(z, z_prime):
    """What one writes first: both matrices, a mask, logsumexp."""
    images, places = z.shape[:2]
    z, z_prime = (F.normalize(part, dim=-1).flatten(0, 1) for part in (z, z_prime))
    image = torch.arange(images).repeat_interleave(places)
    same = (image[:, None] == image[None, :]).repeat(1, 2)
    logits = z @ torch.cat([z, z_prime]).T / TEMPERATURE
    positive = (z * z_prime).sum(1) / TEMPERATURE
    candidates = torch.cat([positive[:, None], logits.masked_fill(same, -math.inf)], 1)
    return (candidates.logsumexp(1) - positive).mean()


_compiled = torch.compile(dense_eager)


def ours(z, z_prime):
    return patch_nt_xent(z, z_prime, temperature=TEMPERATURE)


def products(z, z_prime):
    """The floor: the four products [M, 2M] of forward and backward pass, and nothing else, in the same tiles."""
    z, z_prime = (part.detach().flatten(0, 1) for part in (z, z_prime))
    keys, rows, cols = torch.cat([z, z_prime]), 392, 784
    for i in range(0, len(z), rows):
        for j in range(0, len(keys), cols):
            x, y = z[i : i + rows], keys[j : j + cols]
            tile = times_transposed(x, y)
            times_transposed(x, y)
            times_transposed(tile, y.T)
            times_transposed(x.T, tile.T)


def step(version, arguments):
    for part in arguments:
        part.grad = None
    loss = version(*arguments)
    if loss is not None:
        loss.backward()
    return loss


VERSIONS = {"dense eager": dense_eager, "dense, torch.compile": _compiled, "patch_nt_xent": ours}
SIZES = {16: 1, 64: 3}  # images, and by how much fewer turns


def memory_runs():
    """A compiled version first runs at full size, so that compiling it is not counted."""
    return {
        f"{name} {images}": (
            lambda v=version, n=images: step(v, inputs(n)) if v is _compiled else step(v, inputs(2, 49, 32)),
            lambda v=version, n=images: step(v, inputs(n)),
        )
        for name, version in VERSIONS.items()
        for images in SIZES
    }


def benchmark(repeats: int, threads: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for images, fewer in SIZES.items():
        arguments = inputs(images)
        expected = dense_eager(*arguments)
        for version in (ours, _compiled):
            torch.testing.assert_close(version(*arguments), expected)
        del expected
        runs = {**VERSIONS, "the bare products": products}
        steps = {name: lambda v=v, a=arguments: step(v, a) for name, v in runs.items()}
        seconds = medians(steps, max(3, repeats // fewer))
        work = f"SER loss, {images} images x {TOKENS} tokens, D = {WIDTH}, forward + backward"
        for name in runs:
            row: dict[str, object] = {"work": work, "version": name, "seconds": seconds[name]}
            if name in VERSIONS:
                row["megabytes"] = peak_megabytes(__name__, f"{name} {images}", threads)
            rows.append(row)
    return rows
