"""A data set with the index of each sample."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from equireg._checks import Arguments

__all__ = ["WithIndex"]


class WithIndex(Dataset[Any]):
    """A map-style dataset whose items end with their index.

    Args:
        dataset: gives ``(image, label)`` or anything else for an index, and has a length.

    Items are ``(*item, index)``: ``(image, label)`` becomes ``(image, label, index)``, and any other item becomes
    ``(item, index)``. A dict, as of Hugging Face, stays one: ``{**item, "index": index}``.
    All other attributes are read from, and set on, the wrapped dataset.

    Raises:
        TypeError: the dataset is iterable-style or has no length, so its samples have no index.
        ValueError: at a dict that has a key ``"index"`` already.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> image, label, index = WithIndex(TensorDataset(torch.rand(4, 3), torch.arange(4)))[2]
        >>> int(label), index
        (2, 2)
    """

    def __init__(self, dataset: Dataset[Any]):
        check_map_style(Arguments("WithIndex"), dataset)
        super().__setattr__("dataset", dataset)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"WithIndex: index must be in 0 .. {len(self) - 1}, got {index}")
        item = self.dataset[index]
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
        if name != "dataset" and hasattr(self.dataset, name):
            setattr(self.dataset, name, value)
        else:
            super().__setattr__(name, value)


def check_map_style(args: Arguments, dataset: Dataset[Any]) -> None:
    """Raise unless the dataset takes an index and has a length."""
    has_items = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not has_items:
        args.fail_type("dataset", "map-style, with a length", type(dataset).__name__)
