"""Adjusted similarity of samples to classes (EqInv, Wang et al., ECCV 2022, Step 2).

The similarity of a sample to an anchor class is a mean of dot products, and a mean of dot products is a dot product
with a mean: one product with the class means replaces the loop over classes, streamed over classes and samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.similarity import accumulation_dtype, inverse_length, times_transposed

__all__ = ["adjusted_similarity"]

Adjust = bool | str
_ADJUSTMENTS = (True, False, "median")
# Entries in the largest buffer of a stream, 256 MB of fp32: the features are read once for each time it fills. Where
# they come from the host, reading costs more: 4 GB.
_BLOCK_ENTRIES, _STREAMED_ENTRIES = 2**26, 2**30


def adjusted_similarity(features: Tensor, labels: Tensor, num_classes: int, *, adjust: Adjust = True) -> Tensor:
    r"""Similarity of every sample to every class, without what the sample's own class explains of it.

    With L2-normalised features :math:`x_n` and class means :math:`p_k`,

    .. math::
        s^+(k, n) = \frac{1}{n_k} \sum_{m: y_m = k} \langle x_n, x_m \rangle = \langle x_n, p_k \rangle, \qquad
        s(k, n) = s^+(k, n) - \operatorname*{mean}_{m: y_m = y_n} s^+(k, m) = \langle x_n - p_{y_n}, p_k \rangle

    EqInv (Wang et al., 2022), Section 4, Step 2.

    Args:
        features: [N, D], floating point; normalised inside, gradients do not pass. On the CPU they are streamed in
            blocks of 4,096 rows to the device of the labels.
        labels: [N], whole numbers in 0 .. ``num_classes`` - 1.
        num_classes: how many there are, C.
        adjust: True subtracts the mean of each class, as the paper; ``"median"`` its median, so that every class is
            split evenly even where its similarities are skewed; False leaves the plain similarity :math:`s^+`.

    Returns:
        [C, N], float32 (float64 for float64 features); ``-inf`` where ``labels[n] == c``. The row of a class without
        samples is that of a zero class mean.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, labels out of range, features that are NaN or infinite.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> adjusted_similarity(features, torch.tensor([0, 1, 1]), 2)
        tensor([[   -inf,  0.5000, -0.5000],
                [ 0.0000,    -inf,    -inf]])
    """
    labels, num_classes = check_samples(Arguments("adjusted_similarity"), features, labels, num_classes, adjust)
    scores = Scores(features, labels, num_classes, adjust)
    return scores.block(slice(0, num_classes))


def check_samples(
    check: Arguments, features: Tensor, labels: Tensor, num_classes: int | None, adjust: Adjust
) -> tuple[Tensor, int]:
    check.features("features", features, "N D")
    if features.device.type == "cpu" and isinstance(labels, Tensor) and labels.device.type != "meta":
        check.device, check.device_of = labels.device, "labels"  # to which the features are streamed
    labels = check.integers("labels", labels, "N")
    check.option("adjust", adjust, _ADJUSTMENTS)
    if num_classes is None:
        if len(labels) == 0:
            check.fail("num_classes", "given where there are no labels", None)
        num_classes = max(int(labels.max()) + 1, 1)
    check.count("num_classes", num_classes)
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        rule = f"in 0 .. {num_classes - 1} (num_classes)"
        check.fail("labels", rule, f"{int(labels[place])} at position {place}")
    check.finite("features", features)
    return labels, num_classes


def check_indices(
    check: Arguments, indices: Tensor | None, num_samples: int | None, count: int
) -> tuple[Tensor | None, Tensor | None, int]:
    """Dataset indices of ``count`` samples, the order that sorts them, and the length of the dataset."""
    order = None
    if indices is not None:
        indices = check.integers("indices", indices, "N")
        ranked, order = indices.sort()
        twice = ranked[1:] == ranked[:-1]
        if twice.any():
            check.fail("indices", "all different", f"{int(ranked[1:][twice][0])} twice")
        if (indices < 0).any():
            check.fail("indices", "at least 0", int(indices.min()))
    if num_samples is None:
        num_samples = count if indices is None else int(indices.max()) + 1
    check.count("num_samples", num_samples)
    if indices is not None and (indices >= num_samples).any():
        check.fail("indices", f"in 0 .. {num_samples - 1} (num_samples)", int(indices.max()))
    if indices is None and count > num_samples:
        check.fail("num_samples", f"at least the {count} rows of features", num_samples)
    return indices, order, num_samples


class Scores:
    """Similarities of all samples to a block of classes; holds the class means and the norms, not the scores."""

    @torch.no_grad()
    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, adjust: Adjust):
        self.features, self.labels, self.adjust = features, labels, adjust
        self.dtype = accumulation_dtype(features.dtype)
        self.sample_blocks = [slice(i, i + 4096) for i in range(0, len(features), 4096)]
        self.means = labels.new_zeros(num_classes, features.shape[1], dtype=self.dtype)
        # Written again for each block: fresh memory from the system would cost more than what is computed in it.
        self.x, self.own_means = self.means.new_empty(2, min(4096, len(features)), features.shape[1])
        self.inverse = self.x.new_empty(len(features), 1)
        for rows in self.sample_blocks:
            x = self._normalized(rows, first=True)
            # A product with one-hot labels: sums in a fixed order on every device.
            of_class = self.means.new_zeros(num_classes, len(x)).scatter_(0, labels[None, rows], 1)
            with torch.autocast(x.device.type, enabled=False):
                self.means += times_transposed(of_class, x.T)
        self.sizes = labels.bincount(minlength=num_classes)
        self.means /= self.sizes.clamp(min=1)[:, None]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Scores of a few classes at a time, so that the buffer stays small."""
        streamed = self.features.device != self.labels.device
        size = max(1, (_STREAMED_ENTRIES if streamed else _BLOCK_ENTRIES) // max(1, len(self.features)))
        for start in range(0, len(self.means), size):
            classes = slice(start, min(start + size, len(self.means)))
            yield classes, self.block(classes)

    @torch.no_grad()
    def block(self, classes: slice) -> Tensor:
        """Scores [len(classes), N]; -inf where a sample is of the class itself."""
        anchors = self.means[classes]
        scores = anchors.new_empty(len(anchors), len(self.features))
        for rows in self.sample_blocks:
            x = self._normalized(rows)
            if self.adjust is True:
                x -= torch.index_select(self.means, 0, self.labels[rows], out=self.own_means[: len(x)])
            with torch.autocast(x.device.type, enabled=False):
                scores[:, rows] = times_transposed(anchors, x)
        if self.adjust == "median":
            self._subtract_medians(scores)
        own = ((self.labels >= classes.start) & (self.labels < classes.stop)).nonzero().squeeze(1)
        scores[self.labels[own] - classes.start, own] = -math.inf
        return scores

    @torch.no_grad()
    def to_own_class(self) -> Tensor:
        """Similarity of each sample to the mean of its own class, [N]."""
        parts = [(self._normalized(rows) * self.means[self.labels[rows]]).sum(1) for rows in self.sample_blocks]
        return torch.cat(parts)

    def _normalized(self, rows: slice, first: bool = False) -> Tensor:
        features = self.features[rows].to(self.labels.device, non_blocking=True)
        if first:
            self.inverse[rows] = inverse_length(features)
        return torch.mul(features, self.inverse[rows], out=self.x[: len(features)])

    def _subtract_medians(self, scores: Tensor) -> None:
        for k in self.labels.unique().tolist():
            samples = (self.labels == k).nonzero().squeeze(1)
            of_class = scores[:, samples]
            ordered = of_class.sort(dim=1).values
            n = len(samples)
            median = (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
            scores[:, samples] = of_class - median[:, None]
