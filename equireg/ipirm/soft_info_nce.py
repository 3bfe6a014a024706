"""InfoNCE within groups of samples, soft or hard, and its slope in a dummy scale, without the similarity matrix.

With similarities ``s`` that a dummy ``θ = 1`` multiplies, and a positive ``p``, the loss of a row and its derivative in
``θ`` have closed forms in the log-sum-exp and the softmax mean of the row's negatives:

    log Z - s_p = softplus(gap),    d/dθ = sigmoid(gap) (mean - s_p),    gap = lse - s_p

so a penalty on the slope needs no second differentiation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg.distributed import Group, Processes
from equireg.similarity import exactly, normalized, pair_lse

__all__ = ["soft_info_nce"]


class RowTerms(NamedTuple):
    """The loss of each row and its slope in θ, and whether the row has a negative; where not, both are 0."""

    loss: Tensor
    slope: Tensor  # or [rows, C], in each of C dummy scales
    counted: Tensor


def info_nce_terms(lse: Tensor, mean: Tensor, positive: Tensor) -> RowTerms:
    """From the log-sum-exp and softmax mean of each row's negatives, [K, rows], and the similarity of its positive."""
    counted = lse != -math.inf  # NaN counts, and shows
    gap = torch.where(counted, lse - positive, 0)
    loss, slope = F.softplus(gap), gap.sigmoid() * (mean - positive)
    return RowTerms(torch.where(counted, loss, 0), torch.where(counted, slope, 0), counted)


def soft_info_nce(
    z1: Tensor,
    z2: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 0.5,
    gather_distributed: bool | Group = False,
) -> tuple[Tensor, Tensor]:
    r"""InfoNCE of two views within soft groups of samples, and its slope in a dummy scale.

    With the cosine similarities :math:`s` of all 2N rows (both views) over the temperature, a row's positive :math:`p`
    (the other view of its sample), and the weight :math:`w_k(j)` of sample j in group k, which both of its views share,

    .. math::
        Z_k(i) &= e^{s_{ip}} + (2N - 2) \frac{\sum_a w_k(a)\, e^{s_{ia}}}{\sum_a w_k(a)} \qquad
            (a:\ \text{all rows but } i \text{ and } p) \\
        L_k &= \frac{\sum_i w_k(i)\, (\log Z_k(i) - s_{ip})}{\sum_i w_k(i)}, \qquad
        \text{slope}_k = \frac{\partial L_k(\theta s)}{\partial \theta} \Big|_{\theta = 1}

    the objective of Step 2 of IP-IRM (Wang et al., 2021), Eq. 3, in closed form: memory grows with N, not its square.
    Both results are differentiable in the features and the weights. One group of equal weights is SimCLR's loss.

    Args:
        z1: features of the first views, [N, d], any floating dtype; normalised here.
        z2: features of the second views, [N, d].
        weights: [N, K], at least 0; None for one group of all samples.
        temperature: above 0.
        gather_distributed: whether the samples are those of all processes, or of a process group, each with its
            gradient; they are those of this process otherwise. Both results are then the same in all of them, and under
            DistributedDataParallel so are their gradients to one process with the whole batch. Each process must bring
            the same number of samples and groups, or all raise the same ValueError.

    Returns:
        loss [K] and slope [K], in float32, or float64 for float64 features. A row without a negative of positive weight
        in a group is left out of it; both are 0, with gradients of 0, for a group without a row.

    Raises:
        TypeError, ValueError: wrong types, shapes or temperatures; on CPU also weights that are negative or not finite.

    Example:
        >>> z1, z2 = torch.eye(4), torch.eye(4)
        >>> loss, slope = soft_info_nce(z1, z2)
        >>> loss.shape, bool(torch.isclose(loss[0], torch.log(1 + 6 * torch.tensor(-2.0).exp())))
        (torch.Size([1]), True)
        >>> soft_info_nce(z1, z2, torch.eye(4)[:, :2] + 0.5)[0].shape
        torch.Size([2])
    """
    processes = Processes("soft_info_nce", gather_distributed)
    with processes.alike() as facts:
        _check(z1, z2, weights, temperature)
        facts.update({"z1": z1, "z2": z2, "weights": weights})
    # Both views of a sample side by side, so that the pairs left out lie along the diagonal.
    views = torch.stack([normalized(z1), normalized(z2)], 1)
    shares = views.new_ones(len(z1), 1) if weights is None else weights.to(views.dtype)
    all_shares = processes.gather(shares).flatten(0, 1)
    col_weight = None if weights is None else _of_rows(all_shares)
    row_ids = col_ids = _of_rows(torch.arange(len(all_shares), device=z1.device))
    rows = cols = views.flatten(0, 1)
    mine = slice(2 * processes.rank * len(z1), 2 * (processes.rank + 1) * len(z1))
    if processes.size > 1:  # alone, one tensor for rows and columns: then each similarity is formed once
        row_ids, cols = col_ids[mine], processes.gather(views).flatten(0, 2)
    lse, mean = pair_lse(rows, cols, 1 / temperature, row_id=row_ids, col_id=col_ids, col_weight=col_weight)
    if weights is not None:
        others = 2 * _of_rows(_without_own(exactly(all_shares)))[:, mine]
        scale = (2 * len(all_shares) - 2) / torch.where(others > 0, others, 1)
        lse = lse + scale.log().to(lse.dtype)
    terms = info_nce_terms(lse, mean, _of_rows((views[:, 0] * views[:, 1]).sum(1) / temperature))
    counted = _of_rows(shares) * terms.counted
    sums = torch.stack([(counted * terms.loss).sum(1), (counted * terms.slope).sum(1), counted.sum(1)])
    loss, slope, size = processes.total(sums)
    size = torch.where(size > 0, size, 1)
    return loss / size, slope / size


def _of_rows(of_samples: Tensor) -> Tensor:
    """[K, 2 N] from [N, K], or [2 N] from [N]: what belongs to a sample, for the rows of both its views."""
    return of_samples.movedim(0, -1).repeat_interleave(2, -1)


def _without_own(x: Tensor) -> Tensor:
    """For each row of [N, K] the sum of all others, from both sides: a sum less its own would cancel."""
    zero = torch.zeros_like(x[:1])
    before = torch.cat([zero, x[:-1].cumsum(0)])
    after = torch.cat([x[1:].flip(0).cumsum(0).flip(0), zero])
    return before + after


def _check(z1: Tensor, z2: Tensor, weights: Tensor | None, temperature: float) -> None:
    check = Arguments("soft_info_nce")
    check_views(check, z1, z2, temperature)
    if weights is not None:
        check.features("weights", weights, "N K")
        check.weights("weights", weights)


def check_views(check: Arguments, z1: Tensor, z2: Tensor, temperature: float) -> None:
    """Features [N, d] of both views, not empty, of one dtype; and a temperature."""
    check.alike(z1=(z1, "N d"), z2=(z2, "N d"))
    if check.sizes["N"] == 0 or check.sizes["d"] == 0:
        check.fail("z1", "of at least one sample and one feature", list(z1.shape))
    check.positive("temperature", temperature)
