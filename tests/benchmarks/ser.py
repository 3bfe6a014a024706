"""The loss of soft equivariance in its own shape, against the dense matrix in eager PyTorch and compiled."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from equireg import patch_nt_xent
from tests.benchmarks.floor import bare_products
from tests.benchmarks.measure import Row, Settings, compare, compiled, difference, peak_megabytes, runs_by_size, step

TEMPERATURE = 0.3
TURNS = {16: 9, 32: 5, 64: 3}  # at the most: the dense form takes 20 s at 64 images


def shape(settings: Settings) -> tuple[tuple[int, ...], int, int]:
    """Numbers of images, tokens of each, their width."""
    return ((2, 3, 4), 9, 16) if settings.quick else ((16, 32, 64), 196, 256)


def inputs(images: int, settings: Settings) -> list[torch.Tensor]:
    torch.manual_seed(0)
    _, tokens, width = shape(settings)
    return [torch.randn(images, tokens, width, device=settings.device, requires_grad=True) for _ in range(2)]


def dense_eager(z, z_prime):
    """What one writes first: both matrices, a mask, logsumexp."""
    images, places = z.shape[:2]
    z, z_prime = (F.normalize(part, dim=-1).flatten(0, 1) for part in (z, z_prime))
    image = torch.arange(images, device=z.device).repeat_interleave(places)
    same = (image[:, None] == image[None, :]).repeat(1, 2)
    logits = z @ torch.cat([z, z_prime]).T / TEMPERATURE
    positive = (z * z_prime).sum(1) / TEMPERATURE
    candidates = torch.cat([positive[:, None], logits.masked_fill(same, -math.inf)], 1)
    return (candidates.logsumexp(1) - positive).mean()


def ours(z, z_prime):
    return patch_nt_xent(z, z_prime, temperature=TEMPERATURE)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Products in bfloat16 (``"medium"``) or TensorFloat-32 (``"high"``), where the device has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_medium(version):
    def with_backward(arguments):
        with precision("medium"):
            return step(version, arguments)

    return with_backward


def versions(settings: Settings):
    return {
        "dense eager": dense_eager,
        "dense, torch.compile": compiled(dense_eager, settings),
        "patch_nt_xent": ours,
    }


def memory_runs(settings: Settings):
    return runs_by_size(versions(settings), inputs, shape(settings)[0], 2, settings)


def benchmark(settings: Settings) -> Iterator[Row]:
    found = versions(settings)
    sizes, tokens, width = shape(settings)
    for images in sizes:
        arguments = inputs(images, settings)
        expected = step(dense_eager, arguments)
        for name, version in found.items():
            if version is not dense_eager:
                assert difference(step(version, arguments), expected) < 1e-4, name
        runs = {name: lambda v=v, a=arguments: step(v, a) for name, v in found.items()}
        if images == sizes[-1]:
            for name in ("dense eager", "patch_nt_xent"):
                run = in_medium(found[name])
                assert difference(run(arguments), expected) < 2e-2, name
                runs[f"{name}, precision medium"] = lambda run=run, a=arguments: run(a)
        z, z_prime = (part.detach().flatten(0, 1) for part in arguments)
        keys = torch.cat([z, z_prime])
        runs["four bare products"] = lambda z=z, keys=keys: bare_products(z, keys)
        runs["three bare products"] = lambda z=z, keys=keys: bare_products(z, keys, recomputed=False)
        del expected

        def memory(name, images=images):
            return peak_megabytes(__name__, f"{name} {images}", settings) if name in found else None

        labels = {"size": images, "unit": "images", "rows": images * tokens}
        work = f"SER loss, {tokens} tokens an image, D = {width}, forward + backward"
        repeats = min(settings.repeats, TURNS.get(images, settings.repeats))
        yield from compare(work, runs, settings, repeats=repeats, memory=memory, **labels)
