"""Paired comparison of two arms over the same seeds."""

from __future__ import annotations

import math
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t


class Difference(NamedTuple):
    """The mean of paired differences, and its 95% interval by Student's t."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What so few seeds can tell."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "no difference told"


def paired(values: list[float], base: list[float]) -> Difference:
    """Of ``values[i] - base[i]``; infinite with a single seed."""
    if len(values) != len(base) or not values:
        raise ValueError(f"paired: values and base must be as many and not none, got {len(values)} and {len(base)}")
    differences = [value - other for value, other in zip(values, base)]
    center, count = mean(differences), len(differences)
    half = t.ppf(0.975, count - 1) * stdev(differences) / math.sqrt(count) if count > 1 else math.inf
    return Difference(center, center - half, center + half)
