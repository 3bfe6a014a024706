"""Stage II's losses against their formulas, written out."""

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
    TokenTap,
)


def logits(count=6, classes=5, dtype=torch.float64):
    return torch.randn(count, classes, dtype=dtype)


# ------------------------------------------------------------------------------------------------- on logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_the_formula(temperature):
    student, teacher, labels = logits(), logits(), torch.arange(6) % 5
    total = 0.0
    for z_s, z_t, y in zip(student.tolist(), teacher.tolist(), labels.tolist()):
        p, q, plain = (
            [math.exp(a / t) / sum(math.exp(b / t) for b in z) for a in z]
            for z, t in ((z_s, temperature), (z_t, temperature), (z_s, 1.0))
        )
        ce = -sum((0.9 * (i == y) + 0.1 / 5) * math.log(plain[i]) for i in range(5))
        total += 0.3 * ce + 0.7 * sum(b * math.log(b / a) for a, b in zip(p, q))
    loss = DistillationLoss(temperature=temperature, alpha=0.3, beta=0.7)(student, teacher, labels)
    torch.testing.assert_close(loss.item(), total / 6)


def test_default_beta_is_hintons():
    """The gradient at a high temperature is that of matching logits, whatever the temperature."""
    student, teacher = logits().requires_grad_(), logits()
    grads = [
        torch.autograd.grad(DistillationLoss(temperature=t, alpha=0.0)(student, teacher), student)[0]
        for t in (500, 1000)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=0.02, atol=1e-6)
    difference = student - teacher
    expected = (difference - difference.mean(1, keepdim=True)) / (5 * 6)
    torch.testing.assert_close(grads[1], expected.detach(), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype):
    student, teacher = 30 * logits(dtype=dtype), 30 * logits(dtype=dtype)
    labels = torch.zeros(6).long()
    loss = DistillationLoss(temperature=0.5)(student, teacher, labels)
    assert loss.dtype == torch.float32
    exact = DistillationLoss(temperature=0.5)(student.double(), teacher.double(), labels)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.ones(4, 3), torch.ones(4, 2), torch.zeros(4).long()),
            ValueError,
            r"teacher must be \[B, C\] = \[4, 3\]",
        ),
        ((torch.ones(4, 3), torch.ones(4, 3)), ValueError, "labels must be given where alpha is above 0, got None"),
        ((torch.ones(4, 3), torch.ones(4, 3), torch.arange(4)), ValueError, "labels must be in 0 .. 2"),
        ((torch.ones(4, 3), torch.ones(4, 3), torch.ones(4)), TypeError, "labels must be a tensor of whole numbers"),
        ((torch.ones(0, 3), torch.ones(0, 3), torch.zeros(0).long()), ValueError, "student must be of at least one"),
    ],
)
def test_refuses_logits(arguments, error, message):
    with pytest.raises(error, match=f"DistillationLoss: {message}"):
        DistillationLoss()(*arguments)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"alpha": -1}, {"beta": -1}, {"label_smoothing": 2}])
def test_refuses_options(options):
    with pytest.raises(ValueError, match=f"DistillationLoss: {next(iter(options))} must be"):
        DistillationLoss(**options)


# ------------------------------------------------------------------------------------------------- on features


def test_features_equal_the_formula_in_any_layout():
    criterion = FeatureDistillation(5)
    student, teacher = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    q, p = teacher.softmax(-1), student.softmax(-1)
    expected = (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(criterion(student, teacher), expected)
    maps = [x.transpose(1, 2).unflatten(2, (7, 1)) for x in (student, teacher)]
    torch.testing.assert_close(criterion(*maps), expected)
    torch.testing.assert_close(criterion(student[:, 0], teacher[:, 0]), (q * (q / p).log()).sum(-1)[:, 0].mean())
    assert not list(criterion.parameters())


def test_features_of_other_widths_are_connected():
    criterion = FeatureDistillation(5, 8, temperature=2.0)
    student, teacher = torch.randn(4, 5), torch.randn(4, 8, requires_grad=True)
    criterion(student, teacher).backward()
    assert teacher.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in criterion.parameters())
    with pytest.raises(ValueError, match=r"teacher must be \[B, D\] = \[B, 8\], got \[4, 5\]"):
        criterion(student, student)
    with pytest.raises(ValueError, match=r"teacher must be at the student's places \[4\], got \[4, 2\]"):
        criterion(student, torch.randn(4, 2, 8))


