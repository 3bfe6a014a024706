"""The similar half of a ranking, one bit a sample; for a whole data set, and for a batch by itself."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from equireg.similarity import normalized


def similar_in_batch(features: Tensor, labels: Tensor) -> Tensor:
    """The split made of one batch alone: bool [B, B], whether sample a is in Env#1 of the class of sample i.

    The same ranking as :meth:`Environments.split` with the class means of the batch; of fixed shape, for compilation.
    """
    x = normalized(features)
    same = labels[:, None] == labels[None, :]
    weight = same.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        means = (weight @ x) / weight.sum(1, keepdim=True)  # row i: mean of the class of sample i
        scores = (means @ (x - means).T).masked_fill(same, -math.inf)
    place = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(place).scatter_(1, place, torch.arange(len(x), device=x.device).expand_as(place))
    return (rank < (same.logical_not().sum(1, keepdim=True) + 1) // 2) | same


def write_first_half(bits: Tensor, scores: Tensor, half: Tensor, where: Tensor, order: Tensor | None) -> None:
    """``first_half`` of scores [C, N] as one bit a sample into ``bits`` [C, n], for sample i at place ``where[i]``."""
    # Classes at a time: on a CPU they stay in the cache, elsewhere they fill the device.
    few = max(1, (2**21 if scores.device.type == "cpu" else 2**26) // scores.shape[1])
    for into, of_few, half_of_few in zip(bits.split(few), scores.split(few), half.split(few)):
        chosen = torch.zeros(len(into), 8 * into.shape[1], dtype=torch.bool, device=into.device)
        into.copy_(packed(chosen.index_copy_(1, where, first_half(of_few, half_of_few, order))))


def first_half(scores: Tensor, half: Tensor, order: Tensor | None) -> Tensor:
    """The ``half`` [C] highest scores of each row, the first in ``order`` among equals; bool [C, N]."""
    # kthvalue takes one place for all rows, so each row is filled up with infinities until its threshold is there.
    most = int(half.max()) + 1
    filled = torch.arange(most - int(half.min()), device=scores.device) < most - half[:, None]
    longer = torch.cat([scores, torch.where(filled, math.inf, -math.inf)], 1)
    threshold = longer.kthvalue(longer.shape[1] - most + 1).values
    first = scores >= threshold[:, None]
    crowded = (first.sum(1) > half).nonzero().squeeze(1)  # more equals than places: the earlier ones
    if len(crowded):
        equal = scores[crowded] == threshold[crowded, None]
        room = half[crowded] - (first[crowded] & ~equal).sum(1)
        queue = equal if order is None else equal[:, order]
        admitted = queue & (queue.cumsum(1, dtype=torch.int32) <= room[:, None])
        if order is not None:
            admitted = torch.empty_like(admitted).index_copy_(1, order, admitted)
        first[crowded] &= admitted | ~equal
    return first


def packed(bits: Tensor) -> Tensor:
    """bool [C, 8 n] to uint8 [C, n], the first bit lowest."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    eights = rearrange(bits.view(torch.uint8), "classes (byte place) -> classes byte place", place=8)
    return (eights << places).sum(-1, dtype=torch.uint8)


def bit_of(byte: Tensor, indices: Tensor) -> Tensor:
    return byte & (1 << (indices % 8)).to(torch.uint8) != 0
