"""EqInv: class-wise invariant risk minimisation (Wang et al., "Equivariance and invariance inductive bias for learning
from insufficient data", ECCV 2022), Step 3.

One loss line beside cross entropy::

    features = backbone(images)
    loss = F.cross_entropy(head(irm.mask(features)), labels) + irm(features, labels, indices)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments
from equireg.environments import Adjust, Environments, similar_in_batch
from equireg.features import extract_features
from equireg.invariance import irmv1_penalty, rex_penalty
from equireg.similarity import gram, normalized, row_lse


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
    ``torch._dynamo.config.capture_dynamic_output_shape_ops``; :class:`ClassWiseIRM` does not. Of the samples of one
    process only.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> similar = torch.ones(3, 3, dtype=torch.bool)
        >>> risks = class_wise_risks(z, torch.tensor([4, 4, 7]), similar, temperature=1.0)
        >>> risks.classes, risks.risk
        (tensor([4]), tensor([[0.3133, 0.0000]]))
    """
    check = Arguments("class_wise_risks")
    labels = _check_batch(check, "z", z, labels)
    check.booleans("similar", similar, "B B")
    check.positive("temperature", temperature)
    check.option("denominator", denominator, ("own", "all"))
    contrast = _contrast(z, labels, similar, temperature)
    # A class is represented by its first sample.
    first = ((contrast.size > 1) & ~contrast.same.tril(-1).any(1)).nonzero().squeeze(1)
    first = first[labels[first].argsort()]
    return ClassRisks(labels[first], _risk(contrast, denominator)[first], _slope(contrast, denominator)[first])


class _Contrast(NamedTuple):
    """Similarities of a batch, and for each anchor what its negatives sum to in the two environments.

    Everything is by sample rather than by class, so that all shapes are fixed.
    """

    s: Tensor  # [B, B], cosine over the temperature
    same: Tensor  # bool [B, B]: of one class
    size: Tensor  # [B]: size of the sample's class in the batch
    lse: Tensor  # [2, B]: log-sum-exp over the negatives
    mean: Callable[[], Tensor]  # [2, B]: their softmax mean, which only the slope needs

    def positive(self) -> Tensor:
        """bool [B, B]: another sample of the same class."""
        return self.same & ~torch.eye(len(self.s), dtype=torch.bool, device=self.s.device)

    def over_positives(self, of_pair: Callable[..., Tensor], *of_anchor: Tensor) -> Tensor:
        """The mean over the positives of each anchor, [..., B], 0 where there is none.

        ``of_pair`` takes the similarity of pairs and, for each of ``of_anchor`` [..., B], the value of their anchors.
        """
        share = 1 / (self.size - 1).clamp(min=1).to(self.s.dtype)
        if self.s.device.type == "cpu" and not torch.compiler.is_compiling():
            # A few positives among many pairs: pick them out. A GPU would have to wait for their number.
            i, p = self.same.nonzero().unbind(1)
            i, p = i[i != p], p[i != p]
            of_pairs = of_pair(self.s[i, p], *(values[..., i] for values in of_anchor)) * share[i]
            return of_pairs.new_zeros(*of_pairs.shape[:-1], len(share)).index_add(-1, i, of_pairs)
        of_pairs = of_pair(self.s, *(values[..., None] for values in of_anchor))
        return (of_pairs * (self.positive() * share[:, None])).sum(-1)

    def over_class(self, values: Tensor) -> Tensor:
        """The mean over the anchors of each sample's class, [2, B] to [B, 2]."""
        # As a product: sums in a fixed order on every device.
        with torch.autocast(values.device.type, enabled=False):
            return self.same.to(values.dtype) @ values.T / self.size[:, None]


def _contrast(z: Tensor, labels: Tensor, similar: Tensor, temperature: float | Tensor) -> _Contrast:
    z = normalized(z)
    same = labels[:, None] == labels[None, :]
    with torch.autocast(z.device.type, enabled=False):
        s = gram(z) / temperature
    # The negatives of both environments in one pass. The table of environments is as large as the matrix of
    # similarities, so nothing would be won by streaming.
    lse, mean = row_lse(s, torch.stack([similar, ~similar]) & ~same)
    return _Contrast(s, same, same.sum(1), lse, mean)


def _risk(contrast: _Contrast, denominator: str) -> Tensor:
    """Eq. 5 for the class of each sample, [B, 2]; for a class of one sample a finite number that is no risk."""
    if denominator == "own":
        return contrast.over_class(contrast.over_positives(lambda s, lse: _softplus(lse - s), contrast.lse))
    average, above, _ = _positives(contrast)
    return contrast.over_class(above + _softplus(contrast.lse - average - above))


def _slope(contrast: _Contrast, denominator: str) -> Tensor:
    """The derivative of the risk in the dummy classifier, [B, 2], in closed form: no double backward."""
    lse, mean = contrast.lse, contrast.mean()
    if denominator == "own":  # the sigmoid is the share of the negatives in the softmax

        def of_pair(s: Tensor, lse: Tensor, mean: Tensor) -> Tensor:
            return (lse - s).sigmoid() * (mean - s)

        return contrast.over_class(contrast.over_positives(of_pair, lse, mean))
    average, above, tilt = _positives(contrast)
    return contrast.over_class((lse - average - above).sigmoid() * (mean - average - tilt) + tilt)


