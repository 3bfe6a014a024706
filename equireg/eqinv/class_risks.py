"""Risks of each class in its two environments, with their slopes (EqInv, Wang et al., ECCV 2022, Eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg.distributed import Processes
from equireg.similarity import gram, normalized, split_lse

__all__ = ["ClassRisks", "class_wise_risks"]


class ClassRisks(NamedTuple):
    """Risks of the K classes with at least two samples in the batch, in each of their two environments."""

    classes: Tensor  # int64 [K], ascending
    risk: Tensor  # [K, 2], Env#1 and Env#2
    slope: Tensor  # [K, 2], derivative of the risk in the dummy classifier w at w = 1


def class_wise_risks(
    z: Tensor, labels: Tensor, similar: Tensor, *, temperature: float | Tensor = 0.1, denominator: str = "own"
) -> ClassRisks:
    r"""Supervised contrastive risk of each class in its two environments, with its slope in the dummy classifier.

    For anchors :math:`i` of class :math:`k`, positives :math:`P(i)` (the other samples of the class), negatives
    :math:`A_e(i)` (samples of other classes in environment :math:`e`) and cosine similarities over the temperature
    :math:`s`, Eq. 5 of EqInv is

    .. math::
        \ell(k, e, w) = \operatorname*{mean}_{i} \operatorname*{mean}_{p \in P(i)}
        -\log \frac{e^{w s_{ip}}}{e^{w s_{ip}} + \sum_{a \in A_e(i)} e^{w s_{ia}}}

    and its derivative at :math:`w = 1` is the mean of
    :math:`\mathbb{E}_{\text{softmax over } \{p\} \cup A_e(i)}[s] - s_{ip}`. An environment without negatives has
    risk 0.

    Args:
        z: embeddings [B, d], normalised inside.
        labels: whole numbers [B].
        similar: bool [B, B]; ``similar[i, a]``: sample a is in Env#1 of the class of sample i. Entries between samples
            of one class are not used.
        temperature: a number above 0, or a 0-d tensor (which gets a gradient).
        denominator: ``"own"``, Eq. 5: each positive stands alone against the negatives. ``"all"``, the released code:
            all positives of the anchor stand in the denominator, as in SupCon.

    Returns:
        Classes, risks and slopes; K = 0 where no class has two samples. Float32 (float64 for float64 z).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, a temperature that is not above 0, an unknown denominator.

    K depends on the labels: under ``torch.compile(fullgraph=True)`` this needs
    ``torch._dynamo.config.capture_dynamic_output_shape_ops``; :class:`ClassWiseIRM` does not. The samples are those of
    this process; :class:`ClassWiseIRM` can gather the others.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> similar = torch.ones(3, 3, dtype=torch.bool)
        >>> risks = class_wise_risks(z, torch.tensor([4, 4, 7]), similar, temperature=1.0)
        >>> risks.classes, risks.risk
        (tensor([4]), tensor([[0.3133, 0.0000]]))
    """
    check = Arguments("class_wise_risks")
    labels = check_batch(check, "z", z, labels)
    check.booleans("similar", similar, "B B")
    check.positive("temperature", temperature)
    check.option("denominator", denominator, ("own", "all"))
    compared = compare(z, Batch(labels, labels, similar, temperature, Processes("class_wise_risks", False)))
    first = compared.first_of_each_class()
    first = first[labels[first].argsort()]
    return ClassRisks(labels[first], risk_of(compared, denominator)[first], slope_of(compared, denominator)[first])


class Compared(NamedTuple):
    """Similarities of A anchors to a batch, and for each what its negatives sum to in the two environments.

    The anchors are the samples of this process; in the batch, that of all ``processes``, they begin at ``first``.
    Everything is by sample rather than by class, so that all shapes are fixed.
    """

    s: Tensor  # [A, B], cosine over the temperature
    same: Tensor  # bool [A, B]: of one class
    size: Tensor  # [A]: size of the sample's class in the batch
    lse: Tensor  # [2, A]: log-sum-exp over the negatives
    mean: Tensor  # [2, A]: their softmax mean
    weight: Tensor | None  # [B]: of the samples as anchors; None for all alike
    first: int
    processes: Processes

    def positive(self) -> Tensor:
        """bool [A, B]: another sample of the same class."""
        places = torch.arange(self.s.shape[1], device=self.s.device)
        return self.same & (places != places[self.first :][: len(self.s), None])

    def first_of_each_class(self) -> Tensor:
        """The first of the anchors of each class with two samples or more, int64 [K]."""
        own = self.same[:, self.first :][:, : len(self.s)]
        return ((self.size > 1) & ~own.tril(-1).any(1)).nonzero().squeeze(1)

    def class_mean(self, values: Tensor) -> Tensor:
        """The mean of values [A], alike within a class, over the classes with two samples or more; 0 without one.

        Each class counts once: a sample of n weighs 1 / n.
        """
        share = torch.where(self.size > 1, 1 / self.size.to(values.dtype), 0)
        total, classes = self.processes.total(torch.stack([(values * share).sum(), share.sum()]))
        mean: Tensor = total / classes.clamp(min=1)
        return mean

    def anchor_mean(self, values: Tensor) -> Tensor:
        """The (weighted) mean of values [A] over the anchors that have a positive; 0 without one."""
        weight = torch.ones_like(values)
        if self.weight is not None:
            weight = self.weight[self.first :][: len(self.s)].to(values.dtype)
        share = torch.where(self.size > 1, weight, 0)
        total, anchors = self.processes.total(torch.stack([(values * share).sum(), share.sum()]))
        mean: Tensor = total / torch.where(anchors > 0, anchors, 1)
        return mean

    def over_positives(self, of_pair: Callable[..., Tensor], *of_anchor: Tensor) -> Tensor:
        """The mean over the positives of each anchor, [..., A], 0 where there is none.

        ``of_pair`` takes the similarity of pairs and, for each of ``of_anchor`` [..., A], the value of their anchors.
        """
        share = 1 / (self.size - 1).clamp(min=1).to(self.s.dtype)
        if self.s.device.type == "cpu" and not torch.compiler.is_compiling():
            # A few positives among many pairs: pick them out. A GPU would have to wait for their number.
            i, p = self.same.nonzero().unbind(1)
            others = i + self.first != p
            i, p = i[others], p[others]
            of_pairs = of_pair(self.s[i, p], *(values[..., i] for values in of_anchor)) * share[i]
            return of_pairs.new_zeros(*of_pairs.shape[:-1], len(share)).index_add(-1, i, of_pairs)
        of_pairs = of_pair(self.s, *(values[..., None] for values in of_anchor))
        return (of_pairs * (self.positive() * share[:, None])).sum(-1)

    def over_class(self, values: Tensor) -> Tensor:
        """The (weighted) mean over the anchors of each one's class, in all processes, [2, A] to [A, 2]."""
        everyone = self.processes.gather(values.T).flatten(0, 1)  # [B, 2]
        share, total = self.same.to(values.dtype), self.size
        if self.weight is not None:
            share = share * self.weight.to(values.dtype)
            total = share.sum(1)
        # As a product: sums in a fixed order on every device.
        with torch.autocast(values.device.type, enabled=False):
            return share @ everyone / total[:, None]


