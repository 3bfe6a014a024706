"""How far the features of a class lie apart."""

from __future__ import annotations

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.similarity import exactly

__all__ = ["within_class_variance"]


@torch.no_grad()
def within_class_variance(features: Tensor, labels: Tensor, *, relative: bool = False) -> float:
    r"""Mean squared distance of features from the mean of their class.

    .. math:: V = \frac{1}{N} \sum_n \lVert x_n - p_{y_n} \rVert^2

    with :math:`p_k` the mean of the features of class k.

    EqInv (Wang et al., 2022), Fig. 6b, follows it over a training, of features and of masked features; the paper writes
    no formula. V grows with the square of the features' length, and a mask :math:`\sigma(m) < 1` makes it smaller
    whatever it selects; the share of the total variance, ``relative=True``, does not depend on their length.

    Args:
        features: [N, D], floating point.
        labels: whole numbers [N], from 0.
        relative: divide by the mean squared distance from the mean of all features.

    Returns:
        V, at least 0; relative, from 0 (a class is a point) to 1 (all classes have one mean); NaN if all features
        are the same.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, no samples, a label below 0, features that are not finite.

    Example:
        >>> x, y = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1])
        >>> within_class_variance(x, y), within_class_variance(5 * x, y)
        (1.0, 25.0)
        >>> round(within_class_variance(x, y, relative=True), 4)
        0.0385
    """
    check = Arguments("within_class_variance")
    check.features("features", features, "N D")
    labels = check.integers("labels", labels, "N")
    check.option("relative", relative, (True, False))
    if features.numel() == 0:
        check.fail("features", "of at least one sample and one feature", list(features.shape))
    if int(labels.min()) < 0:
        check.fail("labels", "0 or above", int(labels.min()))
    check.finite("features", features)
    x = exactly(features)
    classes, place = labels.unique(return_inverse=True)
    sums = x.new_zeros(len(classes), x.shape[1]).index_add_(0, place, x)
    within = (x - (sums / place.bincount()[:, None])[place]).square().sum(1).mean()
    return float(within / (x - x.mean(0)).square().sum(1).mean() if relative else within)
