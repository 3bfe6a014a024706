"""EqInv: class-wise invariant risk minimisation (Wang et al., "Equivariance and invariance inductive bias for learning
from insufficient data", ECCV 2022), Step 3.

One loss line beside cross entropy::

    features = backbone(images)
    loss = F.cross_entropy(head(irm.mask(features)), labels) + irm(features, labels, indices)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from equireg._agreement import Checksum
from equireg._checks import Arguments, for_layers, values_visible
from equireg.distributed import Group, Processes
from equireg.eqinv.adjusted_similarity import Adjust
from equireg.eqinv.batch import check_mask_alike, check_projection, checked_batch, facts_of, zero_of
from equireg.eqinv.class_risks import Batch, Compared, compare, risk_of, slope_of, sup_con_of
from equireg.eqinv.environments import Environments
from equireg.eqinv.feature_mask import FeatureMask
from equireg.eqinv.fitting import fitted_environments
from equireg.eqinv.halves import similar_in_batch
from equireg.invariance import irmv1_penalty, rex_penalty

__all__ = ["ClassWiseIRM"]


class ClassWiseIRMParts(NamedTuple):
    """What the loss is made of, for the K classes of this process that have two samples or more in the batch."""

    loss: Tensor  # 0-d, as ``forward`` gives it, with gradient
    risk: Tensor  # [K, 2], Env#1 and Env#2
    penalty: Tensor  # [K], before its weight
    classes: Tensor  # int64 [K], ascending


class ClassWiseIRM(nn.Module):
    r"""Class-wise invariant risk minimisation over environments it finds by itself.

    .. math::
        L = \operatorname*{mean}_k \Big[ \rho \sum_e \ell(k, e) + \lambda \cdot
        \begin{cases} \text{Var}_e\, \ell(k, e) & \text{REx, Eq. 16} \\
        \sum_e (\partial \ell(k, e, w) / \partial w |_{w=1})^2 & \text{IRMv1, Eq. 6} \end{cases} \Big]

    over the classes :math:`k` with two or more samples in the batch, with the risks of :func:`class_wise_risks` on
    :math:`z = g(\sigma(m) \circ \phi(x))`. EqInv (Wang et al., 2022), Section 4.

    Args:
        num_features: width D of the backbone's features.
        num_classes: how many there are, C.
        weight: λ, at least 0; can be set later (``irm.weight = 100.0`` from some epoch on). Choose it on validation
            images. The paper contradicts itself: its supplementary B prints 2, 10 and 100 for 10, 20 and 50 images
            per class, and beside it that the demand falls with more samples; its Fig. 6a finds 10 best at 20 images;
            the released commands have 100 at 10 images, and with RandAugment 10 at all three.
        penalty: ``"rex"`` or ``"irmv1"``.
        temperature: of the cosine similarities, above 0.
        denominator: as in :func:`class_wise_risks`.
        projection: g; by default Linear(D, 512, no bias), BatchNorm, ReLU, Linear(512, 128). With
            ``detach="penalty"`` it runs twice on a batch, so dropout in it draws anew for the penalty.
        detach: what the backbone φ learns from. ``"penalty"``: from the risk, not from the penalty, which trains the
            mask and g alone (the paper's text, the released code). True: from neither (Eq. 7 to the letter). False:
            from both (the paper's ablation, Fig. 6a).
        contrast: ``"environments"``, the risk above; ``"batch"``, instead of it SupCon over the whole batch, which the
            released code takes.
        penalty_on: ``"projection"``, the risks of z; ``"features"``, those of the masked features, without g.
        risk_weight: ρ, of the contrast, at least 0. With few images per class in a batch the contrast mostly pushes
            classes apart: 0.1 was better than 1 where it was tried on 50 classes with 10 images.
        sample_weights: weigh the anchors of the risk, and of SupCon, by :meth:`Environments.weights`; it takes
            fitted environments and indices.
        num_samples: length of the dataset. The environments are then buffers of full size from the start, for moving
            averages of the model, DistributedDataParallel and checkpoints that are made before the environments.
        gather_distributed: whether the batch is that of all processes, or of a process group, with its gradient: the
            loss is then the same in all of them, and under DistributedDataParallel so are its gradients to one process
            with the whole batch. (The penalty is the square of a mean, so the mean of each process's loss is another.)
            Each must bring the same number of samples, or all raise the same ValueError. The default projection
            normalises over the batch of its process, unless it is made a ``SyncBatchNorm``.

    Attributes:
        mask: the :class:`FeatureMask` that the classifier shares: ``head(irm.mask(features))``. Validate and export
            through it too: :meth:`fold_into`.
        environments: the fitted :class:`Environments`, saved in ``state_dict``; None before :meth:`fit_environments`
            (with ``num_samples``, of full size and not ``fitted``).

    Without fitted environments, or for a loader that gives no indices, each batch is split by itself: an approximation,
    better the more samples of each class a batch holds.

    Shapes and behaviour of the call ``irm(features [B, D], labels [B], indices [B] | None) -> loss``: a 0-d tensor in
    float32 (float64 for a module and features of it). Where no class has two samples, the loss is a zero with zero
    gradients; the first such batch of more than one sample warns (on CPU). By default each process of a distributed run
    takes the classes of its own batch. The environments are buffers, which ``DistributedDataParallel`` sends to every
    process at each step unless told ``broadcast_buffers=False``: tell it so where the dataset is large.

    Raises:
        TypeError, ValueError: arguments of a wrong type, shape or range; on CPU also labels or indices out of range,
            and labels other than those fitted at the same index; ``indices`` given before the environments are fitted;
            masks that differ between processes, looked at in calls that train, until the optimizer has moved them.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> features, labels = torch.randn(40, 16), torch.arange(40) % 4
        >>> irm = ClassWiseIRM(16, 4).fit_environments(features, labels)
        >>> batch = torch.arange(0, 40, 3)
        >>> loss = irm(features[batch], labels[batch], batch)
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)
        >>> irm.parts(features[batch], labels[batch], batch).classes
        tensor([0, 1, 2, 3])
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
        detach: bool | str = "penalty",
        contrast: str = "environments",
        penalty_on: str = "projection",
        risk_weight: float = 1.0,
        sample_weights: bool = False,
        num_samples: int | None = None,
        gather_distributed: bool | Group = False,
    ):
        super().__init__()
        check = Arguments("ClassWiseIRM")
        check.count("num_features", num_features)
        check.count("num_classes", num_classes)
        check.option("penalty", penalty, ("rex", "irmv1"))
        check.positive("temperature", temperature)
        check.option("denominator", denominator, ("own", "all"))
        check.option("detach", detach, ("penalty", True, False))
        check.option("contrast", contrast, ("environments", "batch"))
        check.option("penalty_on", penalty_on, ("projection", "features"))
        check.not_negative("risk_weight", risk_weight)
        check.option("sample_weights", sample_weights, (True, False))
        if num_samples is not None:
            check.count("num_samples", num_samples)
        if projection is not None and not isinstance(projection, nn.Module):
            check.fail_type("projection", "an nn.Module or None", type(projection).__name__)
        check_projection(check, projection, num_features)
        self.num_features, self.num_classes, self.num_samples = num_features, num_classes, num_samples
        self.weight, self.penalty = weight, penalty
        self.temperature, self.denominator, self.detach = temperature, denominator, detach
        self.contrast, self.penalty_on, self.risk_weight = contrast, penalty_on, risk_weight
        self.sample_weights = sample_weights
        self.processes, self.checksum = Processes("ClassWiseIRM", gather_distributed), Checksum()
        self._warned, self._moved_alike, self._mask_seen = False, False, None
        self.mask = FeatureMask(num_features)
        self.projection = projection if projection is not None else _projection(num_features)
        self.register_module("environments", None if num_samples is None else Environments(num_classes, num_samples))
        self.register_load_state_dict_post_hook(_form_weights)  # type: ignore[no-untyped-call]

    @classmethod
    def released(
        cls,
        num_features: int,
        num_classes: int,
        *,
        weight: float = 100.0,
        num_samples: int | None = None,
        gather_distributed: bool | Group = False,
    ) -> ClassWiseIRM:
        r"""The objective of the authors' code, which is not that of their paper.

        .. math:: L = \text{CE}(\text{head}(f)) + \tfrac{0.1}{0.07} \text{SupCon}(g(f)) +
            \lambda \operatorname*{mean}_k \text{Var}_e\, \ell'(k, e), \qquad
            f = 10 \cdot \text{normalize}(\sigma(m) \circ \phi)

        SupCon runs over the whole batch (both views) and trains φ. :math:`\ell'` are the risks of the masked features
        themselves, with all positives in the denominator, and do not train φ. The mask normalises, with scale 10: the
        head is a plain linear layer on ``irm.mask(features)``. The released commands set λ to 0 for the first ten of
        fifty epochs, and then to 100 (10 images per class), or to 10 with RandAugment (10, 20 and 50 images).
        """
        irm = cls(
            num_features,
            num_classes,
            weight=weight,
            denominator="all",
            contrast="batch",
            penalty_on="features",
            risk_weight=0.1 / 0.07,
            num_samples=num_samples,
            gather_distributed=gather_distributed,
        )
        irm.mask.scale = 10.0
        return irm

    @property
    def weight(self) -> float:
        """λ, of the penalty."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        Arguments("ClassWiseIRM").not_negative("weight", weight)
        self._weight = weight

    def fit_environments(
        self,
        features: Tensor | Iterable[Any],
        labels: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        encoder: Callable[[Tensor], Tensor] | None = None,
        num_samples: int | None = None,
        adjust: Adjust = True,
        whiten: int | None = None,
        score: str = "similarity",
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
            whiten, score: as in :meth:`Environments.split`.
            progress: whether ``encoder`` runs with a progress bar, where tqdm is installed.

        Returns:
            The module itself. Features given as a tensor are kept by reference, to rank ``environments.members``
            (``environments.release()`` lets them go); those of ``encoder`` are let go at once.

        Raises:
            TypeError, ValueError: as :meth:`Environments.split`; what goes with ``encoder`` and what does not; a loader
                that leaves samples of its dataset out, unless ``num_samples`` is given.
        """
        num_samples = self.num_samples if num_samples is None else num_samples
        environments = fitted_environments(
            *(features, labels, indices),
            num_classes=self.num_classes,
            encoder=encoder,
            num_samples=num_samples,
            progress=progress,
            adjust=adjust,
            whiten=whiten,
            score=score,
        ).to(self.mask.weight.device)
        if self.environments is not None and self.environments.num_samples == environments.num_samples:
            self.environments.become(environments)  # in place: who holds these buffers sees the change
        else:
            self.environments = environments
        _form_weights(self)
        return self

    def fold_into(self, head: nn.Module) -> nn.Module:
        """``head ∘ mask`` as one module, for validation, export and plain checkpoints: ``FeatureMask.fold_into``.

        Example:
            >>> import torch
            >>> irm, head = ClassWiseIRM(16, 4), nn.Linear(16, 4)
            >>> features = torch.randn(2, 16)
            >>> folded = irm.fold_into(head)
            >>> type(folded).__name__, torch.allclose(folded(features), head(irm.mask(features)), atol=1e-6)
            ('Linear', True)
        """
        return self.mask.fold_into(head)

    def forward(self, features: Tensor, labels: Tensor, indices: Tensor | None = None) -> Tensor:
        return self._terms(features, labels, indices)[0]

    def parts(self, features: Tensor, labels: Tensor, indices: Tensor | None = None) -> ClassWiseIRMParts:
        """The loss, and what it is made of, detached: what to log.

        Args:
            features: as of the call itself, like the others.

        Returns:
            ``(loss, risk [K, 2], penalty [K], classes [K])``.
        """
        loss, terms = self._terms(features, labels, indices)
        if terms is None:
            nothing = loss.detach().new_zeros(0)
            return ClassWiseIRMParts(loss, nothing.view(0, 2), nothing, labels[:0].long())
        compared, risk, penalty = terms
        first = compared.first_of_each_class()
        first = first[labels[first].argsort()]
        return ClassWiseIRMParts(loss, risk.detach()[first], penalty.detach()[first], labels[first].long())

    def _terms(
        self, features: Tensor, labels: Tensor, indices: Tensor | None
    ) -> tuple[Tensor, tuple[Compared, Tensor, Tensor] | None]:
        """The loss; the comparison of the batch, and by sample the risks [B, 2] and penalties [B] of its class."""
        check_mask_alike(self)
        with self.processes.alike() as facts:
            labels, indices = checked_batch(self, features, labels, indices)
            if self.processes.size > 1:
                facts.update(facts_of(self, features, labels, indices))
        if len(features) * self.processes.size < 2:  # no pair; a BatchNorm in the projection would refuse the batch
            return zero_of(self, features), None
        features = features.contiguous()  # so that the layers sum in the same order whatever the strides
        frozen = features.detach()
        batch = self._batch(frozen, labels, indices)

        masked = self.mask(frozen if self.detach is True else features)
        compared = compare(self.projection(for_layers(self.projection, masked)), batch)
        risk = risk_of(compared, self.denominator)
        by_batch = self.contrast == "batch"
        contrast = compared.anchor_mean(sup_con_of(compared)) if by_batch else compared.class_mean(risk.sum(1))
        penalised = self._penalised(features if self.detach is False else frozen, compared, batch)
        if self.penalty == "rex":
            penalty = rex_penalty(risk_of(penalised, self.denominator))
        else:
            penalty = irmv1_penalty(slope_of(penalised, self.denominator))
        loss = self.risk_weight * contrast
        if self.weight > 0:
            loss = loss + self.weight * compared.class_mean(penalty)
        self._warn_where_there_is_no_pair(compared)
        return loss, (compared, risk, penalty)

    def _penalised(self, features: Tensor, compared: Compared, batch: Batch) -> Compared:
        """What the penalty compares: what the risk does, where both are of one embedding with one gradient."""
        if self.penalty_on == "features":
            return compare(self.mask.select(features), batch, source=features.dtype)
        if self.detach != "penalty" or self.weight == 0:
            return compared
        # The same values once more, without the gradient into φ; running statistics count the batch only once.
        buffers = {name: buffer.clone() for name, buffer in self.projection.named_buffers()}
        masked = for_layers(self.projection, self.mask(features))
        return compare(functional_call(self.projection, buffers, (masked,)), batch)

    def _batch(self, features: Tensor, labels: Tensor, indices: Tensor | None) -> Batch:
        processes = self.processes
        all_labels, weights = processes.gather(labels).flatten(), None
        if indices is not None and self.environments is not None:
            everyone = processes.gather(indices).flatten()
            similar = self.environments.similar(labels, everyone)
            weights = self.environments.weights(everyone) if self.sample_weights else None
        else:
            similar = similar_in_batch(processes.gather(features).flatten(0, 1), all_labels)
            similar = similar[processes.rank * len(labels) :][: len(labels)]
        return Batch(labels, all_labels, similar, self.temperature, processes, weights)

    def _warn_where_there_is_no_pair(self, compared: Compared) -> None:
        if not self._warned and values_visible(compared.size) and not (compared.size > 1).any():
            self._warned = True
            text = "ClassWiseIRM: no class has two samples in this batch, so the loss is 0"
            warnings.warn(f"{text}; draw batches of several samples a class", stacklevel=5)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, {self.num_classes}, weight={self.weight}, penalty={self.penalty!r}, "
            f"temperature={self.temperature}, denominator={self.denominator!r}, detach={self.detach!r}, "
            f"contrast={self.contrast!r}, penalty_on={self.penalty_on!r}, risk_weight={self.risk_weight}, "
            f"sample_weights={self.sample_weights}, gather_distributed={self.processes}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        bits = state_dict.get(f"{prefix}environments.bits")
        if bits is not None and len(bits) != self.num_classes:
            errors: list[str] = args[-1]
            errors.append(f"ClassWiseIRM: environments are of {len(bits)} classes, num_classes is {self.num_classes}")
        elif bits is not None and self.environments is None:
            self.environments = Environments().to(self.mask.weight.device)  # takes its sizes from what it loads
        super()._load_from_state_dict(state_dict, prefix, *args)


def _form_weights(irm: ClassWiseIRM, *_: Any) -> None:
    """Once, after fitting or loading, and not in a step: a compiled one could not keep them."""
    if irm.sample_weights and irm.environments is not None and irm.environments.fitted:
        irm.environments.weights(irm.environments.labels[:0])


def _projection(num_features: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(num_features, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 128)
    )
