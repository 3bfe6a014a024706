"""SelfReg where its record does not reach: the default projection, the partners, the share that it draws."""

import pytest
import torch

from equireg import SelfRegLoss
from tests import loss_references


def batch(count=8, classes=3):
    generator = torch.Generator().manual_seed(0)
    features, logits = (torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (6, 4))
    return features.requires_grad_(), logits.requires_grad_(), torch.arange(count) % classes


def test_with_the_authors_projection_it_is_the_formula():
    """Values and gradients against a loop, by the statistics of the batch; and by finite differences."""
    torch.manual_seed(0)
    loss, args = SelfRegLoss(6).double(), batch()
    assert [tuple(p.shape) for p in loss.parameters() if p.dim() == 2] == [(12, 6), (12, 12), (6, 12)]
    p = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in loss.state_dict().items()}
    expected = loss_references.selfreg(p, *args, 0.7, weights=(0.3, 1.0))
    found = loss(*args, 0.7)
    torch.testing.assert_close(found, expected)
    learned = [*args[:2], *loss.parameters()], [*args[:2], *(p[name] for name, _ in loss.named_parameters())]
    for mine, theirs in zip(*map(torch.autograd.grad, (found, expected), learned)):
        assert mine.any()
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(lambda f, h: loss(f, h, args[2], 0.7), args[:2])


def test_samples_of_one_class_are_pulled_together():
    """Of logits that are alike within classes there is nothing to pull; a sample that is alone is its own partner."""
    features, _, labels = batch()
    loss, logits = SelfRegLoss(6).double(), torch.randn(3, 4).double()[labels]
    assert loss.parts(features, logits, labels).logits == 0
    assert loss.parts(features, torch.randn(8, 4).double(), torch.arange(8)).logits == 0
    assert loss.parts(features, logits + torch.randn(8, 1).double(), labels).logits > 0
    # Three of one class, on a line: the partners of each are the two others.
    line, share = torch.tensor([[0.0], [1.0], [3.0]]), 0.25
    mixed = [0.25 * second + 0.75 * third for second, third in ((1, 3), (3, 0), (0, 1))]
    alone, mixed = (sum((own - other) ** 2 for own, other in zip((0, 1, 3), of)) / 3 for of in ((1, 3, 0), mixed))
    found = SelfRegLoss(1).parts(torch.randn(3, 1), line, torch.zeros(3, dtype=torch.int64), share).logits
    assert found.item() == pytest.approx(share * alone + (1 - share) * mixed)


def test_the_share_is_drawn_from_beta():
    """Two logits, 0 and 1, of one class: the loss tells γ."""
    args = torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]), torch.zeros(2, dtype=torch.int64)
    loss, generator = SelfRegLoss(1, feature_weight=0).eval(), torch.Generator().manual_seed(0)
    # The second partner of two is the sample itself: γ + (1 - γ) γ², which rises with γ.
    found = torch.stack([loss(*args, generator=generator) for _ in range(400)])
    grid = torch.linspace(0, 1, 100_001)
    shares = grid[torch.searchsorted(grid + (1 - grid) * grid**2, found).clamp(max=100_000)].sort().values
    expected = 2 / torch.pi * shares.sqrt().arcsin()  # the distribution function
    assert (expected - torch.linspace(0, 1, 400)).abs().max() < 1.63 / 400**0.5  # Kolmogorov and Smirnov, 1%
    again = torch.Generator().manual_seed(0)
    assert torch.equal(found[:3], torch.stack([loss(*args, generator=again) for _ in range(3)]))


def test_a_drawn_share_compiles_whole():
    loss, args = SelfRegLoss(6).double().eval(), batch(8)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, share=0.3), loss(*args, share=0.3))
    found = torch.stack([compiled(*args) for _ in range(8)])
    assert len(found.unique()) == 8  # each call draws its own


def test_a_single_sample_has_no_statistics():
    features, logits, labels = batch(1)
    with pytest.raises(ValueError, match=r"features must be of at least 2 samples, .* BatchNorm, got \[1, 6\]"):
        SelfRegLoss(6).double()(features, logits, labels)
    assert SelfRegLoss(6).double().eval()(features, logits, labels).isfinite()