# ------------------------------------------------------------------------------------------------- overhaul


def overhaul(dims=((3, 4), (5, 6))):
    criterion = OverhaulDistillation([a for a, _ in dims], [b for _, b in dims]).double()
    maps = [torch.randn(8, b, 3, 2, dtype=torch.float64) for _, b in dims]
    criterion.fit_margins([maps[:1] + maps[1:], [2 * layer for layer in maps]])
    return criterion, [torch.randn(8, a, 3, 2, dtype=torch.float64) for a, _ in dims], maps


def test_margins_are_the_means_of_negative_values():
    criterion, _, maps = overhaul()
    for margin, layer in zip(criterion.margins, maps):
        for channel in range(layer.shape[1]):
            values = [v for x in (layer, 2 * layer) for v in x[:, channel].flatten().tolist() if v < 0]
            assert margin[channel].item() == pytest.approx(sum(values) / len(values), rel=1e-6)


def test_overhaul_equals_the_formula():
    criterion, students, teachers = overhaul()
    expected = 0.0
    for i, (student, teacher) in enumerate(zip(students, teachers)):
        connector = copy.deepcopy(criterion.connectors[i])
        places = connector.linear(student.movedim(1, -1))  # a 1×1 convolution
        mean, var = places.mean((0, 1, 2)), places.var((0, 1, 2), correction=0)
        found = ((places - mean) / (var + 1e-5).sqrt()).movedim(-1, 1)
        total = 0.0
        for b in range(8):
            for c in range(teacher.shape[1]):
                for t, s in zip(teacher[b, c].flatten().tolist(), found[b, c].flatten().tolist()):
                    t = max(t, criterion.margins[i][c].item())
                    total += 0.0 if s <= t <= 0 else (t - s) ** 2
        expected += total / teacher.numel() * [0.5, 1.0][i]
    torch.testing.assert_close(criterion(students, teachers).item(), expected, rtol=1e-6, atol=1e-9)


def test_overhaul_takes_tokens_and_one_layer():
    criterion, students, teachers = overhaul(((3, 4),))
    expected = criterion(students, teachers)
    tokens = [[x.flatten(2).transpose(1, 2) for x in part] for part in (students, teachers)]
    torch.testing.assert_close(criterion(*tokens), expected)


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


def test_overhaul_on_taps_of_real_backbones():
    timm = pytest.importorskip("timm", reason="needs the examples extra")
    student, teacher = (timm.create_model(name, num_classes=4) for name in ("test_resnet", "test_efficientnet"))
    layers = {student: ["layer2", "layer3"], teacher: ["blocks.2", "blocks.3"]}
    images = torch.rand(4, 3, 64, 64)

    def tokens(model):
        with TokenTap(model, layers[model][0]) as first, TokenTap(model, layers[model][1]) as last:
            model(images)
        return [first.tokens, last.tokens], [first.grid, last.grid]

    (mine, grids), (theirs, other_grids) = tokens(student), tokens(teacher)
    assert grids == other_grids
    criterion = OverhaulDistillation([x.shape[2] for x in mine], [x.shape[2] for x in theirs])
    criterion.fit_margins([theirs])
    criterion(mine, theirs).backward()
    assert student.conv1[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_overhaul_state_travels():
    criterion, students, teachers = overhaul()
    other = OverhaulDistillation([3, 5], [4, 6]).double()
    with pytest.raises(ValueError, match="margins must be there: call fit_margins or use_batch_norm first"):
        other(students, teachers)
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(other.eval()(students, teachers), criterion.eval()(students, teachers))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OverhaulDistillation([], []), "student_dims must be widths of one layer or more"),
        (lambda: OverhaulDistillation([3], [4, 5]), "teacher_dims must be of 1 layers as student_dims"),
        (lambda: OverhaulDistillation([3], [4], layer_weights=[1, 2]), "layer_weights must be of 1 layers"),
        (lambda: overhaul()[0]([torch.ones(1, 3, 2, 2)], []), "students must be a list of 2 layers, got 1"),
        (lambda: overhaul()[0].fit_margins([]), "features must be of at least one batch, got none"),
        (lambda: overhaul()[0].use_batch_norm([nn.BatchNorm2d(4), nn.ReLU()]), "layers must be normalisations of 6"),
    ],
)
def test_overhaul_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------- contrastive


