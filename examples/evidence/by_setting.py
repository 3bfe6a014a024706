"""Accuracy against the values of one setting, by context: the usual one of a class, others, and all contexts alike."""

import math
from collections.abc import Collection
from pathlib import Path

from evidence.experiments import GROUPS, PLAN
from evidence.tables import CONTEXTS, Rows
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


def one_setting(group: str) -> bool:
    return len(GROUPS[group].get("grid", {})) == 1


def draw_by_setting(accuracy: Rows, groups: Collection[str], arms: dict[str, str], path: Path) -> None:
    """A diagram for each group; without the setting, at 0, the base."""
    suffixes = {"other contexts": "", **{name: f", {name}" for name in CONTEXTS.values()}}
    lines = math.ceil(len(groups) / 3)
    figure = Figure((9, 0.6 + 2.4 * lines), layout="constrained")
    panels = figure.subplots(lines, 3, squeeze=False).flat
    for group, axes in zip(groups, panels):
        [(setting, values)] = GROUPS[group]["grid"].items()
        names, title = [arms["off"], *(arms[f"{setting} {value:g}"] for value in values)], PLAN["titles"][group]
        for color, suffix in enumerate(suffixes.values()):
            if row := accuracy.get(title + suffix):
                axes.plot([0, *values], [row[name].mean for name in names], f"C{color}o-")
        axes.set_title(title, fontsize=9)
        axes.set(xlabel=setting, ylim=(0, 100), xticks=[0, *values])
        axes.tick_params(labelsize=9)
    for axes in panels:  # that no group is left for
        axes.set_axis_off()
    figure.supylabel("accuracy, %", fontsize=10)
    labels = [Line2D([], [], color=f"C{color}", marker="o", label=name) for color, name in enumerate(suffixes)]
    figure.legend(handles=labels, loc="outside lower center", ncols=3, fontsize=10)
    figure.savefig(path, dpi=140)
