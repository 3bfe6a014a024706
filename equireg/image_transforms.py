"""Motion, colour changes and blur of a batch of images, with parameters for each image.

They do what torchvision's functional transforms do to one image, without a loop over images. They compute in float32
(float64 for float64), and return an image with identity parameters bit for bit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
    with torch.autocast(x.device.type, enabled=False):
        moved = F.grid_sample(x, source, mode="bilinear", padding_mode=padding, align_corners=False)
    return _unless((angle == 0) & (dx == 0) & (dy == 0), images, moved)


def jitter_colors(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order, as torchvision's ``adjust_*`` define them.

    Args:
        images: [N, 3, H, W] in 0 .. 1
        brightness, contrast, saturation: factors from 0, [N]; 1 changes nothing
        hue: shift of the hue as a share of its circle, -0.5 .. 0.5, [N]; 0 changes nothing
    """
    x = _wide(images).clamp(0, 1)
    x = _blend(x, torch.zeros_like(x[:1, :1, :1, :1]), brightness)
    x = _blend(x, _gray(x).mean((1, 2, 3), keepdim=True), contrast)
    x = _blend(x, _gray(x), saturation)
    x = _unless(hue == 0, x, _shift_hue(x, hue.to(x.dtype)))
    return _unless((brightness == 1) & (contrast == 1) & (saturation == 1) & (hue == 0), images, x)


def gaussian_blur(images: Tensor, sigma: Tensor, *, radius: int) -> Tensor:
    """Gaussian blur with mirrored edges, by one matrix product for each side and image.

    Args:
        images: [N, C, H, W]
        sigma: standard deviation in pixels from 0, [N]; 0 changes nothing
        radius: where the kernel is cut, in pixels; on a shorter side, as far as mirroring goes.
    """
    x = _wide(images)
    down, across = (_blur_matrix(side, sigma.to(x.dtype), radius).transpose(1, 2) for side in x.shape[2:])
    with torch.autocast(x.device.type, enabled=False):
        sideways = (x.flatten(1, 2) @ across).view_as(x).transpose(2, 3)
        blurred: Tensor = (sideways.flatten(1, 2) @ down).view_as(sideways).transpose(2, 3)
    return _unless(sigma == 0, images, blurred)


def _wide(images: Tensor) -> Tensor:
    return images if images.dtype == torch.float64 else images.float()


def _unless(still: Tensor, images: Tensor, changed: Tensor) -> Tensor:
    """``changed`` in the images' dtype, and the image itself where ``still``."""
    return torch.where(still.view(-1, 1, 1, 1), images, changed.to(images.dtype))


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor.to(x.dtype).view(-1, 1, 1, 1)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _gray(x: Tensor) -> Tensor:
    gray: Tensor = 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]
    return gray


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


def _blur_matrix(side: int, sigma: Tensor, radius: int) -> Tensor:
    """[N, side, side]; row i holds the weights of all places in place i."""
    radius = min(radius, side - 1)
    place = torch.arange(side, device=sigma.device, dtype=sigma.dtype)
    # A σ of 0 would be 0/0; one this small is a single 1 in the middle.
    spread = (2 * sigma.square()).clamp(min=1e-12).view(-1, 1, 1)

    def kernel(offset: Tensor) -> Tensor:
        return torch.exp(-offset.square() / spread) * (offset.abs() <= radius)

    total = kernel(torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)).sum(-1, keepdim=True)
    row, column = place.view(-1, 1), place.view(1, -1)
    before = kernel(row + column) * (column > 0)  # place j mirrored at the first place
    after = kernel(2 * (side - 1) - row - column) * (column < side - 1)
    matrix: Tensor = (kernel(row - column) + before + after) / total
    return matrix
