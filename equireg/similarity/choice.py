"""Which form of ``pair_lse`` serves where none is asked for: by size, and on a GPU by what was measured on GPUs.

``choice.json`` is written by ``python -m tests.benchmarks gpu``: for each card, with its date, the faster of the
streamed forms by what learns, the precision and the width. A card that is not there follows the nearest one. Without
a measurement nothing chooses the kernels.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.similarity.dense import Problem
from equireg.similarity.products import matmul_precision
from equireg.similarity.triton.launch import refusal

BACKENDS = ("dense", "chunked", "triton")
FEATURES, WEIGHTS = "as measured for features", "as measured for weights"  # that learn
VARIABLE, LARGE = "EQUIREG_BACKEND", "the matrix is large"
# Below this many entries of the matrix, storing it is faster than streaming it.
_DENSE_ENTRIES = 2**15

_log = logging.getLogger("equireg")
_told: set[tuple[str, ...]] = set()


class Measured(NamedTuple):
    """The faster streamed form of one kind of problem on one card."""

    card: str
    capability: tuple[int, int]
    date: str
    learns: str  # "features", or "weights": the features get no gradient
    precision: str  # "bf16" (fp16 too), "tf32" or "fp32"
    width: int
    backend: str


def read(path: Path) -> tuple[Measured, ...]:
    """What a file of the form of ``choice.json`` says: a list of cards, each with its rows."""
    cards = json.loads(path.read_text())
    return tuple(
        Measured(card["card"], tuple(card["capability"]), card["date"], **row) for card in cards for row in card["rows"]
    )


TABLE = read(Path(__file__).with_name("choice.json"))


def override() -> str | None:
    """The form that the environment asks for, for all calls that do not."""
    asked = os.environ.get(VARIABLE) or None
    Arguments("pair_lse").option(VARIABLE, asked, (None, *BACKENDS))
    return asked


def chosen(x: Tensor, y: Tensor) -> str:
    """The form for these rows and columns, one of ``BACKENDS`` or one that :func:`measured` resolves.

    What was chosen is told once for each kind to the logger ``equireg``, at INFO.
    """
    asked = override()
    if asked is not None:
        return _told_once(asked, x, f"{VARIABLE} asks for it")
    if len(x) * len(y) <= _DENSE_ENTRIES:
        return _told_once("dense", x, "the matrix is small")
    if x.device.type == "cuda" and TABLE:
        return FEATURES if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad) else WEIGHTS
    return _told_once("chunked", x, LARGE)


def measured(backend: str, problem: Problem) -> str:
    """The form that the table names where :func:`chosen` left it to the table; called where nothing is traced."""
    if backend not in (FEATURES, WEIGHTS):
        return backend
    x = problem.x
    card = torch.cuda.get_device_name(x.device), torch.cuda.get_device_capability(x.device)
    learns = "features" if backend == FEATURES else "weights"
    row = nearest(of_nearest_card(TABLE, *card), learns, precision_of(x), x.shape[1])
    if row is None or (row.backend == "triton" and refusal(x, problem.col_weight, problem.row_select) is not None):
        return _told_once("chunked", x, LARGE)
    return _told_once(row.backend, x, f"measured on {row.card}, {row.date}: {row.learns} learn, D = {row.width}")


def of_nearest_card(table: tuple[Measured, ...], name: str, capability: tuple[int, int]) -> tuple[Measured, ...]:
    """The rows of this card, or of the nearest in compute capability and then in the words of its name."""

    def distance(row: Measured) -> tuple[bool, int, int, int, str]:
        major, minor = (abs(one - other) for one, other in zip(row.capability, capability))
        return row.card != name, major, minor, -len({*row.card.split()} & {*name.split()}), row.card

    card = min(table, key=distance).card
    return tuple(row for row in table if row.card == card)


def nearest(rows: tuple[Measured, ...], learns: str, precision: str, width: int) -> Measured | None:
    """The row of this kind whose width has the smallest ratio to ``width``; None where the kind was not measured."""
    alike = [row for row in rows if row.learns == learns and row.precision == precision]
    return min(alike, key=lambda row: max(row.width, width) / min(row.width, width), default=None)


def precision_of(x: Tensor) -> str:
    """In which precision products of the features are formed, as the table calls it."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return "bf16"
    if x.dtype == torch.float64:
        return "fp64"
    return {"highest": "fp32", "high": "tf32", "medium": "bf16"}[matmul_precision(x.device.type)]


def _told_once(backend: str, x: Tensor, why: str) -> str:
    if not torch.compiler.is_compiling():
        kind = (backend, x.device.type, str(x.dtype), why)
        if kind not in _told:
            _told.add(kind)
            _log.info("pair_lse: %s on %s for %s (%s)", *kind)
    return backend
