"""Accuracy against the values of one setting, by context: the usual one of a class, others, and all contexts alike."""

from collections.abc import Iterable
from pathlib import Path

from evidence.experiments import GROUPS, PLAN
from evidence.tables import Rows
from matplotlib.figure import Figure

CONTEXTS = {"other contexts": "", "all contexts alike": ", all images", "usual context": ", usual context"}


def one_setting(group: str) -> bool:
    return len(GROUPS[group].get("grid", {})) == 1


def draw_by_setting(accuracy: Rows, groups: Iterable[str], arms: dict[str, str], path: Path) -> None:
    """A diagram for each group; without the setting, at 0, the base."""
    groups = list(groups)
    lines = -(-len(groups) // 3)
    figure = Figure((9, 0.6 + 2.4 * lines), layout="constrained")
    panels = figure.subplots(lines, 3, squeeze=False).flat
    for axes, group in zip(panels, groups):
        [(setting, values)] = GROUPS[group]["grid"].items()
        base, *others = [arms["off"], *(arms[f"{setting} {value:g}"] for value in values)]
        for color, (label, suffix) in enumerate(CONTEXTS.items()):
            row = accuracy.get(PLAN["titles"][group] + suffix)
            heights = [row[name].mean for name in (base, *others)] if row else []
            axes.plot([0, *values][: len(heights)], heights, f"C{color}o-", label=label)
        axes.set_title(PLAN["titles"][group], fontsize=9)
        axes.set(xlabel=setting, ylim=(0, 100), xticks=[0, *values])
        axes.tick_params(labelsize=9)
    for axes in panels:
        axes.set_axis_off()
    figure.supylabel("accuracy, %", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    figure.savefig(path, dpi=140)
