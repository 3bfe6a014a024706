"""The batched policy of MoCo-v3, against torchvision's transforms of one image."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from equireg import mocov3_photometric
from tests.benchmarks.views import by_image


def photographs(folder, size):
    from PIL import Image

    files = sorted((folder / "imagenet-samples").glob("*.jpg"))[:40]
    images = [tv.pil_to_tensor(Image.open(file).convert("RGB")) for file in files]
    return torch.stack([tv.center_crop(image, [size, size]) for image in images]) / 255


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("view", [0, 1])
def test_photographs_are_changed_as_torchvision_changes_them(size, view, real_images):
    images, policy = photographs(real_images, size), mocov3_photometric(size)[view]
    assert policy.kernel_size == {64: 7, 224: 23}[size]
    t = policy.draw(len(images))
    torch.manual_seed(1)
    found, t = policy(images), (torch.manual_seed(1), policy.draw(len(images)))[1]
    expected = torch.stack([by_image(image, t, i, policy.kernel_size) for i, image in enumerate(images)])
    # Solarizing and the hue's sectors jump, so a pixel at the edge of a jump may fall on its other side.
    difference = (found - expected).abs()
    assert (difference > 2e-5).float().mean() < 1e-5
    assert found.shape == images.shape


@pytest.mark.parametrize(("view", "blur", "solarize"), [(0, 1.0, 0.0), (1, 0.1, 0.2)])
def test_every_image_draws_its_own_from_the_ranges_of_moco_v3(view, blur, solarize):
    count = 40_000
    t = mocov3_photometric(224)[view].draw(count)
    for drawn, share in ((t.jitter, 0.8), (t.gray, 0.2), (t.blur, blur), (t.solarize, solarize)):
        assert abs(drawn.double().mean() - share) <= 4 * math.sqrt(share * (1 - share) / count)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
    columns = torch.column_stack([t.factors, t.hue, t.sigma])
    for (low, high), values in zip(ranges, columns.unbind(1)):
        assert low <= values.min() < low + 0.001
        assert high - 0.001 < values.max() <= high + 1e-6
        assert abs(values.mean() - (low + high) / 2) < 0.01 * (high - low)
    together = torch.column_stack([columns, t.jitter, t.gray, t.hue_at])  # nothing is drawn with anything else
    correlation = together.T.corrcoef().fill_diagonal_(0)
    assert correlation.abs().max() < 0.03
    orders = (27 * t.hue_at + t.order @ torch.tensor([9, 3, 1])).bincount()
    orders = orders[orders > 0]
    assert len(orders) == 24
    assert (orders / count - 1 / 24).abs().max() < 0.005


def test_one_image_gray_images_and_half_precision():
    first, _ = mocov3_photometric((32, 48))
    assert first.kernel_size == 3
    images = torch.rand(6, 1, 32, 48)
    for x in (images, images[0], images.expand(-1, 3, -1, -1), images.half(), images.double()):
        torch.manual_seed(0)
        found = first(x)
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert ((found >= -1e-6) & (found <= 1 + 1e-6)).all()
    torch.manual_seed(0)
    torch.testing.assert_close(
        first(images.half()).float(), (torch.manual_seed(0), first(images))[1], atol=5e-3, rtol=0
    )
    assert len(first(images[:0])) == 0


def test_gradients_pass():
    images = torch.rand(8, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    mocov3_photometric(12)[1](images).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 4, 8, 8), r"images must be of 3 channels, or of 1, got \[2, 4, 8, 8\]"),
        (torch.rand(8, 8), r"images must be \[B, C, H, W\]"),
        (torch.zeros(3, 8, 8).byte(), "images must be a tensor of floating point"),
        ("image", "images must be a tensor"),
    ],
)
def test_refuses(images, message):
    with pytest.raises((TypeError, ValueError), match=f"^mocov3_photometric: {message}"):
        mocov3_photometric(8)[0](images)
