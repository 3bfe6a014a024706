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


def first_half(scores: Tensor, order: Tensor | None) -> Tensor:
    """The higher half, rounded up, of each row's entries that are not -inf; the first in ``order`` among equals."""
    half = ((scores != -math.inf).sum(1) + 1) // 2
    threshold = scores.new_full((len(scores),), math.inf)
    for size in half.unique().tolist():  # one size where the classes are of one size
        if size > 0:
            rows = half == size
            threshold[rows] = scores[rows].kthvalue(scores.shape[1] - size + 1).values
    first = scores > threshold[:, None]
    equal = scores == threshold[:, None]
    room = half - first.sum(1)
    crowded = (equal.sum(1) > room).nonzero().squeeze(1)  # more equals than places: the earlier ones
    if len(crowded):
        queue = equal[crowded] if order is None else equal[crowded][:, order]
        admitted = queue & (queue.cumsum(1, dtype=torch.int32) <= room[crowded, None])
        if order is not None:
            admitted = torch.empty_like(admitted).index_copy_(1, order, admitted)
        equal[crowded] = admitted
    return first | equal


def packed(bits: Tensor) -> Tensor:
    """bool [C, 8 n] to uint8 [C, n], the first bit lowest."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    eights = rearrange(bits.to(torch.uint8), "classes (byte place) -> classes byte place", place=8)
    return (eights << places).sum(-1, dtype=torch.uint8)


def bit_of(byte: Tensor, indices: Tensor) -> Tensor:
    return byte & (1 << (indices % 8)).to(torch.uint8) != 0