class Batch(NamedTuple):
    """What is known of a batch beside its embeddings: A samples of this process, B of all ``processes``."""

    labels: Tensor  # [A]
    all_labels: Tensor  # [B]
    similar: Tensor  # bool [A, B]: in Env#1 of the class of each of ours
    temperature: float | Tensor
    processes: Processes
    weight: Tensor | None = None  # [B]: of the samples as anchors; None for all alike


def compare(z: Tensor, batch: Batch, source: torch.dtype | None = None) -> Compared:
    """Of the embeddings [A, d] of this process; ``source`` as of ``normalized``."""
    labels, all_labels, similar, temperature, processes, weight = batch
    z = normalized(z, source)
    same = labels[:, None] == all_labels[None, :]
    with torch.autocast(z.device.type, enabled=False):
        cosine = gram(z) if processes.size == 1 else z @ processes.gather(z).flatten(0, 1).T
    if isinstance(temperature, Tensor):
        temperature, bound = temperature.to(z.dtype), math.inf
    else:
        bound = 1.0001 / temperature  # a cosine may be rounded above 1
    # The negatives of both environments in one pass. The table of environments is as large as the matrix of
    # similarities, so nothing would be won by streaming.
    s = cosine / temperature
    lse, mean = split_lse(s, similar, same, bound)
    return Compared(s, same, same.sum(1), lse, mean, weight, processes.rank * len(z), processes)


