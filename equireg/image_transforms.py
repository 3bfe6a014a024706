"""Motion, colour changes and blur of a batch of images, with parameters for each image.

They do what torchvision's functional transforms do to one image, without a loop over images. They compute in float32
(float64 for float64), and return an image with identity parameters bit for bit, ``projected`` to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2**19  # numbers: 2 MB in float32


def in_blocks(change: Callable[..., Tensor], images: Tensor, *values: Tensor) -> Tensor:
    """``change(images, *values)``, where each value holds a row for each image.

    On a CPU one block after the other, so that intermediate results stay in the cache: twice as fast.
    """
    size = max(1, _BLOCK // max(images[:1].numel(), 1)) if images.device.type == "cpu" else len(images)
    if len(images) <= size:
        return change(images, *values) if len(images) else images
    return torch.cat([change(*block) for block in zip(images.split(size), *(value.split(size) for value in values))])


def rigid_motion(images: Tensor, angle: Tensor, dx: Tensor, dy: Tensor, *, padding: str) -> Tensor:
    """Turn about the centre, then move: x′ = R(angle) x + (dx, dy), an element of SE(2), by bilinear sampling.

    Args:
        images: [N, C, H, W]
        angle: degrees, counter-clockwise as seen, [N]
        dx, dy: pixels to the right and downwards, [N]
        padding: what lies outside of the frame, as ``grid_sample`` calls it: "zeros", "border" or "reflection".
    """
    (height, width), x = images.shape[2:], _wide(images)
    radians = angle.to(x.dtype) * (math.pi / 180)
    cos, sin = radians.cos().view(-1, 1, 1), radians.sin().view(-1, 1, 1)
    # Where each pixel of the result comes from, in pixels from the centre: R⁻¹ (x′ - displacement).
    right = torch.arange(width, device=x.device, dtype=x.dtype) + (1 - width) / 2 - dx.to(x.dtype).view(-1, 1, 1)
    down = torch.arange(height, device=x.device, dtype=x.dtype).view(-1, 1) + (1 - height) / 2
    down = down - dy.to(x.dtype).view(-1, 1, 1)
    source = torch.stack(((cos * right - sin * down) * (2 / width), (sin * right + cos * down) * (2 / height)), -1)
    with _without_autocast(x):
        moved = F.grid_sample(x, source, mode="bilinear", padding_mode=padding, align_corners=False)
    return _unless((angle == 0) & (dx == 0) & (dy == 0), images, moved)


def projected(images: Tensor, matrices: Tensor, *, padding: str, size: tuple[int, int] | None = None) -> Tensor:
    """Images that show at each place p what the given images show at M p, by bilinear sampling.

    Args:
        images: [N, C, H, W]
        matrices: the homographies M, [N, 3, 3], of places (x, y, 1) in pixels from the images' upper left corner; the
            middle of the first pixel is at (0.5, 0.5)
        padding: what lies outside of the frame, as for ``rigid_motion``
        size: height and width of the result; None keeps the images'
    """
    (height, width), x = size or images.shape[2:], _wide(images)
    down, right = (torch.arange(side, device=x.device, dtype=x.dtype) + 0.5 for side in (height, width))
    places = F.pad(torch.stack(torch.meshgrid(right, down, indexing="xy"), -1), (0, 1), value=1)
    with _without_autocast(x):
        seen = (places.flatten(0, 1) @ matrices.to(x).transpose(1, 2)).unflatten(1, (height, width))
        scale = torch.tensor([2 / images.shape[3], 2 / images.shape[2]], device=x.device, dtype=x.dtype)
        grid = seen[..., :2] / seen[..., 2:] * scale - 1
        return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False).to(images.dtype)


def jitter_colors(
    images: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    hue: Tensor,
    order: Tensor | None = None,
    *,
    hue_at: int = 3,
) -> Tensor:
    """Brightness, contrast, saturation and hue, as torchvision's ``adjust_*`` define them, in this order or another.

    Args:
        images: [N, 3, H, W] in 0 .. 1
        brightness, contrast, saturation: factors from 0, [N]; 1 changes nothing
        hue: shift of the hue as a share of its circle, -0.5 .. 0.5, [N]; 0 changes nothing
        order: of the first three, as 0, 1 and 2, for each image, [N, 3]; None keeps them as they are
        hue_at: how many of these three come before the hue, 0 .. 3
    """
    x = _wide(images).clamp(0, 1)
    factors = torch.stack((brightness, contrast, saturation), 1)
    order = torch.arange(3, device=factors.device).expand_as(factors) if order is None else order
    steps = list(zip(order.unbind(1), factors.gather(1, order).unbind(1)))
    for place in range(4):
        if place == hue_at:
            x = _unless(hue == 0, x, _shift_hue(x, hue.to(x.dtype)))
        if place < 3:
            (kind, factor), gray = steps[place], gray_of(x)
            # Towards black, towards the image's mean gray, or towards each pixel's gray.
            mean = gray.mean((1, 2, 3)) * (kind == 1)
            other = mean.view(-1, 1, 1, 1) + gray * (kind == 2).view(-1, 1, 1, 1)
            x = torch.lerp(other, x, factor.to(x.dtype).view(-1, 1, 1, 1)).clamp(0, 1)
    return _unless((brightness == 1) & (contrast == 1) & (saturation == 1) & (hue == 0), images, x)


def gray_of(x: Tensor) -> Tensor:
    """Luminance of [N, 3, H, W], as one channel, by torchvision's weights."""
    gray: Tensor = 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]
    return gray


