"""NT-Xent of two views (SimCLR's loss), forward and backward, against dense forms and the libraries that offer it."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from equireg import soft_info_nce
from tests.benchmarks.floor import bare_products
from tests.benchmarks.measure import Row, Settings, compare, compiled, difference, peak_megabytes, runs_by_size, step

PACKAGES = ("lightly", "pytorch-metric-learning")
WIDTH, TEMPERATURE = 128, 0.5
OURS, LIGHTLY = "soft_info_nce", "lightly, NTXentLoss"
BY_PAIRS, BY_MATRIX = "pytorch-metric-learning, NTXentLoss", "pytorch-metric-learning, SupConLoss"
# pytorch-metric-learning's NTXentLoss puts each of its R positive pairs before all R² negative ones: its memory grows
# with the cube of the rows, 2 GB at this size and 17 GB at the next.
MOST_BY_PAIRS = 512


def sizes(settings: Settings) -> tuple[int, ...]:
    """Rows of the matrix, which are both views of half as many samples."""
    return (16, 32, 64) if settings.quick else (256, 512, 1024, 2048, 4096, 8192)


def inputs(rows: int, settings: Settings) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows // 2, WIDTH, device=settings.device, requires_grad=True) for _ in range(2)]


def dense_eager(z1, z2):
    """What one writes first: the matrix, its diagonal out, a cross entropy."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    samples = torch.arange(len(z1), device=z.device)
    return F.cross_entropy(logits, torch.cat([samples + len(z1), samples]))


def ours(z1, z2):
    return soft_info_nce(z1, z2, temperature=TEMPERATURE)[0][0]


def by_library(name: str) -> Callable[..., Any] | None:
    """The loss of another library, or None where it is not installed."""
    if importlib.util.find_spec(name.split(",")[0].replace("-", "_")) is None:
        return None
    if name == LIGHTLY:
        from lightly.loss import NTXentLoss

        return NTXentLoss(temperature=TEMPERATURE)
    from pytorch_metric_learning import losses

    # Where each sample has one positive, their supervised loss is NT-Xent.
    loss = losses.NTXentLoss if name == BY_PAIRS else losses.SupConLoss
    return losses.SelfSupervisedLoss(loss(temperature=TEMPERATURE))


def versions(settings: Settings) -> dict[str, Callable[..., Any] | None]:
    return {
        "dense eager": dense_eager,
        "dense, torch.compile": compiled(dense_eager, settings),
        **{name: by_library(name) for name in (LIGHTLY, BY_PAIRS, BY_MATRIX)},
        OURS: ours,
    }


def memory_runs(settings: Settings):
    return runs_by_size(versions(settings), inputs, sizes(settings), min(sizes(settings)), settings)


def benchmark(settings: Settings) -> Iterator[Row]:
    found = versions(settings)
    for rows in sizes(settings):
        labels = {"size": rows, "unit": "rows"}
        work = f"NT-Xent loss of two views, D = {WIDTH}, forward + backward"
        arguments, runs = inputs(rows, settings), {}
        expected = step(dense_eager, arguments)
        for name, version in found.items():
            reason = "not installed" if version is None else "its memory grows with the cube of the rows"
            if version is None or (name == BY_PAIRS and rows > MOST_BY_PAIRS):
                yield {"work": work, "version": name, **labels, "not_measured": reason}
                continue
            assert difference(step(version, arguments), expected) < 1e-4, name
            runs[name] = lambda v=version, a=arguments: step(v, a)
        x = torch.cat(arguments).detach()
        runs["the bare products"] = lambda x=x: bare_products(x)
        runs["the bare products, similarities once"] = lambda x=x: bare_products(x, recomputed=False)

        def memory(name, rows=rows):
            return peak_megabytes(__name__, f"{name} {rows}", settings) if name in found else None

        repeats = max(3, settings.repeats // 3) if rows > 2048 else settings.repeats
        yield from compare(work, runs, settings, repeats=repeats, memory=memory, **labels)
