"""Building environments, against the loop over classes with its matrix of similarities for each."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from equireg import Environments
from equireg.similarity import times_transposed
from tests.benchmarks.measure import Row, Settings, compare, peak_megabytes

LARGE = (50_000, 1_000, 2_048)  # samples, classes, width


def loop_over_classes(features, labels, num_classes):
    """For each anchor class: all similarities to the other samples, their mean, its level in each class, a ranking."""
    x = F.normalize(features, dim=1)
    split = []
    for k in range(num_classes):
        others = (labels != k).nonzero().squeeze(1)
        similarity = (x[labels == k] @ x[others].T).mean(0)
        adjusted = similarity.clone()
        for i in range(num_classes):
            if i != k:
                of_class = labels[others] == i
                adjusted[of_class] = similarity[of_class] - similarity[of_class].mean()
        ranked = others[adjusted.argsort(descending=True, stable=True)]
        half = (len(ranked) + 1) // 2
        split.append((ranked[:half], ranked[half:]))
    return split


def bare_products(features, labels, num_classes):
    """What a split cannot do without: sums over classes, as a product with one-hot labels, and the similarities."""
    means = features.new_zeros(num_classes, features.shape[1])
    for x, y in zip(features.split(4096), labels.split(4096)):
        means += times_transposed(F.one_hot(y, num_classes).T.to(x.dtype), x.T)
    for x in features.split(4096):
        times_transposed(means, x)


def large(settings: Settings) -> tuple[int, int, int]:
    return (60, 6, 16) if settings.quick else LARGE


def memory_runs(settings: Settings):
    def build(samples, classes, width):
        features = torch.ones(samples, width, device=settings.device)
        features[:, 0] = torch.arange(samples) % 17  # not all equal, and touched before the measurement
        labels = torch.arange(samples, device=settings.device) % classes
        return lambda: Environments.split(features, labels, classes)

    return {"Environments.split": (build(500, 10, 64), build(*large(settings)))}


def benchmark(settings: Settings) -> Iterator[Row]:
    for samples, classes, width in ((40, 4, 16),) if settings.quick else ((1_000, 50, 512), (4_000, 200, 512)):
        torch.manual_seed(0)
        features = torch.randn(samples, width).to(settings.device)
        labels = torch.arange(samples, device=settings.device) % classes
        environments = Environments.split(features, labels, classes)
        expected = loop_over_classes(features, labels, classes)
        same = sum(len(set(environments.members(k)[0].tolist()) & set(expected[k][0].tolist())) for k in range(classes))
        assert same >= 0.9999 * sum(len(first) for first, _ in expected)  # fp32 may exchange neighbours
        runs = {
            "loop over classes": lambda f=features, y=labels, c=classes: loop_over_classes(f, y, c),
            "Environments.split": lambda f=features, y=labels, c=classes: Environments.split(f, y, c),
        }
        work = f"Environments, {samples:,} samples, {classes} classes, D = {width}"
        yield from compare(work, runs, settings, repeats=min(settings.repeats, 3))
    samples, classes, width = large(settings)
    features = torch.randn(samples, width).to(settings.device)
    labels = torch.arange(samples, device=settings.device) % classes
    yield from compare(
        f"Environments, {samples:,} samples, {classes:,} classes, D = {width:,}",
        {
            "the bare products": lambda: bare_products(features, labels, classes),
            "Environments.split": lambda: Environments.split(features, labels, classes),
            "its report": Environments.split(features, labels, classes).report,
        },
        settings,
        repeats=3,
        memory=lambda name: peak_megabytes(__name__, name, settings) if name == "Environments.split" else None,
    )
