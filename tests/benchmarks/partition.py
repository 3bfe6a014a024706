"""One step of the search for a partition (Step 2 of IP-IRM), against masked copies of the matrix differentiated twice.

``python -m tests.benchmarks.partition`` searches all of 50,000 samples, and 2,048 of them, for a factor that was hidden
in their features.
"""

import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from equireg import PartitionUpdater, soft_info_nce
from tests.benchmarks.measure import Row, Settings, compare, peak_megabytes

WIDTH, GROUPS, TEMPERATURE, WEIGHT = 128, 2, 0.5, 0.5


def inputs(samples, settings: Settings):
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (F.normalize(torch.randn(samples, WIDTH, generator=generator), dim=1) for _ in range(2))
    logits = torch.randn(samples, GROUPS, generator=generator)
    return z1.to(settings.device), z2.to(settings.device), logits.to(settings.device).requires_grad_()


def masked_copies(z1, z2, shares):
    """In the released manner: for each group the matrix, copies of it without the diagonal, of its positives and of its
    negatives with their weights, and the slope by differentiating with ``create_graph=True``."""
    n = len(z1)
    z, objective = torch.cat([z1, z2]), 0.0
    for k in range(shares.shape[1]):
        weight = shares[:, k].repeat(2)
        sample = torch.arange(n, device=z.device).repeat(2)
        same = sample[None, :] == sample[:, None]
        similarity = z @ z.T
        off_diagonal = ~torch.eye(2 * n, dtype=torch.bool, device=z.device)
        same = same[off_diagonal].view(2 * n, -1)
        similarity = similarity[off_diagonal].view(2 * n, -1)
        by_column = weight.expand(2 * n, 2 * n)[off_diagonal].view(2 * n, -1)
        positives, negatives = similarity[same].view(2 * n, -1), similarity[~same].view(2 * n, -1)
        of_negatives = by_column[~same].view(2 * n, -1)
        of_negatives = of_negatives / of_negatives.sum(1, keepdim=True) * (2 * n - 2)
        logits = torch.cat([positives, negatives], 1) / TEMPERATURE
        theta = torch.ones((), device=z.device, requires_grad=True)
        scaled = logits * theta
        total = (scaled.exp() * torch.cat([torch.ones_like(positives), of_negatives], 1)).sum(1)
        loss = ((total.log() - scaled[:, 0]) * weight).sum() / weight.sum()
        (slope,) = torch.autograd.grad(loss, theta, create_graph=True)
        objective = objective + loss + WEIGHT * slope**2
    return objective


def one_matrix(z1, z2, shares):
    """As a careful person would write it: one matrix, masked once, and the slope in closed form."""
    n = len(z1)
    z, sample = torch.cat([z1, z2]), torch.arange(n, device=z1.device).repeat(2)
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


PASS = f"PartitionUpdater, a pass in blocks of {3096:,}"


def sizes(settings: Settings) -> dict[str, list[int]]:
    """Samples by version, up to what takes seconds."""
    if settings.quick:
        return {name: [16, 32, 64] for name in (*VERSIONS, PASS)}
    most = {"masked copies, differentiated twice": 2048, "one matrix": 8192}
    found = {name: [2**k for k in range(7, 15) if 2**k <= most.get(name, 16_384)] for name in VERSIONS}
    found["soft_info_nce"].append(50_000)
    return {**found, PASS: [2**k for k in range(10, 15)] + [50_000]}


def title() -> str:
    return f"Step of the search for a partition, D = {WIDTH}, K = {GROUPS}"


def steps():
    runs = {name: lambda arguments, v=v: step(v, arguments) for name, v in VERSIONS.items()}
    return {**runs, PASS: one_pass}


def memory_runs(settings: Settings):
    return {
        f"{name} {samples}": (
            lambda run=run: run(inputs(64, settings)),
            lambda run=run, n=samples: run(inputs(n, settings)),
        )
        for name, run in steps().items()
        for samples in sizes(settings)[name]
    }


def benchmark(settings: Settings) -> Iterator[Row]:
    wanted = sizes(settings)
    for samples in sorted(set().union(*wanted.values())):
        arguments = inputs(samples, settings)
        if samples in wanted["masked copies, differentiated twice"]:
            doubled = [part.double().detach().requires_grad_(i == 2) for i, part in enumerate(arguments)]
            expected = step(masked_copies, doubled)
            for version in VERSIONS.values():
                for value, exact in zip(step(version, arguments), expected):
                    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-8)
        runs = {name: lambda r=r, a=arguments: r(a) for name, r in steps().items() if samples in wanted[name]}

        def memory(name, samples=samples):
            return peak_megabytes(__name__, f"{name} {samples}", settings)

        repeats = 1 if samples > 16_384 else min(settings.repeats, 3)
        yield from compare(title(), runs, settings, repeats=repeats, memory=memory, size=samples, unit="samples")


def planted(samples: int = 50_000, few: int = 2048) -> None:
    """Two directions in noise, and ten weaker ones across them."""
    from equireg.ipirm.partition_search import adjusted_rand_index

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
    planted()
