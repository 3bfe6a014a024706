"""One step of the search for a partition (Step 2 of IP-IRM), against masked copies of the matrix differentiated twice.

``python -m tests.benchmarks.partition`` draws the cost against the number of samples to docs/partition-cost.png; with
``planted`` it searches all of 50,000 samples, and 2,048 of them, for a factor that was hidden in their features.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F

from equireg import PartitionUpdater, soft_info_nce
from tests.benchmarks.measure import medians, peak_megabytes

WIDTH, GROUPS, TEMPERATURE, WEIGHT = 128, 2, 0.5, 0.5


def inputs(samples):
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (F.normalize(torch.randn(samples, WIDTH, generator=generator), dim=1) for _ in range(2))
    return z1, z2, torch.randn(samples, GROUPS, generator=generator).requires_grad_()


def masked_copies(z1, z2, shares):
    """In the released manner: for each group the matrix, copies of it without the diagonal, of its positives and of its
    negatives with their weights, and the slope by differentiating with ``create_graph=True``."""
    n = len(z1)
    z, objective = torch.cat([z1, z2]), 0.0
    for k in range(shares.shape[1]):
        weight = shares[:, k].repeat(2)
        sample = torch.arange(n).repeat(2)
        same = sample[None, :] == sample[:, None]
        similarity = z @ z.T
        off_diagonal = ~torch.eye(2 * n, dtype=torch.bool)
        same = same[off_diagonal].view(2 * n, -1)
        similarity = similarity[off_diagonal].view(2 * n, -1)
        by_column = weight.expand(2 * n, 2 * n)[off_diagonal].view(2 * n, -1)
        positives, negatives = similarity[same].view(2 * n, -1), similarity[~same].view(2 * n, -1)
        of_negatives = by_column[~same].view(2 * n, -1)
        of_negatives = of_negatives / of_negatives.sum(1, keepdim=True) * (2 * n - 2)
        logits = torch.cat([positives, negatives], 1) / TEMPERATURE
        theta = torch.ones((), requires_grad=True)
        scaled = logits * theta
        total = (scaled.exp() * torch.cat([torch.ones(2 * n, 1), of_negatives], 1)).sum(1)
        loss = ((total.log() - scaled[:, 0]) * weight).sum() / weight.sum()
        (slope,) = torch.autograd.grad(loss, theta, create_graph=True)
        objective = objective + loss + WEIGHT * slope**2
    return objective


def one_matrix(z1, z2, shares):
    """As a careful person would write it: one matrix, masked once, and the slope in closed form."""
    n = len(z1)
    z, sample = torch.cat([z1, z2]), torch.arange(n).repeat(2)
    s = z @ z.T / TEMPERATURE
    mass = s.exp().masked_fill(sample[:, None] == sample, 0)
    weight = shares.T.repeat(1, 2)
    scale = (2 * n - 2) / (2 * (shares.sum(0) - shares)).T.repeat(1, 2)
    negatives, moment = (scale * (weight @ part) for part in (mass, mass * s))
    positive = ((z1 * z2).sum(1) / TEMPERATURE).repeat(2)
    total = positive.exp() + negatives
    slopes = (positive.exp() * positive + moment) / total - positive
    loss, slope = ((weight * row).sum(1) / weight.sum(1) for row in (total.log() - positive, slopes))
    return (loss + WEIGHT * slope.square()).sum()


def streamed(z1, z2, shares):
    loss, slope = soft_info_nce(z1, z2, shares, temperature=TEMPERATURE)
    return (loss + WEIGHT * slope.square()).sum()


VERSIONS = {"masked copies, differentiated twice": masked_copies, "one matrix": one_matrix, "soft_info_nce": streamed}


def step(version, arguments):
    """The objective and its gradient to the logits."""
    z1, z2, logits = arguments
    logits.grad = None
    objective = version(z1, z2, logits.softmax(1))
    objective.backward()
    return objective.detach(), logits.grad


def one_pass(arguments):
    z1, z2, _ = arguments
    PartitionUpdater(len(z1), max_passes=1, starts=1).update(z1, z2, progress=False)


def memory_runs():
    small = inputs(64)
    runs = {
        f"{name} {samples}": (lambda v=version: step(v, small), lambda v=version, n=samples: step(v, inputs(n)))
        for name, version in VERSIONS.items()
        for samples in (2048, 50_000)
    }
    return {**runs, "one pass": (lambda: one_pass(small), lambda: one_pass(inputs(50_000)))}


def benchmark(repeats: int, threads: int) -> list[dict[str, object]]:
    arguments = inputs(2048)
    expected = step(
        masked_copies, tuple(part.double().detach().requires_grad_(i == 2) for i, part in enumerate(arguments))
    )
    for version in VERSIONS.values():
        for value, exact in zip(step(version, arguments), expected):
            torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-8)
    work = f"step of a partition, 2,048 samples x {WIDTH}, K = {GROUPS}"
    seconds = medians({name: lambda v=v: step(v, arguments) for name, v in VERSIONS.items()}, min(repeats, 3))
    rows: list[dict[str, object]] = [
        {
            "work": work,
            "version": name,
            "seconds": seconds[name],
            "megabytes": peak_megabytes(__name__, f"{name} 2048", threads),
        }
        for name in VERSIONS
    ]
    large = inputs(50_000)
    for name, version, run in (
        ("all at once", "soft_info_nce 50000", lambda: step(streamed, large)),
        ("one pass in blocks of 3,096", "one pass", lambda: one_pass(large)),
    ):
        start = time.perf_counter()
        run()
        rows.append(
            {
                "work": f"step of a partition, 50,000 samples x {WIDTH}, K = {GROUPS}, {name}",
                "version": "soft_info_nce" if "once" in name else "PartitionUpdater",
                "seconds": time.perf_counter() - start,
                "megabytes": peak_megabytes(__name__, version, threads),
            }
        )
    return rows


def draw(path: str = "docs/partition-cost.png") -> None:
    """Seconds of a step against the number of samples, on one thread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    figure, axes = plt.subplots(figsize=(6, 4.2))
    sizes = {"masked copies, differentiated twice": 2048, "one matrix": 8192, "soft_info_nce": 16_384}
    for name, most in sizes.items():
        samples = [2**power for power in range(7, 15) if 2**power <= most]
        costs = [medians({name: lambda n=n, v=VERSIONS[name]: step(v, inputs(n))}, 3)[name] for n in samples]
        print(name, dict(zip(samples, costs)))
        axes.loglog(samples, costs, "o-", label=name)
    samples = [2**power for power in range(10, 15)]
    costs = [medians({"": lambda n=n: one_pass(inputs(n))}, 3)[""] for n in samples]
    print("one pass", dict(zip(samples, costs)))
    axes.loglog(samples, costs, "s--", label="PartitionUpdater, a pass in blocks of 3,096")
    axes.set(xlabel="samples", ylabel="seconds", title="a step of the search for a partition, one thread")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def planted(samples: int = 50_000, few: int = 2048) -> None:
    """Two directions in noise, and ten weaker ones across them."""
    from equireg.partition_search import adjusted_rand_index

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randint(count, (samples,), generator=generator) for count in (2, 10))
    directions, weaker = (F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1) for count in (2, 10))
    noise = torch.randn(3, samples, WIDTH, generator=generator) / WIDTH**0.5
    views = directions[hidden] + 0.25 * weaker[other] + noise[0] + 0.5 * noise[1:]
    partitions = []
    for count in (few, samples):
        updater, start = PartitionUpdater(count, starts=1), time.perf_counter()
        partitions.append(updater.update(views[0, :count], views[1, :count]))
        agreement = adjusted_rand_index(partitions[-1], hidden[:count])
        print(f"{count} samples: {time.perf_counter() - start:.0f} s, agreement with the factor {agreement:.3f}")
    print(f"agreement of both on {few}: {adjusted_rand_index(partitions[0], partitions[1][:few]):.3f}")


if __name__ == "__main__":
    planted() if "planted" in sys.argv else draw()
