"""The contrast whose gradients are formed in the forward pass, against the matrix in autograd's hands."""

import pytest
import torch
import torch.nn.functional as F

from equireg import GridTransform, SERLoss, patch_nt_xent
from equireg.similarity import choice, mean_contrast
from equireg.similarity.fused import mean_contrast as contrast
from equireg.similarity.fused.mean_contrast import few
from equireg.similarity.streamed import tiles
from tests.gpu.devices import needs_a_gpu
from tests.similarity.pairs import DEVICE, GPU


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def reference(x, p, keys, temperature, row_group, key_group):
    """Every pair written out, and logsumexp."""
    columns = torch.cat([x, p] if keys is None else keys)
    logits = x @ columns.T / temperature
    logits = logits.masked_fill(row_group[:, None] == key_group.repeat(2)[None], -torch.inf)
    positive = (x * p).sum(1, keepdim=True) / temperature
    return (torch.cat([positive, logits], 1).logsumexp(1) - positive[:, 0]).mean()


@pytest.fixture(params=[16, 392])
def _tile_size(request, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", request.param)
    monkeypatch.setattr(tiles, "COLS", 2 * request.param - 9)


@pytest.mark.usefixtures("_tile_size")
@pytest.mark.parametrize("temperature", [0.3, 0.02])  # 1 / 0.3 is bounded, 50 looks for each row's peak
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_equals_the_matrix(temperature, apart, learned):
    """Itself, and rows 20 to 49 of 60 keys, as one process has them."""
    groups = torch.arange(60) // 4
    keys = [unit(60, 6, seed=1).requires_grad_(), unit(60, 6, seed=2).requires_grad_()]
    rows = slice(20, 50) if apart else slice(0, 60)
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True) if learned else temperature
    leaves = [*keys, *([tau] if learned else [])]
    results = []
    for function in (reference, mean_contrast):
        x, p = keys[0][rows], keys[1][rows]
        loss = function(x, p, tuple(keys) if apart else None, tau, groups[rows], groups)
        results.append([loss.detach(), *torch.autograd.grad(3 * loss, leaves)])
    for value, expected in zip(results[1], results[0]):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.3, 0.02])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_forms_only_the_gradients_that_are_needed(temperature, wanted):
    x, p = (unit(24, 5, seed=s).requires_grad_(want) for s, want in zip((1, 2), wanted))
    groups = torch.arange(24) // 3
    loss = mean_contrast(x, p, None, temperature, groups, groups)
    expected = reference(x, p, None, temperature, groups, groups)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == any(wanted)
    for part in (x, p):
        if part.requires_grad:
            grads = [torch.autograd.grad(value, part, retain_graph=True)[0] for value in (loss, expected)]
            torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-13)
    with torch.no_grad():
        assert not mean_contrast(x, p, None, temperature, groups, groups).requires_grad


@pytest.mark.parametrize("temperature", [0.3, 0.02])
def test_row_without_pairs_counts_as_nothing(temperature):
    x, p = unit(6, 4, seed=1).requires_grad_(), unit(6, 4, seed=2).requires_grad_()
    groups = torch.zeros(6, dtype=torch.int64)
    loss = mean_contrast(x, p, None, temperature, groups, groups)
    grads = torch.autograd.grad(loss, (x, p))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_second_derivative_is_refused():  # K11
    x, p = unit(6, 4, seed=1).requires_grad_(), unit(6, 4, seed=2)
    groups = torch.arange(6)
    (grad,) = torch.autograd.grad(mean_contrast(x, p, None, 0.3, groups, groups), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_by_pair_lse(apart, wanted, monkeypatch):
    """The form for too many tiles, and for kernels: loss and gradients, also to the temperature, are the same."""
    monkeypatch.setattr(choice, "of_contrast", lambda *_: "chunked")
    groups, rows = torch.arange(60) // 4, slice(20, 50) if apart else slice(0, 60)
    keys = [unit(60, 6, seed=seed).requires_grad_(want) for seed, want in zip((1, 2), wanted)]
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=wanted[0])
    leaves, results = [leaf for leaf in (*keys, tau) if leaf.requires_grad], []
    for function in (reference, mean_contrast):
        x, p = (part[rows] for part in keys)
        loss = function(x, p, tuple(keys) if apart else None, tau, groups[rows], groups)
        results.append([loss.detach(), *(torch.autograd.grad(3 * loss, leaves) if leaves else ())])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.usefixtures("triton_tiles")
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (None, 5e-3 if GPU else 1e-5),
        (torch.float16, 2e-3),
        pytest.param(torch.bfloat16, 1e-2, marks=[pytest.mark.gpu, needs_a_gpu]),
    ],
)
def test_by_kernels(dtype, limit, monkeypatch):
    """Rounded to the dtype of the tokens; in Triton's interpreter where there is no GPU."""
    monkeypatch.setattr(choice, "of_contrast", lambda *_: "triton")
    groups = torch.arange(40, device=DEVICE) // 4
    x, p = (unit(40, 20, seed=seed).float().to(DEVICE).requires_grad_() for seed in (1, 2))
    loss = mean_contrast(x, p, None, 0.3, groups, groups, dtype)
    expected = reference(x.double(), p.double(), None, 0.3, groups, groups)
    torch.testing.assert_close(loss.double(), expected, rtol=limit, atol=0)
    for mine, theirs in zip(torch.autograd.grad(loss, (x, p)), torch.autograd.grad(expected, (x, p))):
        assert (mine - theirs).norm() <= limit * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("module", [False, True])
def test_kernels_may_round_to_the_dtype_of_the_tokens(dtype, module, monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "of_contrast", lambda rows, few: asked.append((rows.dtype, rows.shape[1])) or "at once")
    z, still = torch.randn(3, 4, 8, dtype=dtype), GridTransform.identity(3, (2, 2))
    if module:
        SERLoss(8, projection_dim=16).to(dtype)(z, z, still, still)
    else:
        patch_nt_xent(z, z)
    assert asked == [(dtype, 16 if module else 8)]


def test_both_ways_of_the_loss_agree(monkeypatch):
    """Where the tiles of a block of rows would be too many, they are formed twice."""
    z, z_prime = (torch.randn(5, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert few(200, 400, z.device)
    results = []
    for most in (2**24, 1000):
        monkeypatch.setattr(contrast, "_KEPT", most)
        assert few(200, 400, z.device) == (most > 1000)
        loss = patch_nt_xent(z, z_prime)
        results.append([loss.detach(), *torch.autograd.grad(loss, (z, z_prime))])
    for kept, formed_twice in zip(*results):
        torch.testing.assert_close(kept, formed_twice, rtol=1e-10, atol=1e-14)
