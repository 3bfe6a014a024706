"""Writes the page of results: for each question a picture, tables of means, and folded ones of every interval.

The prose is in ``page.md``, where ``{eqinv}`` and its like stand for what is written here.
"""

import math
import re
import textwrap
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from evidence.by_setting import draw_by_setting, one_setting
from evidence.curves import along, curve_tables, draw_curves
from evidence.experiments import PLAN, groups_of
from evidence.landscapes import landscapes
from evidence.tables import CONTEXTS, Rows, by_measure, differences, paired_seeds, table
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

TITLES = PLAN["titles"]


def write_page(found: dict[str, Any], folder: Path) -> Path:
    """``results.md`` in ``folder``, and the pictures of its questions."""
    blocks = answers(found, folder)
    blocks["robustness"] = robustness(found["runs"])
    blocks["landscapes"] = landscapes(found["runs"], folder)
    measured = [group for group in groups_of("h100") if group in found["runs"]]
    blocks["h100"] = f"Among the tables above: {', '.join(measured)}." if measured else "Not run: no GPU was at hand."
    blocks |= {"date": but_for(found["dates"]), "machine": but_for(found["machines"])}
    text = Path(__file__).with_name("page.md").read_text().format_map({**found, **blocks})
    path = folder / "results.md"
    text = re.sub(r"\n{3,}", "\n\n", text)  # of what was not run nothing is left
    path.write_text("\n".join(map(wrapped, text.strip().splitlines())) + "\n")
    return path


def but_for(values: dict[str, str]) -> str:
    """The value of most groups; in brackets those of the others."""
    most = Counter(values.values()).most_common(1)[0][0]
    others = {
        value: [group for group in values if values[group] == value] for value in sorted({*values.values()} - {most})
    }
    exceptions = "; ".join(f"{', '.join(groups)} on {plain(value)}" for value, groups in others.items())
    return plain(most) + (f" ({exceptions})" if exceptions else "")


def plain(text: str) -> str:
    """As it is, in Markdown."""
    return re.sub(r"([\\`*_{}\[\]()#!|$~^:<>&])", r"\\\1", text)


def wrapped(line: str) -> str:
    """Paragraphs and list items at 125 columns; tables, pictures, code and HTML as they are."""
    if line.startswith(("|", "!", "#", "    ", "<")):
        return line
    how = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, 125, subsequent_indent="  " if line.startswith("- ") else "", **how)


def folded(summary: str, blocks: list[str]) -> str:
    """What opens by a click."""
    return "\n\n".join([f"<details>\n<summary>{summary}</summary>", *blocks, "</details>"])


def answers(found: dict[str, Any], folder: Path) -> dict[str, str]:
    """The first comparison of each question under the question's name, the others under that of their first group."""
    blocks = {}
    for question, (first, *others) in PLAN["questions"].items():
        blocks[question] = compared(found, first, folder, question) or "Not run."
        for other in others:
            name = other["groups"][0]
            blocks[name] = compared(found, other, folder, name)
    return blocks


