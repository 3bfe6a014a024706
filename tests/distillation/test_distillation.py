"""Stage II's losses where their records do not reach: layouts, margins, memory banks, real backbones."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equireg import (
    ContrastiveDistillation,
    DistillationLoss,
    FeatureDistillation,
    OverhaulDistillation,
)


def test_default_beta_is_hintons():
    """The gradient at a high temperature is that of matching logits, whatever the temperature."""
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    difference = (student - teacher).detach()
    expected = (difference - difference.mean(1, keepdim=True)) / (5 * 6)
    for temperature in (500, 1000):
        loss = DistillationLoss(temperature=temperature, alpha=0.0)(student, teacher)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected, rtol=0.02, atol=1e-4)


# ------------------------------------------------------------------------------------------------- on features


def test_a_class_that_the_teacher_rules_out_counts_nothing():
    student = torch.tensor([[0.5, 1.0, -2.0]], requires_grad=True)
    loss = DistillationLoss(temperature=1.0, alpha=0.0)(student, torch.tensor([[0.0, 1.0, -math.inf]]))
    q, p = torch.tensor([0.0, 1.0]).softmax(0), student.detach()[0].log_softmax(0)
    torch.testing.assert_close(loss.detach(), (q * (q.log() - p[:2])).sum())
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient[0], p.exp() - F.pad(q, (0, 1)))


def test_features_in_any_layout():
    criterion = FeatureDistillation(5)
    student, teacher = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    maps = [x.transpose(1, 2).unflatten(2, (7, 1)) for x in (student, teacher)]
    torch.testing.assert_close(criterion(*maps), criterion(student, teacher))
    each = torch.stack([criterion(student[:, place], teacher[:, place]) for place in range(7)])
    torch.testing.assert_close(criterion(student, teacher), each.mean())
    assert not list(criterion.parameters())


# ------------------------------------------------------------------------------------------------- overhaul


def overhaul(dims=((3, 4), (5, 6))):
    criterion = OverhaulDistillation([a for a, _ in dims], [b for _, b in dims]).double()
    maps = [torch.randn(8, b, 3, 2, dtype=torch.float64) for _, b in dims]
    criterion.fit_margins([maps, [2 * layer for layer in maps]])
    return criterion, [torch.randn(8, a, 3, 2, dtype=torch.float64) for a, _ in dims], maps


def test_margins_are_the_means_of_negative_values():
    criterion, _, maps = overhaul()
    for margin, layer in zip(criterion.margins, maps):
        for channel in range(layer.shape[1]):
            values = [v for x in (layer, 2 * layer) for v in x[:, channel].flatten().tolist() if v < 0]
            assert margin[channel].item() == pytest.approx(sum(values) / len(values), rel=1e-6)


def test_overhaul_takes_tokens_and_one_layer():
    criterion, students, teachers = overhaul(((3, 4),))
    tokens = [[x.flatten(2).transpose(1, 2) for x in part] for part in (students, teachers)]
    torch.testing.assert_close(criterion(*tokens), criterion(students, teachers))


def test_margins_of_a_batch_normalisation():
    """The mean of the negative side of what it makes, by sampling."""
    norm = nn.BatchNorm2d(4)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 0.1])
    norm.bias.data = torch.tensor([0.0, 1.0, -0.3, 2.0])
    criterion = OverhaulDistillation([3], [4])
    criterion.use_batch_norm([norm])
    samples = norm.bias + norm.weight * torch.randn(400_000, 4)
    for channel in range(3):
        negative = samples[:, channel][samples[:, channel] < 0]
        assert criterion.margins[0][channel].item() == pytest.approx(negative.mean().item(), rel=0.02)
    assert criterion.margins[0][3].item() == pytest.approx(-0.3)  # never negative


# ------------------------------------------------------------------------------------------------- contrastive


def test_contrastive_banks_and_normalization():
    """Z is set by the first batch; banks move where the batch is, in training alone; no global number is drawn."""
    criterion = ContrastiveDistillation(
        5, 7, 12, embedding_dim=4, num_negatives=6, temperature=0.5, momentum=0.8
    ).double()
    expected_z = None
    for indices in (torch.tensor([3, 0, 11]), torch.tensor([3, 5, 7])):
        features = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
        state, before = torch.get_rng_state(), copy.deepcopy(criterion.state_dict())
        evaluated = criterion.eval()(*features, indices)
        torch.testing.assert_close(criterion.state_dict(), before, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(criterion.train()(*features, indices), evaluated)
        assert torch.equal(torch.get_rng_state(), state)

        generator = torch.Generator()
        generator.set_state(before["generator_state"])
        drawn = torch.randint(11, (3, 6), generator=generator)
        rows = torch.cat([indices[:, None], drawn + (drawn >= indices[:, None])], 1)  # never the row's own
        z = []
        for side, other, x in (("student", "teacher", features[0]), ("teacher", "student", features[1])):
            v = F.normalize(getattr(criterion, f"embed_{side}")(x), dim=1).detach()
            z.append(torch.einsum("bd,bkd->bk", v, before[f"bank_{other}"][rows]).div(0.5).exp().mean() * 12)
            bank = before[f"bank_{side}"].clone()
            bank[indices] = F.normalize(0.8 * bank[indices] + 0.2 * v, dim=1)
            torch.testing.assert_close(getattr(criterion, f"bank_{side}"), bank)
        expected_z = expected_z or z
        torch.testing.assert_close(criterion.log_z.exp(), torch.stack(expected_z))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DistillationLoss()(torch.ones(4, 3), torch.ones(4, 3)), "labels must be given where alpha is above 0"),
        (lambda: DistillationLoss(alpha=-1), "alpha must be"),
        (lambda: DistillationLoss(label_smoothing=2), "label_smoothing must be"),
        (lambda: FeatureDistillation(5)(torch.ones(5), torch.ones(5)), r"student must be \[B, D\], \[B, T, D\] or"),
        (lambda: OverhaulDistillation([], []), "student_dims must be widths of one layer or more"),
        (lambda: OverhaulDistillation([3], [4, 5]), "teacher_dims must be of 1 layers as student_dims"),
        (lambda: OverhaulDistillation([3], [4], layer_weights=[1, 2]), "layer_weights must be of 1 layers"),
        (lambda: OverhaulDistillation([3], [4])([torch.ones(2, 3, 2, 2)], [torch.ones(2, 4, 2, 2)]), "margins must be"),
        (lambda: overhaul()[0].fit_margins([]), "features must be of at least one batch, got none"),
        (lambda: overhaul()[0].use_batch_norm([nn.BatchNorm2d(4), nn.ReLU()]), "layers must be normalisations of 6"),
        (lambda: ContrastiveDistillation(5, 7, 1), "num_samples must be at least 2, got 1"),
        (lambda: ContrastiveDistillation(5, 7, 9, momentum=1.5), "momentum must be in 0 .. 1"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=rf"Distillation\w*[.\w]*: {message}"):
        call()
