"""Environments without labels: each class splits the samples of all others into similar and dissimilar ones.

EqInv (Wang et al., 2022), Step 2. The adjusted similarity of a sample to an anchor class is a mean of dot products,
and a mean of dot products is a dot product with a mean: one product with the class means replaces the loop over
classes, streamed over blocks of classes and samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from equireg._checks import Arguments
from equireg.similarity import accumulation_dtype, normalized, times_transposed

Adjust = bool | str
_ADJUSTMENTS = (True, False, "median")
# Entries in the largest buffer of a stream: 128 MB of fp32.
_BLOCK_ENTRIES = 2**25


def adjusted_similarity(features: Tensor, labels: Tensor, num_classes: int, *, adjust: Adjust = True) -> Tensor:
    r"""Similarity of every sample to every class, without what the sample's own class explains of it.

    With L2-normalised features :math:`x_n` and class means :math:`p_k`,

    .. math::
        s^+(k, n) = \frac{1}{n_k} \sum_{m: y_m = k} \langle x_n, x_m \rangle = \langle x_n, p_k \rangle, \qquad
        s(k, n) = s^+(k, n) - \operatorname*{mean}_{m: y_m = y_n} s^+(k, m) = \langle x_n - p_{y_n}, p_k \rangle

    EqInv (Wang et al., 2022), Section 4, Step 2.

    Args:
        features: [N, D], floating point; normalised inside, gradients do not pass.
        labels: [N], whole numbers in 0 .. ``num_classes`` - 1.
        num_classes: C.
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
    labels, num_classes = _check(Arguments("adjusted_similarity"), features, labels, num_classes, adjust)
    scores = _Scores(features, labels, num_classes, adjust)
    return scores.block(slice(0, num_classes))


