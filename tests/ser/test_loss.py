import math

import pytest
import torch
import torch.nn.functional as F

from equireg import GridTransform, SERLoss, patch_nt_xent
from tests import references


def maps(images, places, width=5, dtype=torch.float64):
    return torch.randn(2, images, places, width, dtype=dtype)


def elements(count, grid=(4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return GridTransform.random(count, grid, generator=generator), GridTransform.random(
        count, grid, generator=generator
    )


def tokens_for(g, width=8, dtype=torch.float32):
    return torch.randn(len(g), g.target[0] * g.target[1], width, dtype=dtype)


# ------------------------------------------------------------------------------------------------- the function


def test_same_tensor_twice_and_one_side_detached():  # F23
    z = maps(3, 2)[0].requires_grad_()
    expected = float(references.patch_nt_xent(z.detach(), z.detach(), 0.3))
    assert float(patch_nt_xent(z, z).detach()) == pytest.approx(expected, rel=1e-10)
    patch_nt_xent(z, z.detach()).backward()
    assert z.grad.norm() > 0


def test_a_small_loss_is_not_lost():
    """Positives at cosine 1, negatives at -1: the loss is log(1 + 4 exp(-40)), 1.7e-17, and not 0."""
    z = torch.tensor([[[1.0, 0.0]] * 2, [[-1.0, 0.0]] * 2])
    assert float(patch_nt_xent(z, z, temperature=0.05)) == pytest.approx(4 * math.exp(-40), rel=1e-4)


def test_the_hardest_pairs_keep_their_gradient():
    """Positives at -1 and negatives at 1, at a temperature of 0.01: a gap of 200 and a slope, not a cut."""
    z = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    z_prime = torch.tensor([[[-1.0, 1e-3]], [[-1.0, 1e-3]]], requires_grad=True)
    loss = patch_nt_xent(z, z_prime, temperature=0.01)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(200, rel=1e-3)
    assert z_prime.grad.isfinite().all()
    assert z_prime.grad.norm() > 1e-2


def test_scale_of_tokens_does_not_matter():
    z, z_prime = maps(3, 4)
    expected = patch_nt_xent(z, z_prime)
    for scale in (1e-3, 1e30):
        torch.testing.assert_close(patch_nt_xent(scale * z, z_prime * scale), expected)


def test_moved_negatives_are_those_of_the_other_view_alone():
    """Two images of one place, whose second views are alike: they repel the moved tokens, not each other."""
    z = torch.eye(2)[:, None]
    z_prime = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    found = patch_nt_xent(z, z_prime, temperature=0.5, negatives="moved")
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))  # the first is nearer to its own, the second not
    assert float(found) == pytest.approx((right + wrong) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="patch_nt_xent: negatives must be one of 'both', 'moved', got 'all'"):
        patch_nt_xent(z, z_prime, negatives="all")


# --------------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("token_norm", [False, True])
def test_module_is_the_function_on_aligned_and_projected_tokens(token_norm):
    g1, g2 = elements(5)
    tokens1, tokens2 = tokens_for(g1), tokens_for(g2)
    ser = SERLoss(8, projection_dim=16, temperature=0.5, token_norm=token_norm)
    norm = torch.nn.LayerNorm(8) if token_norm else torch.nn.Identity()
    moved = (g2 @ g1.inverse()).on_tokens(norm(tokens1))
    expected = patch_nt_xent(ser.projection(moved), ser.projection(norm(tokens2)), temperature=0.5)
    torch.testing.assert_close(ser(tokens1, tokens2, g1, g2), expected)
    assert [type(layer).__name__ for layer in ser.projection] == ["Linear", "GELU", "Linear"]
    assert ser.projection[2].out_features == 16


def test_each_layer_has_every_option():
    g1, g2 = elements(4)
    maps1, maps2 = ([tokens_for(g) for _ in range(2)] for g in (g1, g2))
    how = {"projection_dim": 16, "temperature": 0.5, "token_norm": True, "negatives": "moved"}
    whole, alone = SERLoss(8, layers=2, **how), [SERLoss(8, **how) for _ in range(2)]
    for layer, ser in zip(whole.layers, alone):
        torch.nn.init.normal_(layer.token_norm.weight)
        ser.load_state_dict(layer.state_dict())
    expected = sum(ser(*tokens, g1, g2) for ser, *tokens in zip(alone, maps1, maps2)) / 2
    torch.testing.assert_close(whole(maps1, maps2, g1, g2), expected)


