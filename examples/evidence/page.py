"""The page of answers: a table and a picture for each question, and a sentence that says what the intervals say."""

from __future__ import annotations

import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

from evidence.intervals import Difference, paired
from evidence.questions import QUESTIONS, Comparison, Question
from training import as_markdown, visible

R2 = {"rotation": "R², rotation", "translation": "R², translation", "color": "R², colour", "blur": "R², blur"}
Rows = dict[str, dict[str, list[float]]]  # measure, arm: a value for each seed


def measures(found: dict[str, Any], comparison: Comparison) -> tuple[Rows, Rows]:
    """Accuracies in percent, and what has no unit; only seeds that all arms have: differences are paired."""
    group = found.get(comparison.group, {})
    arms = [comparison.base, *comparison.arms]
    if not all(arm in group for arm in arms):
        return {}, {}
    seeds = sorted(set.intersection(*(set(group[arm]) for arm in arms)), key=int)
    accuracies: Rows = {}
    others: Rows = {}
    for arm in arms:
        for seed in seeds:
            run = group[arm][seed]
            accuracy = {"test": run["accuracy"]["test"]} if "test" in run["accuracy"] else run["accuracy"]
            values = {comparison.title if name == "test" else name: value for name, value in accuracy.items()}
            if "corrupted" in run:
                values[f"{comparison.title}, corrupted".removeprefix(", ")] = mean(run["corrupted"].values())
            for name, value in values.items():
                accuracies.setdefault(name, {}).setdefault(arm, []).append(value)
            extra = {R2[kind]: value for kind, value in run.get("r2", {}).items()}
            if "equivariance" in run:
                extra = {"equivariance": run["equivariance"], **extra}
            for name, value in extra.items():
                others.setdefault(name, {}).setdefault(arm, []).append(value)
    return accuracies, others


def cell(values: list[float], base: list[float] | None, digits: int) -> str:
    """A mean, and in brackets the interval of its difference from the base; bold where that has no 0."""
    if base is None:
        return decimal(mean(values), digits)
    low_high = paired(values, base)
    text = f"{decimal(mean(values), digits)} ({signed(low_high.mean, digits)}: {interval(low_high, digits)})"
    return f"**{text}**" if low_high.verdict != "no difference told" else text


def decimal(value: float, digits: int, sign: str = "") -> str:
    """With a minus that is as wide as a plus."""
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def signed(value: float, digits: int) -> str:
    return decimal(value, digits, "+")


def interval(difference: Difference, digits: int) -> str:
    return f"{signed(difference.low, digits)} to {signed(difference.high, digits)}"


def table(rows: Rows, comparison: Comparison, base_name: str, digits: int) -> list[str]:
    names = [base_name, *comparison.arms.values()]
    lines = [row_of(["", *names]), row_of(["---"] * (len(names) + 1))]
    for measure, arms in rows.items():
        base = arms[comparison.base]
        cells = [cell(base, None, digits), *(cell(arms[arm], base, digits) for arm in comparison.arms)]
        lines.append(row_of([as_markdown(measure), *cells]))
    return lines


def row_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def sentence(rows: Rows, comparison: Comparison, arm: str) -> str:
    """What the intervals of one arm's accuracies say, in words."""
    said: dict[str, list[str]] = {}
    for measure, arms in rows.items():
        said.setdefault(paired(arms[arm], arms[comparison.base]).verdict, []).append(as_markdown(measure))
    words = {
        "higher": "higher on",
        "lower": "lower on",
        "no difference told": "no difference that these seeds can tell on",
    }
    parts = [f"{text} {'; '.join(said[verdict])}" for verdict, text in words.items() if verdict in said]
    return f"**{comparison.arms[arm]}**: {'. '.join(part[0].upper() + part[1:] for part in parts)}."


def answer(
    found: dict[str, Any], question: Question, base_name: str
) -> tuple[list[str], list[tuple[Comparison, Rows, Rows]]]:
    """The lines of one question, and what its picture shows."""
    lines = [f"## {question.title}", "", question.text, ""]
    shown = []
    for comparison in question.comparisons:
        accuracies, others = measures(found["runs"], comparison)
        if accuracies:
            shown.append((comparison, accuracies, others))
    if not shown:
        return [*lines, "Not run.", ""], []
    lines += [f"![Paired differences and their 95% intervals](results-{question.key}.png)", ""]
    # Comparisons of the same arms share a table.
    tables: dict[tuple[str, ...], list[tuple[Comparison, Rows, Rows]]] = {}
    for one in shown:
        tables.setdefault(tuple(one[0].arms.values()), []).append(one)
    for several in tables.values():
        first = several[0][0]
        accuracies = {name: arms for _, rows, _ in several for name, arms in rows.items()}
        lines += ["Accuracy, %:", "", *table(accuracies, first, base_name, 1), ""]
        for comparison, _, others in several:
            if others:
                where = f", {comparison.title}" if comparison.title else ""
                lines += [f"What the features tell{where}:", "", *table(others, first, base_name, 3), ""]
        lines += [f"- {sentence(accuracies, first, arm)}" for arm in first.arms] + [""]
        times = found["step_seconds"].get(
            next((c.group for c, _, _ in several if c.group in found["step_seconds"]), ""), {}
        )
        if times:
            ratios = [
                f"{name} {times[arm] / times[first.base]:.2f}" for arm, name in first.arms.items() if arm in times
            ]
            lines += [f"Time of a step over the base's: {', '.join(ratios)}.", ""]
        picked = [
            f"{comparison.title} {name}: {flag} {value:g}".strip()
            for comparison, _, _ in several
            for arm, name in comparison.arms.items()
            for flag, value in next(iter(found["runs"][comparison.group][arm].values()))["chosen"].items()
        ]
        if picked:
            lines += [f"Chosen on validation images: {'; '.join(picked)}.", ""]
    return lines, shown


