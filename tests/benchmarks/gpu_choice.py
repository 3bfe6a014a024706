"""What the automatic choice of ``pair_lse`` follows, written from the rows of ``python -m tests.benchmarks gpu``."""

import json
from pathlib import Path
from typing import Any

import equireg.similarity
from tests.benchmarks.measure import Row

PATH = Path(equireg.similarity.__file__).with_name("choice.json")
CHUNKED, KERNELS = "pair_lse, chunked", "pair_lse, triton"
GAIN = 1.05  # the kernels have to win by more than the noise


def fastest(rows: list[Row]) -> list[Row]:
    """For each kind of problem the faster streamed form, at the largest size where ``chunked`` was measured."""
    seconds: dict[tuple[str, str, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        if "learns" in row and "seconds" in row:
            kind = row["learns"], row["precision"], row["width"]
            seconds.setdefault(kind, {}).setdefault(row["size"], {})[row["version"]] = row["seconds"]
    found = []
    for (learns, precision, width), by_size in seconds.items():
        compared = [size for size, times in by_size.items() if CHUNKED in times]
        if compared:
            times = by_size[max(compared)]
            faster = KERNELS in times and GAIN * times[KERNELS] < times[CHUNKED]
            backend = "triton" if faster else "chunked"
            found.append({"learns": learns, "precision": precision, "width": width, "backend": backend})
    return found


def write(rows: list[Row], about: dict[str, Any], path: Path = PATH) -> None:
    """The rows of this card in the place of its older ones; ``about`` has its name, capability and the date."""
    cards = [card for card in json.loads(path.read_text()) if card["card"] != about["card"]]
    cards.append({**about, "rows": fastest(rows)})
    blocks = []
    for card in sorted(cards, key=lambda card: str(card["card"])):
        head = json.dumps({key: value for key, value in card.items() if key != "rows"})
        lines = ",\n".join("  " + json.dumps(row) for row in card["rows"])
        blocks.append(f'{head[:-1]}, "rows": [\n{lines}\n]}}')
    path.write_text("[\n" + ",\n".join(blocks) + "\n]\n")
