import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from equireg import EquivariantViews, split_batch
from equireg.ser.views import _cropped

IDENTITY = torch.nn.Identity()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "patch"), [(32, 4), ((24, 48), 8), (16, 16)])
def test_views_are_what_the_elements_do(size, patch):
    views = EquivariantViews(size, patch, photometric=IDENTITY)
    images = torch.rand(6, 3, *views.image_size)
    x1, x2, g1, g2 = views(images, seeded())
    for x, g in ((x1, g1), (x2, g2)):
        assert torch.equal(x, g.on_images(images, patch))
        assert g.source == views.grid
        assert tuple(x.shape[2:]) == (patch * g.target[0], patch * g.target[1])


def test_the_second_view_is_the_first_one_moved():
    """x2 = ρ_g(x1) with g = g2 g1⁻¹, exactly where nothing is resized."""
    views = EquivariantViews(32, 4, photometric=IDENTITY, scale=(1, 1), ratio=(1, 1))
    x1, x2, g1, g2 = views(torch.rand(32, 3, 32, 32), seeded())
    assert torch.equal((g2 @ g1.inverse()).on_images(x1, 4), x2)
    assert len(set(zip(g1.quarter_turns.tolist(), g1.flip.tolist()))) == 8  # each image has its own element
    assert not torch.equal(g1.quarter_turns, g2.quarter_turns)  # and each view


def test_sizes_stay_in_their_range():
    views = EquivariantViews(224, 16, photometric=IDENTITY)
    found = set()
    for seed in range(60):
        _, _, g1, g2 = views(torch.zeros(1, 3, 224, 224), seeded(seed))
        found |= {g1.target, g2.target}
    areas = [h * w / 196 for h, w in found]
    assert len(found) > 20
    assert 0.62 < min(areas) < 0.8  # 0.7 and 1.3, and rounding to whole patches
    assert 1.2 < max(areas) < 1.4
    assert all(0.65 < w / h < 1.55 for h, w in found)  # 3/4 and 4/3, and rounding


