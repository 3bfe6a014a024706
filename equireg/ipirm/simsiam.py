"""IP-IRM on SimSiam."""

from __future__ import annotations

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.distributed import Group
from equireg.ipirm.partition_loss import IPIRMParts, PartitionLoss
from equireg.ipirm.partitions import PartitionUpdater
from equireg.ipirm.soft_info_nce import RowTerms
from equireg.similarity import normalized

__all__ = ["SimSiamIPIRMLoss"]


class SimSiamIPIRMLoss(PartitionLoss):
    r"""SimSiam's loss that is invariant over the groups of all partitions, as :class:`IPIRMLoss` is for SimCLR.

    .. math:: L(k, P) = -\tfrac{\theta}{2} \operatorname*{mean}_{i \in k} \big( \cos(p_{1i}, z_{2i}) +
        \cos(p_{2i}, z_{1i}) \big), \qquad \theta = 1

    so that the slope in the dummy scale is the loss itself. No gradient passes into z.

    Args:
        partitions: as of :class:`IPIRMLoss`.
        weight: λ₁ of the squared slopes, at least 0.
        global_penalty: as of :class:`IPIRMLoss`.
        gather_distributed: as of :class:`IPIRMLoss`, though processes exchange only the sums of each group. By default
            each takes its own batch.

    The call is ``loss(p1, p2, z1, z2, indices)``: predictions and projections of both views, [B, d].

    Raises:
        TypeError, ValueError: as :class:`IPIRMLoss`.

    Example:
        >>> criterion = SimSiamIPIRMLoss(torch.arange(100)[None] % 2)
        >>> p1, p2, z1, z2 = torch.ones(4, 16, 8)
        >>> criterion(p1, p2, z1, z2, torch.arange(16))
        tensor(-1.8000)
    """

    def __init__(
        self,
        partitions: PartitionUpdater | Tensor,
        *,
        weight: float = 0.2,
        global_penalty: bool = False,
        gather_distributed: bool | Group = False,
    ):
        super().__init__("SimSiamIPIRMLoss", partitions, weight, global_penalty, gather_distributed)

    def forward(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, indices: Tensor) -> Tensor:
        return self.parts(p1, p2, z1, z2, indices).loss

    def parts(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, indices: Tensor) -> IPIRMParts:
        """The loss and, detached, the risk and penalty of all samples and of each group in each partition."""
        with self.processes.alike() as facts:
            indices = self._check({"p1": p1, "p2": p2, "z1": z1, "z2": z2}, indices)
            facts.update({"p1": p1, "p2": p2, **self.facts()})
        q1, q2, x1, x2 = normalized(p1), normalized(p2), normalized(z1.detach()), normalized(z2.detach())
        loss = -((q1 * x2).sum(1) + (q2 * x1).sum(1)) / 2
        terms = RowTerms(loss, slope=loss, counted=torch.ones_like(loss, dtype=torch.bool))
        groups, num_groups = self.groups_of(indices)
        return self.combined(terms, [terms] * len(groups), groups, num_groups, torch.ones_like(loss))

    def _check(self, views: dict[str, Tensor], indices: Tensor) -> Tensor:
        check = Arguments(self.function).beside(self, self.table)
        check.alike(**{name: (view, "N d") for name, view in views.items()})
        if views["p1"].numel() == 0:
            check.fail("p1", "of at least one sample and one feature", list(views["p1"].shape))
        return self.check_indices(check, indices)