def _positives(contrast: _Contrast) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the positives of each anchor, and how far their log-sum-exp and softmax mean lie above it, each [B].

    With one positive both are exactly 0, and small losses keep their digits.
    """
    average = contrast.over_positives(lambda s: s)
    kept = contrast.positive() | (contrast.size < 2)[:, None]  # an anchor without positives keeps something finite
    above = torch.where(kept, contrast.s - average[:, None], -torch.inf)
    tilt = (above.softmax(-1) * above.masked_fill(~kept, 0)).sum(-1)
    return average, above.logsumexp(-1), tilt


def _softplus(gap: Tensor) -> Tensor:
    """log(1 + exp(gap)): a small risk keeps its digits, as ``logaddexp(positive, lse) - positive`` would not."""
    # From 50 on it is linear to the last bit in float64; the default of 20 is not. logsigmoid takes twice the time.
    return F.softplus(gap, threshold=50)


class FeatureMask(nn.Module):
    r"""Selects features by a learnable vector: :math:`\sigma(m) \circ x`.

    EqInv (Wang et al., 2022), Section 4, Step 3. The vector starts uniform in [0, 1).

    Args:
        num_features: D.
        scale: None for the masked features as they are (the paper). A number gives ``scale · normalize(σ(m) ∘ x)``;
            the released code classifies with ``scale=10``.

    Example:
        >>> mask = FeatureMask(4)
        >>> mask(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, num_features: int, *, scale: float | None = None):
        super().__init__()
        check = Arguments("FeatureMask")
        check.count("num_features", num_features)
        if scale is not None:
            check.positive("scale", scale)
        self.weight = nn.Parameter(torch.rand(num_features))
        self.scale = scale

    def select(self, features: Tensor) -> Tensor:
        """The masked features, [..., D], without the scale."""
        return features * self.weight.sigmoid()

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-1:] != self.weight.shape:
            Arguments("FeatureMask").refuse("features", f"[..., {len(self.weight)}]", list(features.shape))
        selected = self.select(features)
        return selected if self.scale is None else self.scale * F.normalize(selected, dim=-1, eps=1e-6)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}" + ("" if self.scale is None else f", scale={self.scale}")


