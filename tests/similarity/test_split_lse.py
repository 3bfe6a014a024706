"""Log-sum-exp and softmax mean in two parts of each row, against plain sums and autograd."""

import math

import pytest
import torch

from equireg.similarity import split_lse
from equireg.similarity.fused import split_lse as split
from equireg.similarity.fused.split_lse import _split_lse


def problem(rows, cols, size=5.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows + cols)
    logits = size * (2 * torch.rand(rows, cols, dtype=torch.float64, generator=generator) - 1)
    first, dropped = (torch.rand(rows, cols, generator=generator) < share for share in (0.5, 0.2))
    return logits.to(dtype).requires_grad_(), first, dropped


def reference(logits, first, dropped):
    """Each row and part by itself."""
    lse, mean = [], []
    for part in (first & ~dropped, ~first & ~dropped):
        chosen = [row[kept] for row, kept in zip(logits, part)]
        lse.append(torch.stack([row.logsumexp(0) for row in chosen]))
        mean.append(torch.stack([(row.softmax(0) * row).sum() for row in chosen]))
    return torch.stack(lse), torch.stack(mean)


@pytest.mark.parametrize("entries", [1, 40, 2**16])
@pytest.mark.parametrize(("size", "bound"), [(5.0, 5.0), (5.0, math.inf), (300.0, 300.0)])
def test_equals_the_sums(entries, size, bound, monkeypatch):
    monkeypatch.setattr(split, "_ENTRIES", entries)
    logits, first, dropped = problem(9, 13, size)
    found, expected = split_lse(logits, first, dropped, bound), reference(logits, first, dropped)
    g_lse, g_mean = torch.randn(2, 2, 9, dtype=torch.float64)
    for upstream in ((g_lse, g_mean), (g_lse, 0 * g_mean), (0 * g_lse, g_mean)):
        grads = [
            torch.autograd.grad([lse, mean], logits, upstream, retain_graph=True)[0] for lse, mean in (found, expected)
        ]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    for value, wanted in zip(found, expected):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    only_lse = torch.autograd.grad(split_lse(logits, first, dropped, bound)[0], logits, g_lse)[0]
    torch.testing.assert_close(only_lse, torch.autograd.grad(expected[0], logits, g_lse)[0])


@pytest.mark.parametrize("bound", [5.0, math.inf])
def test_part_without_pairs_has_no_gradient(bound):
    logits, first, dropped = problem(4, 6)
    first[1], dropped[2] = True, True
    lse, mean = split_lse(logits, first, dropped, bound)
    assert lse[1, 1] == lse[0, 2] == lse[1, 2] == -math.inf
    assert mean[1, 1] == mean[0, 2] == mean[1, 2] == 0
    (grad,) = torch.autograd.grad((lse.exp() + mean).sum(), logits)
    assert grad.isfinite().all()
    assert not grad[2].any()
    empty = split_lse(torch.zeros(3, 0), *torch.zeros(2, 3, 0, dtype=torch.bool), bound)
    assert empty[0].eq(-math.inf).all()
    assert not empty[1].any()


def test_parts_far_apart_keep_their_digits():
    """A peak in common would leave nothing of the lower part; that what is dropped is larger makes no difference."""
    logits = torch.tensor([[500.0, 499.0, -500.0, -501.0, 900.0]], requires_grad=True)
    first = torch.tensor([[True, True, False, False, False]])
    dropped = torch.tensor([[False, False, False, False, True]])
    lse, _ = split_lse(logits, first, dropped, math.inf)
    torch.testing.assert_close(lse.flatten(), torch.tensor([500.0, -500.0]) + math.log(1 + math.exp(-1)))
    (grad,) = torch.autograd.grad(lse.sum(), logits)
    torch.testing.assert_close(grad[0], torch.tensor([0.731059, 0.268941, 0.731059, 0.268941, 0.0]))
    assert torch.autograd.grad(split_lse(logits, first, dropped, math.inf)[1].sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("bounded", [False, True])
def test_nan_shows(bounded):  # F15
    logits, first, dropped = problem(3, 8)
    with torch.no_grad():
        logits[1, 4] = math.nan
    dropped[1, 4] = False
    lse, mean = _split_lse(logits, first, dropped, bounded)
    assert lse[:, 1].isnan().any()
    assert mean[:, 1].isnan().any()
    assert lse[:, [0, 2]].isfinite().all()


def test_second_derivative_is_refused():  # K11
    logits, first, dropped = problem(4, 6)
    (grad,) = torch.autograd.grad(split_lse(logits, first, dropped, 5.0)[0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
