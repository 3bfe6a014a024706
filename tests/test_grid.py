import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from equireg import GridTransform

ELEMENTS = [(turns, flip) for flip in (False, True) for turns in range(4)]
elements = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=5)


def transform(pairs, source, target=None, **options):
    turns, flips = zip(*pairs)
    return GridTransform(torch.tensor(turns), torch.tensor(flips), source, target or source, **options)


def one_by_one(images, pairs, target):
    """The definition, image by image: flip, turn, resize."""
    results = []
    for image, (turns, flip) in zip(images, pairs):
        moved = torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1))[None]
        if tuple(moved.shape[2:]) != tuple(target):
            moved = F.interpolate(moved, target, mode="bicubic", align_corners=False)
        results.append(moved[0])
    return torch.stack(results)


def as_maps(tokens, grid):
    return tokens.transpose(1, 2).unflatten(2, grid)


def random_tokens(count, grid, width=3):
    return torch.randn(count, grid[0] * grid[1], width, dtype=torch.float64)


@pytest.mark.parametrize(
    ("source", "target"),
    [((4, 4), (4, 4)), ((4, 4), (3, 5)), ((3, 5), (4, 4)), ((3, 5), (6, 4)), ((4, 4), (6, 6)), ((3, 5), (3, 5))],
)
def test_equals_flip_turn_resize_of_each_image(source, target):
    """All eight elements in one batch, odd and even turns mixed, square grids or not."""
    g = transform(ELEMENTS, source, target)
    tokens = random_tokens(8, source)
    expected = one_by_one(as_maps(tokens, source), ELEMENTS, target)
    torch.testing.assert_close(as_maps(g.on_tokens(tokens), target), expected, rtol=1e-10, atol=1e-10)
    images = torch.randn(8, 2, 2 * source[0], 2 * source[1], dtype=torch.float64)
    expected = one_by_one(images, ELEMENTS, (2 * target[0], 2 * target[1]))
    torch.testing.assert_close(g.on_images(images, patch_size=2), expected, rtol=1e-10, atol=1e-10)


def test_permutations_are_exact():
    """Also where a grid that is not square swaps its sides, and in compositions of such."""
    odd = [pair for pair in ELEMENTS if pair[0] % 2]
    for pairs, source, target in ((ELEMENTS, (5, 5), (5, 5)), (odd, (3, 5), (5, 3))):
        g, tokens = transform(pairs, source, target), random_tokens(len(pairs), source)
        moved = g.on_tokens(tokens)
        assert torch.equal(as_maps(moved, target), one_by_one(as_maps(tokens, source), pairs, target))
        assert torch.equal(g.inverse().on_tokens(moved), tokens)
        back = transform(pairs[::-1], target, source)
        assert torch.equal((back @ g).on_tokens(tokens), back.on_tokens(moved))


@given(first=elements, seed=st.integers(0, 2**31))
def test_identity_and_inverse(first, seed):  # G3
    torch.manual_seed(seed)
    g, tokens = transform(first, (4, 4)), random_tokens(len(first), (4, 4))
    unit = GridTransform.identity(len(first), (4, 4))
    assert torch.equal(unit.on_tokens(tokens), tokens)
    assert torch.equal(g.inverse().on_tokens(g.on_tokens(tokens)), tokens)
    for both in (g.inverse() @ g, g @ g.inverse()):
        assert torch.equal(both.quarter_turns, unit.quarter_turns)
        assert torch.equal(both.flip, unit.flip)
    assert torch.equal((g @ unit).quarter_turns, g.quarter_turns)


