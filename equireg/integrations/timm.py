"""EqInv in timm's own training script: the weights of the environments and class-wise IRM, as one of timm's tasks.

Needs ``timm.task``, as of timm 1.0.31. The patch of ``train.py`` is in ``docs/guides/timm.md``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from equireg._checks import Arguments
from equireg.data.with_index import WithIndex
from equireg.eqinv.class_wise_irm import ClassWiseIRM
from equireg.integrations._mixtures import FastCollateMixup, Mixture, Mixup

__all__ = ["EqInvTask", "FastCollateMixup", "Mixup"]


class EqInvTask(ClassificationTask):  # type: ignore[misc]  # timm has no types
    r"""timm's ``ClassificationTask`` with the weights of the environments and class-wise IRM.

    .. math::
        L = \frac{1}{B} \sum_n w(n) \cdot \text{criterion}(h(\sigma(m) \circ \phi(x_n)), y_n) + L_\text{IRM}

    with :math:`w` of :meth:`equireg.Environments.weights` and :math:`L_\text{IRM}` of :class:`equireg.ClassWiseIRM`.

    The trained module is the model with the mask before its classifier, and ``irm``: timm's optimizer, moving average,
    DistributedDataParallel and compilation take both, and timm's evaluation goes through the mask. A checkpoint's
    ``state_dict`` is that of the plain model, with the mask folded into its classifier, so ``timm.create_model`` and
    timm's scripts load it; its ``task_state`` is what resuming needs besides, bit for bit.

    Args:
        model: one of timm's, whose classifier is an ``nn.Linear``. Changed in place: the mask comes before that.
        irm: for the features that enter the classifier. Its environments are fitted before the first step.
        sharpness: as of ``Environments.weights``; "auto" follows the signs of a bias, and 0 is for no weights.
        options: as of ``ClassificationTask``. ``criterion`` is a mean over the batch.

    The call ``task(input [B, C, H, W], target [B, 2])`` takes the targets of ``WithIndex(dataset, in_target=True)``,
    and returns ``{"loss": 0-d, "output": logits [B, C]}``. With ``criterion_kwargs=dict(soft_targets=True)`` it takes
    mixtures, with the targets [B, 6] of :class:`Mixup` or :class:`FastCollateMixup` of this module, which stand for
    timm's: the criterion of each of its two samples then counts by its share and its own weight, and to
    :math:`L_\text{IRM}` a mixture is the sample that has the larger share of it.

    Raises:
        TypeError, ValueError: a model whose classifier is no ``nn.Linear`` of ``irm.num_features``; an ``irm`` whose
            mask has a scale, which does not fold into a linear layer; mixtures of timm's own; timm's binary cross
            entropy, or another criterion that is not the mean of what it is of each sample, as with weights of
            classes, unless ``sharpness`` is 0.
    """

    def __init__(self, model: nn.Module, *, irm: ClassWiseIRM, sharpness: float | str = "auto", **options: Any) -> None:
        check = Arguments("EqInvTask")
        if not isinstance(irm, ClassWiseIRM):
            check.fail_type("irm", "a ClassWiseIRM", type(irm).__name__)
        if irm.mask.scale is not None:
            check.fail("irm", "one whose mask has no scale, so that it folds into the classifier", irm.mask.scale)
        super().__init__(_Masked(check, model, irm, sharpness), **options)
        self.mixed = bool((options.get("criterion_kwargs") or {}).get("soft_targets"))
        if sharpness and not self._is_a_mean_over_samples(irm.num_classes):
            rule = "cross entropy without weights of classes, or another that is the mean of what torch.vmap takes "
            rule += "sample by sample, or sharpness=0"
            check.fail("criterion", rule, type(self.criterion).__name__)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.mixed:
            return self._of_mixtures(input, Mixture.of(target))
        labels, indices = WithIndex.labels_and_indices(target)
        logits, invariance, weights = self.trainable_module(input, labels, indices)
        if weights is None:
            loss = self.criterion(logits, labels)
        else:
            loss = (weights[0] * self._sample_by_sample(logits, labels)).mean()
        return {"loss": loss + invariance, "output": logits}

    def _of_mixtures(self, input: Tensor, mixture: Mixture) -> dict[str, Tensor]:
        labels, indices = mixture.larger()
        both = torch.stack([mixture.indices, mixture.other_indices])
        logits, invariance, weights = self.trainable_module(input, labels, indices, both)
        first, other = mixture.soft(logits.shape[1])
        if weights is None:
            loss = self.criterion(logits, other.lerp(first, mixture.share[:, None]))
        else:
            of_first, of_other = (self._sample_by_sample(logits, soft) for soft in (first, other))
            loss = (mixture.share * weights[0] * of_first + (1 - mixture.share) * weights[1] * of_other).mean()
        return {"loss": loss + invariance, "output": logits}

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = unwrap_model) -> dict[str, Any]:
        masked = self.get_eval_model(ema=ema)
        if masked is None:
            return {}
        suffix = "_ema" if ema else ""
        with torch.no_grad():
            state, task_state = unwrap_fn(masked).plain_and_own_state()
        return {f"state_dict{suffix}": state, f"task_state{suffix}": task_state}

    def load_checkpoint_state(
        self,
        state_dict: dict[str, Tensor],
        task_state: dict[str, Any] | None = None,
        ema: bool = False,
        strict: bool = True,
    ) -> None:
        if not task_state:
            rule = "one that EqInvTask saved; start from another by --initial-checkpoint"
            Arguments("EqInvTask").fail("checkpoint", rule, "one without a task_state")
        unwrap_model(self.get_eval_model(ema=ema)).load_both(state_dict, task_state, strict)

    def _is_a_mean_over_samples(self, num_classes: int) -> bool:
        if isinstance(self.criterion, BinaryCrossEntropy):  # its threshold is for whole mixtures
            return False
        labels = torch.arange(min(num_classes, 256))
        logits = torch.arange(len(labels) * num_classes).sin().view(len(labels), num_classes)
        some = F.one_hot(labels, num_classes).float() if self.mixed else labels
        try:
            return bool(torch.isclose(self._sample_by_sample(logits, some).mean(), self.criterion(logits, some)))
        except (RuntimeError, AssertionError):
            return False

    def _sample_by_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The criterion, a mean over the batch, of each sample alone: [B]."""
        losses: Tensor = torch.vmap(self.criterion)(logits[:, None], labels[:, None])
        return losses


