"""Measures over the grid of two settings: a table and a picture of means, beside the value of the base."""

from pathlib import Path
from statistics import mean
from typing import Any

from evidence.experiments import GROUPS, PLAN
from evidence.tables import digits_of, markdown, number
from matplotlib.figure import Figure

Grid = dict[str, list[float]]  # the values of the setting that goes down, and of the one that goes across
Plane = list[list[float]]


def landscapes(runs: dict[str, Any], folder: Path) -> str:
    """What was swept, or "Not run."; the pictures are ``results-<group>.png``."""
    blocks = []
    for plan in PLAN["landscapes"]:
        group = plan["group"]
        if group in runs:
            grid, off = GROUPS[group]["grid"], runs[group]["off"]
            known = measured(next(iter(off.values())))
            planes = {name: plane(runs[group], name, grid) for name in plan["measures"] if name in known}
            tables = [table(name, average(off, name), values, grid) for name, values in planes.items()]
            draw(planes, grid, folder / f"results-{group}.png")
            blocks += [f"**{plan['title']}.**", *tables, f"![{plan['title']}](results-{group}.png)"]
    return "\n\n".join(blocks) or "Not run."


def average(seeds: dict[str, Any], measure: str) -> float:
    """Over seeds, of the last network of each."""
    return mean(measured(run)[measure] for run in seeds.values())


def measured(run: dict[str, Any]) -> dict[str, float]:
    """Of its last network."""
    return run["curve"][max(run["curve"], key=int)]


def plane(runs: dict[str, Any], measure: str, grid: Grid) -> Plane:
    (down, rows), (across, columns) = grid.items()
    return [[average(runs[f"{down} {row:g}, {across} {col:g}"], measure) for col in columns] for row in rows]


def table(measure: str, base: float, values: Plane, grid: Grid) -> str:
    (down, rows), (across, columns) = grid.items()
    head = [f"{measure}; base: {number(base, digits_of(base))}", *(f"{across} {column:g}" for column in columns)]
    lines = [[f"{down} {row:g}", *(number(v, digits_of(base)) for v in line)] for row, line in zip(rows, values)]
    return markdown(head, lines)


def draw(planes: dict[str, Plane], grid: Grid, path: Path) -> None:
    (down, rows), (across, columns) = grid.items()
    figure = Figure((10, 3.6), layout="constrained")
    for axes, (measure, values) in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes.items()):
        picture = axes.imshow(values, aspect="auto")
        axes.set_title(measure, fontsize=10)
        axes.set(xlabel=across, ylabel=down)
        axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
        axes.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
        figure.colorbar(picture, ax=axes)
    figure.savefig(path, dpi=140)