class ClassWiseIRM(nn.Module):
    r"""Class-wise invariant risk minimisation over environments it finds by itself.

    .. math::
        L = \operatorname*{mean}_k \Big[ \sum_e \ell(k, e) + \lambda \cdot
        \begin{cases} \text{Var}_e\, \ell(k, e) & \text{REx, Eq. 16} \\
        \sum_e (\partial \ell(k, e, w) / \partial w |_{w=1})^2 & \text{IRMv1, Eq. 6} \end{cases} \Big]

    over the classes :math:`k` with two or more samples in the batch, with the risks of :func:`class_wise_risks` on
    :math:`z = g(\sigma(m) \circ \phi(x))`. EqInv (Wang et al., 2022), Section 4.

    Args:
        num_features: width D of the backbone's features.
        num_classes: C.
        weight: λ, at least 0. The paper uses 2, 10 and 100 at 10, 20 and 50 images per class.
        penalty: ``"rex"`` or ``"irmv1"``.
        temperature: of the cosine similarities, above 0.
        denominator: as in :func:`class_wise_risks`.
        projection: g; by default Linear(D, 512, no bias), BatchNorm, ReLU, Linear(512, 128).
        detach: whether the backbone gets no gradient from this loss (the paper). It then trains the mask and g alone;
            with False it trains the backbone too.

    Attributes:
        mask: the :class:`FeatureMask` that the classifier shares: ``head(irm.mask(features))``.
        environments: the fitted :class:`Environments`, saved with ``state_dict``; None before
            :meth:`fit_environments`.

    Without fitted environments, or for a loader that gives no indices, each batch is split by itself: an approximation,
    better the more samples of each class a batch holds.

    Shapes and behaviour of the call ``irm(features [B, D], labels [B], indices [B] | None) -> loss``: a 0-d tensor in
    float32 (float64 for float64 features). Where no class has two samples, the loss is a zero with zero gradients. Each
    process of a distributed run takes the classes of its own batch.

    Raises:
        TypeError, ValueError: arguments of a wrong type, shape or range; on CPU also labels or indices out of range;
            ``indices`` given before the environments are fitted.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> features, labels = torch.randn(40, 16), torch.arange(40) % 4
        >>> irm = ClassWiseIRM(16, 4).fit_environments(features, labels)
        >>> batch = torch.arange(0, 40, 3)
        >>> loss = irm(features[batch], labels[batch], batch)
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)
    """

    environments: Environments | None

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        weight: float = 10.0,
        penalty: str = "rex",
        temperature: float = 0.1,
        denominator: str = "own",
        projection: nn.Module | None = None,
        detach: bool = True,
    ):
        super().__init__()
        check = Arguments("ClassWiseIRM")
        check.count("num_features", num_features)
        check.count("num_classes", num_classes)
        check.not_negative("weight", weight)
        check.option("penalty", penalty, ("rex", "irmv1"))
        check.positive("temperature", temperature)
        check.option("denominator", denominator, ("own", "all"))
        check.option("detach", detach, (True, False))
        self.num_features, self.num_classes = num_features, num_classes
        self.weight, self.penalty = weight, penalty
        self.temperature, self.denominator, self.detach = temperature, denominator, detach
        self.mask = FeatureMask(num_features)
        self.projection = projection if projection is not None else _projection(num_features)
        self.register_module("environments", None)

    def fit_environments(
        self,
        features: Tensor | Iterable[Any],
        labels: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        encoder: Callable[[Tensor], Tensor] | None = None,
        num_samples: int | None = None,
        adjust: Adjust = True,
    ) -> ClassWiseIRM:
        """Find the environments of a dataset, from its features or from a loader and an encoder.

        Args:
            features: features [N, D] of the whole dataset, from a frozen encoder; or, with ``encoder``, a loader of
                ``(images, labels, indices)``, as over ``WithIndex(dataset)``, without random augmentation.
            labels: [N], whole numbers in 0 .. C - 1; not with ``encoder``.
            indices: dataset index of each row, [N]; by default 0 .. N - 1; not with ``encoder``.
            encoder: images [B, ...] to features [B, D]. Run in eval mode without gradient, and left as it was.
            num_samples: length of the dataset where it is more than the samples given here.
            adjust: as in :func:`adjusted_similarity`.

        Returns:
            The module itself.

        Raises:
            TypeError, ValueError: as :meth:`Environments.split`; what goes with ``encoder`` and what does not.
        """
        check = Arguments("ClassWiseIRM.fit_environments")
        if encoder is not None:
            if isinstance(features, Tensor):
                check.refuse_type("features", "a loader where encoder is given", "a tensor")
            if labels is not None or indices is not None:
                check.refuse("labels and indices", "None where encoder is given: the loader gives them", "given")
            features, labels, indices = extract_features(encoder, features)
        elif not isinstance(features, Tensor):
            check.refuse_type("features", "a tensor, or a loader together with encoder", type(features).__name__)
        elif labels is None:
            check.refuse("labels", "given with features", None)
        # The width of these features may be another than num_features: any frozen encoder will do.
        environments = Environments.split(
            features, labels, self.num_classes, indices=indices, num_samples=num_samples, adjust=adjust
        )
        self.environments = environments.to(self.mask.weight.device)
        return self

    def forward(self, features: Tensor, labels: Tensor, indices: Tensor | None = None) -> Tensor:
        check = Arguments("ClassWiseIRM")
        check.sizes["D"] = self.num_features
        labels = _check_batch(check, "features", features, labels)
        check.below("labels", labels, self.num_classes, "num_classes")
        if indices is not None:
            indices = check.integers("indices", indices, "B")
            if self.environments is None:
                check.refuse("indices", "None before fit_environments", list(indices.shape))
        if len(features) < 2:  # no pair; a BatchNorm in the projection would refuse the batch
            return self._zero(features)

        if self.detach:
            features = features.detach()
        if indices is not None and self.environments is not None:
            similar = self.environments.similar(labels, indices)
        else:
            similar = similar_in_batch(features.detach(), labels)
        z = self.projection(self.mask.select(features))
        contrast = _contrast(z, labels, similar, self.temperature)
        risk = _risk(contrast, self.denominator)
        of_class = risk.sum(1)
        if self.weight > 0:
            penalty = rex_penalty(risk) if self.penalty == "rex" else irmv1_penalty(_slope(contrast, self.denominator))
            of_class = of_class + self.weight * penalty
        # Each class with two samples or more counts once: a sample of n weighs 1 / n.
        share = torch.where(contrast.size > 1, 1 / contrast.size.to(risk.dtype), 0)
        return (of_class * share).sum() / share.sum().clamp(min=1)

    def _zero(self, features: Tensor) -> Tensor:
        """Zero, with a zero gradient for all the loss can reach: distributed training waits for every parameter."""
        reached = [*self.parameters()] if self.detach else [features, *self.parameters()]
        return torch.stack([part.flatten()[:0].sum() for part in reached]).sum()

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, {self.num_classes}, weight={self.weight}, penalty={self.penalty!r}, "
            f"temperature={self.temperature}, denominator={self.denominator!r}, detach={self.detach}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if self.environments is None and f"{prefix}environments.bits" in state_dict:
            self.environments = Environments().to(self.mask.weight.device)  # takes its sizes from what it loads
        super()._load_from_state_dict(state_dict, prefix, *args)


def _projection(num_features: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(num_features, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 128)
    )


def _check_batch(check: Arguments, name: str, features: Tensor, labels: Tensor) -> Tensor:
    """Features [B, D] and labels [B], the labels as int64."""
    check.features(name, features, "B D")
    if check.sizes["D"] == 0:
        check.refuse(name, "at least one wide", list(features.shape))
    return check.integers("labels", labels, "B")
