"""Measures over the grid of two settings: a table and a picture of means, beside the value of the base."""

from pathlib import Path
from statistics import mean
from typing import Any

from evidence.experiments import GROUPS, PLAN
from evidence.tables import markdown, number
from matplotlib.figure import Figure

Plane = list[list[float]]


def landscapes(runs: dict[str, Any], folder: Path) -> str:
    """What was swept, or "Not run."; the pictures are ``results-<group>.png``."""
    blocks = []
    for plan in PLAN["landscapes"]:
        group = plan["group"]
        if group in runs:
            (across, rows), (down, columns) = GROUPS[group]["grid"].items()
            known = measured(next(iter(runs[group]["off"].values())))
            base = {name: average(runs[group]["off"], name) for name in plan["measures"] if name in known}
            planes = {measure: plane(runs[group], measure, across, rows, down, columns) for measure in base}
            blocks += [f"**{plan['title']}.**", *tables(planes, base, across, rows, down, columns)]
            draw(planes, across, rows, down, columns, folder / f"results-{group}.png")
            blocks.append(f"![{plan['title']}](results-{group}.png)")
    return "\n\n".join(blocks) or "Not run."


def average(seeds: dict[str, Any], measure: str) -> float:
    """Over seeds, of the last network of each."""
    return mean(measured(run)[measure] for run in seeds.values())


def measured(run: dict[str, Any]) -> dict[str, float]:
    """Of its last network."""
    return run["curve"][max(run["curve"], key=int)]


def plane(runs: dict[str, Any], measure: str, across: str, rows: list[float], down: str, columns: list[float]) -> Plane:
    return [[average(runs[f"{across} {row:g}, {down} {col:g}"], measure) for col in columns] for row in rows]


def tables(
    planes: dict[str, Plane], base: dict[str, float], across: str, rows: list[float], down: str, columns: list[float]
) -> list[str]:
    found = []
    for measure, values in planes.items():
        digits = 1 if base[measure] > 1 else 3
        lines = [[f"{across} {row:g}", *(number(v, digits) for v in line)] for row, line in zip(rows, values)]
        head = [f"{measure}; base: {number(base[measure], digits)}", *(f"{down} {column:g}" for column in columns)]
        found.append(markdown(head, lines))
    return found


def draw(planes: dict[str, Plane], across: str, rows: list[float], down: str, columns: list[float], path: Path) -> None:
    figure = Figure((4.2 * len(planes), 3.6), layout="constrained")
    for axes, (measure, values) in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes.items()):
        picture = axes.imshow(values, aspect="auto")
        axes.set(title=measure, xlabel=down, ylabel=across)
        axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
        axes.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
        figure.colorbar(picture, ax=axes)
    figure.savefig(path, dpi=140)
