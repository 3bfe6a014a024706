"""How differences come about in a training: measured of networks that are kept on its way, and of the last one."""

from pathlib import Path
from typing import Any, NamedTuple

from evidence.experiments import PLAN, settings_of
from evidence.tables import Result, by_measure, difference, digits_of, markdown
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


class Curve(NamedTuple):
    """Of one measure: the paired difference of an arm from a base, by the number of steps."""

    measure: str
    arm: str
    base: str
    results: dict[int, Result]


def along(scale: str, group: str, runs: dict[str, Any], comparison: dict[str, Any]) -> list[Curve]:
    """The curves that a comparison names under ``along``, of what was run."""
    base, found, title = comparison.get("from", "off"), [], PLAN["titles"].get(group, "")
    s, names = settings_of(scale, group, base, {}), {base: comparison["base"], **comparison["arms"]}
    for asked in comparison.get("along", ()):
        arms = {arm: names[arm] for arm in (asked["from"], *asked["arms"]) if arm in runs}
        if asked["from"] not in runs or len(arms) < 2 or "curve" not in next(iter(runs[asked["from"]].values())):
            continue

        def measured(run: dict[str, Any], measures: list[str] = asked["measures"]) -> dict[tuple[str, int], float]:
            last = s["epochs"] * (s["samples"] // s["batch_size"])
            by_steps = {int(step): own for step, own in run["curve"].items()}
            if "told" in run:
                by_steps[last] = {**run["accuracy"], **run["told"]}
            there = [name for name in measures if all(name in own for own in by_steps.values())]
            return {(name, step): by_steps[step][name] for name in there for step in sorted(by_steps)}

        rows = by_measure(runs, arms, measured)
        for arm in list(arms)[1:]:
            for measure in dict.fromkeys(name for name, _ in rows):
                results = {step: row[names[arm]] for (name, step), row in rows.items() if name == measure}
                where = f"{title}: {measure}".removeprefix(": ")
                found.append(Curve(where, names[arm], names[asked["from"]], results))
    return found


def curve_tables(curves: list[Curve]) -> list[str]:
    """One for all trainings of the same length."""
    by_steps: dict[tuple[int, ...], list[list[str]]] = {}
    for measure, arm, base, results in curves:
        differences = [difference(result, digits_of(result.mean)) for result in results.values()]
        by_steps.setdefault(tuple(results), []).append([measure, arm, base, *differences])
    return [
        markdown(["", "of", "from", *(f"{step:,} steps" for step in steps)], lines) for steps, lines in by_steps.items()
    ]


def draw_curves(curves: list[Curve], path: Path) -> None:
    """A diagram for each measure, with a line and its intervals for each arm and base."""
    measures = list(dict.fromkeys(curve.measure for curve in curves))
    labels = list(dict.fromkeys(f"{curve.arm}, less {curve.base}" for curve in curves))
    figure = Figure((10, 4.2), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        for curve in (curve for curve in curves if curve.measure == measure):
            centers = [result.difference for result in curve.results.values()]
            half = [result.high - result.difference for result in curve.results.values()]
            color = f"C{labels.index(f'{curve.arm}, less {curve.base}')}"
            axes.errorbar(list(curve.results), centers, half, color=color, marker="o", capsize=4)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(measure, fontsize=10)
        axes.set(xlabel="steps", ylabel="difference")
        axes.grid(alpha=0.3)
    lines = [Line2D([], [], color=f"C{color}", marker="o", label=label) for color, label in enumerate(labels)]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=10)
    figure.savefig(path, dpi=140)
