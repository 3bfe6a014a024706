"""IP-IRM on SimCLR: a contrastive loss that is to be the same in every group of every partition (Step 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equireg._checks import Arguments, values_visible
from equireg.distributed import Group
from equireg.ipirm.partition_loss import IPIRMParts, Pairs, PartitionLoss
from equireg.ipirm.partitions import PartitionUpdater
from equireg.ipirm.soft_info_nce import check_views
from equireg.similarity import accumulation_dtype, normalized

__all__ = ["IPIRMLoss", "mix_images"]


class IPIRMLoss(PartitionLoss):
    r"""SimCLR's loss that is invariant over the groups of all partitions found so far (Step 1 of IP-IRM).

    .. math::
        L(\text{all}) + \operatorname*{mean}_{P,\, k} \Big[ L(k, P) +
        \lambda_1 \Big( \frac{\partial L(k, P)}{\partial \theta} \Big|_{\theta = 1} \Big)^2 \Big]

    with L(k, P) InfoNCE over both views of the samples of group k in the batch, whose negatives are the group's other
    samples, and θ a dummy scale of all similarities (Wang et al., 2021, Eq. 2; the mean over groups and partitions and
    the global term beside it are the released code's). The slope has a closed form, so nothing is differentiated twice.

    Args:
        partitions: a :class:`PartitionUpdater`, followed as it grows, or int64 [P, N] of groups 0 .. K - 1. A partition
            of one group, as the first of the updater's is, is the global term, which is there in any case.
        temperature: τ of the cosine similarities, above 0.
        weight: λ₁ of the squared slopes, at least 0.
        global_penalty: whether the global term has its penalty, too. The paper sums over all partitions, the first one
            of all samples among them, and penalises each. With the released code's mean instead of the sum, a
            penalised global term outweighs the rest; there it has none.
        dummy_scales: "one" θ of all similarities, as the paper has it, whose slope is a sum over the logits of a row
            before it is squared; or "logits" for one of each, as the released code: the penalty is then the sum of the
            squared slopes, each a mean over rows. A scale belongs to the positive of all rows, or to their j-th
            negative; with ``mix``, to a key. It stores the similarities of the batch.
        gather_distributed: whether the batch is that of all processes, or of a process group, each with its gradient:
            the loss is then the same in all of them, and under DistributedDataParallel so are its gradients to one
            process with the whole batch. Each must bring the same number of samples, or all raise the same ValueError.
            By default each process takes its own batch.

    The call ``loss(z1 [B, d], z2 [B, d], indices [B], mix=None)`` takes features of two views, normalised here, and the
    index of each sample in the dataset; it returns a 0-d tensor in float32 (float64 for float64). A group with fewer
    than two samples in the batch has no negatives and is left out, as is a row without negatives. With ``mix =
    (partner, share)`` the first views are mixed images, ``share * x[i] + (1 - share) * x[partner[i]]``
    (``mix_images``): each is an anchor for both its samples, by their shares, against the second views alone.

    Raises:
        TypeError, ValueError: wrong types, shapes or ranges; a group without a sample; on CPU also indices out of
            range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> partitions = torch.stack([torch.zeros(100, dtype=torch.int64), torch.arange(100) % 2])
        >>> criterion = IPIRMLoss(partitions)
        >>> z1, z2, indices = torch.randn(16, 8), torch.randn(16, 8), torch.randperm(100)[:16]
        >>> loss = criterion(z1, z2, indices)
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        partitions: PartitionUpdater | Tensor,
        *,
        temperature: float = 0.5,
        weight: float = 0.2,
        global_penalty: bool = False,
        dummy_scales: str = "one",
        gather_distributed: bool | Group = False,
    ):
        super().__init__("IPIRMLoss", partitions, weight, global_penalty, gather_distributed, dummy_scales)
        Arguments("IPIRMLoss").positive("temperature", temperature)
        self.temperature = temperature

    def forward(
        self, z1: Tensor, z2: Tensor, indices: Tensor, mix: tuple[Tensor, float | Tensor] | None = None
    ) -> Tensor:
        return self.parts(z1, z2, indices, mix).loss

    def parts(
        self, z1: Tensor, z2: Tensor, indices: Tensor, mix: tuple[Tensor, float | Tensor] | None = None
    ) -> IPIRMParts:
        """The loss and, detached, the risk and penalty of all samples and of each group in each partition."""
        with self.processes.alike() as facts:
            check = Arguments(self.function).beside(self, self.table)
            check_views(check, z1, z2, self.temperature)
            indices = self.check_indices(check, indices)
            mixed = None if mix is None else _check_mix(check, mix, z1)
            facts.update({"z1": z1, "z2": z2, "mix": mixed and mixed[1], **self.facts()})
        pairs, weights = self._pairs(normalized(z1), normalized(z2), mixed)
        groups, num_groups = self.groups_of(self.processes.gather(indices).flatten())
        row_groups = groups[:, pairs.row_ids]
        column_groups = row_groups if pairs.column_ids is pairs.row_ids else groups[:, pairs.column_ids]
        return self.contrasted(pairs, row_groups, column_groups, num_groups, weights)

    def _pairs(self, x1: Tensor, x2: Tensor, mixed: tuple[Tensor, Tensor] | None) -> tuple[Pairs, Tensor]:
        """The pairs of all processes that have their rows in this one, and how much each row counts."""
        size, views = self.processes.size, torch.stack([x1, x2])
        all_views = self.processes.gather(views).transpose(0, 1).flatten(1, 2)  # [2, processes · N, d]
        samples = torch.arange(size * len(x1), device=x1.device)
        mine = samples.view(size, -1)[self.processes.rank]
        if mixed is None:
            rows, ids = views.flatten(0, 1), mine.repeat(2)
            # One tensor for both where they are the same: then each similarity is formed once.
            columns, column_ids = (rows, ids) if size == 1 else (all_views.flatten(0, 1), samples.repeat(2))
            positive = ((x1 * x2).sum(1) / self.temperature).repeat(2)
            pairs = Pairs(rows, columns, positive, ids, column_ids, self.temperature, "rank")
            return pairs, torch.ones_like(positive)
        partner, share = mixed
        # Each mixed image twice, as either of the samples that it is made of.
        rows, columns, ids = x1.repeat(2, 1), all_views[1], torch.cat([mine, mine[partner]])
        positive = (rows * columns[ids]).sum(1) / self.temperature
        pairs = Pairs(rows, columns, positive, ids, samples, self.temperature, "key")
        return pairs, torch.cat([share, 1 - share])

    def settings(self) -> dict[str, Any]:
        return {"temperature": self.temperature, **super().settings()}


