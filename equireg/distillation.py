"""Distillation from a frozen teacher: on logits, on features, and overhauled on maps before their activation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments
from equireg.similarity import accumulation_dtype


class DistillationLoss(nn.Module):
    r"""Cross entropy and the divergence from a teacher's softened answers.

    .. math:: L = \alpha L_\text{CE} + \beta \operatorname{KL}(q^T \,\|\, q^S), \qquad
        q_i = \frac{e^{z_i / T}}{\sum_j e^{z_j / T}}

    (Hinton et al., 2015; Stage II of the VIPriors recipe, Eq. 4 and 5), a mean over the batch. There is no further
    factor :math:`T^2`: it is in the default β, which keeps the gradient's size whatever the temperature of Hinton's
    form. No gradient reaches the teacher.

    Args:
        temperature: T, above 0.
        alpha: α, at least 0; with 0 no labels are needed.
        beta: β, at least 0; None takes :math:`T^2`.
        label_smoothing: of the cross entropy, 0 to 1.

    The call ``loss(student [B, C], teacher [B, C], labels [B] | None)`` takes logits and gives a 0-d tensor, in float32
    (float64 for float64).

    Under DistributedDataParallel each process takes the mean over its own samples, and the averaged gradients are those
    of the whole batch where all have equally many.

    Raises:
        TypeError, ValueError: wrong types, shapes or ranges; on CPU also labels out of range; no labels with α above 0.

    Example:
        >>> criterion = DistillationLoss(temperature=2.0, alpha=0.0)
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> float(criterion(logits, logits)), bool(criterion(logits, -logits) > 0)
        (0.0, True)
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float | None = None,
        label_smoothing: float = 0.1,
    ):
        super().__init__()
        check = Arguments("DistillationLoss")
        check.positive("temperature", temperature)
        check.not_negative("alpha", alpha)
        if beta is not None:
            check.not_negative("beta", beta)
        check.share("label_smoothing", label_smoothing)
        self.temperature, self.alpha, self.label_smoothing = temperature, alpha, label_smoothing
        self.beta = temperature**2 if beta is None else beta

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        check = Arguments("DistillationLoss")
        for name, logits in (("student", student), ("teacher", teacher)):
            check.features(name, logits, "B C")
            if logits.numel() == 0:
                check.refuse(name, "of at least one sample and class", list(logits.shape))
        if labels is None and self.alpha > 0:
            check.refuse("labels", "given where alpha is above 0", None)
        exact = accumulation_dtype(student.dtype)
        loss = self.beta * divergence(student.to(exact), teacher.to(exact), self.temperature).mean()
        if labels is not None:
            labels = check.integers("labels", labels, "B")
            check.below("labels", labels, student.shape[1], "classes of the logits")
            if self.alpha > 0:
                smoothing = self.label_smoothing
                loss = loss + self.alpha * F.cross_entropy(student.to(exact), labels, label_smoothing=smoothing)
        return loss

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}, "
            f"label_smoothing={self.label_smoothing}"
        )


