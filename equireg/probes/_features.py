"""Frozen features before a fit: standardised, whatever their scale and dtype, and split in two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.similarity import exactly


def standardizer(train: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that standardises each column by its mean and standard deviation over ``train``.

    It returns fp32, outside of any graph. A column that is constant in ``train`` becomes 0 everywhere, because a fit
    would find any weight for it.
    """
    with torch.inference_mode(False), torch.no_grad():
        exact = exactly(train)  # in fp32 the mean of a constant column is off by its last digit
        mean, std = exact.mean(0), exact.std(0, correction=0)
        varies = std > 1e-6 * exact.abs().amax(0)
        inverse = torch.where(varies, 1 / torch.where(varies, std, 1), 0)

    def standardize(part: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return ((exactly(part) - mean) * inverse).float()

    return standardize


def standardized(train: Tensor, *others: Tensor) -> list[Tensor]:
    """All of them, by the columns of ``train``."""
    standardize = standardizer(train)
    return [standardize(part) for part in (train, *others)]


def split_rows(
    check: Arguments, name: str, count: int, held_out: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows to fit, and those held out, both in random order."""
    check.number("held_out", held_out)
    if not 0 < held_out < 1:
        check.fail("held_out", "above 0 and below 1", held_out)
    size = round(held_out * count)
    if size < 2 or count - size < 2:
        check.fail(name, f"of enough rows to hold out a share of {held_out}, and to train on the rest", count)
    order = torch.randperm(count, generator=generator)
    return order[size:], order[:size]


def seeded(check: Arguments, seed: int) -> torch.Generator:
    """A generator of its own on the CPU, so that the global one does not change."""
    check.count("seed", seed, least=0)
    if seed >= 2**63:
        check.fail("seed", "below 2**63", seed)
    return torch.Generator().manual_seed(seed)


def enough_for_epochs(check: Arguments, name: str, rows: int, of: int) -> None:
    if rows < 20:  # a tenth of them choose the epoch
        check.fail(name, "of at least 20 rows for training", f"{rows} of {of}")
