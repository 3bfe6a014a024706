"""What the losses of Step 1 of IP-IRM share: the groups of a batch, and the sum over groups and partitions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equireg._agreement import Checksum, Facts
from equireg._checks import Arguments
from equireg.distributed import Group, Processes
from equireg.ipirm.partitions import PartitionUpdater
from equireg.ipirm.soft_info_nce import Rows


class PartitionLoss(nn.Module):
    """What the losses share: the groups of a batch in each partition, and the sum over groups and partitions."""

    partitions: PartitionUpdater | Tensor

    def __init__(
        self, function: str, partitions: PartitionUpdater | Tensor, weight: float, gather_distributed: bool | Group
    ):
        super().__init__()
        check = Arguments(function)
        check.not_negative("weight", weight)
        self.weight, self.function = weight, function
        self.processes, self._checksum = Processes(function, gather_distributed), Checksum()
        if isinstance(partitions, PartitionUpdater):
            self.partitions = partitions
            return
        if not isinstance(partitions, Tensor):
            check.fail_type("partitions", "a PartitionUpdater or a tensor [P, N]", type(partitions).__name__)
        check.integers("partitions", partitions, "P N")
        if partitions.numel() == 0:
            check.fail("partitions", "of at least one partition and sample", list(partitions.shape))
        for p, partition in enumerate(partitions.long()):
            sizes = partition.clamp(min=0).bincount()
            if partition.min() < 0 or (sizes == 0).any():
                got = f"groups {sorted(set(partition.tolist()))[:8]} in partition {p}"
                check.fail("partitions", "of groups 0 .. K - 1, each with a sample", got)
        self.register_buffer("partitions", partitions.long().clone(), persistent=False)  # an argument, not a state
        self._split = (partitions != partitions[:, :1]).any(1).nonzero().flatten().tolist()
        self._most = int(partitions.max()) + 1

    def groups_of(self, indices: Tensor) -> tuple[Tensor, int]:
        """The groups of a batch, int64 [P, B], in the partitions that have more than one; and how many at most."""
        table = self.partitions
        if isinstance(table, PartitionUpdater):
            return table.partitions[1:, indices], table.num_groups
        return table[self._split][:, indices], self._most

    def check_indices(self, check: Arguments, indices: Tensor) -> Tensor:
        indices = check.integers("indices", indices, "N")
        check.below("indices", indices, self._table().shape[1], "samples of the partitions")
        return indices

    def _table(self) -> Tensor:
        """The partitions, int64 [P, N]."""
        return self.partitions.partitions if isinstance(self.partitions, PartitionUpdater) else self.partitions

    def settings(self) -> dict[str, Any]:
        """The options that must be alike in every process."""
        return {"weight": self.weight}

    def facts(self) -> Facts:
        """What processes have to agree on, beside their batches."""
        table = self._table()
        return {
            "partitions": list(table.shape),
            "partitions' sum": partial(self._checksum.of, table),
            "settings": self.settings(),
        }

    def combined(self, everyone: Rows, weights: Tensor, parts: list[tuple[Rows, Tensor, int]]) -> Tensor:
        """The global term, and the mean over partitions and the groups of each that the batch has."""
        whole = torch.zeros_like(weights, dtype=torch.int64)
        sums = [
            _sums(everyone, weights, whole, 1),
            *(_sums(rows, weights, group, count) for rows, group, count in parts),
        ]
        # A penalty is the square of a mean: of all processes, not the mean of theirs.
        loss, slope, size = self.processes.total(torch.cat(sums, 1))
        there = size > 0
        size = torch.where(there, size, 1)
        of_group = loss / size + self.weight * (slope / size).square()
        combined: Tensor = of_group[0] + of_group[1:].sum() / there[1:].sum().clamp(min=1)
        return combined

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        return f"{settings}, gather_distributed={self.processes}"


def _sums(rows: Rows, weights: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sums over the rows of each group of the loss, the slope and the weight, [3, K]."""
    member = group == torch.arange(num_groups, device=group.device)[:, None]  # [K, rows]
    member = torch.where(member & rows.counted, weights, 0)
    return torch.stack([(member * rows.loss).sum(1), (member * rows.slope).sum(1), member.sum(1)])
