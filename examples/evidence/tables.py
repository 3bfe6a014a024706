"""Means over seeds, paired differences from a base with their intervals, and tables of them in Markdown."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import t

VERDICTS = HIGHER, LOWER, NOTHING = "Higher on", "Lower on", "difference that these seeds can tell"


class Result(NamedTuple):
    """The mean of an arm; that of its paired differences from the base, and its 95% interval by Student's t."""

    mean: float
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return HIGHER if self.low > 0 else LOWER if self.high < 0 else NOTHING


Rows = dict[str, dict[str, Result]]  # by measure and name of the arm, the base first


def paired(values: list[float], base: list[float]) -> Result:
    """Of ``values[i] - base[i]``; infinite with a single seed."""
    differences = [value - other for value, other in zip(values, base, strict=True)]
    center, count = mean(differences), len(differences)
    half = t.ppf(0.975, count - 1) * stdev(differences) / math.sqrt(count) if count > 1 else math.inf
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
    """With columns for the share of the way that some go to the last one, a ceiling, where that is higher."""
    head, lines = ["", *arms.values()], [[measure, *cells(row, arms, digits)] for measure, row in rows.items()]
    for name in share[:-1]:
        head.append(f"{name}: share of the way")
        for line, row in zip(lines, rows.values()):
            arm, ceiling = row.get(name), row.get(share[-1])
            there = arm and ceiling and ceiling.verdict == HIGHER
            line.append(f"{number(100 * arm.difference / ceiling.difference, 0)}%" if there else "")
    return markdown(head, lines)


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def cells(row: dict[str, Result], arms: dict[str, str], digits: int) -> list[str]:
    """Means, and in brackets the interval of the difference from the base; bold where that has no 0."""
    base, *others = arms.values()
    found = [number(row[base].mean, digits)]
    for result in map(row.get, others):
        text = f"{number(result.mean, digits)} ({difference(result, digits)})" if result else ""
        found.append(text if not result or result.verdict == NOTHING else f"**{text}**")
    return found


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
