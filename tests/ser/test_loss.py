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


FUNCTION_ERRORS = {
    "F1 a list": (TypeError, "z must be a tensor", lambda z: ([1.0], z), {}),
    "F1 None": (TypeError, "z_prime must be a tensor", lambda z: (z, None), {}),
    "F2 complex": (TypeError, "z must be a tensor of floating point", lambda z: (z.cfloat(), z), {}),
    "F3 a matrix": (ValueError, r"z must be \[B, T, D\], got \[2, 3\]", lambda z: (z[:, :, 0], z), {}),
    "F4 images": (ValueError, r"z_prime must be .* \[2, 3, 4\], got \[1, 3, 4\]", lambda z: (z, z[:1]), {}),
    "F4 width": (ValueError, r"z_prime must be .* \[2, 3, 4\], got \[2, 3, 2\]", lambda z: (z, z[..., :2]), {}),
    "F5 devices": (ValueError, "z_prime must be on cpu as z is, got meta", lambda z: (z, z.to("meta")), {}),
    "F5 dtypes": (TypeError, "z_prime must be of z's dtype", lambda z: (z, z.double()), {}),
    "F6 no places": (ValueError, "z must be of at least one token", lambda z: (z[:, :0], z[:, :0]), {}),
    "F7 no width": (ValueError, "z must be of at least one token", lambda z: (z[..., :0], z[..., :0]), {}),
    "temperature 0": (ValueError, "temperature must be .* above 0, got 0", lambda z: (z, z), {"temperature": 0}),
    "temperature nan": (ValueError, "temperature .* got nan", lambda z: (z, z), {"temperature": math.nan}),
    "temperature text": (TypeError, "temperature must be a number", lambda z: (z, z), {"temperature": "0.3"}),
}


@pytest.mark.parametrize("case", FUNCTION_ERRORS)
def test_wrong_arguments(case):
    kind, message, arguments, options = FUNCTION_ERRORS[case]
    with pytest.raises(kind, match=f"^patch_nt_xent: .*{message}"):
        patch_nt_xent(*arguments(torch.randn(2, 3, 4)), **options)


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


def test_names_of_its_state():
    assert set(SERLoss(8).state_dict()) == {f"projection.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}


def wrong_calls():
    g1, g2 = elements(3)
    t1, t2 = tokens_for(g1), tokens_for(g2)
    other, _ = elements(3, grid=(5, 5))
    short, _ = elements(2)
    return {
        "another source grid": (ValueError, r"g2 must be of g1's source grid \(4, 4\)", (t1, t2, g1, other)),
        "G8 another length": (ValueError, "g2 must be of 3 elements as g1, got 2", (t1, tokens_for(short), g1, short)),
        "G7 tokens of another grid": (ValueError, "tokens2 must be of", (t1, t2[:, :-1], g1, g2)),
        "width": (ValueError, r"tokens1 must be .*8\].*got", (t1[..., :4], t2, g1, g2)),
        "F5 devices": (ValueError, "tokens2 must be on cpu as tokens1 is", (t1, t2.to("meta"), g1, g2)),
    }


@pytest.mark.parametrize("case", wrong_calls())
def test_wrong_calls(case):
    kind, message, arguments = wrong_calls()[case]
    with pytest.raises(kind, match=f"^SERLoss: .*{message}"):
        SERLoss(8)(*arguments)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 8.0}, TypeError, "dim must be a whole number"),
        ({"projection_dim": -1}, ValueError, "projection_dim must be at least 1"),
        ({"temperature": 0.0}, ValueError, "temperature must be .* above 0"),
        ({"token_norm": "layer"}, ValueError, "token_norm must be one of True, False"),
        ({"gather_distributed": 1}, ValueError, "gather_distributed must be True, False or an .* group .*, got 1"),
    ],
)
def test_wrong_options(options, kind, message):
    with pytest.raises(kind, match=f"^SERLoss: {message}"):
        SERLoss(**{"dim": 8, **options})


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