class _Masked(nn.Module):
    """A model with the mask before its classifier, and the loss of class-wise IRM in the same call.

    In one call, as DistributedDataParallel looks at nothing else.
    """

    def __init__(self, check: Arguments, model: nn.Module, irm: ClassWiseIRM, sharpness: float | str):
        super().__init__()
        head = getattr(model, "get_classifier", lambda: None)()
        if not isinstance(head, nn.Linear):
            check.fail_type("model", "one of timm's with an nn.Linear as classifier", type(head).__name__)
        if head.in_features != irm.num_features or head.out_features != irm.num_classes:
            rule = f"for the model's {head.in_features} features and {head.out_features} classes"
            check.fail("irm", rule, f"{irm.num_features} and {irm.num_classes}")
        # In this order, as timm takes the last two parameters for the classifier's: --clip-mode agc leaves them out.
        self.irm = irm.to(head.weight.device, head.weight.dtype)
        self.model, self.sharpness = model, sharpness
        if any(getattr(hook, "__func__", None) is _Masked._mask for hook in head._forward_pre_hooks.values()):
            check.fail("model", "without a mask; create it anew", "one that an EqInvTask wrapped already")
        self.head = next(name for name, module in model.named_modules() if module is head)
        # A bound method, as a copy of this module, the moving average, binds its own. A closure would bind this one.
        head.register_forward_pre_hook(self._mask)
        self._seen: list[Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        indices: Tensor | None = None,
        weighed: Tensor | None = None,
    ) -> Any:
        """Logits; with labels and indices [B] also the loss of the IRM, and the weights [S, B] or None.

        Those of the samples ``weighed`` [S, B], by default of ``indices`` alone.
        """
        seen: list[Tensor] = []
        self._seen = seen
        logits, self._seen = self.model(x), None
        if labels is None or indices is None:
            return logits
        if len(seen) != 1:
            Arguments("EqInvTask").fail("model", "one that calls its classifier once", f"{len(seen)} calls")
        invariance, environments = self.irm(seen[0], labels, indices), self.irm.environments
        if not self.sharpness or environments is None:
            return logits, invariance, None
        weighed = indices[None] if weighed is None else weighed
        weights = environments.weights(weighed.flatten(), sharpness=self.sharpness)
        return logits, invariance, weights.view(weighed.shape)

    def _mask(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        if self._seen is not None:  # not where the model runs alone
            self._seen.append(args[0])
        return (self.irm.mask(args[0]),)

    def plain_and_own_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state of the plain model that classifies as this one does, and what else this one is made of."""
        state, name = self.model.state_dict(), f"{self.head}.weight"
        own = {"irm": self.irm.state_dict(), "head_weight": state[name]}
        return {**state, name: self.irm.mask.select(state[name])}, own

    def load_both(self, state: dict[str, Tensor], own: dict[str, Any], strict: bool) -> None:
        self.model.load_state_dict({**state, f"{self.head}.weight": own["head_weight"]}, strict=strict)
        self.irm.load_state_dict(own["irm"], strict=strict)
