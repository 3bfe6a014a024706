"""``pair_lse`` in the shape of the soft equivariance loss, against the dense matrix in eager PyTorch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from equireg import pair_lse
from tests.benchmarks.measure import Row, Settings, compare, peak_megabytes

SHAPE, SMALL = (16, 196, 256), (2, 49, 32)  # images, tokens, width
TEMPERATURE = 0.3


def inputs(shape, settings: Settings):
    torch.manual_seed(0)
    images, tokens, width = shape
    x, y = (torch.randn(images * tokens, width, device=settings.device) for _ in range(2))
    image = torch.arange(images, device=settings.device).repeat_interleave(tokens)
    return F.normalize(x, dim=1).requires_grad_(), F.normalize(y, dim=1).requires_grad_(), image


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


def memory_runs(settings: Settings):
    shape = SMALL if settings.quick else SHAPE
    return {
        name: (lambda v=v: step(v, inputs(SMALL, settings)), lambda v=v: step(v, inputs(shape, settings)))
        for name, v in VERSIONS.items()
    }


def benchmark(settings: Settings) -> Iterator[Row]:
    shape = SMALL if settings.quick else SHAPE
    arguments = inputs(shape, settings)
    for expected, got in zip(dense_eager(*arguments), chunked(*arguments)):
        torch.testing.assert_close(got, expected)
    runs = {name: lambda v=v: step(v, arguments) for name, v in VERSIONS.items()}
    images, tokens, width = shape
    work = f"pair_lse, {images} images x {tokens} tokens, D = {width}, forward + backward"
    yield from compare(work, runs, settings, memory=lambda name: peak_megabytes(__name__, name, settings))
