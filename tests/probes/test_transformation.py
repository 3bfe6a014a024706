import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equireg import (
    IntermediateViews,
    extract_view_features,
    linear_probe,
    transformation_accuracy,
    transformation_r2,
)

QUICK = {"epochs": 40, "hidden_dim": 64, "progress": False}


def pairs(count=600, noise=0.0):
    """Features that hold the first parameter in a curve, the second in a line, and the third not at all."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(count, 3, generator=generator) * torch.tensor([6.0, 100.0, 1.0]) + torch.tensor([-3.0, 50, 0])
    first = torch.randn(count, 6, generator=generator)
    second = first.clone()
    second[:, 0] += t[:, 0].sin() + 0.3 * t[:, 0]
    second[:, 1] += t[:, 1] / 50
    return first, second + noise * torch.randn(count, 6, generator=generator), t


# ----------------------------------------------------------------------------------------------------------------- R²


def test_what_is_in_the_features_is_found():
    r2 = transformation_r2(*pairs(1500), **QUICK)
    assert r2.shape == (3,)
    assert r2[0] > 0.8
    assert r2[1] > 0.9
    assert r2[2] < 0.1


def test_held_out_rows_decide():
    """Features that only name the row tell nothing about rows never seen; the formula, with the regressor's guess."""
    names = torch.eye(300)
    r2 = transformation_r2(names, names, torch.rand(300, 1), **QUICK)
    assert r2[0] < 0.05
    # Held-out parameters shifted far away: residuals of the size of the shift, whatever the regressor says.
    first, second, t = pairs(300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5))
    far = t[:, 1:2].clone()
    far[order[:60]] += 1000
    r2 = transformation_r2(first, second, far, seed=5, **QUICK)
    variance = far[order[:60]].var(correction=0)
    assert r2[0] == pytest.approx(float(1 - 1000**2 / variance), rel=0.2)


@pytest.mark.parametrize(("scale", "shift"), [(8, 4), (1e-9, 0), (1e9, 0)])
def test_scale_of_the_parameters_and_features_does_not_matter(scale, shift):
    first, second, t = pairs(300)
    r2 = transformation_r2(first, second, t, **QUICK | {"epochs": 10})
    scaled = transformation_r2(scale * first - shift, scale * second - shift, 16 * t + 2, **QUICK | {"epochs": 10})
    torch.testing.assert_close(scaled, r2, rtol=0, atol=0.02)


def test_features_that_are_rarely_active():
    """A column that is constant in the training rows says nothing, and moves nothing where it is not."""
    first, second, t = pairs(300)
    rare = torch.zeros(300, 1)
    rare[torch.randperm(300, generator=torch.Generator().manual_seed(0))[0]] = 0.5  # held out
    expected = transformation_r2(first, second, t, **QUICK)
    found = transformation_r2(torch.cat([first, rare], 1), torch.cat([second, rare], 1), t, **QUICK)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.3)


def test_one_seed_one_result_in_any_mode():
    """An encoder's precision is not the regressor's, and no global number is drawn."""
    quick = {**QUICK, "epochs": 5}
    state, given = torch.get_rng_state(), pairs(200)
    first = transformation_r2(*given, **quick)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(transformation_r2(*given, seed=1, **quick), first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transformation_r2(*given, **quick), first)
    with torch.inference_mode():
        inside = pairs(200)
        assert torch.equal(transformation_r2(*inside, **quick), first)
    assert torch.equal(transformation_r2(*inside, **quick), first)
    features1, features2, t = given
    half = transformation_r2(features1.half(), features2.half(), t, **quick)
    torch.testing.assert_close(half, first, rtol=0, atol=0.05)