def test_a_generator_decides_everything_and_leaves_the_global_one_alone():  # E9
    views, images = EquivariantViews(32, 4), torch.rand(4, 3, 32, 32)
    before = torch.get_rng_state()
    first, again, other = (views(images, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first[:2], again[:2]):
        assert torch.equal(a, b)
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
    torch.manual_seed(3)
    x = views(images)[0]
    torch.manual_seed(3)
    assert torch.equal(views(images)[0], x)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_is_put_back_after_an_error():
    def fail(image):
        torch.rand(3)
        raise RuntimeError("no")

    views, images = EquivariantViews(32, 4, photometric=fail), torch.rand(2, 3, 32, 32)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        views(images, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_colours_are_drawn_for_each_image_and_each_view():
    views = EquivariantViews(32, 4, scale=(1, 1), ratio=(1, 1))
    image = torch.rand(3, 32, 32)
    x1, x2, g1, g2 = views(image.expand(12, -1, -1, -1), seeded())
    flat = [g.inverse().on_images(x, 4) for x, g in ((x1, g1), (x2, g2))]  # what is left are the colours
    every = torch.cat(flat).flatten(1)
    distances = torch.cdist(every, every) + torch.eye(24)
    assert (distances > 1e-3).float().mean() > 0.9  # some change nothing in both
    assert ((x1 > -1e-4) & (x1 < 1 + 1e-4)).all()


def test_one_policy_for_each_view():
    views = EquivariantViews(32, 4, photometric=(v2.RandomSolarize(0.0, p=1.0), IDENTITY))
    images = torch.rand(3, 3, 32, 32)
    x1, x2, g1, g2 = views(images, seeded())
    torch.testing.assert_close(x1, 1 - g1.on_images(images, 4).clamp(0, 1))
    assert torch.equal(x2, g2.on_images(images, 4))


def test_overshoot_of_resizing_gives_no_nan():
    """Sharp edges overshoot under bicubic resizing, and jittered hues of such colours were NaN."""
    checkers = (torch.arange(32)[:, None] // 2 + torch.arange(32) // 2) % 2
    images = checkers.expand(64, 3, 32, 32).float() * torch.rand(64, 3, 1, 1)
    views = EquivariantViews(32, 4)
    for seed in range(4):
        for x in views(images, seeded(seed))[:2]:
            assert x.isfinite().all()
            assert ((x > -1e-4) & (x < 1 + 1e-4)).all()


def test_bytes_are_divided_by_255():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    for options in ({}, {"photometric": IDENTITY}, {"crop": (0.3, 1)}):
        views = EquivariantViews(32, 4, **options)
        for mine, theirs in zip(views(images, seeded())[:2], views(images / 255, seeded())[:2]):
            assert mine.dtype == torch.float32
            assert torch.equal(mine, theirs)


class Operations(TorchDispatchMode):
    """Counts what reaches the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"crop": (0.3, 1)}, {"crop": (0.3, 1), "complementary": True}])
def test_a_larger_batch_takes_no_more_operations_and_no_value_is_read(options):
    """On an accelerator; the meta device holds no values, so reading one raises."""
    views, counts = EquivariantViews(32, 4, **options), []
    for size in (256, 1024):
        with Operations() as operations:
            x1, x2, _, _ = views(torch.rand(size, 3, 32, 32, device="meta"), seeded())
        assert x1.is_meta
        assert x2.is_meta
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_a_policy_of_the_users_own_gets_one_image_at_a_time():
    """With numbers of its own for each, in 0 .. 1, whatever resizing overshot."""
    seen = []

    def shift(image):
        seen.append(image)
        return image + torch.rand(())

    views = EquivariantViews(32, 4, photometric=shift, scale=(1.3, 1.3))
    images = (torch.rand(5, 3, 32, 32) > 0.5).float()
    x1, x2, g1, g2 = views(images, seeded())
    assert [image.dim() for image in seen] == [3] * 10
    plain = [g.on_images(images, 4) for g in (g1, g2)]
    assert min(x.min() for x in plain) < 0
    shifts = [x - y.clamp(0, 1) for x, y in zip((x1, x2), plain)]
    assert all((shift.amax((1, 2, 3)) - shift.amin((1, 2, 3))).max() < 1e-6 for shift in shifts)
    assert len(set(torch.cat([shift[:, 0, 0, 0] for shift in shifts]).tolist())) == 10


def test_empty_batch_and_gradients():
    views = EquivariantViews(32, 4)
    x1, _, g1, _ = views(torch.rand(0, 3, 32, 32), seeded())
    assert len(x1) == len(g1) == 0
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    EquivariantViews(32, 4, photometric=IDENTITY)(images, seeded())[0].sum().backward()
    assert images.grad.norm() > 0


def test_split_batch():
    batch = torch.arange(200)
    b1, b2 = split_batch(batch, 0.25)
    assert torch.equal(torch.cat([b1, b2]), batch)
    wanted = {(2048, 0.01): 20, (100, 0.01): 2, (10, 0.5): 5, (10, 1): 10, (10, 0): 0}
    assert {key: len(split_batch(torch.zeros(key[0]), key[1])[1]) for key in wanted} == wanted


VIEWS = EquivariantViews(32, 4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: EquivariantViews(30, 4), ValueError, "image_size must be whole patches of 4, got 30"),
        (lambda: EquivariantViews((32, 30), 4), ValueError, "image_size must be whole patches of 4"),
        (lambda: EquivariantViews((32, 32, 3), 4), ValueError, "image_size must be a side or"),
        (lambda: EquivariantViews(32.0, 4), TypeError, "image_size must be a whole number"),
        (lambda: EquivariantViews(32, 0), ValueError, "patch_size must be at least 1"),
        (lambda: EquivariantViews(32, 4, photometric=(IDENTITY, 1)), ValueError, "photometric must be a callable or a"),
        (lambda: EquivariantViews(32, 4, photometric=3), ValueError, "photometric must be a callable or a pair"),
        (lambda: EquivariantViews(32, 4, scale=(1.3, 0.7)), ValueError, "scale must be two numbers above 0 in rising"),
        (
            lambda: EquivariantViews(32, 4, ratio=(0, 1)),
            ValueError,
            "ratio must be two numbers above 0 in rising order",
        ),
        (lambda: VIEWS([1.0]), TypeError, "images must be a tensor"),
        (lambda: VIEWS(torch.zeros(2, 3, 32, 32).long()), TypeError, "images must be a tensor of floating point"),
        (lambda: VIEWS(torch.zeros(3, 32, 32)), ValueError, r"images must be \[B, C, H, W\]"),
        (
            lambda: VIEWS(torch.zeros(2, 3, 32, 40)),
            ValueError,
            r"images must be \[B, C, 32, 32\], got \[2, 3, 32, 40\]",
        ),
        (lambda: split_batch([1, 2], 0.5), TypeError, "batch must be a tensor"),
        (lambda: split_batch(torch.zeros(4), 1.5), ValueError, "ratio must be from 0 to 1, got 1.5"),
        (lambda: split_batch(torch.zeros(4), -0.1), ValueError, "ratio must be from 0 to 1"),
        (lambda: split_batch(torch.zeros(4), float("nan")), ValueError, "ratio must be from 0 to 1"),
        (lambda: split_batch(torch.zeros(4), "half"), TypeError, "ratio must be a number"),
        (lambda: split_batch(torch.zeros(1), 0.5), ValueError, "batch must be of at least 2 samples"),
        (lambda: split_batch(torch.zeros(()), 0.0), ValueError, "batch must be of at least 1 samples"),
    ],
)
def test_refuses(call, kind, message):
    with pytest.raises(kind, match=f"^(EquivariantViews|GridTransform.random|split_batch): {message}"):
        call()


@pytest.mark.parametrize("size", [32, (16, 48)])
def test_complementary_views_share_no_element(size):
    views = EquivariantViews(size, 4, photometric=IDENTITY, complementary=True)
    images = torch.rand(16, 3, *views.image_size)
    for seed in range(5):
        x1, x2, g1, g2 = views(images, seeded(seed))
        assert torch.equal(g2.flip, ~g1.flip)
        assert torch.equal(g2.quarter_turns // 2, 1 - g1.quarter_turns // 2)
        assert torch.equal(x2, g2.on_images(images, 4))
        assert torch.equal(x1, g1.on_images(images, 4))


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("size", [32, (16, 48)])
@pytest.mark.parametrize(
    ("options", "turns", "flips"),
    [
        ({"quarter_turns": False}, {0}, {False, True}),
        ({"flips": False}, {0, 1, 2, 3}, {False}),
        ({"quarter_turns": False, "flips": False}, {0}, {False}),
    ],
)
def test_parts_of_the_group(options, turns, flips, size, complementary):
    """Without turns and flips only the size changes; without turns, an image can only be flipped left to right."""
    if complementary and turns == {0} and flips == {False}:
        with pytest.raises(ValueError, match="complementary must be False without quarter turns and flips, got True"):
            EquivariantViews(size, 4, complementary=True, **options)
        return
    views = EquivariantViews(size, 4, photometric=IDENTITY, complementary=complementary, **options)
    seen_turns, seen_flips = set(), set()
    for seed in range(8):
        x1, x2, *elements = views(torch.rand(8, 3, *views.image_size), seeded(seed))
        for g, x in zip(elements, (x1, x2)):
            seen_turns |= set(g.quarter_turns.tolist())
            seen_flips |= set(g.flip.tolist())
            assert tuple(x.shape[2:]) == tuple(4 * side for side in g.target)
        if complementary and flips != {False}:
            assert torch.equal(elements[0].flip, ~elements[1].flip)
    assert seen_turns == turns
    assert seen_flips == flips


def test_both_views_are_of_one_crop():
    """Undone, the elements leave the same box of the image in both: a ramp's values tell where it was."""
    views = EquivariantViews(32, 4, photometric=IDENTITY, scale=(1, 1), ratio=(1, 1), crop=(0.25, 0.25))
    ramp = torch.linspace(0, 1, 32).expand(20, 3, 32, 32).contiguous()
    ramp[:, 1] = ramp[:, 1].transpose(1, 2).clone()  # channel 0 rises to the right, channel 1 downwards
    x1, x2, g1, g2 = views(ramp, seeded())
    first, second = g1.inverse().on_images(x1, 4), g2.inverse().on_images(x2, 4)
    torch.testing.assert_close(first, second)
    for channel, axis in ((0, -1), (1, -2)):
        low, high = first[:, channel].amin((1, 2)), first[:, channel].amax((1, 2))
        torch.testing.assert_close(high - low, torch.full((20,), 0.5), atol=0.03, rtol=0)  # half of each side
        assert low.std() > 0.1  # from places of their own
        assert (first[:, channel].diff(dim=axis) >= -1e-6).all()  # neither turned nor flipped
    whole = EquivariantViews(32, 4, photometric=IDENTITY, scale=(1, 1), ratio=(1, 1), crop=(1, 1))(ramp, seeded())
    torch.testing.assert_close(whole[2].inverse().on_images(whole[0], 4), ramp)


def test_crops_have_the_areas_and_aspects_asked_for():
    """Read off a ramp that the box of each image shows."""
    ramp = torch.linspace(0, 1, 64).expand(200, 2, 64, 64).contiguous()
    ramp[:, 1] = ramp[:, 1].transpose(1, 2).clone()
    box = _cropped(ramp, (0.1, 0.5), (0.5, 2.0), seeded())
    width, height = ((box[:, channel].amax((1, 2)) - box[:, channel].amin((1, 2))) for channel in (0, 1))
    area, aspect = width * height, (width / height).log()
    assert 0.08 < area.min() < 0.13
    assert 0.44 < area.max() < 0.52
    assert -math.log(2) - 0.1 < aspect.min() < -0.5
    assert 0.5 < aspect.max() < math.log(2) + 0.1


def test_normalised_images_are_refused():
    with pytest.raises(ValueError, match=r"images must be in 0 .. 1: normalise the views.*got -2 .. 2"):
        EquivariantViews(32, 4)(torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32))
    for crop in ((0, 1), (0.5, 0.2), (0.1, 1.5), (0.3,)):
        with pytest.raises(ValueError, match="crop must be"):
            EquivariantViews(32, 4, crop=crop)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_crop_in_half_precision_is_that_of_fp32(dtype):
    views = EquivariantViews(224, 16, photometric=IDENTITY, scale=(1, 1), ratio=(1, 1), crop=(0.3, 0.9))
    images = torch.rand(2, 3, 224, 224).to(dtype)
    mine, theirs = views(images, seeded())[0], views(images.float(), seeded())[0]
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.float(), theirs, atol=0.01, rtol=0)
    assert len(views(images[:0], seeded())[0]) == 0