def compared(found: dict[str, Any], comparison: dict[str, Any], folder: Path, name: str) -> str:
    """Nothing where not even two arms were run."""
    groups = {group: found["runs"][group] for group in comparison["groups"] if group in found["runs"]}
    base = comparison.get("from", "off")
    arms = {base: comparison["base"], **comparison["arms"]}
    arms = {arm: called for arm, called in arms.items() if any(arm in runs for runs in groups.values())}
    if len(arms) < 2:
        return ""
    accuracy, features = rows_of(groups, arms)
    share = [arms[arm] for arm in comparison.get("share", ()) if arm in arms]
    seeds = " or ".join(map(str, sorted({len(paired_seeds(runs, arms)) for runs in groups.values()})))
    draw(accuracy, features, arms[base], folder / f"results-{name}.png")
    blocks = [f"![Paired differences and their 95% intervals](results-{name}.png)"]
    if by_setting := all(map(one_setting, groups)):
        draw_by_setting(accuracy, groups, arms, folder / f"results-{name}-lines.png")
        blocks.insert(0, f"![Accuracy against the setting, by context](results-{name}-lines.png)")
    blocks += [f"Accuracy, %, of {seeds} seeds:", table(accuracy, arms, 1, share)]
    if features:
        blocks += ["What the features tell:", table(features, arms, 3)]
    every = tables_of_differences(accuracy, features, arms[base], list(arms.values())[1:])
    controls = {arm: control for arm, control in comparison.get("controls", {}).items() if {arm, control} <= {*arms}}
    if controls:
        names = [arms[arm] for arm in controls]
        every += tables_of_differences(*from_controls(groups, arms, controls), "the control", names)
        pairs = [f"{arms[arm]}: {arms[control]}" for arm, control in controls.items()]
        every.append(f"The controls: {'; '.join(pairs)}.")
    if not by_setting:  # another value costs nothing
        every += times_of_steps(groups, arms)
    if curves := [curve for group, runs in groups.items() for curve in along(found["scale"], group, runs, comparison)]:
        if any(len(curve.results) > 1 for curve in curves):
            draw_curves(curves, folder / f"results-{name}-steps.png")
            blocks.append(f"![Differences along the training, against steps](results-{name}-steps.png)")
        every += ["Along the training, of the networks as they are after so many steps:", *curve_tables(curves)]
    return "\n\n".join([*blocks, folded("Every difference, with its interval", [*every, *chosen(groups, arms)])])


def rows_of(groups: dict[str, Any], arms: dict[str, str]) -> tuple[Rows, Rows]:
    """Accuracies in percent, and what else the features tell."""
    accuracy, features = {}, {}
    for group, runs in groups.items():
        read = partial(accuracies, TITLES.get(group, ""))
        accuracy |= by_measure(runs, arms, read)
        features |= by_measure(runs, arms, told)
    return accuracy, features


def from_controls(groups: dict[str, Any], arms: dict[str, str], controls: dict[str, str]) -> tuple[Rows, Rows]:
    """Each arm beside its own control."""
    joined: tuple[Rows, Rows] = {}, {}
    for arm, control in controls.items():
        both = {group: runs for group, runs in groups.items() if arm in runs and control in runs}
        for rows, own in zip(joined, rows_of(both, {control: arms[control], arm: arms[arm]})):
            for measure, row in own.items():
                if arms[arm] in row:  # some measures are of the control alone
                    rows.setdefault(measure, {})[arms[arm]] = row[arms[arm]]
    return joined


def tables_of_differences(accuracy: Rows, features: Rows, base: str, names: list[str]) -> list[str]:
    blocks = ["Accuracy, points:", differences(accuracy, base, names, 1)]
    return blocks + (["What the features tell:", differences(features, base, names, 3)] if features else [])


def times_of_steps(groups: dict[str, Any], arms: dict[str, str]) -> list[str]:
    """Over that of the base, in the first group whose steps are so long that what is measured is not mostly chance."""
    for runs in groups.values():
        times = {
            name: median(run.get("step_seconds", 0) for run in runs[arm].values())
            for arm, name in arms.items()
            if arm in runs
        }
        base, *others = times
        if times[base] > 0.1:
            ratios = ", ".join(f"{name} {times[name] / times[base]:.2f}" for name in others)
            return [f"Time of a step over the base's, while other trainings ran beside it: {ratios}."]
    return []


def chosen(groups: dict[str, Any], arms: dict[str, str]) -> list[str]:
    """A list of the values of each setting, and of the data sets that they were chosen on."""
    found: dict[str, dict[str, list[str]]] = {}
    for group, runs in groups.items():
        settings = {arm: next(iter(runs[arm].values()))["chosen"] for arm in arms if arm in runs}
        shared = settings.get("off", {}).keys()  # with all arms
        for arm, values in settings.items():
            for setting in (name for name in values if arm == "off" or name not in shared):
                by_value = found.setdefault(f"{arms[arm]}, {setting}", {})
                by_value.setdefault(f"{values[setting]:g}", []).append(TITLES.get(group, ""))
    lines = [f"- {what}: {listed(titles)}" for what, titles in found.items()]
    return ["Chosen on validation images:", "\n".join(lines)] if lines else []


