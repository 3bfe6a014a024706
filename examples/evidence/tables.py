"""Means over seeds, paired differences from a base with their intervals, and tables of them in Markdown."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import t


class Result(NamedTuple):
    """The mean of an arm; that of its paired differences from the base, and its 95% interval by Student's t."""

    mean: float
    difference: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """That of the whole interval: 1, -1, or 0 where it holds 0."""
        return (self.low > 0) - (self.high < 0)


Rows = dict[str, dict[str, Result]]  # by measure and name of the arm, the base first
# Where contexts are usual for classes, accuracy is that on images in other contexts; beside it stand these.
CONTEXTS = {"overall": "all images", "usual": "usual context"}


def paired(values: list[float], base: list[float]) -> Result:
    """Of ``values[i] - base[i]``; infinite with a single seed."""
    differences = [value - other for value, other in zip(values, base, strict=True)]
    center, count = mean(differences), len(differences)
    half = float(t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count) if count > 1 else math.inf
    return Result(mean(values), center, center - half, center + half)


def paired_seeds(runs: dict[str, Any], arms: dict[str, str]) -> list[str]:
    """Those that all arms have."""
    return sorted(set.intersection(*(set(runs[arm]) for arm in arms if arm in runs)), key=int)


def by_measure(runs: dict[str, Any], arms: dict[str, str], read: Callable[[Any], dict[str, float]]) -> Rows:
    """What is read of each run."""
    arms, seeds = {arm: name for arm, name in arms.items() if arm in runs}, paired_seeds(runs, arms)
    rows: dict[str, dict[str, list[float]]] = {}
    for arm, seed in product(arms, seeds):
        for measure, value in read(runs[arm][seed]).items():
            rows.setdefault(measure, {}).setdefault(arms[arm], []).append(value)
    base = next(iter(arms.values()))
    return {measure: {name: paired(row[name], row[base]) for name in row} for measure, row in rows.items()}


def table(rows: Rows, arms: dict[str, str], digits: int, share: Sequence[str] = ()) -> str:
    """Of means, bold where the interval of the difference from the base holds no 0.

    With columns for the share of the way that some go to the last one, a ceiling, where that is higher.
    """
    head = ["", *arms.values(), *(f"{name}: share of the way" for name in share[:-1])]
    lines = []
    for measure, row in rows.items():
        line = [measure, *(cell(row.get(name), digits, average) for name in arms.values())]
        for name in share[:-1]:
            arm, ceiling = row.get(name), row.get(share[-1])
            there = arm and ceiling and ceiling.sign > 0
            line.append(f"{number(100 * arm.difference / ceiling.difference, 0)}%" if there else "")
        lines.append(line)
    return markdown(head, lines)


def differences(rows: Rows, base: str, names: list[str], digits: int) -> str:
    """A table of those from the base, with their intervals."""
    lines = [[measure, *(cell(row.get(name), digits, difference) for name in names)] for measure, row in rows.items()]
    return markdown([f"from {base}", *names], lines)


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def cell(result: Result | None, digits: int, written: Callable[[Result, int], str]) -> str:
    """What is ``written`` of a result, if there is one; bold where the interval of its difference holds no 0."""
    text = written(result, digits) if result else ""
    return f"**{text}**" if result and result.sign else text


def average(result: Result, digits: int) -> str:
    """Over seeds."""
    return number(result.mean, digits)


def difference(result: Result, digits: int) -> str:
    """That of an arm from the base, and its interval."""
    center, low, high = (number(value, digits, "+") for value in result[1:])
    return f"{center}: {low} to {high}"


def digits_of(value: float) -> int:
    """Behind the point: of percents, or of shares."""
    return 1 if value > 1 else 3


def number(value: float, digits: int, sign: str = "") -> str:
    """With a minus that is as wide as a plus."""
    return f"{value:{sign}.{digits}f}".replace("-", "−")
