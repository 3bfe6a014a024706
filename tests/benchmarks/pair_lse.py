"""``pair_lse`` in the shape of the soft equivariance loss, against the dense matrix in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from equireg import pair_lse
from tests.benchmarks.measure import medians, peak_megabytes

IMAGES, TOKENS, WIDTH = 16, 196, 256
TEMPERATURE = 0.3


def inputs(images=IMAGES, tokens=TOKENS, width=WIDTH):
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(images * tokens, width), dim=1).requires_grad_() for _ in range(2))
    return x, y, torch.arange(images).repeat_interleave(tokens)


def dense_eager(x, y, image):
    """What one writes first: the matrix, a mask, logsumexp and a softmax mean."""
    logits = x @ y.T / TEMPERATURE
    masked = logits.masked_fill(image[:, None] == image[None, :], -torch.inf)
    return torch.logsumexp(masked, 1), (torch.softmax(masked, 1) * logits).sum(1)


def dense_eager_lse_only(x, y, image):
    logits = x @ y.T / TEMPERATURE
    masked = logits.masked_fill(image[:, None] == image[None, :], -torch.inf)
    return torch.logsumexp(masked, 1), None


def chunked(x, y, image):
    lse, mean = pair_lse(x, y, 1 / TEMPERATURE, relation="ne", row_group=image, col_group=image, backend="chunked")
    return lse[0], mean[0]


VERSIONS = {"dense eager": dense_eager, "dense eager, without the mean": dense_eager_lse_only, "chunked": chunked}


def step(version, arguments):
    """Forward and backward; the loss reads the log-sum-exp, as the soft equivariance loss does."""
    x, y, _ = arguments
    x.grad = y.grad = None
    lse, _ = version(*arguments)
    lse.mean().backward()


def memory_runs():
    return {
        name: (lambda v=version: step(v, inputs(2, 49, 32)), lambda v=version: step(v, inputs()))
        for name, version in VERSIONS.items()
    }


def benchmark(repeats: int, threads: int) -> list[dict[str, object]]:
    arguments = inputs()
    for expected, got in zip(dense_eager(*arguments), chunked(*arguments)):
        torch.testing.assert_close(got, expected)
    seconds = medians({name: lambda v=v: step(v, arguments) for name, v in VERSIONS.items()}, repeats)
    memory = {name: peak_megabytes(__name__, name, threads) for name in VERSIONS}
    work = f"pair_lse, {IMAGES} images x {TOKENS} tokens, D = {WIDTH}, forward + backward"
    return [{"work": work, "version": name, "seconds": seconds[name], "megabytes": memory[name]} for name in VERSIONS]
