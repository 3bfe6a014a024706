"""The fifteen corruptions of ImageNet-C, as examples/corruptions.py gives them, on real images."""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SPEC = importlib.util.spec_from_file_location("corruptions", Path(__file__).parent.parent / "examples/corruptions.py")
corruptions = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(corruptions)
corrupted, KINDS = corruptions.corrupted, corruptions.KINDS


@pytest.fixture
def library():
    return pytest.importorskip("imagecorruptions", reason="needs the report extra")


@pytest.fixture(scope="module")
def images(real_images):
    """Two images of each class of CIFAR-10, ``[20, 32, 32, 3]``."""
    files = [
        file for folder in sorted((real_images / "cifar10/train").iterdir()) for file in sorted(folder.iterdir())[:2]
    ]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def enlarged(images):
    """Twice the height and width."""
    return images.repeat(2, axis=1).repeat(2, axis=2)


def change(images, result):
    return np.abs(result.astype(float) - images).mean(axis=(1, 2, 3))


def test_kinds_are_those_of_the_benchmark(library):
    assert list(KINDS) == library.get_corruption_names("common")
    assert len(set(KINDS)) == 15


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_changes_and_more_at_higher_severity(library, images, kind):
    for pixels in (images, enlarged(images)):
        original = pixels.copy()
        mild, severe = corrupted(pixels, kind, 1, seed=0), corrupted(pixels, kind, 5, seed=0)
        assert (pixels == original).all()
        for result in (mild, severe):
            assert result.dtype == np.uint8
            assert result.shape == pixels.shape
            assert (change(pixels, result) > 0.5).all()  # of 255
        assert change(pixels, severe).mean() > 1.15 * change(pixels, mild).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_fixes_every_bit_and_no_generator_is_left_changed(library, images, kind):
    def run(seed):
        return corrupted(images, kind, 3, seed=seed)

    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    first = run(7)
    drawn = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002, S311
    second = run(7)
    assert (first == second).all()
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002, S311
    deterministic = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert (run(8) == first).all() == (kind in deterministic)
    # No image is corrupted with another's random numbers: equal images come out different.
    twins = corrupted(np.stack([images[0], images[0]]), kind, 3, seed=1)
    assert (twins[0] == twins[1]).all() == (kind in deterministic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float_images_go_the_same_way(library, images, dtype):
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).to(dtype) / 255
    result = corrupted(tensor, "motion_blur", 2, seed=3)
    assert result.dtype == dtype
    assert result.shape == tensor.shape
    expected = torch.from_numpy(corrupted(images, "motion_blur", 2, seed=3)).permute(0, 3, 1, 2)
    assert (result.double() * 255).round().to(torch.uint8).equal(expected)


def test_gaussian_noise_has_the_published_deviation(library):
    """An independent truth: 0.08 of the range at severity 1 and 0.38 at severity 5, on grey where little is clipped."""
    grey = np.full((8, 64, 64, 3), 128, np.uint8)
    assert np.std(corrupted(grey, "gaussian_noise", 1, seed=0) / 255) == pytest.approx(0.08, rel=0.01)
    noise = np.random.default_rng(0).normal(128 / 255, 0.38, 10**6).clip(0, 1)
    assert np.std(corrupted(grey, "gaussian_noise", 5, seed=0) / 255) == pytest.approx(noise.std(), rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "rain"}, "kind must be one of gaussian_noise, .* got 'rain'"),
        ({"severity": 0}, r"severity must be 1, 2, 3, 4 or 5, got 0"),
        ({"images": np.zeros((1, 32, 32, 3))}, r"images must be a uint8 array .* got float64 \[1, 32, 32, 3\]"),
        ({"images": np.zeros((1, 28, 28, 3), np.uint8)}, r"H and W >= 32.* got uint8 \[1, 28, 28, 3\]"),
        (
            {"images": torch.zeros(1, 32, 32, 3)},
            r"images must be a float tensor \[N, 3, H, W\].* got .*\[1, 32, 32, 3\]",
        ),
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, r"images must be a float tensor .* got torch.uint8"),
        ({"images": torch.full((1, 3, 32, 32), 2.0)}, r"images must be in \[0, 1\].* got 2 to 2"),
        ({"images": torch.full((1, 3, 32, 32), torch.nan)}, r"images must be in \[0, 1\].* got nan to nan"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"images": np.zeros((1, 32, 32, 3), np.uint8), "kind": "fog", "severity": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        corrupted(**arguments)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ImportError, match=r"imagecorruptions-imaug .* pip install \"equireg\[report\]\""):
        corrupted(np.zeros((1, 32, 32, 3), np.uint8), "fog", 1, seed=0)
