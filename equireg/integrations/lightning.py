"""Callbacks for Lightning, for what happens between its steps: searches over the whole dataset, and a growing weight.

They work with ``pytorch_lightning`` and with ``lightning``. What a step logs needs none of them::

    parts = self.irm.parts(features, labels, indices)  # in training_step, instead of self.irm(...)
    self.log_dict({"irm": parts.loss, "irm_penalty": parts.penalty.mean()})
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor

from equireg._checks import Arguments
from equireg.eqinv.context_weights import SCORES
from equireg.eqinv.fitting import fitted_environments
from equireg.features import check_callable

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
except ImportError:  # the same package under its other name
    from lightning.pytorch import Callback, LightningModule, Trainer  # type: ignore[no-redef]

__all__ = ["FindPartitions", "FitEnvironments", "WarmUpWeight"]


class FitEnvironments(Callback):
    """Find the environments of a dataset with the model as it is, on its device, before the given epochs.

    Before epoch 0 means at ``on_fit_start``: the model is on its device, and what ``ckpt_path`` names is loaded.
    Environments that are there already, as in a resumed run, are then kept. Those found before a later epoch replace
    them. Validating, testing and predicting find none. In a distributed run each process takes the whole dataset.

    Args:
        environments: a :class:`ClassWiseIRM` or an :class:`Environments` of full size (``Environments(num_classes,
            num_samples)``), a submodule of the LightningModule, so that its checkpoints hold what is found.
        loader: ``(images, labels, indices)`` of the whole dataset, as over ``WithIndex(dataset)``, without random
            augmentation.
        encoder: images [B, ...] to features [B, D], such as ``model.backbone``. Run in eval mode without gradient, and
            left as it was.
        epochs: before which epochs, counted from 0.
        whiten, score: as of :meth:`Environments.split`.
        progress: whether to show a bar, where tqdm is installed.

    Raises:
        TypeError, ValueError: arguments of another kind; while fitting, as :meth:`ClassWiseIRM.fit_environments`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from equireg import ClassWiseIRM
        >>> backbone, irm = nn.Linear(8, 4), ClassWiseIRM(4, num_classes=2)  # of your LightningModule
        >>> loader = [(torch.rand(6, 8), torch.arange(6) % 2, torch.arange(6))]  # over WithIndex(dataset)
        >>> trainer = Trainer(callbacks=[FitEnvironments(irm, loader, encoder=backbone)], logger=False)
    """

    def __init__(
        self,
        environments: Any,
        loader: Iterable[Any],
        *,
        encoder: Callable[[Tensor], Tensor],
        epochs: Collection[int] = (0,),
        whiten: int | None = None,
        score: str = "similarity",
        progress: bool = True,
    ):
        check = Arguments("FitEnvironments")
        if not hasattr(environments, "fit_environments") and not hasattr(environments, "become"):
            check.fail_type("environments", "a ClassWiseIRM or Environments", type(environments).__name__)
        if getattr(environments, "num_samples", None) == 0:
            check.fail("environments", "of full size, Environments(num_classes, num_samples)", "empty ones")
        check_callable(check, "encoder", encoder)
        check.option("score", score, SCORES)
        self.environments, self.loader, self.encoder = environments, loader, encoder
        self.epochs = _checked_epochs(check, epochs)
        self.whiten, self.score, self.progress = whiten, score, progress

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = getattr(self.environments, "environments", self.environments)
        if 0 in self.epochs and (found is None or not found.fitted):
            self._fit()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if _begins(trainer, batch_idx) in self.epochs - {0}:
            self._fit()

    def _fit(self) -> None:
        options: dict[str, Any] = {"encoder": self.encoder, "progress": self.progress}
        options |= {"whiten": self.whiten, "score": self.score}
        if hasattr(self.environments, "fit_environments"):
            self.environments.fit_environments(self.loader, **options)
            return
        sizes = {"num_classes": self.environments.num_classes, "num_samples": self.environments.num_samples}
        found = fitted_environments(self.loader, None, None, **sizes, **options)
        self.environments.become(found)


class FindPartitions(Callback):
    """Let a :class:`PartitionUpdater` find one more partition before each of the given epochs, in all processes.

    What it finds, and its report, are in the checkpoints if the loss that follows the updater is a submodule of the
    LightningModule. A resumed run goes on with the next of the epochs.

    Args:
        updater: the :class:`PartitionUpdater`.
        loader: ``((view1, view2), indices)`` of the whole dataset; see :meth:`PartitionUpdater.update`.
        encoder: views [B, ...] to features [B, d], such as ``model.encoder``. Run in eval mode without gradient, and
            left as it was.
        epochs: before which epochs, counted from 0: ``range(50, 800, 50)`` is the paper's. The released code begins
            with 0.
        progress: whether to show bars, where tqdm is installed.

    Raises:
        TypeError, ValueError: arguments of another kind; while searching, as :meth:`PartitionUpdater.update`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from equireg import PartitionUpdater
        >>> encoder, updater = nn.Linear(8, 4), PartitionUpdater(num_samples=6)  # the loss of your module follows it
        >>> loader = [((torch.rand(6, 8), torch.rand(6, 8)), torch.arange(6))]
        >>> found = FindPartitions(updater, loader, encoder=encoder, epochs=range(50, 800, 50))
        >>> trainer = Trainer(callbacks=[found], logger=False)
    """

    def __init__(
        self,
        updater: Any,
        loader: Iterable[Any],
        *,
        encoder: Callable[[Tensor], Tensor],
        epochs: Collection[int],
        progress: bool = True,
    ):
        check = Arguments("FindPartitions")
        if not hasattr(updater, "update") or not hasattr(updater, "partitions"):
            check.fail_type("updater", "a PartitionUpdater", type(updater).__name__)
        check_callable(check, "encoder", encoder)
        self.updater, self.loader, self.encoder, self.progress = updater, loader, encoder, progress
        self.epochs = _checked_epochs(check, epochs)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if _begins(trainer, batch_idx) in self.epochs:
            self.updater.update(self.loader, encoder=self.encoder, progress=self.progress)


class WarmUpWeight(Callback):
    r"""Let the weight of a loss grow linearly from 0 to what it is set to.

    .. math:: \lambda(t) = \lambda \min\Big(1, \frac{\max(0, t + 1 - \text{start})}{\text{steps}}\Big)

    in optimizer step :math:`t = 0, 1, \dots` (``trainer.global_step``, with which a resumed run goes on).

    Args:
        loss: anything with a number ``weight``, such as :class:`ClassWiseIRM`, :class:`IPIRMLoss` or your own module.
        steps: how many steps it takes to grow, at least 1, which is a jump.
        start: the first step whose weight is not 0. The released code of EqInv has its penalty from epoch 10 on:
            ``start=10 * len(loader), steps=1``.

    Raises:
        TypeError, ValueError: a loss without such a weight, steps that are not whole numbers or too few.

    Example:
        >>> from equireg import ClassWiseIRM
        >>> irm = ClassWiseIRM(4, num_classes=2, weight=10.0)  # of your LightningModule
        >>> trainer = Trainer(callbacks=[WarmUpWeight(irm, steps=1000)], logger=False)
    """

    def __init__(self, loss: Any, *, steps: int, start: int = 0):
        check = Arguments("WarmUpWeight")
        check.number("loss.weight", getattr(loss, "weight", None))
        check.count("steps", steps)
        check.count("start", start, least=0)
        self.loss, self.weight, self.steps, self.start = loss, loss.weight, steps, start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.loss.weight = self.weight * min(1.0, max(0, trainer.global_step + 1 - self.start) / self.steps)


def _checked_epochs(check: Arguments, epochs: Collection[int]) -> frozenset[int]:
    if not isinstance(epochs, Collection):
        check.fail_type("epochs", "several whole numbers, such as (0, 10)", f"{type(epochs).__name__} {epochs!r}")
    if not epochs:
        check.fail("epochs", "of one epoch at least", epochs)
    for epoch in epochs:
        check.count("epochs", epoch, least=0)
    return frozenset(epochs)


def _begins(trainer: Trainer, batch_idx: int) -> int | None:
    """The epoch that begins with this batch, or None.

    Not by ``on_train_epoch_start``: Lightning leaves it out where a run resumes from the last step of an epoch.
    """
    return None if batch_idx else trainer.current_epoch
