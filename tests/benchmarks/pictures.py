"""Seconds and peak memory against the size of the work, both axes logarithmic, from the record."""

import textwrap
from pathlib import Path
from typing import Any

from tests.benchmarks.record import Group

# Okabe and Ito's colours, which the colour-blind tell apart; a marker of its own for each version besides.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8C8C8C", "#B8A600"]
MARKERS = "osD^vPX*<"


def picture_of(group: Group, folder: Path) -> Path:
    """Where the picture of a benchmark lies, whether there is one or not."""
    where = "" if group["device"] == "cpu" else f"-{group['device']}"
    return folder / f"{group['benchmark'].replace('_', '-')}-cost{where}.png"


def draw(group: Group, folder: Path) -> Path | None:
    """Draws the work of the group that comes in the most sizes; None where that is fewer than three."""
    sizes: dict[str, set[int]] = {}
    for row in group["rows"]:
        if "size" in row and "not_measured" not in row:
            sizes.setdefault(row["work"], set()).add(row["size"])
    work = max(sizes, key=lambda work: len(sizes[work]), default=None)
    if work is None or len(sizes[work]) < 3:
        return None
    rows = [row for row in group["rows"] if row["work"] == work]
    return _figure(work, rows, picture_of(group, folder))


def _figure(work: str, rows: list[dict[str, Any]], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"seconds": "seconds", "megabytes": "peak extra memory, MB"}
    panels = {key: label for key, label in panels.items() if any(key in row for row in rows)}
    versions = list(dict.fromkeys(row["version"] for row in rows))
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.6), squeeze=False, layout="constrained")
    lines = {}
    for axes, (key, label) in zip(all_axes[0], panels.items()):
        for number, version in enumerate(versions):
            points = sorted((_x(row), row[key]) for row in rows if row["version"] == version and key in row)
            points = [point for point in points if key == "seconds" or point[1] >= 1]  # less than 1 MB is noise
            if points:
                (lines[version],) = axes.loglog(
                    *zip(*points),
                    color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=5,
                    linewidth=1.6,
                    linestyle="--" if "product" in version else "-",  # a floor, not a version
                    label=version,
                )
        axes.set(xscale="log", yscale="log")  # where nothing was drawn too
        ticks = sorted({_x(row) for row in rows})
        ticks = ticks[:: -(-len(ticks) // 6)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="rows" if "rows" in rows[0] else rows[0]["unit"], ylabel=label)
        axes.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(work, 60 * len(panels)), fontsize=11)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _x(row: dict[str, Any]) -> int:
    """Rows of the matrix where they are given, else the size."""
    x: int = row.get("rows", row["size"])
    return x
