"""What the losses of Step 1 of IP-IRM share: the groups of a batch, and the sum over groups and partitions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equireg._agreement import Checksum, Facts
from equireg._checks import Arguments
from equireg.distributed import Group, Processes
from equireg.ipirm.partitions import PartitionUpdater
from equireg.ipirm.soft_info_nce import RowTerms, info_nce_terms
from equireg.similarity import pair_lse


class IPIRMParts(NamedTuple):
    """A loss of IP-IRM and the P partitions of K groups that it is made of, each penalty a squared slope.

    The loss is global_risk (with ``global_penalty=True`` + weight · global_penalty), and the mean of
    risk + weight · penalty over the groups present.
    """

    loss: Tensor
    global_risk: Tensor  # of all samples as one group
    global_penalty: Tensor
    risk: Tensor  # [P, K], in the partitions that have more than one group
    penalty: Tensor  # [P, K]
    present: Tensor  # bool [P, K]: the batch has samples of the group with negatives; the others count nothing

    @property
    def of_groups(self) -> tuple[Tensor, Tensor]:
        """Risk and penalty as means over the groups present, to be logged apart; 0 before there is a partition.

        With the first partition they join the loss, which so begins a new, higher curve; ``global_risk`` is the one
        that goes on.
        """
        count = self.present.sum().clamp(min=1)
        return self.risk.sum() / count, self.penalty.sum() / count


class Pairs(NamedTuple):
    """Rows, and the columns in which their negatives are: those of another sample."""

    rows: Tensor  # [rows, d], of unit length
    columns: Tensor  # [columns, d]
    positive: Tensor  # cosine similarity of each row with its positive over the temperature, [rows]
    row_ids: Tensor  # which sample it is, [rows]
    column_ids: Tensor
    temperature: float
    # Which logit a dummy scale of its own belongs to: "rank" among the row's negatives, or the "place" of the column,
    # both behind the positive; or "key", where the positive is a column as the others.
    logits: str


class PartitionLoss(nn.Module):
    """What the losses share: the groups of a batch in each partition, and the sum over groups and partitions."""

    partitions: PartitionUpdater | Tensor
    _split: Tensor

    def __init__(
        self,
        function: str,
        partitions: PartitionUpdater | Tensor,
        weight: float,
        global_penalty: bool,
        gather_distributed: bool | Group,
        dummy_scales: str = "one",
    ):
        super().__init__()
        check = Arguments(function)
        check.not_negative("weight", weight)
        check.option("global_penalty", global_penalty, (True, False))
        check.option("dummy_scales", dummy_scales, ("one", "logits"))
        self.weight, self.global_penalty, self.function = weight, global_penalty, function
        self.dummy_scales = dummy_scales
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
        several = (partitions != partitions[:, :1]).any(1)
        self.register_buffer("_split", partitions.long()[several], persistent=False)  # taken once: a step must not wait
        self._most = int(partitions.max()) + 1

    def groups_of(self, indices: Tensor) -> tuple[Tensor, int]:
        """The groups of a batch, int64 [P, B], in the partitions that have more than one; and how many at most."""
        table = self.partitions
        if isinstance(table, PartitionUpdater):
            return table.splitting[:, indices], table.num_groups
        return self._split[:, indices], self._most

    def check_indices(self, check: Arguments, indices: Tensor) -> Tensor:
        indices = check.integers("indices", indices, "N")
        check.below("indices", indices, self.table.shape[1], "samples of the partitions")
        return indices

    @property
    def table(self) -> Tensor:
        """The partitions, int64 [P, N]."""
        return self.partitions.partitions if isinstance(self.partitions, PartitionUpdater) else self.partitions

    def settings(self) -> dict[str, Any]:
        """The options that must be alike in every process."""
        return {"weight": self.weight, "global_penalty": self.global_penalty, "dummy_scales": self.dummy_scales}

    def facts(self) -> Facts:
        """What processes have to agree on, beside their batches."""
        table = self.table
        return {
            "partitions": list(table.shape),
            "partitions' sum": partial(self._checksum.of, table),
            "settings": self.settings(),
        }

    def contrasted(
        self, pairs: Pairs, row_groups: Tensor, column_groups: Tensor, num_groups: int, weights: Tensor
    ) -> IPIRMParts:
        """``combined`` of InfoNCE with negatives from all groups, and from the row's group in each partition."""
        terms = _info_nce if self.dummy_scales == "one" else _with_scale_of_each_logit
        by_partition = []
        for row_group, column_group in zip(row_groups, column_groups):
            alike = column_groups is row_groups  # then each similarity is formed once
            by_partition.append(terms(pairs, row_group, row_group if alike else column_group))
        return self.combined(terms(pairs), by_partition, row_groups, num_groups, weights)

    def combined(
        self, everyone: RowTerms, by_partition: list[RowTerms], groups: Tensor, num_groups: int, weights: Tensor
    ) -> IPIRMParts:
        """The global term, and the mean over partitions and the groups of each that the batch has.

        Args:
            everyone: of each row, among the rows of all groups.
            by_partition: of each row, among those of its group; for each of P partitions.
            groups: of each row in each partition, [P, rows].
            num_groups: K, at most.
            weights: how much each row counts, [rows].
        """
        sums = [_sums(everyone, weights, torch.zeros_like(weights, dtype=torch.int64), 1)]
        sums += [_sums(terms, weights, group, num_groups) for terms, group in zip(by_partition, groups)]
        # A penalty is the square of a mean: of all processes, not the mean of theirs.
        size, risk, slope = self.processes.total(torch.cat(sums)).tensor_split((1, 2), 1)
        present = size[:, 0] > 0
        size = torch.where(size > 0, size, 1)
        risk, penalty = (risk / size)[:, 0], (slope / size).square().sum(1)
        of_group = risk + self.weight * penalty
        of_all = of_group[0] if self.global_penalty else risk[0]
        loss = of_all + of_group[1:].sum() / present[1:].sum().clamp(min=1)
        of_groups = (part[1:].view(-1, num_groups) for part in (risk.detach(), penalty.detach(), present))
        return IPIRMParts(loss, risk[0].detach(), penalty[0].detach(), *of_groups)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        return f"{settings}, gather_distributed={self.processes}"