class Environments(nn.Module):
    """Two environments for each class: the samples of other classes most similar to it, and the rest.

    For class k the samples of other classes are ranked by their (adjusted) similarity, the lower index first among
    equals. Env#1 holds the first half, rounded up; Env#2 the rest. Samples of class k itself belong to both. Kept as
    one bit for each class and sample, in buffers: it moves with ``.to``, and ``state_dict`` saves and restores it.

    Made by :meth:`split`; ``Environments()`` is empty and waits for ``load_state_dict``.

    Attributes:
        bits: uint8 [C, ceil(N / 8)], bit ``n % 8`` of byte ``n // 8``: whether sample n is in Env#1 of the class.
        labels: int64 [N], -1 for a dataset index that took no part in the split.
    """

    bits: Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bits", torch.zeros(0, 0, dtype=torch.uint8))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        # What members are ranked by, by reference and outside the state: a stored ranking would be 30 times the bits.
        self._ranking: tuple[Tensor, Tensor, Adjust] | None = None

    @property
    def num_classes(self) -> int:
        return self.bits.shape[0]

    @property
    def num_samples(self) -> int:
        return self.labels.shape[0]

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, num_samples={self.num_samples}"

    @classmethod
    def split(
        cls,
        features: Tensor,
        labels: Tensor,
        num_classes: int | None = None,
        *,
        indices: Tensor | None = None,
        num_samples: int | None = None,
        adjust: Adjust = True,
    ) -> Environments:
        r"""Split the samples of a dataset for every class.

        One product of [N, D] with the [C, D] class means, streamed: extra memory stays below about 1 GB at
        50,000 × 1,000 × 2,048.

        Args:
            features: [N, D], floating point, of a frozen encoder; normalised inside.
            labels: [N], whole numbers in 0 .. C - 1.
            num_classes: C; by default the largest label plus one.
            indices: dataset index of each row, [N], all different; by default 0 .. N - 1.
            num_samples: length of the dataset; by default N, or the largest index plus one.
            adjust: as in :func:`adjusted_similarity`.

        Returns:
            The environments. The features are kept by reference, to rank :meth:`members`; ``release()`` lets them go.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: shapes that do not fit, no samples, labels or indices out of range, an index twice, features
                that are NaN or infinite.

        Example:
            >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.1], [0.1, 1.0]])
            >>> environments = Environments.split(features, torch.tensor([0, 0, 1, 1]))
            >>> environments.members(0)
            (tensor([2]), tensor([3]))
        """
        check = Arguments("Environments.split")
        features = features.detach() if isinstance(features, Tensor) else features
        labels, num_classes = _check(check, features, labels, num_classes, adjust)
        if len(labels) == 0:
            check.refuse("features", "of at least one sample", list(features.shape))
        order = None
        if indices is not None:
            indices = check.integers("indices", indices, "N")
            ranked, order = indices.sort()
            twice = ranked[1:] == ranked[:-1]
            if twice.any():
                check.refuse("indices", "all different", f"{int(ranked[1:][twice][0])} twice")
        if num_samples is None:
            num_samples = len(labels) if indices is None else int(indices.max()) + 1
        check.count("num_samples", num_samples)
        if indices is not None:
            wrong = (indices < 0) | (indices >= num_samples)
            if wrong.any():
                check.refuse("indices", f"in 0 .. {num_samples - 1} (num_samples)", int(indices[wrong][0]))
        elif len(labels) > num_samples:
            check.refuse("num_samples", f"at least the {len(labels)} rows of features", num_samples)

        where = torch.arange(len(labels), device=labels.device) if indices is None else indices
        environments = cls()
        environments.labels = labels.new_full((num_samples,), -1).index_copy_(0, where, labels)
        num_bytes = math.ceil(num_samples / 8)
        environments.bits = torch.zeros(num_classes, num_bytes, dtype=torch.uint8, device=labels.device)
        for classes, scores in _Scores(features, labels, num_classes, adjust).blocks():
            first = _first_half(scores, order)
            chosen = first.new_zeros(len(scores), num_bytes * 8)
            chosen.index_copy_(1, where, first)
            environments.bits[classes] = _pack(chosen)
        environments._ranking = (features, where, adjust)
        return environments

    def similar(self, classes: Tensor, indices: Tensor) -> Tensor:
        """Which samples are in Env#1 of which classes.

        Args:
            classes: [A], whole numbers in 0 .. C - 1.
            indices: [B], dataset indices of samples that took part in the split.

        Returns:
            bool [A, B]. True where sample ``indices[b]`` is in Env#1 of class ``classes[a]``, and where it is of that
            class itself (which is in Env#2 as well).

        Raises:
            TypeError, ValueError: wrong dtype or shape; on CPU also a class or an index out of range, or a sample that
                took no part in the split.

        Example:
            >>> environments = Environments.split(torch.eye(3), torch.tensor([0, 1, 1]))
            >>> environments.similar(torch.tensor([0]), torch.tensor([0, 1, 2]))
            tensor([[ True,  True, False]])
        """
        check = Arguments("Environments.similar")
        check.device, check.device_of = self.bits.device, "the environments"
        classes = check.integers("classes", classes, "A")
        indices = check.integers("indices", indices, "B")
        check.below("classes", classes, self.num_classes, "num_classes")
        check.below("indices", indices, self.num_samples, "num_samples")
        labels = self.labels[indices]
        check.below("labels of indices", labels, self.num_classes, "-1 marks a sample that was not in the split")
        place = classes[:, None] * self.bits.shape[1] + indices // 8  # three times faster than indexing by both
        byte = self.bits.flatten().index_select(0, place.flatten()).view(place.shape)
        return _bit(byte, indices) | (classes[:, None] == labels)

    def members(self, k: int) -> tuple[Tensor, Tensor]:
        """The samples of other classes in the two environments of class ``k``, the most similar first within each.

        The ranking is formed anew from the features of the split. An object restored from a ``state_dict`` or a pickle
        has the environments but not the features: its members come by index.

        Args:
            k: the anchor class, 0 .. C - 1.

        Returns:
            Dataset indices of Env#1 and Env#2, int64 [n1] and [n2], n1 = ceil((n1 + n2) / 2).

        Raises:
            TypeError, ValueError: ``k`` is no whole number, or out of range.

        Example:
            >>> features = torch.tensor([[1.0, 0.0], [0.1, 1.0], [0.9, 0.1], [0.3, 0.7], [0.6, 0.4]])
            >>> environments = Environments.split(features, torch.tensor([0, 1, 1, 1, 1]))
            >>> environments.members(0)
            (tensor([2, 4]), tensor([3, 1]))
        """
        check = Arguments("Environments.members")
        check.count("k", k, least=0)
        if k >= self.num_classes:
            check.refuse("k", f"in 0 .. {self.num_classes - 1} (num_classes)", k)
        others = ((self.labels >= 0) & (self.labels != k)).nonzero().squeeze(1)
        if self._ranking is not None:
            features, indices, adjust = self._ranking
            scores = _Scores(features, self.labels.to(features.device)[indices], self.num_classes, adjust)
            table = self.labels.new_full((self.num_samples,), -math.inf, dtype=scores.dtype)
            table[indices] = scores.block(slice(k, k + 1))[0].to(table.device)
            others = others[table[others].sort(descending=True, stable=True).indices]
        first = _bit(self.bits[k][others // 8], others)
        return others[first], others[~first]

    def release(self) -> None:
        """Let the features of the split go; :meth:`members` then comes by index."""
        self._ranking = None

    def __getstate__(self) -> dict[str, Any]:
        # Pickles and copies carry the environments, not the features of a whole dataset.
        return {**self.__dict__, "_ranking": None}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # The sizes are those of the dataset that was saved; an empty object takes them, a filled one must agree.
        for name in ("bits", "labels"):
            saved, mine = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and mine.numel() == 0:
                setattr(self, name, torch.empty_like(saved, device=mine.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ranking = None


def similar_in_batch(features: Tensor, labels: Tensor) -> Tensor:
    """The split made of one batch alone: bool [B, B], whether sample a is in Env#1 of the class of sample i.

    The same ranking as :meth:`Environments.split` with the class means of the batch; of fixed shape, for compilation.
    """
    x = normalized(features)
    same = labels[:, None] == labels[None, :]
    weight = same.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        means = (weight @ x) / weight.sum(1, keepdim=True)  # row i: mean of the class of sample i
        scores = (means @ (x - means).T).masked_fill(same, -math.inf)
    place = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(place).scatter_(1, place, torch.arange(len(x), device=x.device).expand_as(place))
    return (rank < (same.logical_not().sum(1, keepdim=True) + 1) // 2) | same


def _check(
    check: Arguments, features: Tensor, labels: Tensor, num_classes: int | None, adjust: Adjust
) -> tuple[Tensor, int]:
    check.features("features", features, "N D")
    labels = check.integers("labels", labels, "N")
    check.option("adjust", adjust, _ADJUSTMENTS)
    if num_classes is None:
        if len(labels) == 0:
            check.refuse("num_classes", "given where there are no labels", None)
        num_classes = int(labels.max()) + 1
    check.count("num_classes", num_classes)
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        rule = f"in 0 .. {num_classes - 1} (num_classes)"
        check.refuse("labels", rule, f"{int(labels[place])} at position {place}")
    for start in range(0, len(features), 4096):  # in blocks: a mask of all features would be a quarter of their size
        check.finite("features", features[start : start + 4096])
    return labels, num_classes


class _Scores:
    """Similarities of all samples to a block of classes; holds the class means and the norms, not the scores."""

    @torch.no_grad()
    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, adjust: Adjust):
        self.features, self.labels, self.adjust = features, labels, adjust
        self.dtype = accumulation_dtype(features.dtype)
        self.sample_blocks = [slice(i, i + 4096) for i in range(0, len(features), 4096)]
        classes = torch.arange(num_classes, device=labels.device)
        self.means = torch.zeros(num_classes, features.shape[1], dtype=self.dtype, device=features.device)
        for rows in self.sample_blocks:
            # A product with one-hot labels: sums in a fixed order on every device.
            of_class = (classes[:, None] == labels[rows]).to(self.dtype)
            with torch.autocast(features.device.type, enabled=False):
                self.means += times_transposed(of_class, self._normalized(rows).T)
        self.means /= labels.bincount(minlength=num_classes).clamp(min=1)[:, None]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Scores of a few classes at a time, so that the buffer stays small."""
        size = max(1, _BLOCK_ENTRIES // max(1, len(self.features)))
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
                x -= self.means[self.labels[rows]]
            with torch.autocast(x.device.type, enabled=False):
                scores[:, rows] = times_transposed(anchors, x)
        if self.adjust == "median":
            self._subtract_medians(scores)
        own = torch.arange(classes.start, classes.stop, device=self.labels.device)[:, None] == self.labels
        return scores.masked_fill_(own, -math.inf)

    def _normalized(self, rows: slice) -> Tensor:
        return normalized(self.features[rows])

    def _subtract_medians(self, scores: Tensor) -> None:
        for k in self.labels.unique().tolist():
            samples = (self.labels == k).nonzero().squeeze(1)
            of_class = scores[:, samples]
            ordered = of_class.sort(dim=1).values
            n = len(samples)
            median = (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
            scores[:, samples] = of_class - median[:, None]


def _first_half(scores: Tensor, order: Tensor | None) -> Tensor:
    """The higher half, rounded up, of each row's entries that are not -inf; the first in ``order`` among equals."""
    half = ((scores != -math.inf).sum(1) + 1) // 2
    threshold = scores.new_full((len(scores),), math.inf)
    for size in half.unique().tolist():  # one size where the classes are of one size
        if size > 0:
            rows = half == size
            threshold[rows] = scores[rows].kthvalue(scores.shape[1] - size + 1).values
    first = scores > threshold[:, None]
    equal = scores == threshold[:, None]
    room = half - first.sum(1)
    crowded = (equal.sum(1) > room).nonzero().squeeze(1)  # more equals than places: the earlier ones
    if len(crowded):
        queue = equal[crowded] if order is None else equal[crowded][:, order]
        admitted = queue & (queue.cumsum(1, dtype=torch.int32) <= room[crowded, None])
        if order is not None:
            admitted = torch.empty_like(admitted).index_copy_(1, order, admitted)
        equal[crowded] = admitted
    return first | equal


def _pack(bits: Tensor) -> Tensor:
    """bool [C, 8 n] to uint8 [C, n], the first bit lowest."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    eights = rearrange(bits.to(torch.uint8), "classes (byte place) -> classes byte place", place=8)
    return (eights << places).sum(-1, dtype=torch.uint8)


def _bit(byte: Tensor, indices: Tensor) -> Tensor:
    return byte & (1 << (indices % 8)).to(torch.uint8) != 0
