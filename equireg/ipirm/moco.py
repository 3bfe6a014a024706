"""IP-IRM on MoCo-v2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg.distributed import Group
from equireg.ipirm.partition_loss import IPIRMParts, Pairs, PartitionLoss
from equireg.ipirm.partitions import PartitionUpdater
from equireg.similarity import normalized

__all__ = ["MoCoIPIRMLoss"]


class MoCoIPIRMLoss(PartitionLoss):
    r"""MoCo-v2's loss with its queue, invariant over the groups of all partitions.

    L(k, P) is InfoNCE of the queries of group k, each with its own key as the positive and the keys of group k in the
    queue as negatives; the queue remembers whose they are. As in :class:`IPIRMLoss` otherwise.

    Args:
        partitions: as of :class:`IPIRMLoss`.
        num_features: d, width of queries and keys.
        queue_size: how many keys of earlier batches are negatives. It begins with random directions, as MoCo's does,
            which belong to no group.
        temperature: τ, above 0.
        weight: λ₁ of the squared slopes, at least 0.
        global_penalty: as of :class:`IPIRMLoss`.
        dummy_scales: as of :class:`IPIRMLoss`; with "logits", a scale belongs to the positives, or to a key.
        gather_distributed: as of :class:`IPIRMLoss`; the keys of all processes enter the queue, which is the same in
            all of them. By default each has a queue of its own; give DistributedDataParallel
            ``broadcast_buffers=False`` then, or it becomes that of rank 0 at every step.

    The call ``loss(query [B, d], key [B, d], indices [B])`` puts the keys into the queue afterwards, in training mode.
    A sample is no negative of itself, however old its key.

    Raises:
        TypeError, ValueError: as :class:`IPIRMLoss`; a batch larger than the queue.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> criterion = MoCoIPIRMLoss(torch.arange(100)[None] % 2, num_features=8, queue_size=64)
        >>> for batch in torch.arange(96).split(16):
        ...     loss = criterion(torch.randn(16, 8), torch.randn(16, 8), batch)
        >>> loss.shape, int((criterion.queue_indices >= 0).sum())
        (torch.Size([]), 64)
    """

    queue: Tensor
    queue_indices: Tensor
    place: Tensor

    def __init__(
        self,
        partitions: PartitionUpdater | Tensor,
        *,
        num_features: int = 128,
        queue_size: int = 4096,
        temperature: float = 0.2,
        weight: float = 0.2,
        global_penalty: bool = False,
        dummy_scales: str = "one",
        gather_distributed: bool | Group = False,
    ):
        super().__init__("MoCoIPIRMLoss", partitions, weight, global_penalty, gather_distributed, dummy_scales)
        check = Arguments(self.function)
        check.count("num_features", num_features)
        check.count("queue_size", queue_size)
        check.positive("temperature", temperature)
        self.temperature = temperature
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, num_features, generator=generator), dim=1))
        self.register_buffer("queue_indices", torch.full((queue_size,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
        return self.parts(query, key, indices).loss

    def parts(self, query: Tensor, key: Tensor, indices: Tensor) -> IPIRMParts:
        """The loss and, detached, the risk and penalty of all samples and of each group in each partition.

        As the call does, it puts the keys into the queue in training mode: use one of them in a step.
        """
        processes = self.processes
        with processes.alike() as facts:
            indices = self._check(query, key, indices)
            x, own_key = normalized(query), normalized(key.detach())
            facts.update({"query": query, "key": own_key, "training": self.training, **self.facts()})
        positive, queue, owners = (x * own_key).sum(1) / self.temperature, self.queue.to(x.dtype), self.queue_indices
        pairs = Pairs(x, queue, positive, indices, owners, self.temperature, "place")
        groups, num_groups = self.groups_of(indices)
        in_queue = torch.where(owners >= 0, self.groups_of(owners.clamp(min=0))[0], -1)  # [P, queue_size]
        parts = self.contrasted(pairs, groups, in_queue, num_groups, torch.ones_like(positive))
        if self.training:
            self._enqueue(processes.gather(own_key).flatten(0, 1), processes.gather(indices).flatten())
        return parts

    def _check(self, query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
        check = Arguments(self.function).beside(self, self.table)
        check.sizes["d"] = self.queue.shape[1]
        check.alike(query=(query, "N d"), key=(key, "N d"))
        size = self.processes.size
        if not 0 < len(query) * size <= len(self.queue):
            places = "" if size == 1 else f" in {size} processes"
            check.fail("query", f"of 1 to queue_size = {len(self.queue)} samples{places}", list(query.shape))
        return self.check_indices(check, indices)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor, indices: Tensor) -> None:
        """New tensors instead of changed ones: the backward pass needs what the loss saw, compiled or not."""
        with torch.inference_mode(False):  # what is made in that mode could not be saved for a backward pass later
            keys, indices = keys.to(self.queue.dtype, copy=True), indices.clone()
            places = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue = self.queue.index_copy(0, places, keys)
            self.queue_indices = self.queue_indices.index_copy(0, places, indices)
            self.place = (self.place + len(keys)) % len(self.queue)

    def settings(self) -> dict[str, Any]:
        size, width = self.queue.shape
        return {"num_features": width, "queue_size": size, "temperature": self.temperature, **super().settings()}
