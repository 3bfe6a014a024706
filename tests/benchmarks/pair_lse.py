"""``pair_lse`` in the shape of the soft equivariance loss, against the dense matrix in eager PyTorch.

On a GPU in bfloat16, where the Triton kernels run too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from equireg import pair_lse
from tests.benchmarks.measure import Row, Settings, compare_steps, runs_by_size

TEMPERATURE = 0.3


def shape(settings: Settings) -> tuple[int, int, int]:
    """Images, tokens of each, their width."""
    return (2, 49, 32) if settings.quick else (16, 196, 256)


def inputs(images: int, settings: Settings) -> list[torch.Tensor]:
    """Rows, columns, and the image that each is of."""
    torch.manual_seed(0)
    _, tokens, width = shape(settings)
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    x, y = (F.normalize(torch.randn(images * tokens, width), dim=1).to(settings.device, dtype) for _ in range(2))
    image = torch.arange(images, device=settings.device).repeat_interleave(tokens)
    return [x.requires_grad_(), y.requires_grad_(), image]


def dense_eager(x, y, image, with_mean=True):
    """What one writes first: the matrix, a mask, logsumexp and a softmax mean."""
    logits = x @ y.T / TEMPERATURE
    masked = logits.masked_fill(image[:, None] == image[None, :], -torch.inf)
    mean = (torch.softmax(masked, 1) * logits).sum(1) if with_mean else None
    return torch.logsumexp(masked, 1).mean(), mean


def ours(backend: str):
    """The loss reads the log-sum-exp, as the soft equivariance loss does."""

    def version(x, y, image):
        groups = {"relation": "ne", "row_group": image, "col_group": image}
        return pair_lse(x, y, 1 / TEMPERATURE, **groups, backend=backend)[0].mean()

    return version


def versions(settings: Settings):
    found = {
        "dense eager": lambda *arguments: dense_eager(*arguments)[0],
        "dense eager, without the mean": lambda *arguments: dense_eager(*arguments, with_mean=False)[0],
        "chunked": ours("chunked"),
    }
    if settings.device == "cuda" and importlib.util.find_spec("triton"):
        found["triton"] = ours("triton")
    return found


def memory_runs(settings: Settings):
    return runs_by_size(versions(settings), inputs, [shape(settings)[0]], 2, settings)


def benchmark(settings: Settings) -> Iterator[Row]:
    images, tokens, width = shape(settings)
    work = f"pair_lse, {images} images x {tokens} tokens, D = {width}, forward + backward"
    arguments, labels = inputs(images, settings), {"size": images, "unit": "images"}
    limit = 1e-4 if settings.device == "cpu" else 5e-2
    yield from compare_steps(work, versions(settings), arguments, settings, limit=limit, module=__name__, **labels)
