import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equireg import IntermediateReconstructionHead
from equireg.reconstruction.decoder import Decoder, enlargements


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(dim=12, **options):
    options = {"image_size": 8, "patch_size": 4, "hidden_dim": 16, **options}
    return IntermediateReconstructionHead(dim, **options)


def batch(count=3, dim=6, places=4, n=2, side=8, dtype=torch.float32):
    """Equivariant parts of both views, and targets."""
    parts = [torch.randn(count, places, dim, generator=seeded(i)).to(dtype) for i in range(2)]
    return *parts, torch.rand(n, count, 3, side, side, generator=seeded(2)).to(dtype)


# ----------------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 12), (2, 12, 3, 4)])
@pytest.mark.parametrize(("fraction", "width"), [(0.5, 6), (0.25, 3), (0.05, 1), (1.0, 12)])
def test_split_and_concatenation_lose_nothing(shape, fraction, width):
    head, features = small(equivariant_fraction=fraction), torch.randn(shape)
    invariant, equivariant = head.split(features)
    along = 1 if len(shape) == 4 else -1
    assert equivariant.shape[along] == width == head.equivariant_dim
    assert torch.equal(torch.cat([invariant, equivariant], along), features)


def test_maps_of_a_cnn_are_the_same_as_their_tokens():
    head, (e1, e2, targets) = small(), batch()
    maps = [part.transpose(1, 2).unflatten(2, (2, 2)) for part in (e1, e2)]
    assert torch.equal(head.reconstruct(*maps), head.reconstruct(e1, e2))
    assert torch.equal(head(*maps, targets), head(e1, e2, targets))
    last = [part.contiguous(memory_format=torch.channels_last) for part in maps]
    torch.testing.assert_close(head(*last, targets), head(e1, e2, targets))


# ------------------------------------------------------------------------------------------------------------ the loss


