"""timm's Mixup and CutMix for targets that have an index: each mixture still tells which two samples are in it.

In timm's ``train.py`` they take the place of timm's own by their names::

    from equireg.integrations.timm import EqInvTask, FastCollateMixup, Mixup
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm import data
from torch import Tensor
from torch.utils.data import default_collate

from equireg._checks import Arguments
from equireg.data.with_index import WithIndex


class Mixture(NamedTuple):
    """The two samples of each mixed image of a batch, [B] each."""

    labels: Tensor
    indices: Tensor
    other_labels: Tensor
    other_indices: Tensor
    share: Tensor  # of the first sample, 0 .. 1
    smoothing: Tensor  # of the labels, the same for all

    @classmethod
    def of(cls, target: Tensor) -> Mixture:
        """Columns of the targets of ``Mixup`` and ``FastCollateMixup``, float64 [B, 6]."""
        # timm's own soft labels of six classes are [B, 6] too, but float32.
        if target.dim() != 2 or target.shape[1] != len(cls._fields) or target.dtype != torch.float64:
            rule = "float64 [B, 6], as of Mixup and FastCollateMixup of equireg.integrations.timm: timm's have no index"
            Arguments("EqInvTask").fail("target", rule, f"{target.dtype} {list(target.shape)}")
        label, index, other_label, other_index = target[:, :4].long().unbind(1)
        share, smoothing = target[:, 4:].float().unbind(1)
        return cls(label, index, other_label, other_index, share, smoothing)

    def larger(self) -> tuple[Tensor, Tensor]:
        """Label and index of the sample that has the larger share, [B] each."""
        first = self.share >= 0.5
        return self.labels.where(first, self.other_labels), self.indices.where(first, self.other_indices)

    def soft(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """The smoothed labels of the first samples, and of the other ones, float32 [B, C] each."""
        first, other = (F.one_hot(labels, num_classes).float() for labels in (self.labels, self.other_labels))
        smoothing = self.smoothing[:, None]
        return first + smoothing * (1 / num_classes - first), other + smoothing * (1 / num_classes - other)


class _Indexed(data.Mixup):  # type: ignore[misc]  # timm has no types
    """What both share: timm is given places in the batch for labels, and what it returns tells each sample's share."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.multi_label:
            Arguments(type(self).__name__).fail("multi_label", "False: one label a sample", True)
        self.smoothing: float = self.label_smoothing
        self.label_smoothing: float = 0.0

    def _targets(self, shares: Tensor, target: Tensor) -> Tensor:
        """[M, 6], as ``Mixture`` reads it, from the shares [M, B] that the samples have in the mixtures."""
        labels, indices = WithIndex.labels_and_indices(target)
        first = torch.arange(len(shares), device=target.device)
        other = len(target) - 1 - first  # timm mixes a batch with its reverse
        share = shares[first, first].to(target.device, torch.float64)
        samples = [labels[first], indices[first], labels[other], indices[other]]
        return torch.stack([*(column.double() for column in samples), share, torch.full_like(share, self.smoothing)], 1)


class Mixup(_Indexed):
    """``timm.data.Mixup`` of batches whose targets [B, 2] are of ``WithIndex(dataset, in_target=True)``.

    Args:
        args, options: as of timm's.

    The call ``mixup(x [B, ...], target [B, 2])`` returns the mixed images, as timm's does from the same random numbers,
    and float64 [B, 6] that ``EqInvTask`` reads. B is even.

    Raises:
        TypeError, ValueError: other targets; ``multi_label``.

    Example:
        >>> import torch
        >>> target = torch.tensor([[0, 8], [2, 5]])  # labels and indices
        >>> images, mixed = Mixup(prob=0.0, label_smoothing=0.1)(torch.rand(2, 3, 8, 8), target)
        >>> mixed[:, :5].tolist()  # label and index, those of the other sample, and the share of the first one
        [[0.0, 8.0, 2.0, 5.0, 1.0], [2.0, 5.0, 0.0, 8.0, 1.0]]
    """

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self.num_classes = len(x)
        x, shares = super().__call__(x, torch.arange(len(x), device=x.device))
        return x, self._targets(shares, target)


class FastCollateMixup(_Indexed, data.FastCollateMixup):  # type: ignore[misc]
    """``timm.data.FastCollateMixup``, for timm's prefetching loader: as :class:`Mixup`, of items that are collated.

    Args:
        args, options: as of timm's.

    Example:
        >>> import numpy as np
        >>> items = [(np.zeros((3, 8, 8), np.uint8), np.array([label, label + 4])) for label in range(2)]
        >>> images, mixed = FastCollateMixup(prob=0.0)(items)
        >>> images.shape, mixed.shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 6]))
    """

    def __call__(self, batch: list[Any], _: Any = None) -> tuple[Tensor, Tensor]:
        self.num_classes = len(batch)
        images, shares = super().__call__([(image, place) for place, (image, _) in enumerate(batch)])
        return images, self._targets(shares, default_collate([target for _, target in batch]))
