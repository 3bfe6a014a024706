"""Environments without labels: each class splits the samples of all others into similar and dissimilar ones.

EqInv (Wang et al., ECCV 2022), Step 2; and, of the same similarities, the context of each sample and its weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import WeightedRandomSampler

from equireg._checks import Arguments, values_visible
from equireg.eqinv.adjusted_similarity import Adjust, Scores, check_indices, check_samples
from equireg.eqinv.context_weights import SCORES, class_weights, standardized
from equireg.eqinv.halves import bit_of, write_first_half
from equireg.eqinv.report import EnvironmentsReport
from equireg.eqinv.whitening import whitened

__all__ = ["Environments"]


class Environments(nn.Module):
    """Two environments for each class: the samples of other classes most similar to it, and the rest.

    For class k the samples of other classes are ranked by their (adjusted) similarity, the lower index first among
    equals (equal as computed: rounding may set two copies of a sample apart). Env#1 holds the first half, rounded up;
    Env#2 the rest. Samples of class k itself belong to both. Buffers hold one bit for each class and sample.

    The even split tells two environments apart only a little; :meth:`weights` use the whole ranking. In any loop::

        loss = (environments.weights(indices) * F.cross_entropy(logits, labels, reduction="none")).mean()

    Made by :meth:`split`. ``Environments()`` is empty and waits for ``load_state_dict``; so does
    ``Environments(num_classes, num_samples)``, whose buffers have their full size from the start.

    Attributes:
        bits: uint8 [C, ceil(N / 8)], bit ``n % 8`` of byte ``n // 8``: whether sample n is in Env#1 of the class.
        labels: int64 [N], -1 for a dataset index that took no part in the split.
        contexts: int32 [N], the inferred context of each sample, -1 where there is none.
        scores: int32 [N], the bits of float32 z(n): how much further the sample is in that context than its class is.
        fitted: whether a split was made or loaded.
    """

    bits: Tensor
    labels: Tensor
    contexts: Tensor
    scores: Tensor

    def __init__(self, num_classes: int = 0, num_samples: int = 0) -> None:
        super().__init__()
        check = Arguments("Environments")
        check.count("num_classes", num_classes, least=0)
        check.count("num_samples", num_samples, least=0)
        self.register_buffer("bits", torch.zeros(num_classes, math.ceil(num_samples / 8), dtype=torch.uint8))
        self.register_buffer("labels", torch.full((num_samples,), -1))
        self.register_buffer("contexts", torch.full((num_samples,), -1, dtype=torch.int32))
        # As whole numbers, so that neither ``.half()`` nor timm's moving average of the model changes them.
        self.register_buffer("scores", torch.zeros(num_samples, dtype=torch.int32))
        self._fitted = False
        # Features, their indices and ``adjust``, by reference, to sort ``members``: an order is 30 times the bits.
        self._ranked_by: tuple[Tensor, Tensor, Adjust] | None = None
        self._weights: dict[tuple[float | str, float], Tensor] = {}

    @property
    def fitted(self) -> bool:
        # By the labels, as buffers may be filled from outside, by a moving average of the model.
        if not self._fitted and not torch.compiler.is_compiling():
            self._fitted = bool((self.labels >= 0).any())
        return self._fitted

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
        whiten: int | None = None,
        score: str = "similarity",
    ) -> Environments:
        r"""Split the samples of a dataset for every class.

        One product of [N, D] with the [C, D] class means, streamed: extra memory stays below about 1 GB at
        50,000 × 1,000 × 2,048.

        Args:
            features: [N, D], floating point, of a frozen encoder; normalised inside. Those of a large dataset may stay
                on the CPU with labels on a GPU, to which they are streamed in blocks of 4,096 rows.
            labels: [N], whole numbers in 0 .. C - 1; on their device the split is formed.
            num_classes: C; by default the largest label plus one.
            indices: dataset index of each row, [N], all different; by default 0 .. N - 1.
            num_samples: length of the dataset; by default N, or the largest index plus one.
            adjust: as in :func:`adjusted_similarity`.
            whiten: project the features on so many principal axes of unit variance first; None takes them as they are.
                Worth it with two or three classes and wide features: 16 to 64 axes.
            score: what :meth:`weights` rank by: ``"similarity"`` to another class, or ``"margin"``, less that to its
                own; sharper where there is a bias, costlier where there is none, so with ``sharpness="auto"``.

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
        check.option("score", score, SCORES)
        features = features.detach() if isinstance(features, Tensor) else features
        labels, num_classes = check_samples(check, features, labels, num_classes, adjust)
        if len(labels) == 0:
            check.fail("features", "of at least one sample", list(features.shape))
        indices, order, num_samples = check_indices(check, indices, num_samples, len(labels))
        where = torch.arange(len(labels), device=labels.device) if indices is None else indices
        features = features if whiten is None else whitened(check, features, whiten)
        environments = cls(num_classes, num_samples).to(labels.device)
        environments.labels.index_copy_(0, where, labels)
        similarities = Scores(features, labels, num_classes, adjust)
        half = (len(labels) - similarities.sizes + 1) // 2
        most = torch.full((len(labels),), -math.inf, dtype=similarities.dtype, device=labels.device)
        context = torch.full_like(labels, -1)
        for classes, scores in similarities.blocks():
            write_first_half(environments.bits[classes], scores, half[classes], where, order)
            there = similarities.sizes[classes] > 0  # a class without samples is nobody's context
            highest, place = scores.masked_fill_(~there[:, None], -math.inf).max(0)
            context = torch.where(highest > most, place + classes.start, context)
            most = torch.maximum(most, highest)
        if int((similarities.sizes > 0).sum()) > 1:
            most = most - similarities.to_own_class() if score == "margin" else most
            z = standardized(most.cpu(), labels.cpu(), num_classes).float().to(labels.device)
            environments.scores.index_copy_(0, where, z.view(torch.int32))
            environments.contexts.index_copy_(0, where, context.int())
        environments._fitted, environments._ranked_by = True, (features, where, adjust)
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
            TypeError, ValueError: wrong dtype or shape; on CPU also a class, an index or a sample out of range.

        Example:
            >>> environments = Environments.split(torch.eye(3), torch.tensor([0, 1, 1]))
            >>> environments.similar(torch.tensor([0]), torch.tensor([0, 1, 2]))
            tensor([[ True,  True, False]])
        """
        check = Arguments("Environments.similar")
        indices, labels = self._placed(check, indices)
        classes = check.integers("classes", classes, "A")
        check.below("classes", classes, self.num_classes, "num_classes")
        place = classes[:, None] * self.bits.shape[1] + indices // 8  # three times faster than indexing by both
        byte = self.bits.flatten().index_select(0, place.flatten()).view(place.shape)
        return bit_of(byte, indices) | (classes[:, None] == labels)

    def members(self, k: int) -> tuple[Tensor, Tensor]:
        """The samples of other classes in the two environments of class ``k``, the most similar first within each.

        The ranking is formed anew from the features of the split. A copy, or what a ``state_dict`` or a pickle
        restored, has no features: its members come by index.

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
        if self._ranked_by is not None:
            features, indices, adjust = self._ranked_by
            scores = Scores(features, self.labels.to(indices.device)[indices], self.num_classes, adjust)
            table = self.labels.new_full((self.num_samples,), -math.inf, dtype=scores.dtype)
            table[indices] = scores.block(slice(k, k + 1))[0].to(table.device)
            others = others[table[others].sort(descending=True, stable=True).indices]
        first = bit_of(self.bits[k][others // 8], others)
        return others[first], others[~first]

    def weights(self, indices: Tensor | None = None, *, sharpness: float | str = 1.0, cap: float = 2.5) -> Tensor:
        r"""Weights that make up for what is rare: the samples of each class that are in another class's context.

        With :math:`a(n) = \max_{k \ne y_n} s(k, n)` of :func:`adjusted_similarity` (with ``score="margin"``, less
        :math:`\langle x_n, p_{y_n} \rangle`), and its mean and standard deviation over the class of the sample,

        .. math::
            z(n) = \frac{a(n) - \text{mean}\, a}{\text{std}\, a}, \qquad
            w(n) = \frac{e^{t \min(z(n), c)}}{\operatorname*{mean}_{m: y_m = y_n} e^{t \min(z(m), c)}}

        They are this library's, not the paper's. Where a class is mostly seen in one context, as :meth:`report` tells
        beforehand, they raise accuracy outside of it and lower that within.

        Args:
            indices: dataset indices [B] of samples that took part in the split; None for all N.
            sharpness: t, at least 0; 0 gives 1 everywhere. ``"auto"``: :attr:`EnvironmentsReport.sharpness`, 0 to 2.
            cap: c, above 0. Without it one sample could outweigh a hundred.

        Returns:
            float32 [B] or [N], of mean 1 within each class over the dataset, on the environments' device; formed once,
            and again after ``load_state_dict``.

        Raises:
            TypeError, ValueError: arguments of a wrong type or range; fewer than two classes; a sample that took no
                part in the split (on CPU; with None on every device).

        Example:
            >>> _ = torch.manual_seed(0)
            >>> labels = torch.arange(60) % 3
            >>> features = torch.eye(3)[labels] + 0.1 * torch.randn(60, 3)
            >>> features[0] = torch.tensor([0.5, 1.0, 0.0])  # a sample of class 0 that looks like class 1
            >>> environments = Environments.split(features, labels)
            >>> int(environments.weights().argmax()), environments.context(torch.tensor([0]))
            (0, tensor([1]))
        """
        check = Arguments("Environments.weights")
        if isinstance(sharpness, str) and sharpness != "auto":
            check.fail("sharpness", "'auto' or a number", repr(sharpness))
        if not isinstance(sharpness, str):
            check.not_negative("sharpness", sharpness)
        check.positive("cap", cap)
        if indices is not None:
            indices, _ = self._placed(check, indices)
        everyone = self._weights.get((sharpness, cap))
        if everyone is None:
            everyone = self._all_weights(check, sharpness, cap)
            if not torch.compiler.is_compiling():  # a compiled step would be compiled again for what it leaves behind
                self._weights[sharpness, cap] = everyone
        if indices is not None:
            return everyone[indices]
        if bool((self.labels < 0).any()):
            check.fail("indices", "given where samples took no part in the split", None)
        return everyone.clone()

    def context(self, indices: Tensor | None = None) -> Tensor:
        """The inferred context of samples: the other class that each resembles most, beyond its own class.

        Args:
            indices: dataset indices [B] of samples that took part in the split; None for all N, with -1 for one that
                did not.

        Returns:
            int64 [B] or [N]: the arg max over k ≠ y of :func:`adjusted_similarity`. Raises as :meth:`weights`.
        """
        check = Arguments("Environments.context")
        self._check_contexts(check)
        return self.contexts.long() if indices is None else self.contexts[self._placed(check, indices)[0]].long()

    def sampler(
        self,
        num_samples: int | None = None,
        *,
        sharpness: float | str = 1.0,
        cap: float = 2.5,
        generator: torch.Generator | None = None,
    ) -> WeightedRandomSampler:
        """Draws samples as often as they weigh, for a loop whose loss cannot be touched; raises as :meth:`weights`.

        ``DataLoader(dataset, sampler=environments.sampler())``; samples that took no part in the split are not drawn.

        Args:
            num_samples: how many to draw in an epoch; by default as many as took part.
            sharpness, cap: as of :meth:`weights`.
            generator: of the draws.
        """
        check = Arguments("Environments.sampler")
        took_part = (self.labels >= 0).nonzero().squeeze(1)
        weights = torch.zeros(self.num_samples, dtype=torch.float64)
        weights[took_part.cpu()] = self.weights(took_part, sharpness=sharpness, cap=cap).cpu().double()
        num_samples = len(took_part) if num_samples is None else num_samples
        check.count("num_samples", num_samples)
        return WeightedRandomSampler(weights, num_samples, generator=generator)  # type: ignore[arg-type]

    def report(self) -> EnvironmentsReport:
        """For each class how far it looks biased, and in which other classes' contexts its samples are; printable.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> print(Environments.split(torch.randn(300, 4), torch.arange(300) % 3).report())
            0 of 3 classes look biased; sharpness 'auto' is 0.00
             class  samples  kurtosis  skewness  in another class's context (class: samples)
                 2      100      -0.6     -0.4   -
                 1      100      -0.7     -0.1   -
                 0      100      -1.1     -0.2   -
        """
        self._check_contexts(Arguments("Environments.report"))
        took_part = (self.labels >= 0).nonzero().squeeze(1)
        z = self.scores[took_part].view(torch.float32).cpu()
        return EnvironmentsReport(z, self.labels[took_part].cpu(), self.contexts[took_part].cpu(), self.num_classes)

    def release(self) -> None:
        """Let the features of the split go; :meth:`members` then comes by index."""
        self._ranked_by = None

    def check_labels(self, check: Arguments, indices: Tensor, labels: Tensor) -> None:
        """Labels [B] that are those fitted at the same dataset indices; looked at only where that is free."""
        if not values_visible(labels):
            return
        fitted = self.labels[indices]
        wrong = (fitted != labels) & (fitted >= 0)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            rule = f"those of the fitted samples, {int(fitted[i])} at index {int(indices[i])}"
            check.fail("labels", rule, int(labels[i]))

    @torch.no_grad()
    def become(self, other: Environments) -> None:
        """Take what another of the same sizes has, in place."""
        for name, buffer in other.named_buffers():
            getattr(self, name).copy_(buffer)
        self._fitted, self._ranked_by, self._weights = other.fitted, other._ranked_by, {}

    def _placed(self, check: Arguments, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Dataset indices [B] and the labels fitted there, of samples that took part in the split."""
        check.device, check.device_of = self.bits.device, "the environments"
        indices = check.integers("indices", indices, "B")
        check.below("indices", indices, self.num_samples, "num_samples")
        labels = self.labels[indices]
        check.below("labels of indices", labels, self.num_classes, "-1 marks a sample that was not in the split")
        return indices, labels

    def _check_contexts(self, check: Arguments) -> None:
        if not self.fitted:
            check.fail("the environments", "fitted", "none")
        if not torch.compiler.is_compiling() and bool((self.contexts < 0).all()):
            check.fail("the environments", "of two classes or more, in a state that has contexts", "no contexts")

    def _all_weights(self, check: Arguments, sharpness: float | str, cap: float) -> Tensor:
        """[N], 0 where a sample took no part."""
        self._check_contexts(check)
        labels, z = self.labels.cpu(), self.scores.cpu().view(torch.float32).double()
        took_part = labels >= 0
        weights = torch.zeros_like(z)
        t = self.report().sharpness if sharpness == "auto" else float(sharpness)
        weights[took_part] = class_weights(z[took_part], labels[took_part], self.num_classes, t, cap)
        return weights.float().to(self.labels.device)

    def __getstate__(self) -> dict[str, Any]:
        # Pickles and copies carry the environments, not the features of a whole dataset.
        return {**self.__dict__, "_ranked_by": None}

    def _apply(self, *args: Any, **options: Any) -> Environments:
        super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        self._weights = {key: weights.to(self.labels.device) for key, weights in self._weights.items()}
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if prefix + "bits" in state_dict and prefix + "scores" not in state_dict:
            # Saved before there were weights: the environments are there, their contexts are not.
            none = torch.full_like(state_dict[prefix + "labels"], -1, dtype=torch.int32)
            state_dict = state_dict | {prefix + "contexts": none, prefix + "scores": torch.zeros_like(none)}
        # The sizes are those of the dataset that was saved; an empty object takes them, a filled one must agree.
        for name in ("bits", "labels", "contexts", "scores"):
            saved, mine = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and mine.numel() == 0:
                setattr(self, name, torch.empty_like(saved, device=mine.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "labels" in state_dict:
            self._fitted, self._ranked_by, self._weights = bool((self.labels >= 0).any()), None, {}