def test_views_of_photographs_are_read_off_pixels(real_images):
    """Brightness and blur can be read off raw pixels and their edges; on real images, through the whole chain."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import to_tensor

    folder = ImageFolder(real_images / "cifar10" / "test", to_tensor)
    images = torch.stack([folder[i][0] for i in range(0, 2000, 5)])

    def statistics(x):
        edges = (x - F.avg_pool2d(x, 3, 1, 1)).abs().mean((2, 3)) + 1e-3
        return torch.cat([x.mean((2, 3)), x.std((2, 3)), edges.log()], 1)

    generator = torch.Generator().manual_seed(0)
    found = {}
    for kind in ("color", "blur"):
        views = IntermediateViews(kind)
        features = extract_view_features(statistics, images.split(64), views, generator=generator, progress=False)
        assert [len(part) for part in features] == [400] * 3
        found |= dict(zip(views.parameter_names, transformation_r2(*features, **QUICK).tolist()))
    assert found["brightness"] > 0.8
    assert found["sigma"] > 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features1": torch.randn(60)}, r"features1 must be \[N, D\], got \[60\]"),
        (
            {"features1": torch.zeros(60, 0), "features2": torch.zeros(60, 0)},
            "features1 must be of at least one column",
        ),
        ({"features2": torch.randn(60, 3)}, r"features2 must be \[N, D\] = \[60, 4\], got \[60, 3\]"),
        ({"parameters": torch.randn(59, 2)}, r"parameters must be \[N, P\] = \[60, P\], got \[59, 2\]"),
        ({"parameters": torch.zeros(60, 0)}, "parameters must be of at least one column"),
        ({"parameters": torch.zeros(60, 2)}, "parameters must be different from row to row, got a constant"),
        ({"features1": torch.full((60, 4), math.nan)}, "features1 must be finite, got nan in row 0"),
        ({"features1": torch.ones(60, 4).long()}, "features1 must be a tensor of floating"),
        ({"held_out": 1.0}, "held_out must be above 0 and below 1, got 1.0"),
        ({"held_out": 0.8}, "features1 must be of at least 20 rows for training, got 12 of 60"),
        ({"held_out": 0.01}, "features1 must be of enough rows to hold out a share of 0.01"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"weight_decay": -1}, "weight_decay must be finite and at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_r2_refuses(changes, message):
    arguments = {"features1": torch.randn(60, 4), "features2": torch.randn(60, 4), "parameters": torch.rand(60, 2)}
    with pytest.raises((TypeError, ValueError), match=f"transformation_r2: {message}"):
        transformation_r2(**{**arguments, **changes})


# ------------------------------------------------------------------------------------------------ quarter turns, flips


class Pooled(nn.Module):
    """Rows of brightness keep how the image is turned; their mean forgets it."""

    def __init__(self):
        super().__init__()
        self.keeps, self.forgets = nn.Conv2d(1, 8, 8, stride=8, bias=False), nn.AdaptiveAvgPool2d(1)
        position = torch.zeros(8, 1, 8, 8)
        for i in range(4):
            position[i, 0, 2 * i : 2 * i + 2] = 1
            position[4 + i, 0, :, 2 * i : 2 * i + 2] = 1
        self.keeps.weight = nn.Parameter(position)
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        assert not self.training
        self.keeps(x)
        return self.forgets(self.dropout(x)).flatten(1)


def slopes(count=80):
    """Brighter to the top and a little to the right, with noise."""
    slope = torch.linspace(1, -1, 8).view(8, 1) + 0.5 * torch.linspace(-1, 1, 8)
    return slope + 0.3 * torch.randn(count, 1, 8, 8)


@pytest.mark.parametrize(("transformation", "chance"), [("rotation", 0.25), ("flip", 0.5)])
def test_layers_that_keep_it_and_one_that_forgets(transformation, chance):
    model = Pooled().train()
    images = [(batch, "labels") for batch in slopes().split(32)]
    found = transformation_accuracy(model, images, ["keeps", "forgets"], transformation=transformation, progress=False)
    assert list(found) == ["keeps", "forgets"]
    assert found["keeps"] > 0.95
    assert found["forgets"] < chance + 0.15
    assert model.training  # as it was
    assert not model.keeps._forward_hooks
    with torch.autocast("cpu", torch.bfloat16):  # the classifier is fitted in fp32, whatever the encoder runs in
        own = transformation_accuracy(model, images, transformation=transformation, progress=False)
    assert own == {"output": pytest.approx(found["forgets"], abs=0.02)}


def test_equals_the_linear_probe_on_versions_made_by_hand():
    images = torch.rand(50, 2, 6, 6)

    def encode(x):
        return x[:, :, 0].flatten(1)

    found = transformation_accuracy(encode, images.split(20), held_out=0.3, progress=False)["output"]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    parts = []
    for rows in (order[15:], order[:15]):
        versions = [torch.stack([images[i].rot90(k, (1, 2)) for i in rows]) for k in range(4)]
        parts += [torch.cat([encode(part) for part in versions]), torch.arange(4).repeat_interleave(len(rows))]
    assert found == linear_probe(*parts)
    three = transformation_accuracy(encode, images.split(20), held_out=0.3, hidden_dim=16, progress=False)["output"]
    assert three == linear_probe(*parts, hidden_dim=16, progress=False)
    before = torch.get_rng_state()
    transformation_accuracy(encode, [images], progress=False)
    assert torch.equal(torch.get_rng_state(), before)


IMAGES = [torch.rand(20, 1, 8, 8)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model must be a module or a function, got NoneType"),
        (
            {"model": lambda x: x[:1].flatten(1), "layers": None},
            r"model must be one .* a row for each image, got \[1, 64",
        ),
        ({"transformation": "shear"}, "transformation must be one of 'rotation', 'flip', got 'shear'"),
        ({"layers": "keeps"}, "layers must be names of layers in a list, or None, got 'keeps'"),
        ({"layers": []}, "layers must be names of layers in a list"),
        ({"layers": 5}, "layers must be names of layers in a list"),
        ({"layers": iter(["keeps"])}, "layers must be names of layers in a list"),
        ({"loader": []}, "loader must be of at least one batch, got none"),
        ({"loader": [torch.rand(4, 1, 8, 9)]}, "loader must be a loader of square images, to turn them"),
        ({"loader": [torch.rand(8, 8)]}, r"loader must be a loader of images \[B, C, H, W\]"),
        ({"loader": [{"image": 1}]}, "loader must be a loader of images, or of tuples .* got dict"),
        ({"loader": [torch.rand(3, 1, 8, 8)]}, "loader must be of enough rows to hold out"),
        ({"held_out": 0}, "held_out must be above 0 and below 1"),
    ],
)
def test_accuracy_refuses(changes, message):
    arguments = {"model": Pooled(), "loader": IMAGES, "layers": ["keeps"], "progress": False}
    with pytest.raises((TypeError, ValueError), match=f"transformation_accuracy: {message}"):
        transformation_accuracy(**{**arguments, **changes})


def test_accuracy_refuses_an_unknown_layer_with_the_names_there_are():  # R1
    with pytest.raises(ValueError, match="layer must be the name of a submodule, such as 'keeps'.* got 'keep'"):
        transformation_accuracy(Pooled(), IMAGES, ["keep"], progress=False)


# --------------------------------------------------------------------------------------------------- features of pairs


def test_view_features_are_those_of_images_and_views():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Dropout(0.5))
    images, views = torch.rand(10, 3, 4, 4), IntermediateViews("all")
    loader = [(images[:6], torch.zeros(6)), (images[6:], torch.zeros(4))]
    generator = torch.Generator().manual_seed(3)
    first, second, t = extract_view_features(encoder, loader, views, generator=generator, progress=False)
    assert encoder.training
    encoder.eval()
    generator = torch.Generator().manual_seed(3)
    made = [views(part, generator) for part in (images[:6], images[6:])]
    assert torch.equal(t, torch.cat([parameters for _, _, parameters in made]))
    torch.testing.assert_close(first, encoder(images).detach())
    torch.testing.assert_close(second, encoder(torch.cat([view for view, _, _ in made])).detach())
    assert not second.requires_grad


@pytest.mark.parametrize(
    ("encoder", "loader", "message"),
    [
        (nn.Flatten(), [], "loader must be of at least one batch"),
        (nn.Flatten(), [["x"]], "loader must be a loader of images, .* got str"),
        (nn.Identity(), [torch.rand(2, 3, 4, 4)], r"encoder's output must be \[B, D\]"),
    ],
)
def test_view_features_refuse(encoder, loader, message):
    with pytest.raises((TypeError, ValueError), match=f"extract_view_features: {message}"):
        extract_view_features(encoder, loader, IntermediateViews("blur"), progress=False)
