"""What the automatic choice and the kernels follow, written from the rows of ``python -m tests.benchmarks gpu``."""

import json
from pathlib import Path
from typing import Any

import equireg.similarity
from tests.benchmarks.measure import Row

PATH = Path(equireg.similarity.__file__).with_name("choice.json")
KERNELS = "pair_lse, triton"
GAIN = 1.05  # the kernels have to win by more than the noise


def fastest(rows: list[Row]) -> list[Row]:
    """For each kind of problem the faster streamed form: kernels where they win at every size without them."""
    seconds: dict[tuple[str, str, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        if "learns" in row and "seconds" in row:
            kind = row["learns"], row["precision"], row["width"]
            form = row["version"].split(", ")[-1]
            seconds.setdefault(kind, {}).setdefault(row["size"], {})[form] = row["seconds"]
    found = []
    for (learns, precision, width), by_size in seconds.items():
        compared = [times for times in by_size.values() if "chunked" in times]
        if compared:
            faster = all("triton" in times and GAIN * times["triton"] < times["chunked"] for times in compared)
            backend = "triton" if faster else "chunked"
            found.append({"learns": learns, "precision": precision, "width": width, "backend": backend})
    return found


def fastest_tiles(rows: list[Row]) -> list[Row]:
    """For each kernel and width the fastest tile."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        if "tile" in row and "seconds" in row:
            kernel = row["role"], row["width"]
            if kernel not in best or row["seconds"] < best[kernel]["seconds"]:
                best[kernel] = row
    return [{"role": role, "size": 2, "width": width, "tile": row["tile"]} for (role, width), row in best.items()]


def write(rows: list[Row], about: dict[str, Any], path: Path = PATH) -> None:
    """What was found of this card in the place of what it had; ``about`` has its name, capability and the date.

    What this run did not measure stays as it was.
    """
    cards = {card["card"]: card for card in json.loads(path.read_text())}
    old = cards.get(about["card"], {"rows": [], "tiles": []})
    cards[about["card"]] = {**about, "rows": fastest(rows) or old["rows"], "tiles": fastest_tiles(rows) or old["tiles"]}
    blocks = []
    for _, card in sorted(cards.items()):
        head = json.dumps({key: value for key, value in card.items() if key not in ("rows", "tiles")})
        parts = {name: ",\n".join("  " + json.dumps(row) for row in card[name]) for name in ("rows", "tiles")}
        blocks.append(head[:-1] + "".join(f', "{name}": [\n{lines}\n]' for name, lines in parts.items()) + "}")
    path.write_text("[\n" + ",\n".join(blocks) + "\n]\n")