class FeatureDistillation(nn.Module):
    r"""The divergence between the features of student and teacher, each a distribution over its channels.

    .. math:: \operatorname{KL}\big(\text{softmax}(f^T / \tau) \,\|\, \text{softmax}(g(f^S) / \tau)\big)

    with g a linear layer where the widths differ, a mean over samples and places ("KL loss, feature" of the VIPriors
    report). No gradient reaches the teacher.

    Args:
        student_dim: width of the student's features.
        teacher_dim: width of the teacher's; None for the same.
        temperature: τ, above 0.

    The call ``loss(student, teacher)`` takes pooled features [B, D], tokens [B, T, D] or maps [B, D, h, w], both of the
    same kind and places.

    Under DistributedDataParallel each process takes the mean over its own samples, and the averaged gradients are those
    of the whole batch where all have equally many.

    Raises:
        TypeError, ValueError: wrong types or shapes.

    Example:
        >>> criterion = FeatureDistillation(64, 128)
        >>> criterion(torch.randn(4, 49, 64), torch.randn(4, 49, 128)).shape
        torch.Size([])
    """

    def __init__(self, student_dim: int, teacher_dim: int | None = None, *, temperature: float = 1.0):
        super().__init__()
        check = Arguments("FeatureDistillation")
        check.count("student_dim", student_dim)
        if teacher_dim is not None:
            check.count("teacher_dim", teacher_dim)
        check.positive("temperature", temperature)
        self.dims = (student_dim, teacher_dim or student_dim)
        self.temperature = temperature
        same = self.dims[0] == self.dims[1]
        self.connector = nn.Identity() if same else nn.Linear(*self.dims)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        mine, goal = places_of(Arguments("FeatureDistillation"), student, teacher, *self.dims)
        exact = accumulation_dtype(mine.dtype)
        return divergence(self.connector(mine).to(exact), goal.to(exact), self.temperature).mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


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
                check.refuse(name, "widths of one layer or more in a list", dims)
            for dim in dims:
                check.count(name, dim)
        if len(teacher_dims) != len(student_dims):
            check.refuse("teacher_dims", f"of {len(student_dims)} layers as student_dims", list(teacher_dims))
        halves = [2.0 ** (i + 1 - len(student_dims)) for i in range(len(student_dims))]
        weights = halves if layer_weights is None else list(layer_weights)
        if len(weights) != len(student_dims):
            check.refuse("layer_weights", f"of {len(student_dims)} layers as student_dims", weights)
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
                places = channels_last(check, "features", layer, self.dims[i][1]).double().flatten(0, -2)
                sums[i], counts[i] = sums[i] + places.clamp(max=0).sum(0), counts[i] + (places < 0).sum(0)
        if not isinstance(counts[0], Tensor):
            check.refuse("features", "of at least one batch", "none")
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
                check.refuse("layers", f"normalisations of {self.dims[i][1]} channels with weight and bias", layer)
            std, mean = weight.detach().double().abs().clamp(min=1e-12), bias.detach().double()
            share = torch.special.ndtr(-mean / std)
            density = torch.exp(-((mean / std) ** 2) / 2) / math.sqrt(2 * math.pi)
            self._set_margin(i, torch.where(share > 1e-3, mean - std * density / share.clamp(min=1e-12), -3 * std))

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        check = Arguments("OverhaulDistillation")
        self._check_layers(check, "students", students)
        self._check_layers(check, "teachers", teachers)
        total = torch.zeros((), device=students[0].device)
        for i, (student, teacher) in enumerate(zip(students, teachers)):
            margin = self.margins[i]
            if not margin.numel():
                check.refuse("margins", "there: call fit_margins or use_batch_norm first", f"none for layer {i}")
            mine, goal = places_of(check, student, teacher, *self.dims[i])
            exact = accumulation_dtype(mine.dtype)
            found, goal = self.connectors[i](mine).to(exact), torch.maximum(goal.to(exact), margin.to(exact))
            apart = (goal - found).square()
            total = total + self.layer_weights[i] * torch.where((found <= goal) & (goal <= 0), 0, apart).mean()
        return total

    def _check_layers(self, check: Arguments, name: str, given: Sequence[Any]) -> None:
        if not isinstance(given, (list, tuple)) or len(given) != len(self.dims):
            got = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
            check.refuse(name, f"a list of {len(self.dims)} layers", got)

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
        places: Tensor = self.norm(self.linear(x).flatten(0, -2))
        return places.view(*x.shape[:-1], -1)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softmax over the last dimension, [...]."""
    mine, theirs = (part / temperature for part in (student, teacher.detach()))
    q, p = theirs.log_softmax(-1), mine.log_softmax(-1)
    result: Tensor = (q.exp() * (q - p)).sum(-1)
    return result


def channels_last(check: Arguments, name: str, features: Tensor, dim: int) -> Tensor:
    """[B, ..., D] of pooled features, tokens or a map."""
    shapes = {2: "B D", 3: "B T D", 4: "B D h w"}
    check.floats(name, features)
    if features.dim() not in shapes:
        check.refuse(name, "[B, D], [B, T, D] or [B, D, h, w]", list(features.shape))
    check = Arguments(check.function)
    check.sizes["D"] = dim
    check.features(name, features, shapes[features.dim()])
    return features.movedim(1, -1) if features.dim() == 4 else features


def places_of(
    check: Arguments, student: Tensor, teacher: Tensor, student_dim: int, teacher_dim: int
) -> tuple[Tensor, Tensor]:
    """Both with their channels last, at the same places; the teacher without gradient, in the student's dtype."""
    mine = channels_last(check, "student", student, student_dim)
    goal = channels_last(check, "teacher", teacher, teacher_dim)
    if mine.shape[:-1] != goal.shape[:-1]:
        check.refuse("teacher", f"at the student's places {list(mine.shape[:-1])}", list(goal.shape[:-1]))
    if mine.numel() == 0:
        check.refuse("student", "of at least one sample", list(student.shape))
    return mine, goal.detach()
