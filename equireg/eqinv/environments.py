"""Environments without labels: each class splits the samples of all others into similar and dissimilar ones.

EqInv (Wang et al., ECCV 2022), Step 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from equireg._checks import Arguments
from equireg.eqinv.adjusted_similarity import Adjust, Scores, check_samples
from equireg.similarity import normalized

__all__ = ["Environments"]


class Environments(nn.Module):
    """Two environments for each class: the samples of other classes most similar to it, and the rest.

    For class k the samples of other classes are ranked by their (adjusted) similarity, the lower index first among
    equals (equal as computed: rounding may set two copies of a sample apart). Env#1 holds the first half, rounded up;
    Env#2 the rest. Samples of class k itself belong to both. Kept as
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
            The environments. The features are kept by reference, not copied, to rank :meth:`members`: do not change
            them in place, and call ``release()`` to let them go.

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
        labels, num_classes = check_samples(check, features, labels, num_classes, adjust)
        if len(labels) == 0:
            check.fail("features", "of at least one sample", list(features.shape))
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
            num_samples = len(labels) if indices is None else int(indices.max()) + 1
        check.count("num_samples", num_samples)
        if indices is not None:
            if (indices >= num_samples).any():
                check.fail("indices", f"in 0 .. {num_samples - 1} (num_samples)", int(indices.max()))
        elif len(labels) > num_samples:
            check.fail("num_samples", f"at least the {len(labels)} rows of features", num_samples)

        where = torch.arange(len(labels), device=labels.device) if indices is None else indices
        environments = cls()
        environments.labels = labels.new_full((num_samples,), -1).index_copy_(0, where, labels)
        num_bytes = math.ceil(num_samples / 8)
        environments.bits = torch.zeros(num_classes, num_bytes, dtype=torch.uint8, device=labels.device)
        for classes, scores in Scores(features, labels, num_classes, adjust).blocks():
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
            check.fail("k", f"in 0 .. {self.num_classes - 1} (num_classes)", k)
        others = ((self.labels >= 0) & (self.labels != k)).nonzero().squeeze(1)
        if self._ranking is not None:
            features, indices, adjust = self._ranking
            scores = Scores(features, self.labels.to(features.device)[indices], self.num_classes, adjust)
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
