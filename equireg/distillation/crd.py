"""Contrastive representation distillation (CRD) with memory banks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.similarity import normalized

__all__ = ["ContrastiveDistillation"]


class ContrastiveDistillationParts(NamedTuple):
    """``ContrastiveDistillation``, and the losses of both directions, which it is the sum of."""

    loss: Tensor
    student: Tensor  # the student's embeddings against the bank of the teacher's
    teacher: Tensor  # the teacher's against the bank of the student's


class ContrastiveDistillation(nn.Module):
    r"""Student and teacher tell from each other which of many samples an image is (CRD, Tian et al., 2020).

    With embeddings of unit length, the probability that a pair is of one image and not one of K others is estimated by
    noise contrast, and

    .. math:: L = -\operatorname*{mean}_i \Big[ \log h(x_{ii}) + \sum_{k=1}^K \log (1 - h(x_{ik})) \Big], \qquad
        h(x) = \frac{x}{x + K / N}, \quad x_{ij} = \frac{e^{\langle v_i, m_j \rangle / \tau}}{Z}

    is summed over both directions: the student's embeddings against a bank m of the teacher's, and the other way round.
    The banks hold a moving average for each of the N samples; Z is set by the first batch, so that the x are
    probabilities on average, and stays. The teacher is frozen, but its embedding learns.

    Args:
        student_dim: width of the student's pooled features.
        teacher_dim: width of the teacher's.
        num_samples: N, of the dataset.
        embedding_dim: width of the embeddings.
        num_negatives: K, drawn anew for each row among the other samples; None takes 16,384, or all others of fewer.
        temperature: τ, above 0.
        momentum: of the banks' averages, 0 to 1.
        seed: of the banks and of the draws, whose generator travels in the ``state_dict``.

    The call ``loss(student [B, Ds], teacher [B, Dt], indices [B])`` gives a 0-d tensor in float32, and in training mode
    moves the banks. Similarities to a whole bank are formed at once, [B, N].

    Each process has banks of its own, which hold what it saw of each sample: give DistributedDataParallel
    ``broadcast_buffers=False``, or they become those of rank 0 at every step.

    Raises:
        TypeError, ValueError: wrong types, shapes or ranges; on CPU also indices out of range.

    Example:
        >>> criterion = ContrastiveDistillation(16, 32, num_samples=100)
        >>> criterion(torch.randn(8, 16), torch.randn(8, 32), torch.arange(8)).shape
        torch.Size([])
    """

    bank_student: Tensor
    bank_teacher: Tensor
    log_z: Tensor
    generator_state: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        *,
        embedding_dim: int = 128,
        num_negatives: int | None = None,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        check = Arguments("ContrastiveDistillation")
        for name, value in (
            ("student_dim", student_dim),
            ("teacher_dim", teacher_dim),
            ("embedding_dim", embedding_dim),
        ):
            check.count(name, value)
        check.count("num_samples", num_samples, least=2)
        if num_negatives is not None:
            check.count("num_negatives", num_negatives)
        check.positive("temperature", temperature)
        check.share("momentum", momentum)
        check.count("seed", seed, least=0)
        self.dims, self.num_samples = (student_dim, teacher_dim), num_samples
        self.num_negatives = num_negatives or min(16_384, num_samples - 1)
        self.temperature, self.momentum = temperature, momentum
        self.embed_student, self.embed_teacher = (nn.Linear(dim, embedding_dim) for dim in self.dims)
        generator = torch.Generator().manual_seed(seed)
        for name in ("bank_student", "bank_teacher"):
            self.register_buffer(name, F.normalize(torch.randn(num_samples, embedding_dim, generator=generator), dim=1))
        self.register_buffer("log_z", torch.full((2,), math.nan))  # of both directions; set by the first batch
        self.register_buffer("generator_state", generator.get_state())

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor) -> Tensor:
        return self.parts(student, teacher, indices).loss

    def parts(self, student: Tensor, teacher: Tensor, indices: Tensor) -> ContrastiveDistillationParts:
        """The loss and, detached, the losses of both directions: ``.loss``, ``.student`` and ``.teacher``.

        As the call does, it moves the banks in training mode: use one of them in a step.
        """
        indices = self._checked(student, teacher, indices)
        others = self._draw(indices)
        v_student = normalized(self.embed_student(for_layers(self, student).contiguous()))
        v_teacher = normalized(self.embed_teacher(for_layers(self, teacher.detach()).contiguous()))
        # As they are now: the banks move in place, and the backward pass needs what the loss saw.
        banks = self.bank_teacher.to(v_student.dtype, copy=True), self.bank_student.to(v_student.dtype, copy=True)
        with torch.autocast(v_student.device.type, enabled=False):  # sums stay in full precision
            of_student = self._contrast(0, v_student @ banks[0].T / self.temperature, indices, others)
            of_teacher = self._contrast(1, v_teacher @ banks[1].T / self.temperature, indices, others)
        if self.training:
            self._move(self.bank_student, v_student, indices)
            self._move(self.bank_teacher, v_teacher, indices)
        return ContrastiveDistillationParts(of_student + of_teacher, of_student.detach(), of_teacher.detach())

    def _checked(self, student: Tensor, teacher: Tensor, indices: Tensor) -> Tensor:
        check = Arguments("ContrastiveDistillation").beside(self)
        for name, features, dim in (("student", student, self.dims[0]), ("teacher", teacher, self.dims[1])):
            check.features(name, features, "B D")
            if features.shape[1] != dim or len(features) == 0:
                check.fail(name, f"[B, {dim}] of at least one sample", list(features.shape))
            check.sizes.pop("D")
        indices = check.integers("indices", indices, "B")
        check.below("indices", indices, self.num_samples, "num_samples")
        return indices

    def _contrast(self, direction: int, similarity: Tensor, indices: Tensor, others: Tensor) -> Tensor:
        """The loss of one direction, from the similarities [B, N] over the temperature to a bank."""
        logits = torch.cat([similarity.gather(1, indices[:, None]), similarity.gather(1, others)], 1)
        # Z makes the mean of x over samples 1 / N. Kept as a tensor, so that nothing waits for the device.
        first = logits.detach().flatten().logsumexp(0) - math.log(logits.numel()) + math.log(self.num_samples)
        log_z = torch.where(self.log_z[direction].isnan(), first.to(self.log_z.dtype), self.log_z[direction])
        if self.training:
            self.log_z[direction] = log_z
        odds = logits - log_z - math.log(self.num_negatives / self.num_samples)  # log of x over K / N
        return F.softplus(-odds[:, 0]).mean() + F.softplus(odds[:, 1:]).sum(1).mean()

    def _draw(self, indices: Tensor) -> Tensor:
        """Other samples than each row's own, int64 [B, K]."""
        generator = torch.Generator()
        generator.set_state(self.generator_state.cpu())
        drawn = torch.randint(self.num_samples - 1, (len(indices), self.num_negatives), generator=generator)
        if self.training:
            self.generator_state.copy_(generator.get_state())
        drawn = drawn.to(indices.device)
        return drawn + (drawn >= indices[:, None])

    @torch.no_grad()
    def _move(self, bank: Tensor, v: Tensor, indices: Tensor) -> None:
        average = self.momentum * bank[indices] + (1 - self.momentum) * v.to(bank.dtype)
        bank[indices] = F.normalize(average, dim=1)

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, num_negatives={self.num_negatives}, temperature={self.temperature}"
