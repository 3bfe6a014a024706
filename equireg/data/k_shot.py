"""A fixed number of samples of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from equireg._checks import Arguments
from equireg.data.drawn import drawn_order
from equireg.data.image_files import ImageFiles
from equireg.data.with_index import WithIndex

__all__ = ["k_shot"]


@overload
def k_shot(dataset: ImageFiles, shots: int, *, seed: int | None = None) -> ImageFiles: ...


@overload
def k_shot(dataset: Dataset[Any], shots: int, *, seed: int | None = None) -> ImageFiles | Subset[Any]: ...


def k_shot(dataset: Dataset[Any], shots: int, *, seed: int | None = None) -> ImageFiles | Subset[Any]:
    """A fixed number of samples of each class, in the order of the data set.

    Args:
        dataset: an `ImageFiles`, or any data set with its labels in ``labels`` or ``targets``, a ``TensorDataset`` with
            them as its second tensor, or a subset, a concatenation or a `WithIndex` of such. Samples with a negative
            label belong to no class.
        shots: how many of each class.
        seed: ``None`` takes the first of each class. A number draws them, the same on every machine; with one seed,
            fewer shots are a subset of more.

    Returns:
        An `ImageFiles` if ``dataset`` is one, otherwise a ``torch.utils.data.Subset``.

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
        args.fail("dataset", "a data set with labelled samples", "none")
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels.clamp(min=-1) + 1, minlength=max(classes) + 2)
    ends = counts.cumsum(0)
    chosen = []
    for label in classes:
        count = int(counts[label + 1])
        if count < shots:
            name = names[label] if isinstance(names, Sequence) and label < len(names) else label
            args.fail("shots", f"at most {count}, the samples of class {name!r}", shots)
        members = order[ends[label + 1] - count : ends[label + 1]].tolist()
        if seed is not None:
            members = [members[place] for place in drawn_order([f"{label} {place}" for place in range(count)], seed)]
        chosen += members[:shots]
    chosen.sort()
    return dataset.take(chosen) if isinstance(dataset, ImageFiles) else Subset(dataset, chosen)


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
        args.fail_type("dataset", "a data set with its labels in .labels or .targets", type(dataset).__name__)
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError):
        args.fail_type("the dataset's labels", "whole numbers", repr(labels)[:40])
    # Each part of a concatenation has its own N.
    labels = Arguments(args.function).integers("the dataset's labels", labels, "N").cpu()
    if len(labels) != len(dataset):  # type: ignore[arg-type]
        args.fail("dataset", f"one with {len(labels)} samples for its labels", len(dataset))  # type: ignore[arg-type]
    return labels  # type: ignore[no-any-return]
