import colorsys
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from equireg import ColorBias, WithIndex, k_shot, read_image_folder
from tests.image_trees import make_images


def grays(count, num_classes=10, channels=1):
    return TensorDataset(torch.rand(count, channels, 4, 4), torch.arange(count) % num_classes)


class Pictures(list):
    """PIL images with their labels."""

    @property
    def targets(self):
        return [label for _, label, *_ in self]


@pytest.mark.parametrize("bias", [0.0, 0.5, 0.9, 0.995, 1.0])
def test_share_of_the_class_s_color(bias):
    """bias + (1 - bias) / C of the samples wear it, by a normal approximation at 5 standard deviations."""
    count = 50_000
    contexts = ColorBias(grays(count), 10, bias=bias, seed=3).contexts
    own = (contexts == torch.arange(count) % 10).double().mean()
    expected = bias + (1 - bias) / 10
    assert abs(own - expected) <= 5 * (expected * (1 - expected) / count) ** 0.5
    if bias == 0:  # any color is as likely as any other
        assert (contexts.bincount(minlength=10).double() / count - 0.1).abs().max() < 5 * (0.09 / count) ** 0.5


@given(st.integers(1, 40), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**40))
def test_one_color_for_each_index(count, num_classes, bias, seed):
    data = grays(count, num_classes)
    painted, again = (ColorBias(data, num_classes, bias=bias, seed=seed) for _ in range(2))
    assert torch.equal(painted.contexts, again.contexts)
    assert painted.contexts.dtype == torch.int64
    for index in (0, count - 1, -1):
        image, label = painted[index]
        assert torch.equal(image, data[index][0] * painted.colors[painted.contexts[index]][:, None, None])
        assert torch.equal(image, painted[index][0])
        assert label == data[index][1]


def test_seeds_differ_and_no_random_state_is_touched():
    state = torch.get_rng_state()
    drawn = [ColorBias(grays(100), 10, bias=0.5, seed=seed).contexts for seed in (0, 1)]
    assert not torch.equal(*drawn)
    torch.set_rng_state(state)
    assert torch.equal(ColorBias(grays(100), 10, bias=0.5).contexts, drawn[0])


def test_default_colors_are_hues():
    colors = ColorBias(grays(4, 4), 4).colors
    assert torch.allclose(colors, torch.tensor([colorsys.hsv_to_rgb(h / 4, 0.8, 1) for h in range(4)]))
    assert colors.min() >= 0.2 - 1e-6  # something of each channel stays


def test_every_kind_of_image():
    """A tint multiplies each channel: the same of PIL images and tensors, of gray and of color."""
    color = torch.tensor([1.0, 0.5, 0.25])
    pixels = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    expected = (pixels.double() * color[:, None, None]).round().to(torch.uint8)

    def tinted(image):
        return ColorBias(Pictures([(image, 0)]), 1, bias=1.0, colors=[color.tolist()])[0][0]

    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    assert torch.equal(pil_to_tensor(tinted(photo)), expected)
    assert torch.equal(tinted(pixels), expected)
    assert torch.equal(tinted(pixels / 255), pixels / 255 * color[:, None, None])
    assert tinted((pixels / 255).half()).dtype == torch.float16
    gray = Image.fromarray(pixels[0].numpy())
    expected = (pixels[:1].double() * color[:, None, None]).round().to(torch.uint8)
    assert torch.equal(pil_to_tensor(tinted(gray)), expected)
    assert torch.equal(tinted(pixels[:1]), expected)


def test_attributes_and_transform():
    data = Pictures([(Image.new("RGB", (2, 2), "white"), label, "more") for label in (1, 0)])
    data.classes = ["cat", "dog"]
    painted = ColorBias(data, 2, bias=1.0, transform=pil_to_tensor)
    assert painted[0][0][:, 0, 0].tolist() == [round(255 * c) for c in painted.colors[1].tolist()]
    assert painted[0][1:] == (1, "more")
    assert (painted.targets, painted.labels.tolist()) == ([1, 0], [1, 0])
    assert (painted.classes, len(painted)) == (["cat", "dog"], 2)
    assert len(list(painted)) == 2  # iteration ends
    with pytest.raises(IndexError, match=r"index must be in 0 \.\. 1, got 2"):
        painted[2]


def test_with_the_other_data_sets(tmp_path):
    make_images(tmp_path, *(f"{c}/{n}.png" for c in "ab" for n in range(3)), color=(255, 255, 255))
    files = read_image_folder(tmp_path)
    painted = ColorBias(k_shot(files, 2), 2, bias=1.0, transform=pil_to_tensor)
    few = k_shot(WithIndex(painted), 1)
    assert isinstance(few, Subset)
    for image, label, index in few:
        assert index == 2 * label
        assert image[:, 0, 0].tolist() == [round(255 * c) for c in painted.colors[label].tolist()]
    other = pickle.loads(pickle.dumps(painted))  # noqa: S301
    assert torch.equal(other.contexts, painted.contexts)
    batches = list(DataLoader(painted, batch_size=4, num_workers=1))
    assert torch.equal(batches[0][0], torch.stack([painted[n][0] for n in range(4)]))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


WHOLE_NUMBERS = TensorDataset(torch.ones(1, 1, 2, 2).long(), torch.zeros(1).long())


@pytest.mark.parametrize(
    ("dataset", "classes", "options", "message"),
    [
        (Stream(), 2, {}, "dataset must be map-style, with a length, got Stream"),
        (TensorDataset(torch.rand(3, 1, 2, 2)), 2, {}, r"dataset must .*labels in \.labels or \.targets"),
        (grays(4), 3, {}, r"the dataset's labels must be in 0 \.\. 2 .*got 3 at position 3"),
        (grays(4), 10, {"bias": 1.1}, r"bias must be in 0 \.\. 1, got 1\.1"),
        (grays(4), 10, {"colors": torch.rand(9, 3)}, "colors must be of 10 rows or more.*got 9"),
        (grays(4, 1), 1, {"colors": [[0.0, 0.0, 2.0]]}, r"colors must be in 0 \.\. 1"),
        (grays(4, 1), 1, {"colors": [[0.0, 0.0]]}, r"colors must be \[K, 3\], got \[1, 2\]"),
        (grays(4, 1), 1, {"seed": -1}, "seed must be at least 0"),
        (grays(4, 1, channels=4), 1, {}, r"an image must be .*got \[4, 4, 4\]"),
        (WHOLE_NUMBERS, 1, {}, "an image must .*uint8"),
        (Pictures([("cat.png", 0)]), 1, {}, "an image must be a PIL.Image or a tensor"),
    ],
)
def test_wrong_arguments(dataset, classes, options, message):
    with pytest.raises((TypeError, ValueError), match=f"ColorBias: {message}"):
        ColorBias(dataset, classes, **options)[0]
