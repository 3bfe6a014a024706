"""The supervised contrastive loss, which class-wise IRM's released denominator is a case of, against SupCon itself.

With all negatives in Env#1 and all positives in the denominator the risk of Env#1 is SupCon's loss of each class; where
classes are equally large, the mean over the classes is that over the samples.
"""

import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from equireg import class_wise_risks
from tests.benchmarks.floor import bare_products
from tests.benchmarks.measure import Row, Settings, compare, compiled, difference, peak_megabytes, runs_by_size, step

PACKAGES = ("pytorch-metric-learning",)
WIDTH, PER_CLASS, TEMPERATURE = 128, 4, 0.1
LIBRARY = "pytorch-metric-learning, SupConLoss"


def sizes(settings: Settings) -> tuple[int, ...]:
    return (16, 32, 64) if settings.quick else (256, 512, 1024, 2048)


def inputs(rows: int, settings: Settings) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, WIDTH, device=settings.device, requires_grad=True)]


def labels_of(z):
    return torch.arange(len(z), device=z.device) // PER_CLASS


def dense_eager(z):
    z, labels = F.normalize(z, dim=1), labels_of(z)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    log_prob = logits - logits.logsumexp(1, keepdim=True)
    return -(log_prob.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def ours(z):
    """Env#1 of both environments and their slopes: what class-wise IRM needs more of is computed too."""
    everyone = torch.ones(len(z), len(z), dtype=torch.bool, device=z.device)
    return class_wise_risks(z, labels_of(z), everyone, temperature=TEMPERATURE, denominator="all").risk[:, 0].mean()


def versions(settings: Settings):
    found = {"dense eager": dense_eager, "dense, torch.compile": compiled(dense_eager, settings)}
    found["class_wise_risks, with slopes and Env#2"] = ours
    if importlib.util.find_spec("pytorch_metric_learning") is not None:
        from pytorch_metric_learning import losses

        loss = losses.SupConLoss(temperature=TEMPERATURE)
        found[LIBRARY] = lambda z: loss(z, labels_of(z))
    return found


def memory_runs(settings: Settings):
    return runs_by_size(versions(settings), inputs, sizes(settings), min(sizes(settings)), settings)


def benchmark(settings: Settings) -> Iterator[Row]:
    found = versions(settings)
    work = f"Supervised contrastive loss, {PER_CLASS} samples a class, D = {WIDTH}, forward + backward"
    for rows in sizes(settings):
        labels = {"size": rows, "unit": "rows"}
        if LIBRARY not in found:
            yield {"work": work, "version": LIBRARY, **labels, "not_measured": "not installed"}
        arguments = inputs(rows, settings)
        expected = step(dense_eager, arguments)
        for name, version in found.items():
            assert difference(step(version, arguments), expected) < 1e-4, name
        runs = {name: lambda v=version, a=arguments: step(v, a) for name, version in found.items()}
        x = arguments[0].detach()
        runs["the bare products, similarities once"] = lambda x=x: bare_products(x, recomputed=False)

        def memory(name, rows=rows):
            return peak_megabytes(__name__, f"{name} {rows}", settings) if name in found else None

        yield from compare(work, runs, settings, memory=memory, **labels)
