"""A data set with the index of each sample."""

from __future__ import annotations

import operator
from collections.abc import Sized
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from equireg._checks import Arguments

__all__ = ["WithIndex"]


class WithIndex(Dataset[Any]):
    """A map-style dataset whose items end with their index.

    Args:
        dataset: gives ``(image, label)`` or anything else for an index, and has a length.
        in_target: for trainers that hand on ``(image, target)`` alone, such as timm's: see below.

    Items are ``(*item, index)``: ``(image, label)`` becomes ``(image, label, index)``, and any other item becomes
    ``(item, index)``. A dict, as of Hugging Face, stays one: ``{**item, "index": index}``.
    All other attributes are read from, and set on, the wrapped dataset.

    With ``in_target``, items are ``(image, target)``, where the target is the int64 array ``[label, index]``. A batch
    of targets is int64 [B, 2], by PyTorch's ``default_collate`` and by timm's ``fast_collate``, and
    :meth:`labels_and_indices` takes it apart. A loss that gets the target whole raises an error by its shape.

    Raises:
        TypeError: the dataset is iterable-style or has no length, so its samples have no index; ``in_target`` is
            neither True nor False; with it, on reading, an item that is not ``(image, label)`` with a whole label.
        ValueError: at a dict that has a key ``"index"`` already.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> image, label, index = WithIndex(TensorDataset(torch.rand(4, 3), torch.arange(4)))[2]
        >>> int(label), index
        (2, 2)
        >>> from torch.utils.data import DataLoader
        >>> pairs = WithIndex(TensorDataset(torch.rand(4, 3), torch.tensor([5, 6, 7, 8])), in_target=True)
        >>> images, target = next(iter(DataLoader(pairs, batch_size=2)))
        >>> WithIndex.labels_and_indices(target)
        (tensor([5, 6]), tensor([0, 1]))
    """

    def __init__(self, dataset: Dataset[Any], *, in_target: bool = False):
        check = Arguments("WithIndex")
        check_map_style(check, dataset)
        check.option("in_target", in_target, (True, False))
        super().__setattr__("dataset", dataset)
        super().__setattr__("in_target", in_target)

    @staticmethod
    def labels_and_indices(target: Tensor) -> tuple[Tensor, Tensor]:
        """The labels and the indices in a batch of targets of ``WithIndex(dataset, in_target=True)``.

        Args:
            target: int64 [B, 2], on any device.

        Returns:
            labels int64 [B], indices int64 [B].

        Raises:
            TypeError, ValueError: any other target, such as the soft one of Mixup or CutMix: a mixture of two samples
                has neither a label nor an index.
        """
        check = Arguments("WithIndex.labels_and_indices")
        whose = "[B, 2] of whole numbers, as WithIndex(dataset, in_target=True) gives it"
        if check.tensor("target", target).is_floating_point():
            got = f"{target.dtype} {list(target.shape)}: mixtures, as of Mixup or CutMix, have no index"
            got += " (for timm's train.py, equireg.integrations.timm has some that tell their samples)"
            check.fail_type("target", whose, got)
        if target.dim() != 2 or target.shape[1] != 2:
            check.fail("target", whose, list(target.shape))
        labels, indices = check.integers("target", target, "B 2").unbind(1)
        return labels, indices

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"WithIndex: index must be in 0 .. {len(self) - 1}, got {index}")
        item = self.dataset[index]
        if self.in_target:
            return _in_target(item, index % len(self))
        if isinstance(item, dict):
            if "index" in item:
                Arguments("WithIndex").fail("an item", "without a key 'index'", f"index = {item['index']!r}")
            return {**item, "index": index % len(self)}
        return (*(item if isinstance(item, tuple) else (item,)), index % len(self))

    def __getattr__(self, name: str) -> Any:
        # Called only for missing attributes; unpickling asks before `dataset` is set.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # ``wrapped.transform = ...`` must reach the dataset that transforms.
        if name not in ("dataset", "in_target") and hasattr(self.dataset, name):
            setattr(self.dataset, name, value)
        else:
            super().__setattr__(name, value)


def _in_target(item: Any, index: int) -> tuple[Any, Any]:
    # An array: a tuple is taken apart by default_collate, a tensor is refused by fast_collate of older timm.
    if not isinstance(item, tuple) or len(item) != 2:
        got = f"a tuple of {len(item)}" if isinstance(item, tuple) else type(item).__name__
        Arguments("WithIndex").fail_type("items", "(image, label) where in_target is set", got)
    image, label = item
    try:
        return image, np.array([operator.index(label), index], dtype=np.int64)
    except TypeError:
        Arguments("WithIndex").fail_type("labels", "whole numbers where in_target is set", type(label).__name__)


def check_map_style(args: Arguments, dataset: Dataset[Any]) -> None:
    """Raise unless the dataset takes an index and has a length."""
    has_items = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not has_items:
        args.fail_type("dataset", "map-style, with a length", type(dataset).__name__)
