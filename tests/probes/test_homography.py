import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as tv

from equireg import homography_probe
from equireg.image_transforms import projected
from equireg.probes.homography import _pairs, homographies
from tests.test_features import Elsewhere

QUICK = {"epochs": 30, "hidden_dim": 64, "progress": False}


def places(count, side=24):
    """Images whose pixels tell where they are, and nothing else."""
    across = torch.linspace(0, 1, side).expand(count, 1, side, side)
    return torch.cat([across, across.transpose(2, 3)], 1)


def pooled(patches):
    return F.avg_pool2d(patches, 4).flatten(1)


def test_places_are_found_and_features_that_tell_nothing_have_the_error_of_the_mean():
    images = places(300)
    error = homography_probe(pooled, images.split(100), 16, **QUICK)
    chance = 4 * (math.sqrt(2) + math.asinh(1)) / 3  # mean length in a square of half side 4
    assert error < 0.4 * chance
    nothing = homography_probe(lambda x: torch.randn(len(x), 8), images.split(100), 16, **QUICK | {"epochs": 5})
    assert nothing > 0.9 * chance
    assert "0.765" in homography_probe.__doc__
    assert chance / 4 == pytest.approx(0.765, abs=5e-4)


def test_the_error_is_that_of_the_mean_where_features_are_constant():
    """A regressor of nothing but its bias: the mean distance of held-out corners from about their mean."""
    images = torch.rand(100, 1, 20, 20)
    error = homography_probe(lambda x: torch.ones(len(x), 2), [images], 8, max_displacement=3.0, **QUICK)
    generator = torch.Generator().manual_seed(0)
    *_, moved = _pairs(None, images, 8, 3.0, generator)
    order = torch.randperm(100, generator=generator)
    corners = moved[order[:20]].view(-1, 4, 2).double()
    guess = moved[order[20:]].view(-1, 4, 2).double().mean(0)
    total = [math.dist(corner, mean) for sample in corners.tolist() for corner, mean in zip(sample, guess.tolist())]
    assert error == pytest.approx(sum(total) / len(total), rel=0.05)


def test_homographies_take_the_corners_where_they_move():
    source, target = torch.rand(5, 4, 2, dtype=torch.float64), torch.rand(5, 4, 2, dtype=torch.float64)
    matrices = homographies(source, target)
    for matrix, here, there in zip(matrices, source, target):
        for place, expected in zip(here.tolist(), there.tolist()):
            x, y, w = (matrix @ torch.tensor([*place, 1.0], dtype=torch.float64)).tolist()
            assert (x / w, y / w) == pytest.approx(tuple(expected), abs=1e-6)


def test_the_second_view_is_torchvisions_perspective_of_the_image(real_images):
    from PIL import Image

    file = sorted((real_images / "imagenet-samples").glob("*.jpg"))[3]
    image = tv.center_crop(tv.pil_to_tensor(Image.open(file).convert("RGB")), [96, 120])[None] / 255
    generator = torch.Generator().manual_seed(2)
    first, second, moved = _pairs(None, image, 48, 12.0, generator)
    found = [
        (x, y)
        for x in range(12, 61)
        for y in range(12, 37)
        if (image[0, :, y : y + 48, x : x + 48] - first).abs().max() < 1e-4
    ]
    assert len(found) == 1  # the first view is a patch of the image itself
    ((x, y),) = found
    corners = [[x, y], [x + 48, y], [x, y + 48], [x + 48, y + 48]]
    there = [[a + b for a, b in zip(*pair)] for pair in zip(corners, moved.view(4, 2).tolist())]
    whole = tv.perspective(image, there, corners, interpolation=tv.InterpolationMode.BILINEAR)
    torch.testing.assert_close(second, whole[:, :, y : y + 48, x : x + 48], rtol=0, atol=2e-3)


def test_projected_by_nothing_is_the_image():
    images = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(projected(images, torch.eye(3).expand(2, 3, 3), padding="zeros"), images)
    moved = projected(images, torch.tensor([[1.0, 0, 2], [0, 1, 0], [0, 0, 1]]).expand(2, 3, 3), padding="zeros")
    torch.testing.assert_close(moved, F.pad(images[..., 2:], (0, 2)))
    assert projected(images.half(), torch.eye(3).expand(2, 3, 3), padding="zeros", size=(2, 3)).shape == (2, 3, 2, 3)


def test_one_seed_one_result_and_the_encoders_mode_is_kept():
    encoder, images = nn.Sequential(nn.Flatten(), nn.Linear(512, 6), nn.Dropout(0.9)), places(120)
    state, quick = torch.get_rng_state(), QUICK | {"epochs": 3}
    first = homography_probe(encoder, [images], 16, **quick)
    assert encoder.training
    assert torch.equal(torch.get_rng_state(), state)
    assert homography_probe(encoder, [(images, "labels")], 16, **quick) == first
    assert homography_probe(encoder, [images], 16, seed=1, **quick) != first
    with torch.autocast("cpu", torch.bfloat16):
        assert homography_probe(encoder, [images], 16, **quick) == pytest.approx(first, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": None}, "encoder must be a module or a function"),
        ({"encoder": lambda x: x}, r"encoder's output must be \[B, D\]"),
        ({"encoder": lambda x: pooled(x) * math.nan}, "encoder's output must be finite"),
        ({"loader": []}, "loader must be of at least one batch, got none"),
        ({"loader": [places(40, 20)]}, r"images must be of at least 24 pixels to a side, got \[40, 2, 20, 20\]"),
        ({"loader": [places(40)[0]]}, r"images must be \[B, C, H, W\]"),
        ({"loader": [places(20)]}, "loader must be of at least 20 rows for training, got 16 of 20"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"max_displacement": 0}, "max_displacement must be finite and above 0"),
        ({"max_displacement": 8}, "max_displacement must be below half of patch_size, 8, got 8"),
        ({"held_out": 1}, "held_out must be above 0 and below 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"weight_decay": -1}, "weight_decay must be finite and at least 0"),
    ],
)
def test_refuses(changes, message):
    arguments = {"encoder": pooled, "loader": [places(40)], "patch_size": 16, **QUICK}
    with pytest.raises((TypeError, ValueError), match=f"^homography_probe: {message}"):
        homography_probe(**{**arguments, **changes})


def test_output_of_another_device_is_brought_to_the_cpu():
    error = homography_probe(lambda x: pooled(x).as_subclass(Elsewhere), [places(40)], 16, **QUICK)
    assert error == homography_probe(pooled, [places(40)], 16, **QUICK)