def test_contrastive_equals_the_formula():
    """Two steps: the second with banks that have moved, and the Z of the first."""
    criterion = ContrastiveDistillation(5, 7, 12, embedding_dim=4, num_negatives=6, temperature=0.5).double()
    z = None
    for indices in (torch.tensor([3, 0, 11]), torch.tensor([3, 5, 7])):
        student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
        banks = criterion.bank_teacher.clone(), criterion.bank_student.clone()
        generator = torch.Generator()
        generator.set_state(criterion.generator_state)
        drawn = torch.randint(11, (3, 6), generator=generator)
        v = (
            F.normalize(criterion.embed_student(student), dim=1),
            F.normalize(criterion.embed_teacher(teacher), dim=1),
        )
        expected, masses = 0.0, []
        for embedded, bank in zip([part.detach() for part in v], banks):
            mass = []
            for i in range(3):
                others = [int(j) + int(j >= indices[i]) for j in drawn[i]]
                assert int(indices[i]) not in others
                mass.append([math.exp(float(embedded[i] @ bank[j]) / 0.5) for j in [int(indices[i]), *others]])
            masses.append(mass)
        z = z or [sum(map(sum, mass)) / (3 * 7) * 12 for mass in masses]
        for mass, norm in zip(masses, z):
            for positive, *negatives in mass:
                h = [x / norm / (x / norm + 6 / 12) for x in (positive, *negatives)]
                expected -= (math.log(h[0]) + sum(math.log(1 - x) for x in h[1:])) / 3
        loss = criterion(student, teacher, indices)
        torch.testing.assert_close(loss.item(), expected)
        for bank, before, embedded in (
            (criterion.bank_teacher, banks[0], v[1]),
            (criterion.bank_student, banks[1], v[0]),
        ):
            moved = F.normalize(0.5 * before[indices] + 0.5 * embedded, dim=1)
            torch.testing.assert_close(bank[indices], moved.detach())
            rest = [j for j in range(12) if j not in indices]
            assert torch.equal(bank[rest], before[rest])
        loss.backward()


def test_contrastive_gradients_and_modes():
    criterion = ContrastiveDistillation(5, 7, 50, num_negatives=20)
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    state = torch.get_rng_state()
    criterion(student, teacher, torch.arange(4)).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert criterion.embed_teacher.weight.grad.abs().sum() > 0
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()(student, teacher, torch.arange(4))
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


def test_contrastive_resumes_bit_for_bit():
    batches = [(torch.randn(4, 5), torch.randn(4, 7), torch.randperm(50)[:4]) for _ in range(4)]
    whole = ContrastiveDistillation(5, 7, 50)
    first = copy.deepcopy(whole)
    losses = [whole(*batch).item() for batch in batches]
    for batch in batches[:2]:
        first(*batch)
    second = ContrastiveDistillation(5, 7, 50, seed=3)
    second.load_state_dict(first.state_dict())
    assert [second(*batch).item() for batch in batches[2:]] == losses[2:]


def test_contrastive_brings_a_sample_together():
    """Trained on pairs, a student's embedding ends nearer to its own teacher's than to the others'."""
    teacher = torch.randn(40, 8)
    student = teacher @ torch.randn(8, 6)
    criterion = ContrastiveDistillation(6, 8, 40, embedding_dim=8, temperature=0.2)
    optimizer = torch.optim.Adam(criterion.parameters(), 0.01)
    for _ in range(150):
        loss = criterion(student, teacher, torch.arange(40))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    v, t = (F.normalize(x, dim=1) for x in (criterion.embed_student(student), criterion.embed_teacher(teacher)))
    assert ((v @ t.T).argmax(1) == torch.arange(40)).float().mean() > 0.8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c(torch.ones(2, 4), torch.ones(2, 7), torch.arange(2)), ValueError, r"student must be \[B, 5\]"),
        (lambda c: c(torch.ones(2, 5), torch.ones(3, 7), torch.arange(2)), ValueError, "teacher must be"),
        (
            lambda c: c(torch.ones(2, 5), torch.ones(2, 7), torch.tensor([0, 50])),
            ValueError,
            "indices must be in 0 .. 49",
        ),
        (lambda c: ContrastiveDistillation(5, 7, 1), ValueError, "num_samples must be at least 2, got 1"),
        (lambda c: ContrastiveDistillation(5, 7, 9, momentum=1.5), ValueError, "momentum must be in 0 .. 1"),
    ],
)
def test_contrastive_refuses(call, error, message):
    with pytest.raises(error, match=f"ContrastiveDistillation: {message}"):
        call(ContrastiveDistillation(5, 7, 50))
