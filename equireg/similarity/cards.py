"""What was measured on GPUs: the fastest forms, and the fastest tiles of the kernels.

``choice.json`` is written by ``python -m tests.benchmarks gpu``, card by card and with the date, and is committed, so
that nothing is tried out at run time. A card that is not there follows the nearest one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch


class Measured(NamedTuple):
    """The faster streamed form of one kind of problem on one card."""

    card: str
    capability: tuple[int, int]
    date: str
    learns: str  # "features"; "weights": the features get no gradient; or "contrast": those of mean_contrast
    precision: str  # "bf16" (fp16 too), "tf32" or "fp32"
    width: int
    backend: str  # "chunked" or "triton"


class Tuned(NamedTuple):
    """The fastest tile of one kernel on one card."""

    card: str
    capability: tuple[int, int]
    date: str
    role: str  # what the kernel sums, as in tiles.py
    size: int  # bytes of a number
    width: int  # a power of two
    tile: tuple[int, ...]  # as tiles.Tile


Row = TypeVar("Row", Measured, Tuned)


def read(path: Path) -> tuple[tuple[Measured, ...], tuple[Tuned, ...]]:
    """What a file of the form of ``choice.json`` says: a list of cards, each with its rows and its tiles."""
    cards = [((card["card"], tuple(card["capability"]), card["date"]), card) for card in json.loads(path.read_text())]
    rows = tuple(Measured(*about, **row) for about, card in cards for row in card["rows"])
    tiles = (Tuned(*about, **{**row, "tile": tuple(row["tile"])}) for about, card in cards for row in card["tiles"])
    return rows, tuple(tiles)


FORMS, TILES = read(Path(__file__).with_name("choice.json"))


def here(device: torch.device) -> tuple[str, tuple[int, int]]:
    """The name of the card and its compute capability."""
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def of_nearest_card(table: tuple[Row, ...], name: str, capability: tuple[int, int]) -> tuple[Row, ...]:
    """The rows of this card, or of the nearest in compute capability and then in the words of its name."""

    def distance(row: Row) -> tuple[bool, int, int, int, str]:
        major, minor = (abs(one - other) for one, other in zip(row.capability, capability))
        return row.card != name, major, minor, -len({*row.card.split()} & {*name.split()}), row.card

    card = min(table, key=distance).card
    return tuple(row for row in table if row.card == card)
