"""Writes the page of results: for each question tables, a picture, and what the intervals say in words.

The prose is in ``page.md``, where ``{eqinv}`` and its like stand for what is written here.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

from evidence.experiments import PLAN
from evidence.intervals import Difference, paired

Rows = dict[str, dict[str, list[float]]]  # measure, arm: a value for each seed
TITLES = PLAN["titles"]
R2 = {"rotation": "R², rotation", "translation": "R², translation", "color": "R², colour", "blur": "R², blur"}
NOTHING = "no difference told"
WORDS = {"higher": "Higher on", "lower": "Lower on", NOTHING: "No difference that these seeds can tell on"}


def write_page(found: dict[str, Any], folder: Path) -> Path:
    """``results.md`` and ``results-<question>.png`` in ``folder``."""
    blocks = {question: answer(found, question, folder) for question in PLAN["questions"]}
    blocks["corrupted"] = corruption_table(found["runs"])
    blocks["machine"] = re.sub(r"([\\`*_{}\[\]()#!|$~^:<>&])", r"\\\1", found["machine"])
    text = Path(__file__).with_name("page.md").read_text().format_map({**found, **blocks})
    path = folder / "results.md"
    path.write_text("\n\n".join(map(wrapped, text.strip().split("\n\n"))) + "\n")
    return path


def wrapped(block: str) -> str:
    """Paragraphs and list items at 125 columns; tables, pictures and code as they are."""
    if block.startswith(("|", "!", "#", "    ")):
        return block
    items, indent = (block.split("\n"), "  ") if block.startswith("- ") else ([block], "")
    how = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(item, 125, **how) for item in items)


def answer(found: dict[str, Any], question: str, folder: Path) -> str:
    """The tables and sentences of one question, and its picture."""
    blocks: list[str] = []
    sides: tuple[list[Any], list[Any]] = ([], [])  # what the picture shows of accuracies, and of what has no unit
    for comparison in PLAN["questions"][question]:
        groups = {group: found["runs"][group] for group in comparison["groups"] if group in found["runs"]}
        arms = {arm: name for arm, name in comparison["arms"].items() if any(arm in runs for runs in groups.values())}
        if not arms:
            continue
        rows = {group: measures(runs, ["off", *arms], TITLES.get(group, "")) for group, runs in groups.items()}
        accuracies = {measure: row for first, _ in rows.values() for measure, row in first.items()}
        blocks += ["Accuracy, %:", table(accuracies, comparison["base"], arms, 1)]
        for group, (_, others) in rows.items():
            if others:
                where = f", {TITLES[group]}" if group in TITLES else ""
                blocks += [f"What the features tell{where}:", table(others, comparison["base"], arms, 3)]
        blocks.append("\n".join(f"- {sentence(accuracies, arm, name)}" for arm, name in arms.items()))
        times = next((found["step_seconds"][group] for group in groups if group in found["step_seconds"]), {})
        if ratios := [f"{name} {times[arm] / times['off']:.2f}" for arm, name in arms.items() if arm in times]:
            blocks.append(f"Time of a step over the base's: {', '.join(ratios)}.")
        chosen = []
        for group, arm in ((group, arm) for group, runs in groups.items() for arm in arms if arm in runs):
            for name, value in next(iter(groups[group][arm].values()))["chosen"].items():
                chosen.append(f"{TITLES.get(group, '')} {arms[arm]}: {name} {value:g}".strip())
        if chosen:
            blocks.append(f"Chosen on validation images: {'; '.join(chosen)}.")
        for side, part in ((side, part) for pair in rows.values() for side, part in zip(sides, pair)):
            for measure, row in part.items():
                side += [(measure, name, paired(row[arm], row["off"])) for arm, name in arms.items() if arm in row]
    if not blocks:
        return "Not run."
    draw(sides, folder / f"results-{question}.png")
    return "\n\n".join([f"![Paired differences and their 95% intervals](results-{question}.png)", *blocks])


def measures(runs: dict[str, Any], arms: list[str], title: str) -> tuple[Rows, Rows]:
    """Accuracies in percent, and what has no unit; only seeds that all arms have: differences are paired."""
    accuracies: Rows = {}
    others: Rows = {}
    arms = [arm for arm in arms if arm in runs]
    seeds = sorted(set.intersection(*(set(runs[arm]) for arm in arms)), key=int)
    for arm, run in ((arm, runs[arm][seed]) for seed in seeds for arm in arms):
        accuracy = {title: run["accuracy"]["test"]} if "test" in run["accuracy"] else dict(run["accuracy"])
        if "corrupted" in run:
            accuracy[f"{title}, corrupted".removeprefix(", ")] = mean(run["corrupted"].values())
        told = {"equivariance": run["equivariance"]} if "equivariance" in run else {}
        told |= {R2[kind]: value for kind, value in run.get("r2", {}).items()}
        for rows, values in ((accuracies, accuracy), (others, told)):
            for name, value in values.items():
                rows.setdefault(name, {}).setdefault(arm, []).append(value)
    return accuracies, others


def table(rows: Rows, base: str, arms: dict[str, str], digits: int) -> str:
    lines = [["", base, *arms.values()], ["---"] * (len(arms) + 2)]
    for measure, row in rows.items():
        cells = [cell(row[arm], row["off"], digits) if arm in row else "" for arm in arms]
        lines.append([measure, number(mean(row["off"]), digits), *cells])
    return markdown(lines)


def corruption_table(runs: dict[str, Any]) -> str:
    """Accuracy under each kind of corruption, of the base and its regularized counterpart in groups that have it."""
    head, cells = [""], {}
    for group, arm, base, name in PLAN["corrupted"]:
        if {"off", arm} <= runs.get(group, {}).keys():
            head += [base, name]
            off, on = (runs[group][one] for one in ("off", arm))
            seeds = sorted(off.keys() & on.keys(), key=int)
            for kind in off[seeds[0]]["corrupted"]:
                values, others = ([arms[seed]["corrupted"][kind] for seed in seeds] for arms in (off, on))
                cells.setdefault(kind, [kind.replace("_", " ")]).extend(
                    [number(mean(values), 1), cell(others, values, 1)]
                )
    return markdown([head, ["---"] * len(head), *cells.values()]) if cells else "Not run."


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cell(values: list[float], base: list[float], digits: int) -> str:
    """A mean, and in brackets the interval of its difference from the base; bold where that has no 0."""
    difference = paired(values, base)
    center, low, high = (number(value, digits, "+") for value in difference)
    text = f"{number(mean(values), digits)} ({center}: {low} to {high})"
    return text if difference.verdict == NOTHING else f"**{text}**"


def number(value: float, digits: int, sign: str = "") -> str:
    """With a minus that is as wide as a plus."""
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def sentence(rows: Rows, arm: str, name: str) -> str:
    """What the intervals of one arm's accuracies say, in words."""
    told = [(paired(row[arm], row["off"]).verdict, measure) for measure, row in rows.items() if arm in row]
    said = {verdict: "; ".join(measure for one, measure in told if one == verdict) for verdict in WORDS}
    return f"**{name}**: {'. '.join(f'{WORDS[verdict]} {where}' for verdict, where in said.items() if where)}."


def draw(sides: tuple[list[tuple[str, str, Difference]], ...], path: Path) -> None:
    """Every paired difference with its interval: accuracies on the left, what has no unit on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    used = [side for side in sides if side]
    names = list(dict.fromkeys(name for side in used for _, name, _ in side))
    size = (6.5 * len(used), 1.6 + 0.26 * max(map(len, used)))
    figure, grid = plt.subplots(1, len(used), figsize=size, squeeze=False, layout="constrained")
    for axes, side, title in zip(grid[0], used, ("accuracy, points", "equivariance and R²")):
        place, ticks = 0.0, {}
        for measure, name, difference in side:
            place += 1.0 if measure in ticks else 1.7
            ticks.setdefault(measure, []).append(place)
            color = f"C{names.index(name)}"
            axes.plot([difference.low, difference.high], [place, place], color=color, linewidth=2)
            axes.plot(difference.mean, place, "o", color=color, markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks([mean(places) for places in ticks.values()], ticks, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(f"difference from the base: {title}", fontsize=10)
    handles = [plt.Line2D([], [], color=f"C{i}", marker="o", label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
