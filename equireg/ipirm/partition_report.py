"""What an update of the partitions found, and how reports are kept in a ``state_dict``."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["PartitionReport"]


class PartitionReport(NamedTuple):
    """What one update of the partitions found; print it for a line."""

    objective: float  # sum over groups of loss + weight · slope², less the balance term: what was maximised
    loss: float  # sum over groups
    penalty: float  # sum over groups of slope²
    balance: float  # the term that was taken off
    passes: int
    group_sizes: tuple[int, ...]
    agreement: tuple[float, ...]  # adjusted Rand index with each partition then in the set: 1 the same, 0 chance
    collapsed: bool

    @property
    def at_the_bound(self) -> bool:
        """Whether a group is twice another, within 2%, so that ``balance``, not the features, decided the sizes.

        Without ``balance`` it only says that they are that unequal. The partition may still tell something apart, of
        which one side is rarer than a third.
        """
        return 2 * min(self.group_sizes) <= 1.02 * max(self.group_sizes)

    def __str__(self) -> str:
        sizes = " + ".join(map(str, self.group_sizes))
        bound = ", the group collapsed" if self.collapsed else ", at the bound of 2 : 1" if self.at_the_bound else ""
        agreement = ", ".join(f"{index:.2f}" for index in self.agreement[1:]) or "no earlier one"
        return (
            f"groups of {sizes} samples{bound}; objective {self.objective:.2f} (losses {self.loss:.2f}, squared slopes "
            f"{self.penalty:.3f}) after {self.passes} passes; adjusted Rand index with {agreement}"
        )


def as_bytes(num_groups: int, reports: list[PartitionReport]) -> Tensor:
    """The number of groups and the reports, JSON in uint8: accelerate saves tensors alone."""
    told = {"num_groups": int(num_groups), "reports": [report._asdict() for report in reports]}
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


def from_bytes(state: Tensor | dict[str, Any]) -> tuple[int, list[PartitionReport]]:
    """Both again; 0.1.0 saved them as a dictionary."""
    told = state if isinstance(state, dict) else json.loads(bytes(state.tolist()))
    tuples = ("group_sizes", "agreement")  # lists in JSON
    reports = [report | {name: tuple(report[name]) for name in tuples} for report in told["reports"]]
    return told["num_groups"], [PartitionReport(**report) for report in reports]
