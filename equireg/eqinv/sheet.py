"""The first thing to look at: the samples of each class that weigh most, beside those that weigh least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.eqinv.environments import Environments
from equireg.eqinv.report import names_of_classes

__all__ = ["weight_sheet"]


def weight_sheet(
    environments: Environments,
    dataset: Any,
    *,
    classes: Sequence[int] | None = None,
    count: int = 8,
    sharpness: float | str = 1.0,
    cap: float = 2.5,
    class_names: Sequence[str] | None = None,
) -> Any:
    """Draw the samples of each class with the largest and the smallest weights, a row for each class.

    Where a data set is biased, the left half shows what is rare in the class, with the context that each sample was
    found in; the right half shows what is common.

    Args:
        environments: of the data set.
        dataset: gives an image, or a tuple that begins with one, for an index: [C, H, W] or [H, W], any range, or a PIL
            image. Without random augmentation.
        classes: rows, in this order; by default the ten that look most biased.
        count: how many samples of each end.
        sharpness, cap: as of :meth:`Environments.weights`.
        class_names: of all C classes; by default their numbers.

    Returns:
        A ``matplotlib.figure.Figure``; ``.savefig("sheet.png")`` writes it.

    Raises:
        TypeError, ValueError: a class out of range, a count that is not above 0.
        ImportError: matplotlib is not installed.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> features, labels, images = torch.randn(40, 8), torch.arange(40) % 4, torch.rand(40, 3, 8, 8)
        >>> sheet = weight_sheet(Environments.split(features, labels), images, count=3)
        >>> len([axes for axes in sheet.axes if axes.images])  # four classes, three from each end
        24
    """
    from matplotlib.figure import Figure  # on use

    check = Arguments("weight_sheet")
    check.count("count", count)
    report = environments.report()
    if classes is None:
        classes = report.order[:10].tolist()
    if not len(classes):
        check.fail("classes", "one or more", classes)
    for k in classes:
        check.count("classes", k, least=0)
        if k >= environments.num_classes:
            check.fail("classes", f"in 0 .. {environments.num_classes - 1} (num_classes)", k)
    names = names_of_classes(check, class_names, environments.num_classes)
    figure = Figure(figsize=(1.2 * (2 * count + 1), 1.45 * len(classes) + 0.4), layout="constrained")
    grid = figure.subplots(len(classes), 2 * count + 1, squeeze=False, width_ratios=[*[1] * count, 0.4, *[1] * count])
    for row, k in zip(grid, classes):
        members = (environments.labels == k).nonzero().squeeze(1)
        weights = environments.weights(members, sharpness=sharpness, cap=cap)
        ranked = weights.argsort(descending=True, stable=True)
        order, weight_of = members[ranked].tolist(), dict(zip(members.tolist(), weights.tolist()))
        ends = [*order[:count], None, *order[max(count, len(order) - count) :]]
        for axes, index in zip(row, ends + [None] * (len(row) - len(ends))):
            axes.set(xticks=[], yticks=[], frame_on=False)
            if index is None:
                continue
            axes.imshow(_shown(dataset[index]), cmap="gray")
            context = names[int(environments.context(torch.tensor([index], device=members.device))[0])]
            axes.set_title(f"{weight_of[index]:.2g}  {context}", fontsize=9, pad=2)
        row[0].set_ylabel(names[k], fontsize=9)
    figure.suptitle("weight and context of each sample: the largest weights left, the smallest right", fontsize=9)
    return figure


def _shown(item: Any) -> Any:
    """An image as matplotlib takes it; a tensor stretched to 0 .. 1 where it lies outside."""
    image = item[0] if isinstance(item, (tuple, list)) else item
    if not isinstance(image, Tensor):
        return image
    image = image.detach().cpu()
    image = image.float() if image.is_floating_point() else image
    if image.is_floating_point():
        low, high = (float(bound) for bound in image.aminmax())
        if low < 0 or high > 1:
            image = (image - low) / max(high - low, 1e-12)
    # matplotlib takes no axis of one channel.
    return (image.squeeze(0) if image.dim() == 2 or len(image) == 1 else image.permute(1, 2, 0)).numpy()