def mix_images(
    images: Tensor,
    *,
    alpha: float = 1.0,
    groups: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Each image mixed with another of the batch (mixup, Zhang et al., 2018), for ``IPIRMLoss(..., mix=...)``.

    .. math:: \lambda_i x_i + (1 - \lambda_i) x_{\text{partner}(i)}, \qquad \lambda_i \sim \text{Beta}(\alpha, \alpha)

    Args:
        images: [B, ...], floating point.
        alpha: of the Beta distribution, above 0.
        groups: whole numbers [P, B] or [B]; partners are then of one group, in each of P partitions. The released code
            mixes and encodes the batch anew for each partition, within its groups, and once more across them for the
            global term; here one pass of the encoder serves all. None mixes across groups, and a mixed image counts in
            the group of either sample.
        generator: source of the partners and shares, on the CPU; None draws from the global one.

    Returns:
        mixed images [B, ...], partner int64 [B], share of its own image [B].

    Raises:
        TypeError, ValueError: images that are not floating point, an alpha that is not above 0, groups that are not of
            the batch.

    Example:
        >>> mixed, partner, share = mix_images(torch.rand(8, 3, 32, 32))
        >>> mixed.shape, partner.shape, share.shape
        (torch.Size([8, 3, 32, 32]), torch.Size([8]), torch.Size([8]))
    """
    check = Arguments("mix_images")
    check.floats("images", images)
    check.positive("alpha", alpha)
    if images.dim() == 0:
        check.fail("images", "[B, ...]", [])
    partner = torch.randperm(len(images), generator=generator)
    if groups is not None:
        check.sizes["B"] = len(images)
        several = isinstance(groups, Tensor) and groups.dim() == 2
        table = check.integers("groups", groups, "P B" if several else "B").cpu()
        table = table if several else table[None]
        cells = table.unique(dim=1, return_inverse=True)[1] if len(table) else torch.zeros_like(partner)
        # Both orders list one cell after the other; the second has each cell shuffled.
        shuffled = partner[cells[partner].argsort(stable=True)]
        partner = torch.empty_like(partner).index_copy(0, cells.argsort(stable=True), shuffled)
    # A Beta variate is a share of two Gamma variates, and of those a small alpha leaves only the logarithms:
    # log G(a) = log G(a + 1) + log(U) / a. PyTorch's own sampler of Beta takes no generator.
    shape = torch.full((2, len(images)), float(alpha), dtype=torch.float64)
    uniform = 1 - torch.rand(shape.shape, dtype=torch.float64, generator=generator)
    log_gamma = torch._standard_gamma(shape + 1, generator=generator).log() + uniform.log() / alpha
    share = (log_gamma[0] - log_gamma[1]).sigmoid().to(images.device, images.dtype)
    partner, share_of = partner.to(images.device), share.view(-1, *[1] * (images.dim() - 1))
    return torch.lerp(images[partner], images, share_of), partner, share


def _check_mix(check: Arguments, mix: tuple[Tensor, float | Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Partner and share of each row of ``z``, [N]."""
    if not isinstance(mix, tuple) or len(mix) != 2:
        got = f"{len(mix)} parts" if isinstance(mix, tuple) else type(mix).__name__
        check.fail("mix", "(partner, share) or None", got)
    partner = check.integers("mix's partner", mix[0], "N")
    check.below("mix's partner", partner, len(z), "the batch")
    exact = accumulation_dtype(z.dtype)
    if isinstance(mix[1], Tensor):
        share = check.features("mix's share", mix[1], "N").to(exact)
        if values_visible(share) and not bool(((share >= 0) & (share <= 1)).all()):
            low, high = (float(bound) for bound in share.detach().aminmax())
            check.fail("mix's share", "in 0 .. 1", f"{low:g} .. {high:g}")
    else:
        check.share("mix's share", mix[1])
        share = z.new_full((len(z),), float(mix[1]), dtype=exact)
    return partner, share