def test_composition_is_the_action_one_after_the_other():
    """Homomorphism and associativity, for all 8 x 8 pairs and 512 triples."""
    pairs = list(itertools.product(ELEMENTS, ELEMENTS))
    g1, g2 = (transform([pair[i] for pair in pairs], (3, 3)) for i in (0, 1))
    tokens = random_tokens(64, (3, 3))
    assert torch.equal((g2 @ g1).on_tokens(tokens), g2.on_tokens(g1.on_tokens(tokens)))
    images = torch.randn(64, 1, 6, 6)
    assert torch.equal((g2 @ g1).on_images(images, 2), g2.on_images(g1.on_images(images, 2), 2))
    triples = list(itertools.product(ELEMENTS, ELEMENTS, ELEMENTS))
    a, b, c = (transform([triple[i] for triple in triples], (3, 3)) for i in range(3))
    left, right = (a @ b) @ c, a @ (b @ c)
    assert torch.equal(left.quarter_turns, right.quarter_turns)
    assert torch.equal(left.flip, right.flip)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_an_equivariant_encoder_commutes(grid):  # G4
    """Patch averages without positions: acting on images and encoding equals encoding and acting on tokens."""
    pairs = ELEMENTS if grid[0] == grid[1] else [(0, False), (0, True), (2, False), (2, True)]
    images = torch.randn(len(pairs), 3, 4 * grid[0], 4 * grid[1], dtype=torch.float64)

    def encode(x):
        return F.avg_pool2d(x, 4).flatten(2).transpose(1, 2)

    g = transform(pairs, grid)
    torch.testing.assert_close(g.on_tokens(encode(images)), encode(g.on_images(images, 4)), rtol=1e-12, atol=1e-12)


def test_real_images_commute_and_come_back(real_images):
    """On ImageNet images: whole patches, doubled and back again within 1% of the range for smooth parts."""
    from PIL import Image
    from torchvision.transforms import v2

    files = sorted((real_images / "imagenet-samples").glob("*.jpg"))[:8]
    if not files:
        pytest.skip("EQUIREG_DATA has no imagenet-samples/*.jpg")
    load = v2.Compose([v2.ToImage(), v2.Resize((112, 112)), v2.ToDtype(torch.float32, scale=True)])
    images = torch.stack([load(Image.open(file).convert("RGB")) for file in files])
    g = transform(ELEMENTS, (7, 7))
    assert torch.equal(g.on_images(images, 16), one_by_one(images, ELEMENTS, (112, 112)))
    larger = transform(ELEMENTS, (7, 7), (14, 14))
    back = larger.inverse().on_images(larger.on_images(images, 16), 16)
    assert (back - images).abs().mean() < 0.01


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [False, True])
def test_one_operator_for_images_and_tokens(interpolation, antialias):
    options = {"interpolation": interpolation, "antialias": antialias}
    g = GridTransform.random(6, (8, 8), generator=torch.Generator().manual_seed(3), **options)
    tokens = torch.randn(6, 64, 5)
    as_images = g.on_images(as_maps(tokens, (8, 8)), patch_size=1)
    torch.testing.assert_close(as_maps(g.on_tokens(tokens), g.target), as_images)
    assert (g.inverse().interpolation, g.inverse().antialias) == (interpolation, antialias)


def test_random_elements():
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    drawn = [GridTransform.random(16, (14, 14), generator=generator) for _ in range(300)]
    assert torch.equal(torch.get_rng_state(), state)
    areas = torch.tensor([g.target[0] * g.target[1] / 196 for g in drawn])
    assert 0.6 < areas.min() < 0.8
    assert 1.2 < areas.max() < 1.4
    aspects = torch.tensor([g.target[1] / g.target[0] for g in drawn]).log()
    assert abs(aspects.mean()) < 0.05  # log-uniform, and turned as often as not
    assert aspects.abs().max() < 0.45
    assert {tuple(sorted(g.target)) for g in drawn} > {(14, 14), (12, 14)}
    for g in drawn:
        assert g.source == (14, 14)
        if g.target[0] != g.target[1]:  # odd turns swap the sides, so all or none of the batch are odd
            assert len(set((g.quarter_turns % 2).tolist())) == 1
        assert g.on_tokens(torch.ones(16, 196, 1)).shape == (16, g.target[0] * g.target[1], 1)
    seen = {(turns, flip) for g in drawn for turns, flip in zip(g.quarter_turns.tolist(), g.flip.tolist())}
    assert seen == set(ELEMENTS)
    exact = GridTransform.random(200, (4, 4), scale=(1, 1), ratio=(1, 1), generator=generator)
    assert exact.target == (4, 4)
    assert len(set(zip(exact.quarter_turns.tolist(), exact.flip.tolist()))) == 8  # a different one for each image


