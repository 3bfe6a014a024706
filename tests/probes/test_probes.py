import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from equireg import GridTransform, equivariance_score, knn_accuracy, linear_probe
from tests import references


def patch_means(images, patch=4):
    return F.avg_pool2d(images, patch).flatten(2).transpose(1, 2)


def turns(count, grid=(8, 8)):
    return GridTransform(torch.arange(count) % 4, torch.arange(count) % 3 == 0, grid, grid)


# ------------------------------------------------------------------------------------------------- equivariance


def test_an_equivariant_encoder_scores_one(real_images):
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    files = sorted((real_images / "cifar10" / "test" / "cat").glob("*.jpg"))[::20]
    images = torch.stack([to_tensor(Image.open(file)) for file in files])
    score = equivariance_score(patch_means, images, turns(len(images)))
    torch.testing.assert_close(score, torch.ones(len(images)))
    shuffled = equivariance_score(patch_means, images, turns(len(images)), shuffled=True)
    assert (shuffled < 0.999).all()


def test_equals_a_loop_over_images_and_places():
    images, position = torch.rand(3, 2, 12, 8), torch.linspace(-1, 1, 48).view(24, 2)

    def encode(x):
        return patch_means(x, 2) + position

    g = GridTransform(torch.tensor([1, 3, 1]), torch.tensor([True, False, False]), (6, 4), (4, 6))
    expected = []
    before, after = g.on_tokens(encode(images)).double(), encode(g.on_images(images, 2)).double()
    for i in range(3):
        cosines = [float(a @ b) / float(a.norm() * b.norm()) for a, b in zip(before[i], after[i])]
        expected.append(sum(cosines) / len(cosines))
    score = equivariance_score(encode, images, g)
    torch.testing.assert_close(score.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert (score < 0.999).all()
    following = [sum(F.cosine_similarity(before[i], after[(i + 1) % 3], dim=-1)) / 24 for i in range(3)]
    shuffled = equivariance_score(encode, images, g, shuffled=True)
    torch.testing.assert_close(shuffled.double(), torch.stack(following), rtol=1e-5, atol=1e-6)


def test_scaling_and_no_gradient():
    g = GridTransform(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool), (8, 8), (6, 9))
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    score = equivariance_score(patch_means, images, g)
    assert score.shape == (2,)
    assert not score.requires_grad
    assert (score > 0.9).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode": "vit"}, "encode must be a module or a function, got str"),
        ({"transform": "rot90"}, "transform must be a GridTransform"),
        ({"images": torch.rand(3, 3, 32, 32)}, r"images must be .*\[2, C, H, W\], got \[3"),
        ({"images": torch.rand(2, 3, 30, 32)}, "images must be of whole square patches"),
        ({"images": torch.rand(2, 3, 32, 64)}, "images must be of whole square patches"),
        ({"encode": lambda x: x}, r"encode\(images\) must be \[B, T, D\]"),
        ({"encode": lambda x: patch_means(x, 8)}, r"encode\(images\) must be .*\[2, 64, D\], got \[2, 16, 3\]"),
        (
            {"images": torch.rand(1, 3, 32, 32), "transform": turns(1), "shuffled": True},
            "images must be at least 2 to compare with others, shuffled, got 1",
        ),
    ],
)
def test_wrong_equivariance_calls(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        equivariance_score(
            **{"encode": patch_means, "images": torch.rand(2, 3, 32, 32), "transform": turns(2), **changes}
        )


# ------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_equals_a_loop(k):
    train, labels = torch.randn(40, 6), torch.randint(4, (40,))
    test, truth = torch.randn(30, 6), torch.randint(4, (30,))
    expected = references.knn_accuracy(train, labels, test, truth, k, 0.07)
    assert knn_accuracy(train, labels, test, truth, k=k) == pytest.approx(expected)
    assert knn_accuracy(100 * train, labels.int(), test / 100, truth, k=k) == pytest.approx(expected)


def test_knn_at_low_temperatures_and_in_blocks():
    x, y = torch.randn(2500, 8), torch.arange(2500) % 7
    assert knn_accuracy(x, y, x, y, temperature=1e-4) == 1.0  # only the nearest counts: itself
    assert knn_accuracy(x.bfloat16(), y, x.bfloat16(), y, k=1) > 0.99


def test_linear_probe_equals_scikit_learn(real_images):
    """On real images in so few pixels that no classifier is right about all of them."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs the examples extra")
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    parts = {}
    for part in ("train", "test"):
        files = sorted((real_images / "cifar10" / part).rglob("*.jpg"))[::20]
        images = torch.stack([to_tensor(Image.open(file)) for file in files])
        names = sorted({file.parent.name for file in files})
        labels = torch.tensor([names.index(file.parent.name) for file in files])
        parts[part] = F.avg_pool2d(images, 8).flatten(1), labels
    (x, y), (x_test, y_test) = parts["train"], parts["test"]
    for weight_decay in (1e-3, 1e-1):
        mean, std = x.mean(0), x.std(0, correction=0)
        reference = linear_model.LogisticRegression(C=1 / (weight_decay * len(x)), tol=1e-8, max_iter=5000)
        reference.fit((x - mean) / std, y)
        expected = reference.score((x_test - mean) / std, y_test)
        found = linear_probe(x, y, x_test, y_test, weight_decay=weight_decay)
        assert found == pytest.approx(expected, abs=0.021)  # two of a hundred may lie on the edge
        assert 0.2 < found < 0.6


SMALL = {"epochs": 15, "progress": False}
THREE_LAYERS = partial(linear_probe, hidden_dim=32, **SMALL)


def clusters(count=200):
    y = torch.arange(count) % 4
    return torch.nn.functional.one_hot(y, 6) + 0.3 * torch.randn(count, 6), y


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe, THREE_LAYERS])
@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e20, 1e60])
def test_probes_have_no_scale(probe, scale):
    x, y = clusters()
    assert probe(x.double() * scale, y, x.double() * scale, y) == probe(x.double(), y, x.double(), y) > 0.9


@pytest.mark.parametrize("constant", [0.0, 0.1, 100.1])
def test_linear_probe_leaves_out_what_is_constant_in_training(constant):
    x, y = clusters()
    train, test = torch.full((2, 200, 1), constant)
    test[::5] += 0.5
    assert linear_probe(torch.cat([x, train], 1), y, torch.cat([x, test], 1), y) == linear_probe(x, y, x, y)


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe, THREE_LAYERS])
def test_probes_take_features_from_anywhere(probe):
    """From inference mode, in it, from an encoder with a graph, of mixed precision; nothing flows back."""
    x, y = clusters()
    state = torch.get_rng_state()
    expected = probe(x, y, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        inside, labels = x.clone(), y.clone()
        assert probe(x, y, x, y) == probe(inside, labels, inside, labels) == expected
    assert probe(inside, labels, inside, labels) == expected
    leaf = x.clone().requires_grad_()
    assert probe(2 * leaf, y, 2 * leaf, y) == expected
    assert leaf.grad is None
    assert probe(x.double(), y, x, y) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert probe(x, y, x, y) == expected


def test_linear_probe_answers_in_full_precision_too():
    """Where classes overlap, a score rounded to bfloat16 is another answer now and then."""
    x, y = torch.randn(4000, 16), torch.arange(4000) % 4
    x[:, :4] += torch.nn.functional.one_hot(y, 4)
    expected = linear_probe(x, y, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_probe(x, y, x, y) == expected


def test_three_layers_tell_what_no_line_tells():
    """Quadrants: classes by the sign of a product, on samples that were not trained on."""
    x, x_test = torch.randn(2, 600, 4)
    y, y_test = ((part[:, 0] * part[:, 1] > 0).long() for part in (x, x_test))
    assert linear_probe(x, y, x_test, y_test) < 0.6
    found = linear_probe(x, y, x_test, y_test, hidden_dim=64, **SMALL)
    assert found > 0.9
    assert linear_probe(x, y, x_test, y_test, hidden_dim=64, **SMALL) == found
    assert linear_probe(x, y, x_test, y_test, hidden_dim=64, seed=1, **SMALL) != found
    shuffled = y[torch.randperm(600)]
    assert linear_probe(x, shuffled, x_test, y_test, hidden_dim=64, **SMALL) < 0.7


ROWS = {
    "train_features": torch.rand(8, 3),
    "train_labels": torch.arange(8) % 2,
    "features": torch.rand(4, 3),
    "labels": torch.arange(4) % 2,
}
BROKEN = torch.rand(8, 3).index_fill(0, torch.tensor(3), math.nan)
EMPTY = torch.rand(0, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_features": [[1.0]]}, "train_features must be a tensor"),
        ({"train_features": torch.zeros(8, 3).long()}, "train_features must be a tensor of floating"),
        ({"features": torch.randn(4, 2)}, r"features must be \[M, D\] = \[M, 3\], got \[4, 2\]"),
        ({"train_labels": torch.arange(7)}, r"train_labels must be \[N\] = \[8\], got \[7\]"),
        ({"labels": torch.rand(4)}, "labels must be a tensor of whole numbers"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "labels must be 0 or above, got -1"),
        ({"features": EMPTY, "labels": torch.arange(0)}, "features must be of at least one sample and one feature"),
        ({"train_features": EMPTY, "train_labels": torch.arange(0)}, r"train_features must be of .*, got \[0, 3\]"),
        ({"train_features": BROKEN}, "train_features must be finite, got nan in row 3"),
        ({"features": BROKEN[:4]}, "features must be finite, got nan in row 3"),
    ],
)
@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe])
def test_wrong_samples(probe, changes, message):
    options = {"k": 2} if probe is knn_accuracy else {}
    with pytest.raises((TypeError, ValueError), match=f"^{probe.__name__}: {message}"):
        probe(**{**ROWS, **changes}, **options)


@pytest.mark.parametrize(
    ("probe", "options", "message"),
    [
        (knn_accuracy, {"k": 9}, "k must be at most the 8 training samples, got 9"),
        (knn_accuracy, {"k": 0}, "k must be at least 1"),
        (knn_accuracy, {"k": 2, "temperature": 0}, "temperature must be"),
        (linear_probe, {"weight_decay": -1}, "weight_decay must be"),
        (linear_probe, {"max_iterations": 0}, "max_iterations must be at least 1"),
        (linear_probe, {"hidden_dim": 0}, "hidden_dim must be at least 1"),
        (linear_probe, {"hidden_dim": 4}, "train_features must be of at least 20 rows for training, got 8 of 8"),
        (linear_probe, {"epochs": 0}, "epochs must be at least 1"),
        (linear_probe, {"seed": -1}, "seed must be at least 0"),
    ],
)
def test_wrong_options(probe, options, message):
    with pytest.raises(ValueError, match=f"^{probe.__name__}: {message}"):
        probe(**ROWS, **options)
