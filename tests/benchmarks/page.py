"""The tables of docs/benchmarks.md, made from the record; they stand between two marks, the prose around them stays."""

import textwrap
from pathlib import Path
from typing import Any

from tests.benchmarks.pictures import picture_of
from tests.benchmarks.record import DEVICES, TITLES, Group

BEGIN, END = "<!-- results: written by python -m tests.benchmarks -->", "<!-- end of results -->"


def written(page: str, groups: list[Group], folder: Path) -> str:
    """The page with its tables made anew. ``folder`` is where it and its pictures lie."""
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n\n{results(groups, folder)}\n{END}{after}"


def results(groups: list[Group], folder: Path) -> str:
    parts = []
    for device, where in DEVICES.items():
        found = [group for group in groups if group["device"] == device]
        parts.append(f"## {where}\n")
        missing = [TITLES[name] for name in TITLES if name not in {group["benchmark"] for group in found}]
        missing = [title for title in missing if device == "cuda" or title != TITLES["gpu"]]
        if not found:
            parts.append(_wrapped(f"Not measured {where[0].lower()}{where[1:]} yet."))
            continue
        for group in found:
            parts.append(_section(group, folder))
        if missing:
            parts.append(_wrapped(f"Not measured yet: {', '.join(missing)}."))
    return "\n".join(parts)


def _section(group: Group, folder: Path) -> str:
    note = f"; {group['note']}" if group.get("note") else ""
    parts = [f"### {TITLES[group['benchmark']]}\n", _wrapped(f"{group['machine']}; {group['date']}{note}.")]
    picture = picture_of(group, folder)
    if picture.exists():
        parts.append(f"![{TITLES[group['benchmark']]}: cost against size, both axes logarithmic]({picture.name})\n")
    for work in dict.fromkeys(row["work"] for row in group["rows"]):
        rows = [row for row in group["rows"] if row["work"] == work]
        measured = [row for row in rows if any(key in row for key in QUANTITIES)]
        judged = [row for row in rows if "verdict" in row]
        tables = _by_size(rows) if any("size" in row for row in rows) else [_by_quantity(rows)] if measured else []
        parts += [f"**{_below(TITLES[group['benchmark']], work)}**\n", *tables]
        parts += ["\n".join(f"- {row['version']}: {row['verdict']}." for row in judged) + "\n"] if judged else []
        parts += _left_out(rows)
    return "\n".join(parts)


def _left_out(rows: list[dict[str, Any]]) -> list[str]:
    """What was not measured and why, a line for each version and reason."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "not_measured" in row:
            size = [f"{row['size']:,}"] if "size" in row else []
            sizes.setdefault((row["version"], row["not_measured"]), []).extend(size)
    lines = []
    for (version, reason), found in sizes.items():
        at = f" with {', '.join(found)} {rows[0]['unit']}" if found else ""
        lines.append(_wrapped(f"Not measured: {version}{at} ({reason.rstrip('.')})."))
    return lines


def _below(title: str, work: str) -> str:
    """The name of a work without the title that it stands below."""
    rest = work.removeprefix(title).lstrip(" ,")
    return rest[0].upper() + rest[1:]


QUANTITIES = {
    "seconds": "time",
    "cpu_seconds": "processor time",
    "megabytes": "peak extra memory",
    "parameters": "parameters",
    "flops": "FLOPs",
    "rate": "rate (of the ceiling)",
}
BETTER = {"seconds": "faster", "cpu_seconds": "less", "megabytes": "less", "flops": "as many", "rate": "of the ceiling"}


def _by_quantity(rows: list[dict[str, Any]]) -> str:
    """A version a line, a quantity a column, and beside it the ratio to the first version."""
    shown = {key: next(row for row in rows if key in row) for key in QUANTITIES if any(key in row for row in rows)}
    header = ["version"]
    for key in shown:
        compared = key in BETTER and sum(key in row for row in rows) > 1
        header += [QUANTITIES[key], BETTER[key]] if compared else [QUANTITIES[key]]
    lines = []
    for row in rows:
        if "not_measured" in row:
            continue
        cells = [row["version"]]
        for key, first in shown.items():
            cells.append(_quantity(key, row[key]) if key in row else "")
            if key in BETTER and BETTER[key] in header:
                cells.append(_ratio(key, row, first))
        lines.append(cells)
    return _table(header, lines)


def _by_size(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each quantity: a version a line, a size a column."""
    sizes = sorted({row["size"] for row in rows})
    tables = []
    for key in [key for key in QUANTITIES if any(key in row for row in rows)]:
        first, lines = next(row["version"] for row in rows if key in row), []
        for version in dict.fromkeys(row["version"] for row in rows if key in row):
            cells = [version]
            for size in sizes:
                measured = {row["version"]: row for row in rows if row["size"] == size and key in row}
                if version not in measured:
                    cells.append("–")
                    continue
                ratio = _ratio(key, measured[version], measured.get(first))
                cells.append(_quantity(key, measured[version][key]) + (f" ({ratio})" if ratio else ""))
            lines.append(cells)
        tables.append(_table([QUANTITIES[key], *(f"{size:,} {rows[0]['unit']}" for size in sizes)], lines))
    return tables


def _ratio(key: str, row: dict[str, Any], first: dict[str, Any] | None) -> str:
    """How many times less than the first version; of FLOPs, how many times as many; of a rate, its share."""
    if key == "rate" and key in row:
        return f"{row['of_ceiling']:.0%}"
    if key not in BETTER or key not in row or row is first or first is None or row[key] <= 0:
        return ""
    if key == "flops":
        return f"{row[key] / first[key]:.4f}×"
    ratio = first[key] / row[key]
    if ratio < 0.0995:
        return f"{ratio:.1g}×"
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{ratio:.0f}×"


def _quantity(key: str, value: float) -> str:
    if key == "megabytes":
        return f"{value:,.0f} MB"
    if key == "parameters":
        return f"{value / 1e6:,.3f} M"
    if key == "flops":
        return f"{value / 1e12:,.2f} TFLOP" if value >= 5e11 else f"{value / 1e9:,.3f} GFLOP"
    if key == "rate":
        return f"{_digits(value / 1e12)} TFLOP/s"
    return f"{_digits(1e3 * value)} ms" if value < 1 else f"{_digits(value)} s"


def _digits(value: float) -> str:
    """Three figures, but none before the point lost."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def line(row: dict[str, Any]) -> str:
    """A row as it is printed while the benchmark runs."""
    size = f"{row['size']:,} {row['unit']}" if "size" in row else ""
    found = [_quantity(key, row[key]) for key in QUANTITIES if key in row]
    if "not_measured" in row:
        found = [f"not measured: {row['not_measured']}"]
    if "verdict" in row:
        found = [row["verdict"]]
    return f"  {row['version']:<44}{size:>16}  " + ", ".join(found)


def _table(header: list[str], lines: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *lines)) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 125, break_long_words=False, break_on_hyphens=False) + "\n"
