import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equireg import TokenTap, dense_probe

QUIET = {"progress": False}


def blocks(count=12, grid=(6, 8), side=4, classes=4, seed=0):
    """Masks of square blocks, and images that show their classes."""
    small = torch.randint(classes, (count, *grid), generator=torch.Generator().manual_seed(seed))
    masks = small.repeat_interleave(side, 1).repeat_interleave(side, 2)
    return F.one_hot(masks, classes).permute(0, 3, 1, 2).float(), masks


def pixels(images):
    """A token for each pixel."""
    return images.flatten(2).transpose(1, 2)


def halves(images, masks):
    return [(images[:8], masks[:8])], [(images[8:], masks[8:])]


def test_tokens_that_know_the_class_of_each_pixel_score_one():
    for encode in (pixels, lambda images: images):  # [B, T, D] and [B, D, h, w]
        found = dense_probe(encode, *halves(*blocks()), 4, **QUIET)
        assert found == {"upright": 1.0, "90": 1.0, "180": 1.0, "flip": 1.0}


def test_tokens_of_other_images_score_as_chance_does():
    """Nothing is learned, so one answer, or a random one, for all: at most a quarter of each union."""
    images, masks = blocks(40)
    order = torch.randperm(40)
    found = dense_probe(pixels, *halves(images[order], masks), 4, **QUIET)
    assert all(0.0 < score < 0.25 for score in found.values())


def test_equals_a_loop_over_pixels():
    """Of the answers that the fitted map gives: counted class by class, pixel by pixel, ignored ones left out."""
    images, masks = blocks(12, classes=3)
    images = images + 0.7 * torch.randn(images.shape)
    masks[torch.rand(masks.shape) < 0.2] = 255
    masks[8:][masks[8:] == 2] = 255  # a class that the measured images lack
    (train,), (test,) = halves(images, masks)
    found = dense_probe(pixels, [train], [test], 3, ignore_index=255, **QUIET)

    # The same convex problem by another optimiser, in float64.
    kept = train[1].flatten() != 255
    x, y = pixels(train[0]).flatten(0, 1)[kept].double(), train[1].flatten()[kept]
    mean, std = x.mean(0), x.std(0, correction=0)
    weight, bias = (torch.zeros(3, size, dtype=torch.float64, requires_grad=True) for size in (3, 1))
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    for _ in range(400):
        scores = (x - mean) / std @ weight.T + bias[:, 0]
        loss = F.cross_entropy(scores, y) + 1e-3 / 2 * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moves = {"upright": (0, False), "90": (1, False), "180": (2, False), "flip": (0, True)}
    for name, (turns, flip) in moves.items():
        shown, truth = (x.flip(-1) if flip else x.rot90(turns, (-2, -1)) for x in test)
        answers = (((pixels(shown).double() - mean) / std) @ weight.T + bias[:, 0]).argmax(-1).flatten().tolist()
        shares = []
        for c in (0, 1):
            pairs = [(a == c, t == c) for a, t in zip(answers, truth.flatten().tolist()) if t != 255]
            shares.append(sum(a and t for a, t in pairs) / sum(a or t for a, t in pairs))
        assert found[name] == pytest.approx(sum(shares) / 2, abs=5e-3)


def test_answers_in_full_precision_also_under_autocast():
    images, masks = blocks(12)
    (train, test), calls = halves(images + torch.randn(images.shape), masks), {"num_classes": 4, **QUIET}
    expected = dense_probe(pixels, train, test, **calls)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dense_probe(pixels, train, test, **calls) == expected


def test_an_encoder_that_knows_where_up_is_loses_when_turned():
    """Tokens that turn with the image keep their score; rows of an upright image say the same only upright."""
    rows = torch.arange(8) // 2
    masks = rows.view(8, 1).expand(12, 8, 8).clone()
    images = torch.rand(12, 1, 8, 8)

    def places(images):
        return torch.linspace(-1, 1, 8).view(8, 1).expand(len(images), 1, 8, 8) ** torch.arange(1, 4).view(3, 1, 1)

    found = dense_probe(places, *halves(images, masks), 4, weight_decay=1e-5, **QUIET)
    assert found["upright"] == found["flip"] == 1.0
    assert found["180"] == 0.0
    assert found["90"] < 0.3
    shown = F.one_hot(masks, 4).permute(0, 3, 1, 2).float()
    assert min(dense_probe(pixels, *halves(shown, masks), 4, **QUIET).values()) == 1.0