def test_in_units_of_the_pixels_deviation():
    """R7: the error of standardised pixels, of reconstructions that are in the targets' range."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.1)
    head, (e1, e2, targets) = small(mean=mean, std=std), batch()
    rebuilt = head.reconstruct(e1, e2)
    plain = small()
    plain.load_state_dict(head.state_dict())  # mean and std are options, no state
    of_channel = (torch.tensor(part).view(3, 1, 1) for part in (std, mean))
    torch.testing.assert_close(rebuilt, plain.reconstruct(e1, e2) * next(of_channel) + next(of_channel))
    expected = ((rebuilt - targets) / torch.tensor(std).view(3, 1, 1)).square().mean()
    torch.testing.assert_close(head(e1, e2, targets), expected)


def test_gradients_reach_only_what_they_should():
    """The equivariant half of both views; nothing of the invariant half, which the other loss has to itself."""
    head = small()
    tokens = [torch.randn(3, 4, 12, requires_grad=True) for _ in range(2)]
    (i1, e1), (i2, e2) = (head.split(part) for part in tokens)
    head(e1, e2, batch()[2]).backward()
    for part in tokens:
        assert (part.grad[..., :6] == 0).all()
        assert (part.grad[..., 6:] != 0).all()
    ssl = torch.autograd.grad(F.mse_loss(i1, i2), tokens)
    assert all((gradient[..., 6:] == 0).all() for gradient in ssl)


def test_detached_and_frozen_features_train_the_decoders_alone():  # R6
    for options, frozen in (({"detach": True}, False), ({}, True)):
        backbone = nn.Linear(5, 12).requires_grad_(not frozen).eval()
        head, targets = small(**options), batch()[2]
        tokens = [backbone(torch.randn(3, 4, 5)) for _ in range(2)]
        loss = head(*(head.split(part)[1] for part in tokens), targets)
        loss.backward()
        assert backbone.weight.grad is None
        assert all((parameter.grad != 0).any() for parameter in head.parameters())
    attached, detached = small(), small(detach=True)
    detached.load_state_dict(attached.state_dict())
    assert torch.equal(attached(*batch()), detached(*batch()))  # the same numbers


def test_weights_of_the_images():  # R9
    head, (e1, e2, targets) = small(image_weights=(3, 0)), batch()
    both = small(image_weights=(3, 1))
    both.load_state_dict(head.state_dict())
    rebuilt = head.reconstruct(e1, e2)
    for parameter in head.decoders[1].parameters():
        parameter.data.fill_(math.nan)
    calls = []
    head.decoders[1].register_forward_hook(lambda *_: calls.append(1))
    loss = head(e1, e2, targets)
    assert not calls  # of weight 0: it did not run, and may hold anything
    torch.testing.assert_close(loss, (rebuilt[0] - targets[0]).square().mean())
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in head.decoders[1].parameters())
    errors = (rebuilt - targets).square().flatten(1).mean(1)
    torch.testing.assert_close(both(e1, e2, targets), (3 * errors[0] + errors[1]) / 4)


# -------------------------------------------------------------------------------------------------------- the decoders


def test_one_linear_layer_and_four_convolutions():  # R5: all exist from the start
    """And smaller than a twentieth of a ViT-S/16, both together."""
    head = IntermediateReconstructionHead(384, image_size=224, patch_size=16)
    kinds = [type(layer) for layer in head.decoders[0].modules()]
    assert kinds.count(nn.Linear) == 1
    assert kinds.count(nn.Conv2d) == 4
    assert len(head.decoders) == 2
    assert sum(p.numel() for p in head.parameters()) < 22.05e6 / 20
    assert "2 x 0.44 M parameters" in repr(head)


@pytest.mark.parametrize("patch", range(1, 18))
def test_every_patch_size(patch):  # R4
    factors = enlargements(patch)
    assert len(factors) == 4
    assert math.prod(factors) == patch
    assert factors == sorted(factors)
    decoder = Decoder(6, 8, 2, patch)
    assert decoder(torch.randn(1, 2, 3, 6)).shape == (1, 2, 2 * patch, 3 * patch)


@pytest.mark.parametrize("side", range(1, 18))
@pytest.mark.parametrize("patch", [1, 4, 16])
def test_every_image_size(side, patch):  # R4: maps of 1 x 1, odd sides, sides that are no multiple of the stride
    head = IntermediateReconstructionHead(4, image_size=(side, 9), patch_size=patch, hidden_dim=8)
    h, w = math.ceil(side / patch), math.ceil(9 / patch)
    assert head.grid == (h, w)
    e1, e2 = torch.randn(2, 2, h * w, 2)
    rebuilt = head.reconstruct(e1, e2)
    assert rebuilt.shape == (2, 2, 3, side, 9)
    loss = head(e1, e2, torch.rand(2, 2, 3, side, 9))
    assert loss.isfinite()
    # The rule: the decoder's image, resized bilinearly.
    joined = torch.cat([e1, e2], 2).unflatten(1, (h, w))
    whole = head.decoders[0](joined)
    expected = F.interpolate(whole, (side, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(rebuilt[0], expected)


def test_map_of_another_grid_is_resized():  # R4
    head = IntermediateReconstructionHead(8, image_size=(36, 28), patch_size=8, hidden_dim=8, channels=1)
    for places in ((5, 4), (4, 3)):  # a CNN whose stride rounds up, and one whose rounds down
        assert head.reconstruct(*torch.randn(2, 2, 4, *places)).shape == (2, 2, 1, 36, 28)


def test_one_image_and_train_or_eval_make_no_difference():  # R10: nothing is normalised over the batch
    head, (e1, e2, _) = small(), batch()
    together = head.train().reconstruct(e1, e2)
    alone = head.eval().reconstruct(e1[:1], e2[:1])
    torch.testing.assert_close(alone[:, 0], together[:, 0])


# ------------------------------------------------------------------------------------------------ with everything else


def test_autocast_adds_up_in_fp32():  # R8
    head, (e1, e2, targets) = small(image_size=64, patch_size=32), batch(side=64, n=2)
    with torch.no_grad():
        head.decoders[0][-2].bias.fill_(300.0)  # squares of 90,000, above fp16's largest number
    with torch.autocast("cpu", torch.float16):
        loss = head(e1, e2, targets)
        assert head.reconstruct(e1, e2).dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, head(e1, e2, targets), rtol=2e-2, atol=0)
    assert loss > 40_000
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"image_size": (8, 8, 8)}, ValueError, r"image_size must be a side or \(height, width\)"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1"),
        ({"num_images": 0}, ValueError, "num_images must be at least 1"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"hidden_dim": 12}, ValueError, "hidden_dim must be a multiple of 8, got 12"),
        ({"equivariant_fraction": 0.0}, ValueError, "equivariant_fraction must be above 0 and up to 1, .* got 0.0"),
        (
            {"equivariant_fraction": 0.01},
            ValueError,
            "equivariant_fraction must be .* of 12 features or more, got 0.01",
        ),
        ({"equivariant_fraction": math.nan}, ValueError, "equivariant_fraction must be .* got nan"),
        ({"detach": 1}, ValueError, "detach must be one of True, False, got 1"),
        ({"mean": (0.5,) * 3}, ValueError, "std must be 3 numbers, as there are channels, .* got None"),
        ({"mean": (0.5,), "std": (1,)}, ValueError, r"mean must be 3 numbers, .* got \(0.5,\)"),
        ({"mean": (0.5,) * 3, "std": (0.2, 0, 0.2)}, ValueError, "std must be finite and above 0"),
        ({"mean": (0.5, math.nan, 0), "std": (1,) * 3}, ValueError, "mean must be finite"),
        ({"image_weights": (1,)}, ValueError, r"image_weights must be 2 numbers, one for each image, got \[1\]"),
        ({"image_weights": (1, -1)}, ValueError, "image_weights must be finite and at least 0, got -1"),
        ({"image_weights": (0, 0)}, ValueError, "image_weights must be above 0 for one image at least"),
        ({"mean": 0.5, "std": 0.5}, ValueError, "mean must be 3 numbers"),
        ({"image_weights": 1.0}, TypeError, "image_weights must be 2 numbers, one for each image, got float"),
        ({"image_weights": True}, TypeError, "image_weights must be 2 numbers, one for each image, got bool"),
    ],
)
def test_refuses_settings(arguments, error, message):  # R7
    with pytest.raises(error, match=f"IntermediateReconstructionHead: {message}"):
        small(**arguments)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.randn(3, 5, 6), ValueError, "equivariant1 must be .* as equivariant1|equivariant2 must be .*"),
        (0, torch.randn(3, 4, 7), ValueError, r"equivariant1 must be \[B, T, d\] = \[B, T, 6\], got \[3, 4, 7\]"),  # R1
        (0, torch.randn(3, 6), ValueError, r"equivariant1 must be \[B, T, d\] or \[B, d, h, w\]"),  # R2
        (0, (torch.randn(3, 4, 6),), TypeError, "equivariant1 must be a tensor .* got tuple"),  # R2
        (1, torch.randn(2, 4, 6), ValueError, r"equivariant2 must be \[B, T, d\] = \[3, 4, 6\], got \[2, 4, 6\]"),
        (1, torch.randn(3, 6, 2, 2), ValueError, "equivariant2 must be .* as equivariant1"),
        (2, torch.rand(1, 3, 3, 8, 8), ValueError, r"targets must be .* got \[1, 3, 3, 8, 8\]"),
        (2, torch.rand(2, 3, 1, 8, 8), ValueError, r"targets must be .* got \[2, 3, 1, 8, 8\]"),  # R3
        (2, torch.rand(2, 3, 3, 9, 8), ValueError, r"targets must be .* got \[2, 3, 3, 9, 8\]"),
        (2, torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8), TypeError, "targets must be .* got torch.uint8"),  # R3
        (2, torch.full((2, 3, 3, 8, 8), math.nan), ValueError, "targets must be .* got nan .. nan"),
    ],
)
def test_refuses_inputs(place, value, error, message):
    arguments = list(batch())
    arguments[place] = value
    with pytest.raises(error, match=f"IntermediateReconstructionHead: ({message})"):
        small()(*arguments)


def test_refuses_prefix_tokens_and_other_widths():
    head = small()
    with pytest.raises(ValueError, match="equivariant1 must be of 2 x 2 tokens, without class or register tokens"):
        head(torch.randn(3, 5, 6), torch.randn(3, 5, 6), batch()[2])
    with pytest.raises(ValueError, match=r"features must be \[B, T, D\] = \[B, T, 12\], got \[3, 4, 11\]"):
        head.split(torch.randn(3, 4, 11))
    for places in ((2, 2), (8, 16), (15, 16)):  # another stride
        with pytest.raises(ValueError, match="equivariant1 must be of 16 x 16 places"):
            small(16, image_size=64).reconstruct(*torch.rand(2, 1, 8, *places))
    with pytest.raises(ValueError, match=r"features must be \[B, T, D\], \[B, D, h, w\] or \[B, D\]"):
        head.split(torch.randn(12))


def test_statistics_of_any_kind_of_number():
    head = IntermediateReconstructionHead(
        8, image_size=8, patch_size=4, mean=torch.zeros(3).double().numpy(), std=[1, 2, 3], image_weights=[1e308, 1e308]
    )
    assert head.mean.dtype == head.std.dtype == torch.float32
    assert head.image_weights == (0.5, 0.5)


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 6, 2, 2), (3, 6)])
def test_a_linear_head_before_the_split_sets_the_width(shape):
    head = IntermediateReconstructionHead(6, image_size=8, patch_size=4, head_dim=10, equivariant_fraction=0.3)
    features = torch.randn(shape)
    invariant, equivariant = head.split(features)
    along = 1 if len(shape) == 4 else -1
    assert (invariant.shape[along], equivariant.shape[along]) == (7, 3)
    expected = features.movedim(along, -1) @ head.head.weight.T + head.head.bias
    joined = torch.cat([invariant, equivariant], along).movedim(along, -1)
    torch.testing.assert_close(joined, expected)
    if len(shape) > 2:
        head(equivariant, equivariant, torch.rand(2, 3, 3, 8, 8)).backward()
        assert head.head.weight.grad[7:].any()  # of the equivariant features
        assert not head.head.weight.grad[:7].any()
    assert set(head.state_dict()) - set(IntermediateReconstructionHead(6, image_size=8, patch_size=4).state_dict()) == {
        "head.weight",
        "head.bias",
    }
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        IntermediateReconstructionHead(6, image_size=8, patch_size=4, head_dim=0)