def _info_nce(pairs: Pairs, row_group: Tensor | None = None, column_group: Tensor | None = None) -> RowTerms:
    lse, mean = pair_lse(
        pairs.rows,
        pairs.columns,
        1 / pairs.temperature,
        relation="all" if row_group is None else "eq",
        row_group=row_group,
        col_group=column_group,
        row_id=pairs.row_ids,
        col_id=pairs.column_ids,
    )
    return info_nce_terms(lse, mean, pairs.positive)


def _with_scale_of_each_logit(
    pairs: Pairs, row_group: Tensor | None = None, column_group: Tensor | None = None
) -> RowTerms:
    """The terms of ``_info_nce``, with the slope in a scale of each logit; these are stored, [rows, columns]."""
    terms = _info_nce(pairs, row_group, column_group)
    with torch.autocast(pairs.rows.device.type, enabled=False):
        similarity = pairs.rows @ pairs.columns.T / pairs.temperature
    own = pairs.row_ids[:, None] == pairs.column_ids
    negative = ~own
    if row_group is not None and column_group is not None:
        negative = negative & (row_group[:, None] == column_group)
    logits = torch.cat([pairs.positive[:, None], similarity.masked_fill(~negative, -math.inf)], 1)
    share = logits.softmax(1)[:, 1:]
    slope, of_positive = share * similarity, -share.sum(1, keepdim=True) * pairs.positive[:, None]
    if pairs.logits == "key":
        return terms._replace(slope=slope + torch.where(own, of_positive, 0))
    if pairs.logits == "rank":
        rank = (negative.cumsum(1) - 1).clamp(min=0)
        slope = torch.zeros_like(slope).scatter_add(1, rank, slope)
    return terms._replace(slope=torch.cat([of_positive, slope], 1))


def _sums(terms: RowTerms, weights: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sums over the rows of each group of the weight, the loss and the slopes, [K, 2 + C]."""
    member = group == torch.arange(num_groups, device=group.device)[:, None]  # [K, rows]
    member = torch.where(member & terms.counted, weights, 0)[..., None]
    each = torch.cat([part.reshape(len(weights), -1) for part in (terms.loss, terms.slope)], 1)  # [rows, 1 + C]
    return torch.cat([member.sum(1), (member * each).sum(1)], 1)
