import copy
import math
import pickle

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from equireg import IntermediateViews
from equireg.image_transforms import gaussian_blur, jitter_colors, rigid_motion
from tests import references

KINDS = ["rotation", "translation", "se2", "color", "blur", "all"]
TOLERANCE = {"rtol": 0, "atol": 2e-5}  # of pixels in 0 .. 1, against torchvision, which rounds places in fp32 as we do
WIDE = {"brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "hue": 0.5, "degrees": 180, "translate": (0.5, 0.4)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def photographs(real_images, count=6, side=None):
    image = pytest.importorskip("PIL.Image")
    files = sorted((real_images / "imagenet-samples").glob("*.jpg"))[::15][:count]
    opened = [image.open(file).convert("RGB").resize(side or (80, 64)) for file in files]
    return torch.stack([tv.to_dtype(tv.to_image(x), torch.float32, scale=True) for x in opened])


def with_torchvision(kind, image, values):
    """One image by torchvision's functional transforms."""
    if kind == "rotation":
        return tv.rotate(image, values[0], interpolation=InterpolationMode.BILINEAR)
    if kind in ("translation", "se2"):
        angle, dx, dy = [0.0, *values][-3:]
        # Its affine transform turns clockwise, its rotation counter-clockwise.
        return tv.affine(image, -angle, [dx, dy], 1.0, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)
    if kind == "color":
        brightness, contrast, saturation, hue = values
        image = tv.adjust_contrast(tv.adjust_brightness(image, brightness), contrast)
        return tv.adjust_hue(tv.adjust_saturation(image, saturation), hue)
    return tv.gaussian_blur(image, [17, 17], [values[0], values[0]])


# ------------------------------------------------------------------------------------------------- the transformations


@pytest.mark.parametrize("kind", ["rotation", "translation", "se2", "color", "blur"])
def test_agrees_with_torchvision_on_photographs(kind, real_images):
    images = photographs(real_images)
    views = IntermediateViews(kind, **WIDE)
    view, targets, parameters = views(images, seeded())
    assert views.kernel_size == 17
    for i, values in enumerate(parameters.tolist()):
        torch.testing.assert_close(view[i], with_torchvision(kind, images[i], values), **TOLERANCE)
    for step, target in enumerate(targets, 1):
        for i, values in enumerate(views.at(parameters, step / 3).tolist()):
            torch.testing.assert_close(target[i], with_torchvision(kind, images[i], values), **TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (9, 14)])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_motion_equals_a_loop_over_pixels(height, width, padding):
    """Bilinear sampling written pixel by pixel in float64; the corners by each rule."""
    x = torch.rand(3, 2, height, width, dtype=torch.float64)
    angle, dx, dy = torch.tensor([33.0, -120.0, 0.0]), torch.tensor([0.3, 2.5, -1.0]), torch.tensor([-1.2, 0.0, 2.0])
    moved = rigid_motion(x, angle.double(), dx.double(), dy.double(), padding=padding)
    for i in range(3):
        expected = references.rigid_motion(x[i], float(angle[i]), float(dx[i]), float(dy[i]), padding)
        torch.testing.assert_close(moved[i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_doing_nothing_gives_the_same_bits(dtype):  # G10
    still = {"degrees": 0, "translate": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "sigma": (0, 0)}
    images = torch.rand(5, 3, 33, 20).to(dtype)
    view, targets, parameters = IntermediateViews("all", **still)(images, seeded())
    assert parameters.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]] * 5
    assert torch.equal(view, images)
    assert view.dtype == dtype
    for target in targets:
        assert torch.equal(target, images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(kind, dtype):  # G10: coordinates in fp32
    images = torch.rand(3, 3, 64, 48).to(dtype)
    views = IntermediateViews(kind)
    view, targets, _ = views(images, seeded())
    exact, exact_targets, _ = views(images.float(), seeded())
    assert torch.isfinite(view).all()
    if kind == "all":  # three steps, each rounded
        torch.testing.assert_close(view.float(), exact, rtol=0, atol=0.03)
    else:
        assert torch.equal(view, exact.to(dtype))
        assert torch.equal(targets, exact_targets.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(views(images.float(), seeded())[0], exact)


# ------------------------------------------------------------------------------------------------------------ the path


def test_parameters_at_fractions_are_exact():
    views = IntermediateViews("all", num_intermediate=2, degrees=(30, 30), translate=0.25, hue=(0.1, 0.1))
    _, _, parameters = views(torch.rand(6, 3, 16, 16), seeded())
    third = views.at(parameters, 1 / 3)
    torch.testing.assert_close(third[:, 0], torch.full((6,), 10.0))  # 30 degrees: 10, and 20
    torch.testing.assert_close(views.at(parameters, 2 / 3)[:, 0], torch.full((6,), 20.0))
    torch.testing.assert_close(third[:, 1:3], parameters[:, 1:3] / 3)
    torch.testing.assert_close(third[:, 3:6], 1 + (parameters[:, 3:6] - 1) / 3)  # factors, from 1
    torch.testing.assert_close(third[:, 6:], parameters[:, 6:] / 3)
    assert torch.equal(views.at(parameters, 1.0), parameters)
    assert torch.equal(views.at(parameters, 0.0), torch.tensor([0, 0, 0, 1.0, 1, 1, 0, 0]).expand(6, 8))


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_what_lies_outside_of_the_frame(padding):
    views = IntermediateViews("translation", padding=padding)
    ramp = (torch.arange(8.0) / 8).expand(1, 3, 8, 8)
    view = views.transform(ramp, torch.tensor([[3.0, 0.0]]))  # three pixels to the right
    outside = {"zeros": [0, 0, 0], "border": [0, 0, 0], "reflection": [2 / 8, 1 / 8, 0]}[padding]
    torch.testing.assert_close(view[0, 0, 4], torch.tensor([*outside, *[i / 8 for i in range(5)]]))
    bright = views.transform(1 - ramp, torch.tensor([[3.0, 0.0]]))[0, 0, 4, :3].tolist()
    assert bright == pytest.approx({"zeros": [0, 0, 0], "border": [1, 1, 1]}.get(padding, [6 / 8, 7 / 8, 1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_targets_are_fractions_of_the_same_path(kind, count):
    images, views = torch.rand(4, 3, 18, 26), IntermediateViews(kind, num_intermediate=count)
    view, targets, parameters = views(images, seeded())
    assert view.shape == images.shape
    assert targets.shape == (count, *images.shape)
    assert parameters.shape == (4, len(views.parameter_names))
    assert torch.equal(view, views.transform(images, parameters))
    for i in range(count):
        expected = views.transform(images, views.at(parameters, (i + 1) / (count + 1)))
        torch.testing.assert_close(targets[i], expected, rtol=0, atol=1e-6)
        assert not torch.equal(targets[i], view)


def test_all_is_one_after_the_other():
    images, views = torch.rand(4, 3, 18, 26), IntermediateViews("all")
    view, _, t = views(images, seeded())
    moved = rigid_motion(images, *t[:, :3].unbind(1), padding="zeros")
    recolored = jitter_colors(moved, *t[:, 3:7].unbind(1))
    assert torch.equal(view, gaussian_blur(recolored, t[:, 7], radius=8))


def test_the_view_undergoes_all_and_the_targets_what_is_reconstructed():
    """As the paper's rows (all, rotation): no displacement, colour or blur in the targets."""
    images = torch.rand(4, 3, 18, 18)
    view, targets, t = IntermediateViews("all", reconstruct="rotation")(images, seeded())
    whole, _, same = IntermediateViews("all")(images, seeded())
    assert torch.equal(t, same)
    assert torch.equal(view, whole)
    still = torch.zeros(4)
    for i, target in enumerate(targets, 1):
        torch.testing.assert_close(target, rigid_motion(images, t[:, 0] * i / 3, still, still, padding="zeros"))


def test_kinds_compose():
    views = IntermediateViews(("blur", "rotation"), reconstruct=("blur",))
    assert views.parameter_names == ("angle", "sigma")  # in the order in which they are done
    images = torch.rand(2, 3, 12, 12)
    _, targets, t = views(images, seeded())
    torch.testing.assert_close(targets[0], gaussian_blur(images, t[:, 1] / 3, radius=8))
    names = {kind: IntermediateViews(kind).parameter_names for kind in KINDS}
    assert names["se2"] == names["rotation"] + names["translation"] == ("angle", "dx", "dy")
    assert names["all"] == names["se2"] + names["color"] + names["blur"]


def test_parameters_fill_their_ranges():
    views = IntermediateViews("all", degrees=(-20, 50), translate=(0.1, 0.3), sigma=(0.5, 1.5), brightness=(0.9, 2))
    t = dict(zip(views.parameter_names, views.draw(4000, (50, 80), seeded()).unbind(1)))
    expected = {"angle": (-20, 50), "dx": (-8, 8), "dy": (-15, 15), "brightness": (0.9, 2), "contrast": (0.6, 1.4)}
    expected |= {"saturation": (0.8, 1.2), "hue": (-0.1, 0.1), "sigma": (0.5, 1.5)}
    assert t.keys() == expected.keys()
    for name, (low, high) in expected.items():
        assert low <= t[name].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < t[name].max() <= high
        assert abs(t[name].mean() - (low + high) / 2) < 0.03 * (high - low)


def test_each_image_is_transformed_by_itself(monkeypatch):
    """Whatever is beside it in the batch, or in the block of a large one."""
    images, views = torch.rand(5, 3, 16, 16), IntermediateViews("all", reconstruct="color")
    whole = views(images, seeded())
    t = views.draw(5, (16, 16), seeded())
    together = views.transform(images, t)
    for i in range(5):
        torch.testing.assert_close(views.transform(images[i : i + 1], t[i : i + 1])[0], together[i], rtol=0, atol=1e-6)
    monkeypatch.setattr("equireg.image_transforms._BLOCK", 2 * 3 * 16 * 16)
    torch.testing.assert_close(views(images, seeded()), whole, rtol=0, atol=1e-6)


def test_a_generator_decides_everything_and_leaves_the_global_one_alone():
    views, images = IntermediateViews("all"), torch.rand(3, 3, 12, 12)
    before = torch.get_rng_state()
    first, again, other = (views(images, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[2], other[2])
    torch.manual_seed(1)
    parameters = views(images)[2]
    torch.manual_seed(1)
    assert torch.equal(views(images)[2], parameters)


def test_layouts_copies_and_input():
    views, images = IntermediateViews("all"), torch.rand(1, 3, 12, 16).expand(4, -1, -1, -1)
    expected = views(images.contiguous(), seeded())[0]
    kept = images.clone()
    assert torch.equal(views(images, seeded())[0], expected)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(views(last, seeded())[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(images, kept)
    for other in (copy.deepcopy(views), pickle.loads(pickle.dumps(views))):  # noqa: S301
        assert torch.equal(other(images, seeded())[0], expected)
    empty = views(torch.rand(0, 3, 12, 16))
    assert [len(part) for part in (empty[0], empty[1][0], empty[2])] == [0, 0, 0]
    gray, _, _ = IntermediateViews("se2")(torch.rand(2, 1, 8, 8))
    assert gray.shape == (2, 1, 8, 8)


def test_one_forward_pass_of_the_gradient():
    """Pixels are differentiable, as in any other operation."""
    views = IntermediateViews("all", saturation=0.1)
    images = (0.3 + 0.4 * torch.rand(1, 3, 5, 6, dtype=torch.float64)).requires_grad_()
    t = views.draw(1, (5, 6), seeded()).double()
    assert torch.autograd.gradcheck(lambda x: views.transform(x, t), images)


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "shear"}, ValueError, "kind must be one of 'rotation'.*got 'shear'"),
        ({"kind": ()}, ValueError, "kind must be at least one kind, got none"),
        ({"kind": 3}, TypeError, "kind must be a kind, or several in a tuple, got int"),
        ({"kind": "color", "reconstruct": "rotation"}, ValueError, "reconstruct must be a part of kind 'color'"),
        ({"num_intermediate": 0}, ValueError, "num_intermediate must be at least 1, got 0"),
        ({"degrees": -3}, ValueError, "degrees must be finite and at least 0, got -3"),
        ({"degrees": (30, 10)}, ValueError, "degrees must be the lowest value first"),
        ({"degrees": (0, math.nan)}, ValueError, "degrees must be finite"),
        ({"degrees": (1, 2, 3)}, ValueError, "degrees must be a pair of numbers"),
        ({"translate": (0.1,)}, ValueError, "translate must be a number or a pair"),
        ({"translate": (0.1, -0.1)}, ValueError, "translate must be finite and at least 0, got -0.1"),
        ({"brightness": (-0.5, 1)}, ValueError, "brightness must be finite and within 0 .. inf"),
        ({"hue": 0.7}, ValueError, "hue must be finite and within -0.5 .. 0.5"),
        ({"sigma": 2.0}, TypeError, "sigma must be a pair of numbers, got float"),
        ({"sigma": (-1, 2)}, ValueError, "sigma must be finite and within 0 .. inf"),
        ({"padding": "mirror"}, ValueError, "padding must be one of 'zeros', 'border', 'reflection', got 'mirror'"),
    ],
)
def test_refuses_settings(arguments, error, message):
    with pytest.raises(error, match=f"IntermediateViews: {message}"):
        IntermediateViews(**arguments)


@pytest.mark.parametrize(
    ("kind", "images", "error", "message"),
    [
        ("color", torch.rand(2, 1, 8, 8), ValueError, r"images must be \[B, 3, H, W\] for colours"),
        ("color", 255 * torch.rand(2, 3, 8, 8), ValueError, "images must be in 0 .. 1 .*: normalise the views, .*got"),
        ("color", torch.full((2, 3, 8, 8), math.nan), ValueError, "images must be in 0 .. 1 for colours: .*got nan"),
        ("rotation", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "images must be .* got torch.uint8"),
        ("rotation", torch.rand(3, 8, 8), ValueError, r"images must be \[B, C, H, W\], got \[3, 8, 8\]"),
        ("rotation", torch.rand(2, 3, 0, 8), ValueError, "images must be of at least one channel and pixel"),
        ("rotation", "x", TypeError, "images must be a tensor"),
    ],
)
def test_refuses_images(kind, images, error, message):
    with pytest.raises(error, match=f"IntermediateViews: {message}"):
        IntermediateViews(kind)(images)


SE2, BLUR = IntermediateViews("se2"), IntermediateViews("blur", sigma=(0.1, 0.5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: SE2.transform(x, torch.zeros(2, 2)), ValueError, r"parameters must be .* = \[2, 3\], got \[2, 2\]"),
        (lambda x: SE2.at(torch.zeros(2, 3), 1.5), ValueError, "fraction must be in 0 .. 1, got 1.5"),
        (lambda x: SE2.at(torch.zeros(2, 2), 0.5), ValueError, r"parameters must be .* = \[B, 3\], got \[2, 2\]"),
        (
            lambda x: SE2.at(torch.zeros(2, 3), 0.5, only_reconstructed="no"),
            ValueError,
            "only_reconstructed must be one",
        ),
        (lambda x: SE2.draw(-1, (8, 8)), ValueError, "count must be at least 0, got -1"),
        (lambda x: SE2.draw(2, 8), ValueError, r"size must be \(height, width\), got 8"),
        (lambda x: SE2.draw(2, (-8, 8)), ValueError, "size must be at least 1, got -8"),
        (lambda x: SE2(x, 0), TypeError, "generator must be a torch.Generator or None, got int"),
        (lambda x: SE2(x[:, :0]), ValueError, r"images must be of at least one channel and pixel, got \[2, 0, 8, 8\]"),
        (lambda x: BLUR.transform(x, torch.full((2, 1), 8.0)), ValueError, "must be in 0 .. 0.5 for sigma, got 8"),
        (lambda x: BLUR.transform(x, torch.full((2, 1), -1.0)), ValueError, "must be in 0 .. 0.5 for sigma, got -1"),
        (lambda x: BLUR.transform(x, torch.full((2, 1), math.nan)), ValueError, "must be finite, got nan in row 0"),
    ],
)
def test_refuses_parameters(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(2, 3, 8, 8))