def risk_of(compared: Compared, denominator: str) -> Tensor:
    """Eq. 5 for the class of each anchor, [A, 2]; for a class of one sample a finite number that is no risk."""
    if denominator == "own":
        return compared.over_class(compared.over_positives(lambda s, lse: _softplus(lse - s), compared.lse))
    average, lse_excess, _ = _positives(compared)
    return compared.over_class(lse_excess + _softplus(compared.lse - average - lse_excess))


def sup_con_of(compared: Compared) -> Tensor:
    """SupCon over the whole batch, whatever the environments: the loss of each anchor [A], 0 where it has no positive.

    -mean over p in P(i) of s_ip + log (sum over P(i) of exp(s_ip) + sum over all negatives of exp(s_ia)).
    """
    average, lse_excess, _ = _positives(compared)
    known = (compared.lse != -math.inf).any(0)  # where there is no negative at all, logaddexp has no gradient
    negatives = torch.logaddexp(*torch.where(known, compared.lse, 0))
    negatives = torch.where(known, negatives, -math.inf)
    return torch.where(compared.size > 1, lse_excess + _softplus(negatives - average - lse_excess), 0)


def slope_of(compared: Compared, denominator: str) -> Tensor:
    """The derivative of the risk in the dummy classifier, [A, 2], in closed form: no double backward."""
    lse, mean = compared.lse, compared.mean
    if denominator == "own":  # the sigmoid is the share of the negatives in the softmax

        def of_pair(s: Tensor, lse: Tensor, mean: Tensor) -> Tensor:
            return (lse - s).sigmoid() * (mean - s)

        return compared.over_class(compared.over_positives(of_pair, lse, mean))
    average, lse_excess, mean_excess = _positives(compared)
    of_negatives = (lse - average - lse_excess).sigmoid()
    return compared.over_class(of_negatives * (mean - average - mean_excess) + mean_excess)


def _positives(compared: Compared) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the positives of each anchor, and how far their log-sum-exp and softmax mean lie above it, each [A].

    With one positive both are exactly 0, and small losses keep their digits.
    """
    average = compared.over_positives(lambda s: s)
    kept = compared.positive() | (compared.size < 2)[:, None]  # an anchor without positives keeps something finite
    deviation = torch.where(kept, compared.s - average[:, None], -torch.inf)
    mean_excess = (deviation.softmax(-1) * deviation.masked_fill(~kept, 0)).sum(-1)
    return average, deviation.logsumexp(-1), mean_excess


def _softplus(gap: Tensor) -> Tensor:
    """log(1 + exp(gap)): a small risk keeps its digits, as ``logaddexp(positive, lse) - positive`` would not."""
    # From 50 on it is linear to the last bit in float64; the default of 20 is not. logsigmoid takes twice the time.
    return F.softplus(gap, threshold=50)


def check_batch(check: Arguments, name: str, features: Tensor, labels: Tensor) -> Tensor:
    """Features [B, D] and labels [B], the labels as int64."""
    check.features(name, features, "B D")
    if check.sizes["D"] == 0:
        check.fail(name, "at least one wide", list(features.shape))
    return check.integers("labels", labels, "B")
