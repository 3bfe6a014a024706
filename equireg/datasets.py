"""Datasets as the methods need them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence, Sized
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from equireg._checks import Arguments
from equireg.image_files import ImageFiles


class WithIndex(Dataset[tuple[Any, ...]]):
    """Any map-style dataset, with the index of each sample at its end.

    Args:
        dataset: gives ``(image, label)`` or anything else for an index, and has a length.

    Items are ``(*item, index)``: ``(image, label)`` becomes ``(image, label, index)``, and what is not a tuple becomes
    ``(item, index)``. Every other attribute is that of the wrapped dataset, to read and to set.

    Raises:
        TypeError: the dataset is iterable-style or has no length, so its samples have no index.

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

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"WithIndex: index must be in 0 .. {len(self) - 1}, got {index}")
        item = self.dataset[index]
        return (*(item if isinstance(item, tuple) else (item,)), index % len(self))

    def __getattr__(self, name: str) -> Any:
        # Only what is not found here; unpickling asks before `dataset` is set.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # ``wrapped.transform = ...`` must reach the dataset that transforms.
        if name != "dataset" and hasattr(self.dataset, name):
            setattr(self.dataset, name, value)
        else:
            super().__setattr__(name, value)


@overload
def k_shot(dataset: ImageFiles, shots: int, *, seed: int | None = None) -> ImageFiles: ...


@overload
def k_shot(dataset: Dataset[Any], shots: int, *, seed: int | None = None) -> ImageFiles | Subset[Any]: ...


def k_shot(dataset: Dataset[Any], shots: int, *, seed: int | None = None) -> ImageFiles | Subset[Any]:
    """So many samples of each class, in the order of the data set.

    Args:
        dataset: an `ImageFiles`, or any data set with its labels in ``labels`` or ``targets``, a ``TensorDataset`` with
            them as its second tensor, or a subset, a concatenation or a `WithIndex` of such. Samples with a negative
            label belong to no class.
        shots: how many of each class.
        seed: ``None``: the first of each class. A number: drawn by it, the same on every machine; with the same seed
            fewer shots are a part of more.

    Returns:
        An `ImageFiles` of an `ImageFiles`, else a ``torch.utils.data.Subset``.

    Raises:
        TypeError: the data set's labels are not found.
        ValueError: a class has fewer samples; the message names it.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> few = k_shot(TensorDataset(torch.rand(6, 3), torch.tensor([0, 0, 1, 0, 1, 1])), 2)
        >>> few.indices
        [0, 1, 2, 4]
    """
    args = Arguments("k_shot")
    args.count("shots", shots)
    labels = labels_of(args, dataset)
    names = getattr(dataset, "classes", None)
    classes = labels[labels >= 0].unique().tolist()
    if isinstance(dataset, ImageFiles):
        classes = list(range(len(dataset.classes)))
    if not classes:
        args.refuse("dataset", "a data set with labelled samples", "none")
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels.clamp(min=-1) + 1, minlength=max(classes) + 2)
    ends = counts.cumsum(0)
    chosen = []
    for label in classes:
        count = int(counts[label + 1])
        if count < shots:
            name = names[label] if isinstance(names, Sequence) and label < len(names) else label
            args.refuse("shots", f"at most {count}, the samples of class {name!r}", shots)
        members = order[ends[label + 1] - count : ends[label + 1]].tolist()
        if seed is not None:
            members = [members[place] for place in drawn_order([f"{label} {place}" for place in range(count)], seed)]
        chosen += members[:shots]
    chosen.sort()
    return dataset.take(chosen) if isinstance(dataset, ImageFiles) else Subset(dataset, chosen)


def check_map_style(args: Arguments, dataset: Dataset[Any]) -> None:
    """Its samples have places: it gives one for an index, and has a length."""
    has_items = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not has_items:
        args.refuse_type("dataset", "map-style, with a length", type(dataset).__name__)


def labels_of(args: Arguments, dataset: Dataset[Any]) -> Tensor:
    """The labels of a map-style data set, int64 [N], without reading a sample."""
    labels: Any
    if isinstance(dataset, Subset):
        return labels_of(args, dataset.dataset)[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([labels_of(args, part) for part in dataset.datasets])
    if isinstance(dataset, WithIndex):
        return labels_of(args, dataset.dataset)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        labels = dataset.tensors[1]
    else:
        labels = getattr(dataset, "labels", None)
        if labels is None:
            labels = getattr(dataset, "targets", None)
    if labels is None:
        args.refuse_type("dataset", "a data set with its labels in .labels or .targets", type(dataset).__name__)
    # Each part of a concatenation has its own N.
    labels = Arguments(args.function).integers("the dataset's labels", torch.as_tensor(labels), "N").cpu()
    if len(labels) != len(dataset):  # type: ignore[arg-type]
        args.refuse("dataset", f"one with {len(labels)} samples for its labels", len(dataset))  # type: ignore[arg-type]
    return labels  # type: ignore[no-any-return]


def drawn_order(names: Sequence[str], seed: int) -> list[int]:
    """A random order by ``seed``, of each name's own: the same on every machine, and adding a name moves no other."""

    def key(place: int) -> bytes:
        return hashlib.sha256(f"{seed} ".encode() + os.fsencode(names[place])).digest()

    return sorted(range(len(names)), key=key)


def drawn_cells(files: ImageFiles, seed: int) -> dict[tuple[int, int], list[int]]:
    """The images of each (label, context), in a random order by ``seed``."""
    if files.contexts is None:
        return {}
    cells: dict[tuple[int, int], list[int]] = {}
    for index, pair in enumerate(zip(files.labels.tolist(), files.contexts.tolist())):
        cells.setdefault(pair, []).append(index)
    for pair, cell in cells.items():
        # The names by which every machine knows a file, wherever its folder lies.
        names = ["/".join(files.paths[index].split(os.sep)[-3:]) for index in cell]
        cells[pair] = [cell[place] for place in drawn_order(names, seed)]
    return cells
