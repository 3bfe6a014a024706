import pytest
import torch

from equireg import irmv1_penalty, rex_penalty


@pytest.mark.parametrize("environments", [1, 2, 5])
def test_rex_is_the_unbiased_variance(environments):
    risk = torch.randn(7, environments, dtype=torch.float64)
    expected = [0.0 if environments == 1 else float(row.var(unbiased=True)) for row in risk]
    torch.testing.assert_close(rex_penalty(risk), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(rex_penalty(risk[0]), torch.tensor(expected[0], dtype=torch.float64))


def test_rex_of_equal_risks_has_no_gradient():
    risk = torch.ones(3, 2, requires_grad=True)
    rex_penalty(risk).sum().backward()
    assert torch.equal(risk.grad, torch.zeros(3, 2))


def test_irmv1_is_the_sum_of_squares():
    slope = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(irmv1_penalty(slope), slope.pow(2).sum(1))


@pytest.mark.parametrize("penalty", [rex_penalty, irmv1_penalty])
def test_wrong_arguments(penalty):
    with pytest.raises(ValueError, match=r"must be \[K, E\], got \[1, 2, 3\]"):
        penalty(torch.ones(1, 2, 3))
