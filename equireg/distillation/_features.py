"""Features of student and teacher, brought to one form."""

from __future__ import annotations

from torch import Tensor

from equireg._checks import Arguments


def channels_last(check: Arguments, name: str, features: Tensor, dim: int) -> Tensor:
    """[B, ..., D] of pooled features, tokens or a map."""
    shapes = {2: "B D", 3: "B T D", 4: "B D h w"}
    check.floats(name, features)
    if features.dim() not in shapes:
        check.fail(name, "[B, D], [B, T, D] or [B, D, h, w]", list(features.shape))
    check = Arguments(check.function)
    check.sizes["D"] = dim
    check.features(name, features, shapes[features.dim()])
    return features.movedim(1, -1) if features.dim() == 4 else features


def align_features(
    check: Arguments, student: Tensor, teacher: Tensor, student_dim: int, teacher_dim: int
) -> tuple[Tensor, Tensor]:
    """Both with their channels last, at the same places; the teacher without gradient."""
    mine = channels_last(check, "student", student, student_dim)
    goal = channels_last(check, "teacher", teacher, teacher_dim)
    if mine.shape[:-1] != goal.shape[:-1]:
        check.fail("teacher", f"at the student's places {list(mine.shape[:-1])}", list(goal.shape[:-1]))
    if mine.numel() == 0:
        check.fail("student", "of at least one sample", list(student.shape))
    return mine, goal.detach()