def corruption_lines(found: dict[str, Any]) -> list[str]:
    """Accuracy under each kind, the base and its regularized counterpart of every group that was measured."""
    pairs = [
        ("ipirm", "SimCLR", "+ partitions"),
        ("ser", "MoCo-v3", "+ SERLoss"),
        ("reconstruction", "VICReg", "+ 2 images"),
    ]
    pairs.append(("vipriors-20", "fine-tuned", "+ ClassWiseIRM"))
    columns: dict[str, dict[str, str]] = {}
    for group, base_name, name in pairs:
        arms = found["runs"].get(group, {})
        regularized = "two" if group == "reconstruction" else "on"
        if "off" not in arms or regularized not in arms:
            continue
        seeds = sorted(set(arms["off"]) & set(arms[regularized]), key=int)
        for kind in arms["off"][seeds[0]]["corrupted"]:
            base, other = ([arms[arm][s]["corrupted"][kind] for s in seeds] for arm in ("off", regularized))
            columns.setdefault(base_name, {})[kind] = cell(base, None, 1)
            columns.setdefault(name, {})[kind] = cell(other, base, 1)
    if not columns:
        return []
    kinds = list(next(iter(columns.values())))
    lines = [row_of(["", *columns]), row_of(["---"] * (len(columns) + 1))]
    for kind in kinds:
        lines.append(row_of([as_markdown(kind.replace("_", " ")), *(column[kind] for column in columns.values())]))
    return lines


BASES = {
    "eqinv": "cross entropy",
    "eqinv-parts": "cross entropy",
    "ser": "MoCo-v3",
    "reconstruction": "VICReg",
    "ipirm": "SimCLR",
}


def write_page(found: dict[str, Any], folder: Path) -> Path:
    """``results.md`` and ``results-<question>.png`` in ``folder``."""
    lines = [INTRODUCTION.format(**{**found, "machine": as_markdown(found["machine"])})]
    for question in QUESTIONS:
        answered, shown = answer(found, question, BASES[question.key])
        lines += answered
        if shown:
            picture(shown, folder / f"results-{question.key}.png")
    corrupted = corruption_lines(found)
    if corrupted:
        lines += [CORRUPTIONS, *corrupted, ""]
    path = folder / "results.md"
    path.write_text("\n".join(wrapped(line) for line in "\n".join(lines).splitlines()).rstrip() + "\n")
    return path


def wrapped(line: str) -> str:
    """Prose at 125 columns; tables, pictures and code as they are."""
    if line.startswith(("|", "!", "    ")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 125, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def picture(shown: list[tuple[Comparison, Rows, Rows]], path: Path) -> None:
    """Every paired difference with its interval: accuracies on the left, what has no unit on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sides: list[list[tuple[str, str, Difference]]] = [[], []]
    for comparison, *both in shown:
        for side, rows in zip(sides, both):
            for measure, arms in rows.items():
                for arm, name in comparison.arms.items():
                    side.append((measure, name, paired(arms[arm], arms[comparison.base])))
    used = [side for side in sides if side]
    names = list(dict.fromkeys(name for side in used for _, name, _ in side))
    longest = max(len(side) for side in used)
    figure, grid = plt.subplots(1, len(used), figsize=(6.5 * len(used), 1.6 + 0.26 * longest), squeeze=False)
    titles = ["accuracy, points", "equivariance and R²"]
    for axes, side, title in zip(grid[0], used, titles):
        previous = None
        place = 0.0
        ticks: dict[str, list[float]] = {}
        for measure, name, difference in side:
            place += 1.0 if measure == previous else 1.7
            previous = measure
            ticks.setdefault(measure, []).append(place)
            color = f"C{names.index(name)}"
            axes.plot([difference.low, difference.high], [place, place], color=color, linewidth=2)
            axes.plot(difference.mean, place, "o", color=color, markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks([mean(places) for places in ticks.values()], map(visible, ticks), fontsize=8, parse_math=False)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(f"difference from the base: {title}", fontsize=10)
    handles = [plt.Line2D([], [], color=f"C{i}", marker="o", label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)


INTRODUCTION = """\
# Results: does it help?

Every method without and with its regularizer, {seeds} seeds each, on test images that no setting was chosen on. \
A cell is the mean over the seeds; in brackets stand the mean of the paired differences from the first column \
(same seed: same first weights of the backbone, same images and order) and its 95% interval by Student's t. \
Bold: the interval does not hold 0. With so many cells one in twenty is bold by chance. A seed decides weights, \
views and order, and on CIFAR-10 which images have labels; VIPriors and PACS have the same labelled images for \
all seeds, so their intervals do not speak of other draws. The settings named below were chosen by accuracy on \
validation images, with a seed that is not among the reported ones; everything else is the same for all arms of \
a table.

    python examples/report.py --scale {scale}        # trains what is missing, then writes this page and its pictures

{machine}, PyTorch {torch}, {date}; about {hours:.1f} hours of runs, one thread each. This is the *{scale}* \
scale of the report: networks, images and trainings far smaller than the papers', so a difference here says \
whether a regularizer helps in little, not what the papers' settings would give. *VIPriors* is a small one: 50 \
classes of Tiny ImageNet. The equivariance score is the mean cosine of turned token maps with those of turned \
images, less the same with another image.
"""

CORRUPTIONS = """\
## Do they make features more robust?

Accuracy in percent under each of the fifteen corruptions of ImageNet-C at severity 3 (by \
imagecorruptions-imaug): of a linear probe on the frozen features, with the most labels that were tried, and of \
the fine-tuned classifier. No network was trained with these corruptions, though the views of pretraining are \
jittered in colour, and some of them blurred.
"""