def test_same_seed_same_elements():
    a, b = (GridTransform.random(9, (7, 9), generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert repr(a) == repr(b)
    assert GridTransform.random(0, (2, 2)).on_images(torch.ones(0, 3, 4, 4), 2).shape[0] == 0


def test_gradients_flow():
    g = transform(ELEMENTS, (3, 4), (5, 5))
    tokens = random_tokens(8, (3, 4), 2).requires_grad_()
    assert torch.autograd.gradcheck(g.on_tokens, tokens)


def test_precision():
    """Half precision is kept, and rounded once; autocast leaves the resizing alone."""
    g = transform(ELEMENTS, (4, 4), (3, 5))
    tokens = random_tokens(8, (4, 4)).float()
    expected = g.on_tokens(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(g.on_tokens(tokens), expected)
    assert g.on_tokens(tokens.to("meta")).shape == expected.shape
    for dtype in (torch.float16, torch.bfloat16):
        rounded = tokens.to(dtype)
        torch.testing.assert_close(g.on_tokens(rounded), g.on_tokens(rounded.float()).to(dtype))


def test_strides_and_untouched_inputs():  # G11
    g = transform(ELEMENTS, (4, 4), (4, 6))
    images = torch.randn(8, 3, 8, 8)
    last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(g.on_images(last, 2), g.on_images(images, 2))
    expanded = torch.randn(1, 16, 3).expand(8, -1, -1)
    torch.testing.assert_close(g.on_tokens(expanded), g.on_tokens(expanded.contiguous()))
    assert images._version == last._version == 0


def test_compiles_whole():
    def act(tokens, turns, flip):
        return GridTransform(turns, flip, (4, 4), (4, 4)).on_tokens(tokens)

    turns, flips = (torch.tensor(part) for part in zip(*ELEMENTS))
    tokens = torch.randn(8, 16, 3)
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens, turns, flips), act(tokens, turns, flips))


def square(turns=(0, 1), flip=(True, False), source=(2, 2), target=(2, 2), **options):
    return GridTransform(torch.tensor(turns), torch.tensor(flip), source, target, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: square(turns=(0.0, 1.0)), "quarter_turns must be .* got torch.float32"),
        (lambda: square(flip=(0, 1)), "flip must be a bool tensor, got torch.int64"),
        (lambda: square(flip=(True,)), r"flip must be \[B\] = \[2\]"),
        (lambda: square(source=(2, 0)), "source must be at least 1, got 0"),
        (lambda: square(target=(2, 2, 2)), "target must be"),
        (lambda: square(interpolation="nearest"), "interpolation must be one of 'bicubic', 'bilinear', got 'nearest'"),
        (
            lambda: square().on_tokens(torch.ones(2, 5, 3)),
            r"tokens must be of 2 x 2 = 4 tokens .* without class or register tokens, got \[2, 5, 3\]",
        ),
        (
            lambda: square().on_tokens(torch.ones(3, 4, 3)),
            r"tokens must be \[B, T, D\] = \[2, T, D\], got \[3, 4, 3\]",
        ),
        (
            lambda: square().on_images(torch.ones(2, 3, 9, 8), 4),
            r"images must be \[B, C, 8, 8\], got \[2, 3, 9, 8\]",
        ),
        (lambda: square() @ GridTransform.identity(2, (3, 3)), r"onto the grid \(2, 2\) of the left, got \(3, 3\)"),
        (lambda: square() @ GridTransform.identity(3, (2, 2)), "the right operand must be of 2 elements, got 3"),
        (lambda: square().to("meta") @ square(), "the right operand must be on meta as the left operand is, got cpu"),
        (lambda: GridTransform.random(2, (4, 4), scale=(1.3, 0.7)), "scale must be two numbers"),
        (
            lambda: GridTransform.random(2, (4, 4), scale=0.7),
            "scale must be two numbers above 0 in rising order, got 0.7",
        ),
        (lambda: GridTransform.random(2, (4, 4), ratio=("a", "b")), "ratio must be a number, got str 'a'"),
        (lambda: GridTransform.identity(2, 4), r"source must be \(height, width\), got int 4"),
    ],
)
def test_wrong_arguments(call, message):  # G2, G6, G7, G8
    with pytest.raises((TypeError, ValueError), match=message):
        call()
