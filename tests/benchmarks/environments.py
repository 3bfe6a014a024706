"""Building environments, against the loop over classes with its matrix of similarities for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from equireg import Environments
from tests.benchmarks.measure import medians, peak_megabytes

LARGE = (50_000, 1_000, 2_048)


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


def memory_runs():
    def build(samples, classes, width):
        features, labels = torch.ones(samples, width), torch.arange(samples) % classes
        features[:, 0] = torch.arange(samples) % 17  # not all equal, and touched before the measurement
        return lambda: Environments.split(features, labels, classes)

    large = build(*LARGE)
    return {"Environments.split": (build(500, 10, 64), large)}


def benchmark(repeats: int, threads: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for samples, classes, width in ((1_000, 50, 512), (4_000, 200, 512)):
        torch.manual_seed(0)
        features, labels = torch.randn(samples, width), torch.arange(samples) % classes
        environments = Environments.split(features, labels, classes)
        expected = loop_over_classes(features, labels, classes)
        same = sum(len(set(environments.members(k)[0].tolist()) & set(expected[k][0].tolist())) for k in range(classes))
        assert same >= 0.9999 * sum(len(first) for first, _ in expected)  # fp32 may exchange neighbours
        runs = {
            "loop over classes": lambda f=features, y=labels, c=classes: loop_over_classes(f, y, c),
            "Environments.split": lambda f=features, y=labels, c=classes: Environments.split(f, y, c),
        }
        work = f"environments, {samples:,} samples, {classes} classes, D = {width}"
        rows += [{"work": work, "version": name, "seconds": s} for name, s in medians(runs, min(repeats, 3)).items()]
    samples, classes, width = LARGE
    features, labels = torch.randn(samples, width), torch.arange(samples) % classes
    seconds = medians({"Environments.split": lambda: Environments.split(features, labels, classes)}, 1)
    rows.append(
        {
            "work": f"environments, {samples:,} samples, {classes:,} classes, D = {width:,}",
            "version": "Environments.split",
            "seconds": seconds["Environments.split"],
            "megabytes": peak_megabytes(__name__, "Environments.split", threads),
        }
    )
    return rows
