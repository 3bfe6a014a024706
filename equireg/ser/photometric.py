"""Photometric changes of a whole batch at once, each image by parameters of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.image_transforms import gaussian_blur, gray_of, in_blocks, jitter_colors

__all__ = ["mocov3_photometric"]

Photometric = Callable[[Tensor], Tensor]


class BatchPolicy:
    """Jitter of four fifths of the images in a random order, a fifth gray, and shares blurred and solarized.

    What torchvision's ``ColorJitter(0.4, 0.4, 0.2, 0.1)``, ``RandomGrayscale``, ``GaussianBlur`` and
    ``RandomSolarize(0.5)`` do to one image. Which image undergoes what is drawn on the CPU, so no device waits.
    """

    def __init__(self, kernel_size: int, blur: float, solarize: float):
        self.kernel_size, self.blur, self.solarize = kernel_size, blur, solarize

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], or one [C, H, W], floating point in 0 .. 1, with 3 channels or 1.

        Raises:
            TypeError, ValueError: of another dtype or shape.
        """
        check = Arguments("mocov3_photometric")
        batch = images[None] if isinstance(images, Tensor) and images.dim() == 3 else images
        check.features("images", batch, "B C H W")
        channels = batch.shape[1]
        if channels not in (1, 3):
            check.fail("images", "of 3 channels, or of 1", list(images.shape))
        changed = self.apply(batch.expand(-1, 3, -1, -1), self.draw(len(batch)))[:, :channels]
        return changed[0] if batch is not images else changed

    def draw(self, count: int) -> PhotometricParameters:
        """The changes of so many images, from the global generator of the CPU."""
        factors = 1 + torch.tensor([0.4, 0.4, 0.2]) * (2 * torch.rand(count, 3) - 1)
        hue, sigma = 0.1 * (2 * torch.rand(count) - 1), 0.1 + 1.9 * torch.rand(count)
        order, hue_at = torch.rand(count, 3).argsort(1), torch.randint(4, (count,))
        jitter, gray, blur, solarize = (torch.rand(count) < p for p in (0.8, 0.2, self.blur, self.solarize))
        return PhotometricParameters(jitter, factors, hue, order, hue_at, gray, blur, sigma, solarize)

    def apply(self, images: Tensor, t: PhotometricParameters) -> Tensor:
        """Change images [B, 3, H, W] by parameters that were drawn."""
        images = images.clamp(0, 1)  # a copy
        for place in range(4):
            change = partial(jitter_colors, hue_at=place)
            _change(images, t.jitter & (t.hue_at == place), change, *t.factors.unbind(1), t.hue, t.order)
        _change(images, t.gray, lambda x: gray_of(x).expand_as(x))
        _change(images, t.blur, partial(gaussian_blur, radius=self.kernel_size // 2), t.sigma)
        _change(images, t.solarize, lambda x: torch.where(x >= 0.5, 1 - x, x))
        return images


class PhotometricParameters(NamedTuple):
    """What happens to each of B images, on the CPU."""

    jitter: Tensor  # whether, [B]
    factors: Tensor  # of brightness, contrast and saturation, [B, 3]
    hue: Tensor  # shift, as a share of the circle, [B]
    order: Tensor  # of the three, [B, 3]
    hue_at: Tensor  # how many of the three come before the hue, [B]
    gray: Tensor  # whether, [B]
    blur: Tensor  # whether, [B]
    sigma: Tensor  # of the blur, in pixels, [B]
    solarize: Tensor  # whether, [B]


def mocov3_photometric(image_size: int | tuple[int, int]) -> tuple[Photometric, Photometric]:
    """The two policies of MoCo-v3 without their crop and flip: jitter, grayscale, blur, and solarize in the second.

    Each image of a batch has parameters of its own (Chen, Xie and He, 2021).

    Args:
        image_size: side of the images; the blur's kernel is a tenth of it, which is MoCo-v3's 23 pixels at 224.

    Returns:
        One policy for each view; each takes images [B, C, H, W], or one image [C, H, W], in 0 .. 1, with 3 channels or
        1, and draws from the global generator.

    Raises:
        TypeError, ValueError: on calling, images that are not floating point, or of another shape.

    Example:
        >>> first, second = mocov3_photometric(32)
        >>> first(torch.rand(8, 3, 32, 32)).shape, second(torch.rand(3, 32, 32)).shape
        (torch.Size([8, 3, 32, 32]), torch.Size([3, 32, 32]))
    """
    side = min(Arguments("mocov3_photometric").sides("image_size", image_size))
    kernel_size = max(3, side // 10 | 1)  # an odd number
    return BatchPolicy(kernel_size, blur=1.0, solarize=0.0), BatchPolicy(kernel_size, blur=0.1, solarize=0.2)


def _change(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *values: Tensor) -> None:
    """Change the chosen images in place."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        places = rows.to(images.device)
        own = (value[rows].to(images.device) for value in values)
        images.index_copy_(0, places, in_blocks(change, images.index_select(0, places), *own))
