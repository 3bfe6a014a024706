"""Weights from adjusted similarity: a sample counts the more, the more it looks like another class than its own does.

The ranking by adjusted similarity finds the samples in another class's context; a split into halves dilutes them, a
weight does not. From :func:`adjusted_similarity`, for sample n of class y,

    a(n) = max over k ≠ y of s(k, n)                                     its context: the arg max
           or, by the margin, less < x_n, p_y >
    z(n) = (a(n) − mean of a over class y) / std of a over class y
    w(n) = exp(t · min(z(n), c)), divided by its mean over class y       sharpness t, cap c

Everything here is on the CPU, in float64, and sums in the order of the samples: the same bits on every device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = ("similarity", "margin")  # a(n), and a(n) by the margin


class Shape(NamedTuple):
    """How the scores of each class are spread, [C]: 0 in both for a normal distribution, above it with a long tail."""

    excess_kurtosis: Tensor
    skewness: Tensor


def standardized(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """z [N]: the values less the mean of their class, over its standard deviation; 0 in a class of one or of equals."""
    values = values.double()
    size = labels.bincount(minlength=num_classes)
    centered = values - class_mean(values, labels, num_classes)[labels]
    variance = class_mean(centered.square(), labels, num_classes) * (size / (size - 1).clamp(min=1))
    # A spread below what the similarities are rounded to is none.
    std = variance.sqrt()[labels]
    return torch.where(std > 1e-7, centered / std.clamp(min=1e-7), 0)


def class_weights(z: Tensor, labels: Tensor, num_classes: int, sharpness: float, cap: float) -> Tensor:
    """w [N], of mean 1 within each class."""
    z = z.clamp(max=cap)
    highest = torch.full((num_classes,), -math.inf, dtype=z.dtype).scatter_reduce_(0, labels, z, "amax")
    weights = (sharpness * (z - highest[labels])).exp()  # so that none overflows
    return weights / class_mean(weights, labels, num_classes)[labels]


def shape_of(z: Tensor, labels: Tensor, num_classes: int) -> Shape:
    """Excess kurtosis and skewness of the scores of each class, 0 for a class of fewer than four samples."""
    counts = labels.bincount(minlength=num_classes) >= 4
    second, third, fourth = (class_mean(z**power, labels, num_classes) for power in (2, 3, 4))
    counts &= second > 1e-12  # of equal scores there is no shape
    second = second.clamp(min=1e-12)
    kurtosis, skewness = fourth / second.square() - 3, third / second**1.5
    return Shape(torch.where(counts, kurtosis, 0), torch.where(counts, skewness, 0))


def class_mean(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean over the samples of each class, [C]; 0 for a class without samples."""
    total = torch.zeros(num_classes, dtype=values.dtype).index_add_(0, labels, values)
    return total / labels.bincount(minlength=num_classes).clamp(min=1)


def auto_sharpness(shape: Shape, sizes: Tensor) -> float:
    """t in 0 .. 2, from the mean shape over the classes of four samples or more, beyond what chance explains.

    The rarer the few, the higher the excess kurtosis, and the sharper the weights that help: t is the excess, up to
    1.5, beyond which accuracy in all contexts alike gains less, or falls; a tail so long that its excess is 8 to 12, as
    of a shortcut that nearly every image follows, is worth up to 2. A minority of a third has a skewness alone, and
    needs gentle weights: t = 1 from 0.7 on, and 0 up to 0.3, as images without a bias have up to 0.15. Chance is
    :func:`chance_shape`, and two standard errors of the mean, which for n normally spread samples are those of
    sqrt(24 / n) and sqrt(6 / n).
    """
    there = sizes >= 4
    if not there.any():
        return 0.0
    chance = chance_shape(int((sizes > 0).sum()) - 1)

    def beyond(values: Tensor, by_chance: float, spread: float) -> float:
        error = (spread / sizes[there]).sum().sqrt() / there.sum()
        return float(values[there].mean() - by_chance - 2 * error)

    few = beyond(shape.excess_kurtosis, chance.excess_kurtosis, 24)
    minority = (beyond(shape.skewness, chance.skewness, 6) - 0.3) / 0.4
    longest = min(0.5, max(0.0, (few - 8) / 8))
    return max(min(1.5, max(0.0, few)) + longest, min(1.0, max(0.0, minority)))


class Chance(NamedTuple):
    excess_kurtosis: float
    skewness: float


def chance_shape(others: int) -> Chance:
    """The shape of the largest of so many independent normal numbers, which similarities without a bias may have.

    Excess kurtosis and skewness of two are 0.1 and 0.1, of ten 0.3 and 0.4, of a thousand 1.1 and 0.8. By moments of
    its density m φ(x) Φ(x)^(m - 1).
    """
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    density = (-x.square() / 2 + (others - 1) * torch.special.log_ndtr(x)).exp()
    density /= density.sum()
    mean = (density * x).sum()
    second, third, fourth = ((density * (x - mean) ** power).sum() for power in (2, 3, 4))
    return Chance(float(fourth / second.square() - 3), float(third / second**1.5))
