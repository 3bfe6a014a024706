"""Test-time augmentation and ensembles: always probabilities, by their formulas."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms.v2 import functional as tv

from equireg import ensemble, fit_ensemble_weights, predict_tta

MERGES = ["mean", "gmean", "tsharpen"]


def merged(p, merge, weights=None, t=0.5):
    """By the formula, in float64; p [M, B, classes]."""
    p = p.double()
    w = torch.ones(len(p)).double() if weights is None else torch.as_tensor(weights).double()
    w = (w / w.sum())[:, None, None]
    q = {"mean": (w * p).sum(0), "gmean": (p**w).prod(0), "tsharpen": (w * p**t).sum(0)}[merge]
    return q / q.sum(-1, keepdim=True)


def probabilities(models=3, count=8, classes=5):
    return torch.randn(models, count, classes).mul(3).softmax(-1)


class Corner(nn.Module):
    """Sees only the upper left pixels."""

    def forward(self, images):
        return 5 * images[:, :, :2, :2].mean(1).flatten(1)


# ------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("crops", ["flip", "five", "ten"])
def test_merges_the_versions(crops, merge):
    images = torch.rand(4, 3, 9, 12)
    model = Corner()
    views = [images] if crops == "flip" else list(tv.five_crop(images, [6, 7]))
    if crops != "five":
        views += [tv.horizontal_flip(view) for view in views]
    expected = merged(torch.stack([model(view).softmax(-1) for view in views]), merge, t=0.2)
    found = predict_tta(model, images, crops=crops, merge=merge, sharpening=0.2, crop_size=(6, 7))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_crops_are_resized_where_no_size_is_given():
    seen = []

    def model(images):
        seen.append(images)
        return images.mean((2, 3))

    images = torch.rand(2, 3, 16, 24)
    predict_tta(model, images, crops="five")
    crop = tv.five_crop(images, [14, 21])[0]
    expected = torch.nn.functional.interpolate(crop, (16, 24), mode="bicubic", antialias=True)
    assert torch.equal(seen[0], expected)
    assert [tuple(part.shape) for part in seen] == [(2, 3, 16, 24)] * 5
    predict_tta(model, images.half(), crops="five")
    assert seen[5].dtype == torch.float16
    torch.testing.assert_close(seen[5].float(), expected, atol=2e-3, rtol=0)


def test_no_gradient_and_no_change_of_mode():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Dropout()).train()
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    assert not predict_tta(model, images).requires_grad
    assert model.training


IMAGES = torch.rand(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("model", "images", "options", "message"),
    [
        (Corner(), IMAGES[0], {}, r"images must be \[B, C, H, W\], got \[3, 8, 8\]"),
        (Corner(), IMAGES[:0], {}, "images must be of at least one image and pixel"),
        (None, IMAGES, {}, "model must be a module or a function, got NoneType"),
        (Corner(), IMAGES, {"crops": "nine"}, "crops must be one of 'flip', 'five', 'ten'"),
        (Corner(), IMAGES, {"merge": "max"}, "merge must be one of 'mean'"),
        (Corner(), IMAGES, {"sharpening": 0}, "sharpening must be finite and above 0"),
        (Corner(), IMAGES, {"crops": "five", "crop_size": 9}, "crop_size must be at most the images' 8 x 8, got 9"),
        (nn.Identity(), IMAGES, {}, r"model's output must be \[1, classes\]"),
    ],
)
def test_refuses(model, images, options, message):
    with pytest.raises((TypeError, ValueError), match=f"predict_tta: {message}"):
        predict_tta(model, images, **options)


# ------------------------------------------------------------------------------------------------- ensembles


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("weights", [None, [1, 2, 0.5], [0, 1, 0]])
def test_equals_the_formula(weights, merge):
    p = probabilities()
    found = ensemble(p, weights=weights, merge=merge, sharpening=0.2)
    torch.testing.assert_close(found.double(), merged(p, merge, weights, t=0.2), rtol=1e-5, atol=1e-7)
    assert torch.equal(found, ensemble(list(p), weights=weights, merge=merge, sharpening=0.2))
    torch.testing.assert_close(ensemble(p, merge=merge).double(), merged(p, merge, t=0.5), rtol=1e-5, atol=1e-7)


@given(
    merge=st.sampled_from(MERGES),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    scale=st.floats(0.1, 1000),
    seed=st.integers(0, 2**31),
)
def test_always_probabilities(merge, dtype, scale, seed):
    """However sure the models are, also where all of them rule a class out or contradict each other."""
    torch.manual_seed(seed)
    p = torch.randn(3, 6, 4).mul(scale).softmax(-1)
    p[:, 0] = torch.tensor([1.0, 0, 0, 0])
    p[:, 1] = torch.eye(4)[:3]
    found = ensemble(p.to(dtype), weights=torch.rand(3) + 1e-3, merge=merge)
    assert found.isfinite().all()
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]), rtol=0, atol=1e-5)
    assert found[0].argmax() == 0
    assert found[0, 0] > 0.999


@pytest.mark.parametrize("merge", MERGES)
def test_fitted_weights_are_the_best(merge):
    """No others on a grid are likelier; a model that knows nothing gets little."""
    labels = torch.arange(200) % 4
    strength = torch.tensor([2.0, 1.5, 0.0])[:, None, None]
    p = (torch.randn(3, 200, 4) + strength * nn.functional.one_hot(labels, 4)).softmax(-1)
    how = {"merge": merge, "sharpening": 0.2}
    weights = fit_ensemble_weights(p, labels, **how)
    with torch.inference_mode():
        assert torch.equal(fit_ensemble_weights(p.clone(), labels, **how), weights)
    assert weights.sum().item() == pytest.approx(1)
    assert weights[2] < 0.2

    def likelihood(w):
        return merged(p, merge, w, t=0.2).gather(1, labels[:, None]).log().mean().item()

    grid = [i / 10 for i in range(11)]
    best = max(likelihood([a, b, 1 - a - b]) for a, b in itertools.product(grid, grid) if a + b <= 1)
    assert likelihood(weights) > best - 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: ensemble(p[0]), r"probabilities must be \[M, B, classes\]"),
        (lambda p: ensemble([]), "probabilities must be a tensor, or a list of one or more, got list"),
        (lambda p: ensemble([p[0], p[1, :4]]), r"probabilities must be \[B, classes\] = \[8, 5\]"),
        (lambda p: ensemble(2 * p), "probabilities must be at least 0, with a sum of 1 in each row"),
        (lambda p: ensemble(p * float("nan")), "probabilities must be at least 0, with a sum of 1"),
        (lambda p: ensemble(p, weights=[1, 2]), r"weights must be 3 numbers, one for each model, got \[2\]"),
        (lambda p: ensemble(p, weights=[0, 0, 0]), "weights must be finite, at least 0, and not all 0"),
        (lambda p: ensemble(p, weights=[1, -1, 1]), "weights must be finite, at least 0, and not all 0"),
        (lambda p: ensemble(p, merge="vote"), "merge must be one of"),
        (lambda p: fit_ensemble_weights(p, torch.arange(3)), r"labels must be \[B\] = \[8\], got \[3\]"),
        (lambda p: fit_ensemble_weights(p, torch.arange(8)), "labels must be in 0 .. 4"),
    ],
)
def test_refuses_ensembles(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(probabilities())
