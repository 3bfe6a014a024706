"""Vectors of unit length and their gradient in closed form, against PyTorch's quotient."""

import pytest
import torch
import torch.nn.functional as F

from equireg.similarity import inverse_length, normalization, normalized


@pytest.fixture(params=[0, 10, 2**17], autouse=True)
def _entries(request, monkeypatch):
    """By the operator, in blocks of one row and of a few; and for small tensors as a formula."""
    monkeypatch.setattr(normalization, "_ENTRIES", request.param)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4), (6,), (0, 3)])
def test_equals_the_quotient(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(shape, dtype=torch.float64)
    results = [(y, *torch.autograd.grad(y, x, gradient)) for y in (normalized(x), F.normalize(x, dim=-1))]
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_factor_apart_gives_the_same_bits(dtype):
    x = torch.randn(65, 130, dtype=dtype)
    x[3] *= 1e-7
    assert torch.equal(torch.mul(x, inverse_length(x)), normalized(x))


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-3)])
def test_short_vectors_are_divided_by_a_constant(dtype, eps):  # F9
    x = torch.tensor([[0.0, 0.0], [eps / 2, 0.0], [3.0, 4.0]]).to(dtype).requires_grad_()
    y = normalized(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.detach().float() / torch.tensor([[eps], [eps], [5.0]]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = torch.tensor([[1 / eps, 1 / eps], [1 / eps, 1 / eps], [0.2 * (1 - 0.6 * 1.4), 0.2 * (1 - 0.8 * 1.4)]])
    torch.testing.assert_close(gradient, expected.to(dtype))


def test_differentiates_again_and_again():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalized, x)
    assert torch.autograd.gradgradcheck(normalized, x)


def test_contiguous_whatever_comes():
    x = torch.randn(3, 4, 5, requires_grad=True)
    turned = normalized(x.transpose(1, 2))
    assert turned.is_contiguous()
    assert torch.equal(turned, normalized(x.transpose(1, 2).contiguous()))
