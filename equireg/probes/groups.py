"""Accuracy in groups of samples: the average hides the group that a model fails on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from equireg._checks import Arguments

__all__ = ["GroupAccuracy", "group_accuracy"]


class GroupAccuracy(NamedTuple):
    """Shares of right predictions, 0 .. 1."""

    mean: float  # over all samples
    worst: float  # of the groups' classes that have samples
    per_group: Tensor  # [G, L], of the samples of group g with label l; NaN where there are none


def group_accuracy(predictions: Tensor, labels: Tensor, groups: Tensor) -> GroupAccuracy:
    """The accuracy of each class within each group, and the worst of them.

    To choose a setting without labels of contexts, take the highest ``worst`` over the inferred contexts of validation
    images: ``group_accuracy(predictions, labels, Environments.split(features, labels).context())``.

    Args:
        predictions: predicted classes, whole numbers [N].
        labels: [N], whole numbers in 0 .. L - 1.
        groups: [N], whole numbers in 0 .. G - 1.

    Returns:
        ``(mean, worst, per_group [G, L])``.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, no samples, a label or a group below 0.

    Example:
        >>> import torch
        >>> predictions, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0])
        >>> mean, worst, per_group = group_accuracy(predictions, labels, torch.tensor([0, 0, 1, 1]))
        >>> mean, worst, per_group
        (0.75, 0.0, tensor([[1., nan],
                [0., 1.]]))
    """
    check = Arguments("group_accuracy")
    predictions = check.integers("predictions", predictions, "N")
    labels = check.integers("labels", labels, "N")
    groups = check.integers("groups", groups, "N")
    if len(labels) == 0:
        check.fail("labels", "of at least one sample", [0])
    for name, values in (("labels", labels), ("groups", groups)):
        if bool((values < 0).any()):
            check.fail(name, "at least 0", int(values.min()))
    shape = int(groups.max()) + 1, int(labels.max()) + 1
    cell, right = groups * shape[1] + labels, predictions == labels
    count = cell.bincount(minlength=shape[0] * shape[1])
    per_group = cell[right].bincount(minlength=len(count)) / count
    return GroupAccuracy(float(right.float().mean()), float(per_group[count > 0].min()), per_group.view(shape))
