"""A picture of a training from its log: every part of the loss, and the accuracies at its end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from training import averaged, read_log


def draw_curves(folder: Path, results: dict[str, Any]) -> None:
    """``curves.png`` in the folder of a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = [row for row in read_log(folder) if "loss" in row]
    steps = [row["step"] for row in log]
    shares = {name: value for name, value in results.items() if isinstance(value, float)}
    curves = [name for name in log[0] if name != "step"] if log else []
    count = len(curves) + bool(shares)
    columns, rows = min(4, count), math.ceil(count / 4)
    figure, grid = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.8 * rows), squeeze=False)
    places = grid.flatten()
    for axes in places[count:]:
        axes.axis("off")
    for axes, name in zip(places, curves):
        values = [row[name] for row in log]
        smooth = values if name in ("lr", "partitions") else averaged(values)
        axes.plot(steps, values, alpha=0.25)
        axes.plot(steps, smooth, "C0")
        axes.set_title({"lr": "learning rate"}.get(name, name), fontsize=10)
        axes.set_xlabel("step")
    if shares:
        last = places[count - 1]
        bars = last.bar(range(len(shares)), shares.values(), 0.6, color="C1")
        last.bar_label(bars, fmt="%.1f", fontsize=8)
        last.set_xticks(range(len(shares)), [name.replace(" ", "\n") for name in shares], fontsize=8)
        last.margins(y=0.12)
        last.set_title("accuracy at the end, %", fontsize=10)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)
