"""Distillation of feature maps before their activation (OFD)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.distillation._features import align_features, channels_last
from equireg.similarity import accumulation_dtype, exactly

__all__ = ["OverhaulDistillation"]


class OverhaulParts(NamedTuple):
    """``OverhaulDistillation``, and the distances it is the weighted sum of."""

    loss: Tensor
    distances: Tensor  # of each layer, [L]


class OverhaulDistillation(nn.Module):
    r"""Feature distillation before the activation, with a margin ReLU and a partial distance (OFD).

    .. math:: L = \sum_l 2^{l - L} \operatorname{mean} d_p\big(\max(T_l, m_l),\, r_l(S_l)\big), \qquad
        d_p(t, s) = \begin{cases} 0 & s \le t \le 0 \\ (t - s)^2 & \text{otherwise} \end{cases}

    over layers l = 1 .. L from first to last, with a connector r of a 1×1 convolution and batch normalisation on the
    student, and for each channel of the teacher the margin m, the mean of its negative values (Heo et al., 2019, "A
    comprehensive overhaul of feature distillation"; the best of the VIPriors report). Features are those before a ReLU:
    what its negative side holds reaches no later layer, and the student only has to stay below the margin there. No
    gradient reaches the teacher.

    Args:
        student_dims: width of the student's features at each layer.
        teacher_dims: width of the teacher's, at as many layers.
        layer_weights: instead of :math:`2^{l - L}`.

    The margins come from the teacher's batch normalisation (``use_batch_norm``) or from its features on data
    (``fit_margins``), before the first call ``loss(students, teachers)``, which takes a list of features for each: maps
    [B, D, h, w] or tokens [B, T, D], as ``TokenTap`` gives them, of the same places at each layer.

    Under DistributedDataParallel each process takes the mean over its own samples. Its connectors normalise over them
    too, unless they are made ``SyncBatchNorm``; fit the margins in all processes on the same data.

    Raises:
        TypeError, ValueError: wrong types or shapes, other numbers of layers, margins that are not there yet.

    Example:
        >>> criterion = OverhaulDistillation([8, 16], [32, 64])
        >>> maps = [torch.randn(4, 32, 8, 8), torch.randn(4, 64, 4, 4)]  # the teacher's, before the ReLU
        >>> criterion.fit_margins([maps])
        >>> criterion([torch.randn(4, 8, 8, 8), torch.randn(4, 16, 4, 4)], maps).shape
        torch.Size([])
    """

    def __init__(
        self,
        student_dims: Sequence[int],
        teacher_dims: Sequence[int],
        *,
        layer_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        check = Arguments("OverhaulDistillation")
        for name, dims in (("student_dims", student_dims), ("teacher_dims", teacher_dims)):
            if not isinstance(dims, (list, tuple)) or not dims:
                check.fail(name, "widths of one layer or more in a list", dims)
            for dim in dims:
                check.count(name, dim)
        if len(teacher_dims) != len(student_dims):
            check.fail("teacher_dims", f"of {len(student_dims)} layers as student_dims", list(teacher_dims))
        halves = [2.0 ** (i + 1 - len(student_dims)) for i in range(len(student_dims))]
        weights = halves if layer_weights is None else list(layer_weights)
        if len(weights) != len(student_dims):
            check.fail("layer_weights", f"of {len(student_dims)} layers as student_dims", weights)
        for weight in weights:
            check.not_negative("layer_weights", weight)
        self.dims, self.layer_weights = list(zip(student_dims, teacher_dims)), weights
        self.connectors = nn.ModuleList(_Connector(mine, theirs) for mine, theirs in self.dims)
        for i in range(len(self.dims)):
            self.register_buffer(f"margin{i}", torch.empty(0))

    @property
    def margins(self) -> list[Tensor]:
        """m of each layer [D], empty before they are known."""
        return [getattr(self, f"margin{i}") for i in range(len(self.dims))]

    @torch.no_grad()
    def fit_margins(self, features: Iterable[Sequence[Tensor]]) -> None:
        """The mean of each channel's negative values over batches of the teacher's features, 0 where it has none."""
        sums: list[Any] = [0.0] * len(self.dims)
        counts: list[Any] = [0.0] * len(self.dims)
        check = Arguments("OverhaulDistillation.fit_margins")
        for batch in features:
            self._check_layers(check, "features", batch)
            for i, layer in enumerate(batch):
                places = exactly(channels_last(check, "features", layer, self.dims[i][1])).flatten(0, -2)
                sums[i], counts[i] = sums[i] + places.clamp(max=0).sum(0), counts[i] + (places < 0).sum(0)
        if not isinstance(counts[0], Tensor):
            check.fail("features", "of at least one batch", "none")
        for i, (total, count) in enumerate(zip(sums, counts)):
            self._set_margin(i, total / count.clamp(min=1))

    @torch.no_grad()
    def use_batch_norm(self, layers: Sequence[nn.Module]) -> None:
        r"""Margins in closed form where a batch normalisation makes the features, one for each layer.

        With its weight γ and bias β a channel is taken as normal, and :math:`m = \beta - |\gamma|\,
        \varphi(\beta/|\gamma|) / \Phi(-\beta/|\gamma|)` is the mean of its negative side; :math:`-3|\gamma|` where less
        than a thousandth is negative.
        """
        check = Arguments("OverhaulDistillation.use_batch_norm")
        self._check_layers(check, "layers", layers)
        for i, layer in enumerate(layers):
            weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
            if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.shape != (self.dims[i][1],):
                check.fail("layers", f"normalisations of {self.dims[i][1]} channels with weight and bias", layer)
            std, mean = exactly(weight.detach()).abs().clamp(min=1e-12), exactly(bias.detach())
            share = torch.special.ndtr(-mean / std)
            density = torch.exp(-((mean / std) ** 2) / 2) / math.sqrt(2 * math.pi)
            self._set_margin(i, torch.where(share > 1e-3, mean - std * density / share.clamp(min=1e-12), -3 * std))

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        return self.parts(students, teachers).loss

    def parts(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> OverhaulParts:
        """The loss, and in ``.distances`` the partial distance at each layer, detached."""
        aligned = self._checked(students, teachers)
        total, distances = torch.zeros((), device=students[0].device), []
        for i, (mine, goal) in enumerate(aligned):
            exact = accumulation_dtype(mine.dtype)
            found = self.connectors[i](mine).to(exact)
            goal = torch.maximum(goal.to(exact), self.margins[i].to(exact))
            distance = torch.where((found <= goal) & (goal <= 0), 0, (goal - found).square()).mean()
            total = total + self.layer_weights[i] * distance
            distances.append(distance.detach())
        return OverhaulParts(total, torch.stack(distances))

    def _checked(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Features of student and teacher at each layer, channels last; the margins are known."""
        check = Arguments("OverhaulDistillation").beside(self)
        self._check_layers(check, "students", students)
        self._check_layers(check, "teachers", teachers)
        for i, margin in enumerate(self.margins):
            if not margin.numel():
                check.fail("margins", "there: call fit_margins or use_batch_norm first", f"none for layer {i}")
        layers = zip(students, teachers, self.dims)
        return [align_features(check, student, teacher, *dims) for student, teacher, dims in layers]

    def _check_layers(self, check: Arguments, name: str, given: Sequence[Any]) -> None:
        if not isinstance(given, (list, tuple)) or len(given) != len(self.dims):
            got = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
            check.fail(name, f"a list of {len(self.dims)} layers", got)

    def _set_margin(self, i: int, margin: Tensor) -> None:
        like = next(self.connectors[i].parameters())
        setattr(self, f"margin{i}", margin.to(like.device, torch.float32))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for i in range(len(self.dims)):
            saved = state_dict.get(f"{prefix}margin{i}")
            if saved is not None and saved.shape in {(0,), (self.dims[i][1],)}:
                setattr(self, f"margin{i}", torch.empty_like(saved, device=self.margins[i].device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Connector(nn.Module):
    """A 1×1 convolution and batch normalisation, on features [..., D]."""

    def __init__(self, mine: int, theirs: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(mine, theirs, bias=False), nn.BatchNorm1d(theirs)
        nn.init.kaiming_normal_(self.linear.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        places: Tensor = self.norm(self.linear(for_layers(self, x)).flatten(0, -2))
        return places.view(*x.shape[:-1], -1)
