"""Distillation by the Kullback-Leibler divergence from a frozen teacher: of logits, and of features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.distillation._features import align_features
from equireg.similarity import accumulation_dtype

__all__ = ["DistillationLoss", "FeatureDistillation"]


class DistillationParts(NamedTuple):
    """``DistillationLoss`` and what it is made of: alpha · cross_entropy + beta · divergence."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor | None  # None where alpha is 0


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
        >>> import torch
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
        return self.parts(student, teacher, labels).loss

    def parts(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> DistillationParts:
        """The loss and, detached, what it is made of: ``.loss``, ``.divergence`` and ``.cross_entropy``."""
        labels = self._checked(student, teacher, labels)
        exact = accumulation_dtype(student.dtype)
        student, teacher = student.to(exact), teacher.to(exact)
        apart = divergence(student, teacher, self.temperature).mean()
        if labels is None:
            return DistillationParts(self.beta * apart, apart.detach(), None)
        cross_entropy = F.cross_entropy(student, labels, label_smoothing=self.label_smoothing)
        loss = self.beta * apart + self.alpha * cross_entropy
        return DistillationParts(loss, apart.detach(), cross_entropy.detach())

    def _checked(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor | None:
        """The labels that count, as int64."""
        check = Arguments("DistillationLoss")
        for name, logits in (("student", student), ("teacher", teacher)):
            check.features(name, logits, "B C")
            if logits.numel() == 0:
                check.fail(name, "of at least one sample and class", list(logits.shape))
        if labels is None and self.alpha > 0:
            check.fail("labels", "given where alpha is above 0", None)
        if labels is not None:
            labels = check.integers("labels", labels, "B")
            check.below("labels", labels, student.shape[1], "classes of the logits")
        return labels if self.alpha > 0 else None

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}, "
            f"label_smoothing={self.label_smoothing}"
        )


class FeatureDistillationParts(NamedTuple):
    """``FeatureDistillation`` and what it is the mean of."""

    loss: Tensor
    divergence: Tensor  # of each sample and place, [B], [B, T] or [B, h, w]


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
        >>> import torch
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
        return self.parts(student, teacher).loss

    def parts(self, student: Tensor, teacher: Tensor) -> FeatureDistillationParts:
        """The loss, and in ``.divergence`` what it is the mean of, detached."""
        check = Arguments("FeatureDistillation").beside(self)
        mine, goal = align_features(check, student, teacher, *self.dims)
        exact = accumulation_dtype(mine.dtype)
        apart = divergence(self.connector(for_layers(self.connector, mine)).to(exact), goal.to(exact), self.temperature)
        return FeatureDistillationParts(apart.mean(), apart.detach())

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softmax over the last dimension, [...]."""
    mine, theirs = (part / temperature for part in (student, teacher.detach()))
    q, p = theirs.log_softmax(-1), mine.log_softmax(-1)
    apart = (q - p).masked_fill(q == -math.inf, 0)  # what the teacher rules out counts nothing
    result: Tensor = (q.exp() * apart).sum(-1)
    return result