def test_names_of_its_state():
    assert set(SERLoss(8).state_dict()) == {f"projection.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}


def test_parts_hold_the_similarity_of_aligned_tokens():
    """Of a place of the second view, and the place of the first that the element takes there."""
    g1, g2 = (
        GridTransform.identity(3, (2, 2)),
        GridTransform(torch.tensor([1, 2, 3]), torch.ones(3).bool(), (2, 2), (2, 2)),
    )
    tokens1, tokens2 = torch.randn(2, 3, 4, 8)
    ser = SERLoss(8)
    z = ser.projection(tokens1).unflatten(1, (2, 2)).flip(2)
    turned = torch.stack([torch.rot90(z[i], i + 1) for i in range(3)]).flatten(1, 2)
    expected = F.cosine_similarity(turned, ser.projection(tokens2), dim=-1).mean()
    torch.testing.assert_close(ser.parts(tokens1, tokens2, g1, g2).alignment, expected.detach())


Z = torch.randn(2, 3, 4)
ONE, TWO = elements(3)
FIRST, SECOND = tokens_for(ONE), tokens_for(TWO)
SHORT, OTHER = elements(2)[0], elements(3, grid=(5, 5))[0]


def module(*arguments):
    return lambda: SERLoss(8)(*arguments)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: patch_nt_xent([1.0], Z), TypeError, "z must be a tensor"),  # F1
        (lambda: patch_nt_xent(Z.cfloat(), Z), TypeError, "z must be a tensor of floating point"),  # F2
        (lambda: patch_nt_xent(Z[:, :, 0], Z), ValueError, r"z must be \[B, T, D\], got \[2, 3\]"),  # F3
        (lambda: patch_nt_xent(Z, Z[:1]), ValueError, r"z_prime must be .* \[2, 3, 4\], got \[1, 3, 4\]"),  # F4
        (lambda: patch_nt_xent(Z, Z.to("meta")), ValueError, "z_prime must be on cpu as z is, got meta"),  # F5
        (lambda: patch_nt_xent(Z, Z.double()), TypeError, "z_prime must be of z's dtype"),  # F5
        (lambda: patch_nt_xent(Z[:, :0], Z[:, :0]), ValueError, "z must be of at least one token"),  # F6
        (lambda: patch_nt_xent(Z[..., :0], Z[..., :0]), ValueError, "z must be of at least one token"),  # F7
        (lambda: patch_nt_xent(Z, Z, temperature=math.nan), ValueError, "temperature .* got nan"),
        (lambda: patch_nt_xent(Z, Z, temperature="0.3"), TypeError, "temperature must be a number"),
        (module(FIRST, SECOND, ONE, OTHER), ValueError, r"g2 must be of g1's source grid \(4, 4\)"),
        (module(FIRST, SECOND, ONE, SHORT), ValueError, "g2 must be of 3 elements as g1, got 2"),  # G8
        (module(FIRST, SECOND[:, :-1], ONE, TWO), ValueError, "tokens2 must be of"),  # G7
        (module(FIRST[..., :4], SECOND, ONE, TWO), ValueError, r"tokens1 must be .*8\].*got"),
        (module(FIRST, SECOND.to("meta"), ONE, TWO), ValueError, "tokens2 must be on cpu as the loss module"),
        (lambda: SERLoss(0), ValueError, "dim must be at least 1, got 0"),
        (lambda: SERLoss(8.0), TypeError, "dim must be a whole number"),
        (lambda: SERLoss(8, projection_dim=-1), ValueError, "projection_dim must be at least 1"),
        (lambda: SERLoss(8, token_norm=2), ValueError, "token_norm must be one of True, False"),
        (
            lambda: SERLoss(8, gather_distributed=1),
            ValueError,
            "gather_distributed must be True, False or .* got 1",
        ),
    ],
)
def test_refuses(call, kind, message):
    with pytest.raises(kind, match=f"^(patch_nt_xent|SERLoss): .*{message}"):
        call()
