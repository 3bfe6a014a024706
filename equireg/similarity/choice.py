"""Which form of ``pair_lse`` serves where none is asked for: by size, and on a GPU by what was measured on GPUs.

Of each kind of problem ``cards.py`` has the faster of the streamed forms, by what learns, the precision and the width.
``mean_contrast`` is a kind of its own, as its form ``"at once"`` needs fewer products. Without a measurement nothing
chooses the kernels.
"""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.similarity import cards
from equireg.similarity.cards import Measured, of_nearest_card
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
TABLE = cards.FORMS


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
    row = _row("features" if backend == FEATURES else "weights", problem.x, problem.col_weight, problem.row_select)
    return _told_once("chunked", problem.x, LARGE) if row is None else _told_once(row.backend, problem.x, _why(row))


def of_contrast(x: Tensor, few: bool) -> str:
    """The form of ``mean_contrast`` for rows like ``x``: ``"triton"`` where it was measured to be faster.

    Otherwise ``"at once"`` where the tiles of its rows are ``few`` enough to be kept, else ``"chunked"``.
    """
    row = _row("contrast", x, None, None) if x.device.type == "cuda" and TABLE else None
    if row is not None and row.backend == "triton":
        form, why = row.backend, _why(row)
    else:
        form, why = ("at once", "its tiles are few") if few else ("chunked", LARGE)
    return _told_once(form, x, why, "mean_contrast")


def _row(learns: str, x: Tensor, col_weight: Tensor | None, row_select: Tensor | None) -> Measured | None:
    """What was measured of such a problem on the nearest card; None if nothing was, or a form that cannot serve."""
    row = nearest(of_nearest_card(TABLE, *cards.here(x.device)), learns, precision_of(x), x.shape[1])
    if row is not None and row.backend == "triton" and refusal(x, col_weight, row_select) is not None:
        return None
    return row


def _why(row: Measured) -> str:
    return f"measured on {row.card}, {row.date}: {row.learns}, D = {row.width}"


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


def _told_once(form: str, x: Tensor, why: str, of: str = "pair_lse") -> str:
    if not torch.compiler.is_compiling():
        kind = (of, form, x.device.type, str(x.dtype), why)
        if kind not in _told:
            _told.add(kind)
            _log.info("%s: %s on %s for %s (%s)", *kind)
    return form
