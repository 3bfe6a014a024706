"""How steady a classifier is while an image slowly moves, turns, blurs or brightens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg._progress import progress_bar
from equireg.features import check_callable, frozen
from equireg.image_transforms import gaussian_blur, in_blocks, projected

__all__ = ["Stability", "perturbation_stability"]


class Stability(NamedTuple):
    """Shares, 0 .. 1, over all frames of all images."""

    accuracy: float  # of frames whose class is the first, or among the first ``top_k``, of the classifier's
    flip_rate: float  # of pairs of successive frames whose predictions differ


# The largest strength of each, which its sequence reaches; on both sides of the image itself for the first five.
_REACH = {
    "translation": 15 / 224,  # share of the width, to the right
    "rotation": 15.0,  # degrees, counter-clockwise
    "tilt": 0.15,  # how much longer or shorter the right side is than the middle, as a share
    "scale": 0.2,  # logarithm of the factor
    "shear": 0.2,  # sideways, as a share of the distance to the middle row
    "blur": 4 / 224,  # σ, as a share of the width
    "brightness": 0.5,  # added to the factor of 1
}
_TWO_SIDED = ("translation", "rotation", "tilt", "scale", "shear")


@torch.no_grad()
def perturbation_stability(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    perturbations: Sequence[str] = tuple(_REACH),
    *,
    frames: int = 31,
    top_k: int = 1,
    progress: bool = True,
) -> dict[str, Stability]:
    r"""Accuracy and flip rate of a classifier over sequences of growing perturbations of each image.

    The geometric half of ImageNet-P, with its blur and brightness (Hendrycks and Dietterich, 2019), made in memory at
    any size. The flip rate is that of successive frames,

    .. math:: \text{FR} = \frac{1}{N (n - 1)} \sum_{i=1}^N \sum_{j=2}^n \mathbb{1}[f(x_i^{(j)}) \neq f(x_i^{(j-1)})]

    A classifier that is always wrong in the same way has a flip rate of 0, so read both. Over n frames the strength
    changes in equal steps: "translation" to the side, by -15 to 15 pixels of 224; "rotation" about the centre, -15° to
    15°; "tilt" about the vertical axis, until one side is 15% longer; "scale", 1/1.22 to 1.22; "shear", -0.2 to 0.2;
    "blur", σ from 0 to 4 pixels of 224; "brightness", a factor of 1 to 1.5. What lies outside of the frame is mirrored.

    Args:
        model: images to logits [B, C]; a module runs in eval mode.
        loader: batches (images, labels): images [B, C, H, W] in 0 .. 1, which the model normalises itself; labels are
            whole numbers [B].
        perturbations: which sequences.
        frames: length of a sequence, n, at least 2; ImageNet-P has 31.
        top_k: the accuracy counts a frame whose class is among so many with the largest logits, from 1 to C; the flip
            rate is always that of the first.
        progress: whether to show a bar, where tqdm is installed.

    Returns:
        ``(accuracy, flip_rate)`` for each perturbation.

    Raises:
        TypeError, ValueError: an unknown perturbation, batches that are not (images, labels), on CPU images that are
            not in 0 .. 1, logits that are not [B, C], or of fewer than
            ``top_k`` classes.

    Example:
        >>> def bright(images):  # class 1: brighter than a half
        ...     mean = images.mean((1, 2, 3))
        ...     return torch.stack([0.5 - mean, mean - 0.5], 1)
        >>> images = torch.full((4, 3, 8, 8), 0.4)  # crosses the half at a factor of 1.25
        >>> loader = [(images, torch.zeros(4, dtype=torch.int64))]
        >>> found = perturbation_stability(bright, loader, ["brightness", "rotation"], frames=11, progress=False)
        >>> found["brightness"].flip_rate, found["rotation"]
        (0.1, Stability(accuracy=1.0, flip_rate=0.0))
    """
    check = Arguments("perturbation_stability")
    check_callable(check, "model", model)
    if not isinstance(perturbations, (tuple, list)) or not perturbations:
        check.fail("perturbations", "names in a list", repr(perturbations))
    for name in perturbations:
        check.option("perturbations", name, tuple(_REACH))
    check.count("frames", frames, least=2)
    check.count("top_k", top_k)
    right, flips, count = dict.fromkeys(perturbations, 0), dict.fromkeys(perturbations, 0), 0
    with frozen(model) as device:
        for batch in progress_bar(loader, "perturbed images", shown=progress):
            images, labels = _checked(batch)
            images, labels, count = images.to(device), labels.to(device), count + len(images)
            for name in right:
                answers = torch.stack([_classes(model, frame, top_k) for frame in _sequence(images, name, frames)])
                right[name] += int((answers == labels[:, None]).sum())
                flips[name] += int((answers[1:, :, 0] != answers[:-1, :, 0]).sum())
    if not count:
        check.fail("loader", "of at least one image", "none")
    return {name: Stability(right[name] / count / frames, flips[name] / count / (frames - 1)) for name in right}


def _sequence(images: Tensor, name: str, frames: int) -> Iterable[Tensor]:
    """The images under each strength in turn."""
    for step in range(frames):
        share = step / (frames - 1)
        strength = _REACH[name] * (2 * share - 1 if name in _TWO_SIDED else share)
        if name == "brightness":
            yield (images * (1 + strength)).clamp(0, 1)
        elif name == "blur":
            radius = math.ceil(4 * _REACH[name] * images.shape[3])
            sigma = torch.full((len(images),), strength * images.shape[3], device=images.device)
            yield in_blocks(lambda x, sigma, radius=radius: gaussian_blur(x, sigma, radius=radius), images, sigma)
        else:
            matrices = _matrix(name, strength, images.shape[2], images.shape[3])
            moved = matrices.expand(len(images), -1, -1)
            yield in_blocks(lambda x, m: projected(x, m, padding="reflection"), images, moved)


def _matrix(name: str, strength: float, height: int, width: int) -> Tensor:
    """Where each place of the frame comes from, in pixels, as a homography [3, 3]."""
    matrix = torch.eye(3, dtype=torch.float64)
    if name == "translation":
        matrix[0, 2] = -strength * width
    elif name == "rotation":
        cos, sin = math.cos(math.radians(strength)), math.sin(math.radians(strength))
        matrix[:2, :2] = torch.tensor([[cos, -sin], [sin, cos]])
    elif name == "tilt":
        matrix[2, 0] = strength / (width / 2)
    elif name == "scale":
        matrix[:2, :2] *= math.exp(-strength)
    else:
        matrix[0, 1] = -strength
    centre = torch.eye(3, dtype=torch.float64)
    centre[0, 2], centre[1, 2] = width / 2, height / 2
    return centre @ matrix @ centre.inverse()


def _classes(model: Callable[[Tensor], Tensor], images: Tensor, top_k: int) -> Tensor:
    """[B, top_k], the likeliest first."""
    check = Arguments("perturbation_stability")
    check.sizes["B"] = len(images)
    logits = check.features("model(images)", model(images), "B C")
    if logits.shape[1] < top_k:
        check.fail("model(images)", f"logits of at least top_k = {top_k} classes", list(logits.shape))
    return logits.topk(top_k).indices


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch of the loader."""
    check = Arguments("perturbation_stability")
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        check.fail_type("loader", "a loader of (images, labels)", type(batch).__name__)
    images = check.features("images of loader", batch[0], "B C H W")
    labels = check.integers("labels of loader", batch[1], "B")
    check.pixels("images of loader", images, "in 0 .. 1: the model normalises them")
    return images, labels