def listed(titles: dict[str, list[str]]) -> str:
    """Values, and where there are several data sets, those of each."""
    return ". ".join(value + (f" on {'; '.join(of)}" if any(of) else "") for value, of in titles.items())


def accuracies(title: str, run: dict[str, Any]) -> dict[str, float]:
    found = {title: run["accuracy"]["test"]} if "test" in run["accuracy"] else dict(run["accuracy"])
    for name, called in CONTEXTS.items():
        if name in run:
            found[f"{title}, {called}"] = run[name]["test"]
    if "corrupted" in run:
        found[f"{title}, corrupted".removeprefix(", ")] = mean(run["corrupted"].values())
    return found


def told(run: dict[str, Any]) -> dict[str, float]:
    """What is no accuracy on still images."""
    return run.get("told", {})


def robustness(runs: dict[str, Any]) -> str:
    """Accuracy under each kind of corruption and movement, for each group that was measured so."""
    blocks = []
    for plan in PLAN["robustness"]:
        of_group, base = runs.get(plan["group"], {}), plan.get("from", "off")
        arms = {arm: name for arm, name in {base: plan["base"], **plan["arms"]}.items() if arm in of_group}
        if base in arms and len(arms) > 1:
            rows = by_measure(of_group, arms, on_changed_images)
            rows = {measure: row for measure, row in rows.items() if len(row) == len(arms)}
            points = differences(rows, arms[base], list(arms.values())[1:], 1)
            every = ["Accuracy, %:", table(rows, arms, 1), "Points:", points]
            blocks.append(folded(", ".join(arms.values()), every))
    return "\n\n".join(blocks) or "Not run."


def on_changed_images(run: dict[str, Any]) -> dict[str, float]:
    """Accuracies by kind of corruption and by severity, and by kind of movement; some by the first five answers."""
    corrupted = {kind.replace("_", " "): value for kind, value in run["corrupted"].items()}
    moving = {f"moving, {kind}": value for kind, value in run.get("moving", {}).items()}
    return corrupted | run.get("severities", {}) | moving | run.get("top 5", {})


def draw(accuracy: Rows, features: Rows, base: str, path: Path) -> None:
    """Every paired difference with its interval: a diagram for each measure, with a scale of its own."""
    beside = tuple(CONTEXTS.values())  # in the tables alone
    rows = {f"{name}, points": row for name, row in accuracy.items() if not name.endswith(beside)} | features
    names = list(dict.fromkeys(name for row in rows.values() for name in list(row)[1:]))
    lines, columns = math.ceil(len(rows) / 4), min(len(rows), 4)
    figure = Figure((9, 1.5 + lines * (0.65 + 0.09 * len(names))), layout="constrained")
    figure.suptitle(f"Difference from {base}, and its 95% interval", fontsize=10)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for (title, row), axes in zip(rows.items(), panels):
        for y, name in enumerate(names):
            if name in row:
                _, center, low, high = row[name]
                axes.plot([low, center, high], [y] * 3, f"C{y}o-", markevery=[1], linewidth=2, markersize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(ylim=(len(names) - 0.5, -0.5), yticks=[])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=9)
        axes.set_title(textwrap.fill(title, 26), fontsize=9)
    for axes in panels:  # that no measure is left for
        axes.set_axis_off()
    labels = [Line2D([], [], color=f"C{color}", marker="o", label=name) for color, name in enumerate(names)]
    figure.legend(handles=labels, loc="outside lower center", ncols=3, fontsize=10)
    figure.savefig(path, dpi=140)