class Blocks(nn.Module):
    """A random patch embedding, whose mode is to be kept."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 64, 8, stride=8), nn.GELU())
        self.dropout = nn.Dropout(0.9)

    def forward(self, images):
        assert not self.training
        return self.dropout(self.embed(images))


def test_street_scenes_through_a_token_tap(real_images):
    """CamVid: colours and edges of patches tell the sky from the road, and images of another order do not."""
    import numpy as np
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    def read(part, count):
        folder = real_images / "camvid128" / part
        files = sorted((folder / "images").glob("*.jpg"))[::6][:count]
        images = torch.stack([to_tensor(Image.open(file)) for file in files])
        masks = [np.array(Image.open(folder / "masks" / f"{file.stem}.png")) for file in files]
        return images, torch.from_numpy(np.stack(masks))

    train, test = read("train", 40), read("val", 12)
    assert int(train[1].max()) == 11  # not labelled
    model = Blocks().train()

    def encode(images):
        with TokenTap(model, "embed") as tap:
            model(images)
        return tap.tokens

    state = torch.get_rng_state()
    loaders = [list(zip(*(part.split(16) for part in parts))) for parts in (train, test)]
    found = dense_probe(encode, *loaders, 11, max_iterations=40, **QUIET)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(0.11 < score < 0.5 for score in found.values())
    wrong = [(images, masks.flip(0)[torch.randperm(len(masks))].flip(1)) for images, masks in loaders[0]]
    assert dense_probe(encode, wrong, loaders[1], 11, max_iterations=40, **QUIET)["upright"] < 0.07


IMAGES, MASKS = blocks()
LOADER = [(IMAGES, MASKS)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode": None}, "encode must be a module or a function, got NoneType"),
        ({"encode": lambda x: x.flatten(1)}, r"encode\(images\) must be \[B, T, D\], got \[12, 3072\]"),
        (
            {"encode": lambda x: pixels(x)[:, 1:]},
            r"encode\(images\) must be tokens of a grid with the aspect of images",
        ),
        ({"encode": lambda x: pixels(x) * math.nan}, r"encode\(images\) must be finite"),
        ({"train_loader": []}, "train_loader must be of at least one batch, got none"),
        ({"loader": []}, "loader must be of at least one batch, got none"),
        ({"train_loader": [IMAGES]}, r"train_loader must be a loader of \(images, masks\), got Tensor"),
        ({"train_loader": [(IMAGES, MASKS[:, 1:])]}, r"masks of train_loader must be \[B, H, W\] = \[12, 24, 32\]"),
        ({"loader": [(IMAGES, MASKS.float())]}, "masks of loader must be a tensor of whole numbers"),
        ({"loader": [(IMAGES, MASKS + 2)]}, r"masks of loader must be in 0 .. 3 \(or 4, ignored\), got 5"),
        (
            {"train_loader": [(IMAGES, MASKS * 0 + 4)]},
            "train_loader must be of masks with at least one pixel that is not",
        ),
        ({"loader": [(IMAGES, MASKS * 0 + 4)]}, "loader must be of masks with at least one pixel that is not ignored"),
        (
            {"encode": lambda x: F.avg_pool2d(x, 5)},
            r"train_loader must be of masks of whole tokens, 4 x 6, got \[24, 32\]",
        ),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"ignore_index": 0.5}, "ignore_index must be a whole number or None"),
        ({"weight_decay": -1}, "weight_decay must be finite and at least 0"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_refuses(changes, message):
    arguments = {"encode": pixels, "train_loader": LOADER, "loader": LOADER, "num_classes": 4, **QUIET}
    with pytest.raises((TypeError, ValueError), match=f"^dense_probe: {message}"):
        dense_probe(**{**arguments, **changes})
