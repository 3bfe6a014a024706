"""The search for one partition: ascent on the logits of each sample's group, features frozen."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from equireg._progress import progress_bar
from equireg.invariance import irmv1_penalty
from equireg.ipirm.soft_info_nce import soft_info_nce

# The released schedule: Adam's step is a fifth after these passes; past 50 of them, five without gain end it.
_MILESTONES, _DECAY = (5, 35), 0.2
_LEAST_PASSES, _PATIENCE = 50, 5
# Of the relaxed balance: more than any contrast gains. With 1, groups of digits came out as 3.6 : 1.
_RELAXED_WEIGHT = 10.0


class SearchConfig(NamedTuple):
    """What is maximised, and how; the arguments of ``PartitionUpdater``."""

    num_groups: int
    temperature: float
    weight: float
    lr: float
    max_passes: int
    block_size: int | None
    balance: str | None


class SearchResult(NamedTuple):
    """A partition, int64 [N], and the parts of its objective, in which ``balance`` counts negatively."""

    partition: Tensor
    loss: float
    penalty: float
    balance: float
    passes: int


def find_partition(
    z1: Tensor, z2: Tensor, config: SearchConfig, generator: torch.Generator, *, progress: bool
) -> SearchResult:
    """From fresh logits; the best pass counts. Raises FloatingPointError where the objective is not finite."""
    count = len(z1)
    blocks = 1 if config.block_size is None else math.ceil(count / config.block_size)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(z1.device.type, enabled=False):
        z1, z2 = z1.detach().clone(), z2.detach().clone()
        logits = torch.randn(count, config.num_groups, generator=generator).to(z1.device).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=config.lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, _MILESTONES, _DECAY)
        best, best_objective = SearchResult(z1.new_empty(0), 0.0, 0.0, 0.0, 0), -math.inf
        best_logits, waited = logits, 0
        for number in progress_bar(range(1, config.max_passes + 1), "partition", shown=progress):
            optimizer.zero_grad()
            # Blocks of even size: a small last one would have other negatives than the rest.
            order = torch.randperm(count, generator=generator) if blocks > 1 else torch.arange(count)
            loss = penalty = 0.0
            for block in order.to(z1.device).tensor_split(blocks):
                shares = logits.index_select(0, block).softmax(1)
                risk, slope = soft_info_nce(z1[block], z2[block], shares, temperature=config.temperature)
                squared = irmv1_penalty(slope)
                # Times N, so that Adam's epsilon stays as small beside a gradient as in a small dataset.
                (-(risk.sum() + config.weight * squared) * (count / blocks)).backward()
                loss, penalty = loss + float(risk.detach().sum()) / blocks, penalty + float(squared.detach()) / blocks
            balance = _balance(logits.softmax(1).mean(0), config.balance)
            (balance * count).backward()
            objective = loss + config.weight * penalty - float(balance.detach())
            if not math.isfinite(objective):
                raise FloatingPointError(
                    f"PartitionUpdater.update: the objective must be finite, got {objective} in pass {number}"
                )
            waited += 1
            if objective > best_objective:
                best_objective, best_logits, waited = objective, logits.detach().clone(), 0
                best = SearchResult(best_logits, loss, penalty, float(balance.detach()), number)
            if number > _LEAST_PASSES and waited >= _PATIENCE:
                break
            optimizer.step()
            schedule.step()
    partition = best_logits.argmax(1)
    if config.balance is not None:
        partition = _within_two_to_one(partition, best_logits)
    return best._replace(partition=partition, passes=number)


def _balance(shares: Tensor, kind: str | None) -> Tensor:
    """What is taken off the objective for groups of these shares [K] of all samples."""
    entropy: Tensor = -torch.special.xlogy(shares, shares).sum()
    if kind == "strict":
        return -entropy
    return _RELAXED_WEIGHT * torch.relu(entropy_limit(len(shares)) - entropy) if kind == "relaxed" else entropy * 0


def _within_two_to_one(partition: Tensor, logits: Tensor) -> Tensor:
    """The partition with its least certain samples moved from the largest group to the smallest, until that is so.

    What is balanced is the mean of the soft groups; the hard ones come out a few samples off.
    """
    partition = partition.clone()
    sizes = partition.bincount(minlength=logits.shape[1])
    while 2 * sizes.min() < sizes.max() and sizes.min() > 0:
        large, small = int(sizes.argmax()), int(sizes.argmin())
        members = (partition == large).nonzero().squeeze(1)
        certainty = logits[members, large] - logits[members, small]
        moved = members[certainty.sort(stable=True).indices[: -(-int(sizes[large] - 2 * sizes[small]) // 3)]]
        partition[moved] = small
        sizes = partition.bincount(minlength=logits.shape[1])
    return partition


def entropy_limit(num_groups: int) -> float:
    """The largest entropy of K shares of which one is twice another; 0.6365 for two. Above it none is.

    The other groups then lie between the two, at 2^(2/3) of the smaller one.
    """
    between = 2 ** (2 / 3)
    unit = 1 / (3 + (num_groups - 2) * between)
    shares = [unit, 2 * unit, *[between * unit] * (num_groups - 2)]
    return -sum(share * math.log(share) for share in shares)


def adjusted_rand_index(one: Tensor, other: Tensor) -> float:
    """How far two partitions [N] agree: 1 the same but for names, 0 by chance (Hubert & Arabie, 1985)."""
    width = int(other.max()) + 1
    table = torch.bincount(one * width + other, minlength=(int(one.max()) + 1) * width).view(-1, width).cpu().double()

    def pairs(sizes: Tensor) -> float:
        return float((sizes * (sizes - 1) / 2).sum())

    both, rows, columns, total = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(table.sum())
    chance, most = rows * columns / total, (rows + columns) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)
