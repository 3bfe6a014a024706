"""EqInv: class-wise invariant risk minimisation (Wang et al., "Equivariance and invariance inductive bias for learning
from insufficient data", ECCV 2022), Step 3.

One loss line beside cross entropy::

    features = backbone(images)
    loss = F.cross_entropy(head(irm.mask(features)), labels) + irm(features, labels, indices)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments
from equireg.distributed import Checksum, Facts, Group, Processes, settings_of
from equireg.eqinv.adjusted_similarity import Adjust
from equireg.eqinv.class_risks import check_batch, compare, risk_of, slope_of
from equireg.eqinv.environments import Environments
from equireg.eqinv.halves import similar_in_batch
from equireg.features import extract_features
from equireg.invariance import irmv1_penalty, rex_penalty
from equireg.similarity import accumulation_dtype

__all__ = ["ClassWiseIRM", "FeatureMask"]


class FeatureMask(nn.Module):
    r"""Selects features by a learnable vector: :math:`\sigma(m) \circ x`.

    EqInv (Wang et al., 2022), Section 4, Step 3. The vector starts uniform in [0, 1).

    Args:
        num_features: width D of the features.
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
        check = Arguments("FeatureMask")
        check.floats("features", features)
        if features.shape[-1:] != self.weight.shape:
            check.fail("features", f"[..., {len(self.weight)}]", list(features.shape))
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
        num_classes: how many there are, C.
        weight: λ, at least 0. The paper uses 2, 10 and 100 at 10, 20 and 50 images per class.
        penalty: ``"rex"`` or ``"irmv1"``.
        temperature: of the cosine similarities, above 0.
        denominator: as in :func:`class_wise_risks`.
        projection: g; by default Linear(D, 512, no bias), BatchNorm, ReLU, Linear(512, 128).
        detach: whether the backbone gets no gradient from this loss (the paper). It then trains the mask and g alone;
            with False it trains the backbone too.
        gather_distributed: whether the batch is that of all processes, or of a process group, with its gradient: the
            loss is then the same in all of them, and under DistributedDataParallel so are its gradients to one process
            with the whole batch. (The penalty is the square of a mean, so the mean of each process's loss is another.)
            Each must bring the same number of samples, or all raise the same ValueError. The default projection
            normalises over the batch of its process, unless it is made a ``SyncBatchNorm``.

    Attributes:
        mask: the :class:`FeatureMask` that the classifier shares: ``head(irm.mask(features))``.
        environments: the fitted :class:`Environments`, saved with ``state_dict``; None before
            :meth:`fit_environments`.

    Without fitted environments, or for a loader that gives no indices, each batch is split by itself: an approximation,
    better the more samples of each class a batch holds.

    Shapes and behaviour of the call ``irm(features [B, D], labels [B], indices [B] | None) -> loss``: a 0-d tensor in
    float32 (float64 for float64 features). Where no class has two samples, the loss is a zero with zero gradients. By
    default each process of a distributed run takes the classes of its own batch. The environments are buffers, which
    ``DistributedDataParallel`` sends to every process at each step unless told ``broadcast_buffers=False``: tell it so
    where the dataset is large.

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
        gather_distributed: bool | Group = False,
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
        if projection is not None and not isinstance(projection, nn.Module):
            check.fail_type("projection", "an nn.Module or None", type(projection).__name__)
        self.num_features, self.num_classes = num_features, num_classes
        self.weight, self.penalty = weight, penalty
        self.temperature, self.denominator, self.detach = temperature, denominator, detach
        self.processes, self._checksum = Processes("ClassWiseIRM", gather_distributed), Checksum()
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
        progress: bool = True,
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
            progress: whether ``encoder`` runs with a progress bar, where tqdm is installed.

        Returns:
            The module itself. Features given as a tensor are kept by reference, to rank ``environments.members``
            (``environments.release()`` lets them go); those of ``encoder`` are let go at once.

        Raises:
            TypeError, ValueError: as :meth:`Environments.split`; what goes with ``encoder`` and what does not.
        """
        check = Arguments("ClassWiseIRM.fit_environments")
        if encoder is not None:
            if isinstance(features, Tensor):
                check.fail_type("features", "a loader where encoder is given", "a tensor")
            if labels is not None or indices is not None:
                check.fail("labels and indices", "None where encoder is given: the loader gives them", "given")
            features, labels, indices = extract_features(encoder, features, progress=progress)
        elif not isinstance(features, Tensor):
            check.fail_type("features", "a tensor, or a loader together with encoder", type(features).__name__)
        elif labels is None:
            check.fail("labels", "given with features", None)
        # The width of these features may be another than num_features: any frozen encoder will do.
        environments = Environments.split(
            features, labels, self.num_classes, indices=indices, num_samples=num_samples, adjust=adjust
        )
        if encoder is not None:
            environments.release()  # nobody else holds these features, and they may be gigabytes
        self.environments = environments.to(self.mask.weight.device)
        return self

    def forward(self, features: Tensor, labels: Tensor, indices: Tensor | None = None) -> Tensor:
        processes = self.processes
        labels, indices = processes.agree(
            lambda: self._checked(features, labels, indices), lambda made: self._facts(features, *made)
        )
        if len(features) * processes.size < 2:  # no pair; a BatchNorm in the projection would refuse the batch
            return self._zero(features)
        # Contiguous, so that the layers sum in the same order whatever the strides.
        seen = (features.detach() if self.detach else features).contiguous()
        z = self.projection(self.mask.select(seen))
        all_labels = processes.gather(labels).flatten()
        similar = self._similar(features.detach(), labels, all_labels, indices)
        compared = compare(z, labels, all_labels, similar, self.temperature, processes)
        risk = risk_of(compared, self.denominator)
        of_class = risk.sum(1)
        if self.weight > 0 and self.penalty == "rex":
            of_class = of_class + self.weight * rex_penalty(risk)
        elif self.weight > 0:
            of_class = of_class + self.weight * irmv1_penalty(slope_of(compared, self.denominator))
        # Each class with two samples or more counts once: a sample of n weighs 1 / n.
        share = torch.where(compared.size > 1, 1 / compared.size.to(risk.dtype), 0)
        loss, classes = processes.total(torch.stack([(of_class * share).sum(), share.sum()]))
        per_class: Tensor = loss / classes.clamp(min=1)
        return per_class

    def _checked(self, features: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor | None]:
        check = Arguments("ClassWiseIRM")
        check.sizes["D"] = self.num_features
        labels = check_batch(check, "features", features, labels)
        check.below("labels", labels, self.num_classes, "num_classes")
        if indices is not None:
            indices = check.integers("indices", indices, "B")
            if self.environments is None:
                check.fail("indices", "None before fit_environments", list(indices.shape))
            check.below("indices", indices, self.environments.num_samples, "samples of the environments")
        alone = len(features) == 1 and self.processes.size > 1 and self.training
        if alone and any(isinstance(module, nn.BatchNorm1d) for module in self.projection.modules()):
            check.fail("features", "of at least 2 samples, for the projection's BatchNorm", list(features.shape))
        return labels, indices

    def _facts(self, features: Tensor, labels: Tensor, indices: Tensor | None) -> Facts:
        """What processes have to agree on."""
        bits = None if indices is None or self.environments is None else self.environments.bits
        return {
            "features": features,
            "labels": labels,
            "indices": indices,
            "environments": bits,
            "environments' sum": None if bits is None else self._checksum.of(bits),
            "settings": settings_of(self),
            "whether parameters learn": torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()),
        }

    def _similar(self, features: Tensor, labels: Tensor, all_labels: Tensor, indices: Tensor | None) -> Tensor:
        """Which samples of all processes are in Env#1 of the class of each of ours, bool [B, all]."""
        processes = self.processes
        if indices is not None and self.environments is not None:
            return self.environments.similar(labels, processes.gather(indices).flatten())
        similar = similar_in_batch(processes.gather(features).flatten(0, 1), all_labels)
        return similar[processes.rank * len(labels) :][: len(labels)]

    def _zero(self, features: Tensor) -> Tensor:
        """Zero, with a zero gradient for all the loss can reach: distributed training waits for every parameter."""
        zero = features.new_zeros((), dtype=accumulation_dtype(features.dtype))
        for part in [*self.parameters()] if self.detach else [features, *self.parameters()]:
            zero = zero + part.flatten()[:0].sum()
        return zero

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, {self.num_classes}, weight={self.weight}, penalty={self.penalty!r}, "
            f"temperature={self.temperature}, denominator={self.denominator!r}, detach={self.detach}, "
            f"gather_distributed={self.processes}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        bits = state_dict.get(f"{prefix}environments.bits")
        if bits is not None and len(bits) != self.num_classes:
            errors: list[str] = args[-1]
            errors.append(f"ClassWiseIRM: environments are of {len(bits)} classes, num_classes is {self.num_classes}")
        elif bits is not None and self.environments is None:
            self.environments = Environments().to(self.mask.weight.device)  # takes its sizes from what it loads
        super()._load_from_state_dict(state_dict, prefix, *args)


def _projection(num_features: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(num_features, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 128)
    )
