import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from equireg import Stability, perturbation_stability
from equireg.probes.stability import _sequence

QUIET = {"progress": False}
ALL = ["translation", "rotation", "tilt", "scale", "shear", "blur", "brightness"]


def labelled(count=6, classes=3, side=20):
    return torch.rand(count, 3, side, side), torch.arange(count) % classes


class Probabilities(nn.Module):
    """A classifier of pixels, whose answers do change, and whose mode is to be kept."""

    def __init__(self, side=20, classes=3):
        super().__init__()
        self.linear, self.dropout = nn.Linear(3 * side**2, classes), nn.Dropout(0.9)

    def forward(self, images):
        assert not self.training
        return self.linear(self.dropout(images.flatten(1)) - 0.5)


def test_a_classifier_that_never_changes_its_mind_has_no_flips_and_its_accuracy():
    images, labels = labelled()
    found = perturbation_stability(lambda x: torch.eye(3)[1].expand(len(x), 3), [(images, labels)], frames=4, **QUIET)
    assert list(found) == ALL
    assert set(found.values()) == {Stability(1 / 3, 0.0)}


def test_one_that_changes_it_at_every_frame_flips_always():
    calls = []

    def restless(images):
        calls.append(len(images))
        return torch.eye(2)[len(calls) % 2].expand(len(images), 2)

    images, labels = labelled(classes=2)
    found = perturbation_stability(restless, [(images, labels)], ["shear"], frames=8, **QUIET)
    assert found == {"shear": Stability(0.5, 1.0)}
    assert calls == [6] * 8  # a batch at a time


def test_equals_a_loop_over_images_and_frames():
    model, (images, labels) = Probabilities().train(), labelled(7)
    loader = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    state = torch.get_rng_state()
    found = perturbation_stability(model, loader, frames=9, **QUIET)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    for name in ALL:
        right = flips = 0
        for image, label in zip(images, labels.tolist()):
            answers = [int(model(frame).argmax()) for frame in _sequence(image[None], name, 9)]
            right += sum(answer == label for answer in answers)
            flips += sum(a != b for a, b in pairwise(answers))
        assert found[name] == pytest.approx((right / 63, flips / 56))
    assert any(0 < stability.flip_rate < 1 for stability in found.values())


def test_top_k_counts_frames_whose_class_is_among_the_first():
    """Scores in a fixed order, 2 before 0 before 1: at k = 2 two of three classes count, and no answer flips."""
    loader, scores = [labelled()], torch.tensor([0.5, 0.1, 0.9])
    for k, expected in ((1, 1 / 3), (2, 2 / 3), (3, 1.0)):
        found = perturbation_stability(lambda x: scores.expand(len(x), 3), loader, top_k=k, frames=4, **QUIET)
        assert set(found.values()) == {Stability(expected, 0.0)}
    model = Probabilities().eval()
    firsts, both = (perturbation_stability(model, loader, top_k=k, frames=9, **QUIET) for k in (1, 2))
    assert [found.flip_rate for found in both.values()] == [found.flip_rate for found in firsts.values()]
    assert any(found.flip_rate for found in firsts.values())


def test_sequences_are_torchvisions(real_images):
    """Frame by frame on a photograph, away from its border, where torchvision puts black."""
    from PIL import Image

    file = sorted((real_images / "imagenet-samples").glob("*.jpg"))[5]
    image = tv.center_crop(tv.pil_to_tensor(Image.open(file).convert("RGB")), [224, 224])[None] / 255
    linear, size, inside = InterpolationMode.BILINEAR, 224, (..., slice(70, 154), slice(70, 154))
    corners = [[0, 0], [size, 0], [0, size], [size, size]]

    def tilted(s):
        # The place (x, y) from the centre comes from (x, y) / (1 + s x / 112).
        there = [
            [112 + (x - 112) / (1 + s * (x - 112) / 112), 112 + (y - 112) / (1 + s * (x - 112) / 112)]
            for x, y in corners
        ]
        return tv.perspective(image, there, corners, interpolation=linear)

    expected = {
        "translation": lambda t: tv.affine(image, 0.0, [15 * t, 0], 1.0, [0.0, 0.0], linear),
        "rotation": lambda t: tv.rotate(image, 15 * t, linear),
        "tilt": lambda t: tilted(0.15 * t),
        "scale": lambda t: tv.affine(image, 0.0, [0, 0], math.exp(0.2 * t), [0.0, 0.0], linear),
        "shear": lambda t: tv.affine(image, 0.0, [0, 0], 1.0, [-math.degrees(math.atan(0.2 * t)), 0.0], linear),
        "blur": lambda t: tv.gaussian_blur(image, [33, 33], [4 * t]) if t > 0 else image,
        "brightness": lambda t: tv.adjust_brightness(image, 1 + 0.5 * t),
    }
    for name in ALL:
        steps = [i / 4 for i in range(5)] if name in ("blur", "brightness") else [i / 2 - 1 for i in range(5)]
        frames = list(_sequence(image, name, 5))
        for t, frame in zip(steps, frames):
            assert ((frame >= 0) & (frame <= 1 + 1e-6)).all()
            torch.testing.assert_close(frame[inside], expected[name](t)[inside], rtol=0, atol=3e-3, msg=f"{name} {t}")
        still = frames[0 if name in ("blur", "brightness") else 2]
        torch.testing.assert_close(still, image, rtol=0, atol=1e-4)
        assert not any(torch.allclose(a, b, atol=1e-3) for a, b in pairwise(frames))


BATCH = labelled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model must be a module or a function"),
        ({"model": lambda x: x}, r"model\(images\) must be \[B, C\]"),
        ({"model": lambda x: x[:1].flatten(1)}, r"model\(images\) must be \[B, C\] = \[6, C\], got \[1, 1200\]"),
        ({"loader": []}, "loader must be of at least one image, got none"),
        ({"loader": [BATCH[0]]}, r"loader must be a loader of \(images, labels\), got Tensor"),
        ({"loader": [(BATCH[0], BATCH[1][1:])]}, r"labels of loader must be \[B\] = \[6\], got \[5\]"),
        (
            {"loader": [(4 * BATCH[0] - 2, BATCH[1])]},
            "images of loader must be in 0 .. 1: the model normalises them, got -",
        ),
        ({"loader": [(BATCH[0].byte(), BATCH[1])]}, "images of loader must be a tensor of floating point"),
        ({"perturbations": "shear"}, "perturbations must be names in a list, got 'shear'"),
        ({"perturbations": []}, "perturbations must be names in a list"),
        ({"perturbations": ["snow"]}, "perturbations must be one of 'translation', .* got 'snow'"),
        ({"frames": 1}, "frames must be at least 2, got 1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 4}, r"model\(images\) must be logits of at least top_k = 4 classes, got \[6, 3\]"),
    ],
)
def test_refuses(changes, message):
    arguments = {"model": Probabilities(), "loader": [BATCH], **QUIET}
    with pytest.raises((TypeError, ValueError), match=f"^perturbation_stability: {message}"):
        perturbation_stability(**{**arguments, **changes})