def gaussian_blur(images: Tensor, sigma: Tensor, *, radius: int) -> Tensor:
    """Gaussian blur with mirrored edges, along one side and then along the other.

    Args:
        images: [N, C, H, W]
        sigma: standard deviation in pixels from 0, [N]; 0 changes nothing
        radius: where the kernel is cut, in pixels; on a shorter side, as far as mirroring goes.
    """
    (count, channels), x = images.shape[:2], _wide(images)
    down, across = (min(radius, side - 1) for side in x.shape[2:])
    maps = F.pad(x, (across, across, down, down), mode="reflect").flatten(0, 1)[None]
    with _without_autocast(x):  # each map is a channel, with a kernel of its own
        for radius, side in ((down, 2), (across, 3)):
            kernel = _gaussian(radius, sigma.to(x.dtype)).repeat_interleave(channels, 0)
            maps = F.conv2d(maps, kernel[:, None, None].transpose(side, 3), groups=count * channels)
    return _unless(sigma == 0, images, maps.view_as(images))


def _wide(images: Tensor) -> Tensor:
    return images if images.dtype == torch.float64 else images.float()


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # meta tensors know none


def _unless(still: Tensor, images: Tensor, changed: Tensor) -> Tensor:
    """``changed`` in the images' dtype, and the image itself where ``still``."""
    return torch.where(still.view(-1, 1, 1, 1), images, changed.to(images.dtype))


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Convert to hue, saturation and value, shift the hue, and convert back."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    width = torch.where(chroma == 0, 1, chroma)  # a gray has no hue, and its chroma of 0 hides any
    sector = torch.where(
        value == red,
        (green - blue) / width,
        torch.where(value == green, 2 + (blue - red) / width, 4 + (red - green) / width),
    )
    sector = sector[:, None] + 6 * shift.view(-1, 1, 1, 1)  # hue, of a circle of six
    place = (torch.tensor([5, 3, 1], device=x.device, dtype=x.dtype).view(3, 1, 1) + sector).remainder(6)
    shifted: Tensor = value[:, None] - chroma[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)
    return shifted


def _gaussian(radius: int, sigma: Tensor) -> Tensor:
    """Weights of the places -radius .. radius for each σ, [N, 2·radius + 1]."""
    place = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    # A σ of 0 would be 0/0; one this small is a single 1 in the middle.
    weights = torch.exp(-place.square() / (2 * sigma.square()).clamp(min=1e-12)[:, None])
    return weights / weights.sum(1, keepdim=True)
