"""Two views of a batch of images, with a known transformation between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg.grid import Grid, GridTransform
from equireg.ser.photometric import BatchPolicy, Photometric, mocov3_photometric

__all__ = ["EquivariantViews", "split_batch"]


class EquivariantViews:
    r"""Two views of each image by random elements of D4 × scale, each with its own photometric changes.

    The policy :math:`\mathcal{T}_\text{eq}` of soft equivariance regularization (Section 3.2) keeps the photometric
    part of a self-supervised method's augmentation and replaces its random crop by flips, quarter turns and anisotropic
    scaling, drawn by ``GridTransform.random``. Each view has one size for the batch.

    Args:
        image_size: side of the images in pixels, or (height, width); multiples of ``patch_size``.
        patch_size: side of the model's patches in pixels.
        photometric: a random change of the colours of one image [C, H, W] that moves no pixels, such as a
            ``torchvision.transforms.v2`` pipeline; or a pair of them, one for each view. None takes
            ``mocov3_photometric(image_size)``, which changes the whole batch at once, each image by parameters of its
            own; any other is called once for each image. ``torch.nn.Identity()`` changes nothing.
        scale: lowest and highest factor of the area.
        ratio: lowest and highest factor of width over height, of the scaling and of the crop's box.
        quarter_turns, flips: whether views are turned and flipped: False for images with an up and down, or a left and
            right, that count. Without turns, flips are from left to right alone (the paper's Table 9).
        crop: lowest and highest area of a random box of the image, of which both views are then made; None takes the
            whole image. The released code crops first.
        complementary: give the second view the flip and the half turn that the first one has not, so that no pair of
            views shares its element, as the released code does; of flips and turns those that there are, one at least.

    Raises:
        TypeError, ValueError: sizes that are not whole patches, ranges out of order, a policy that is not callable.

    Example:
        >>> views = EquivariantViews(32, 4, photometric=torch.nn.Identity())
        >>> images = torch.rand(8, 3, 32, 32)
        >>> x1, x2, g1, g2 = views(images, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(x1, g1.on_images(images, 4)), len(g2)
        (True, 8)
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        *,
        photometric: Photometric | Sequence[Photometric] | None = None,
        scale: tuple[float, float] = (0.7, 1.3),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        quarter_turns: bool = True,
        flips: bool = True,
        crop: tuple[float, float] | None = None,
        complementary: bool = False,
    ):
        check = Arguments("EquivariantViews")
        check.count("patch_size", patch_size)
        self.image_size = check.sides("image_size", image_size, patch_size)
        if photometric is None:
            photometric = mocov3_photometric(image_size)
        policies = (photometric, photometric) if callable(photometric) else photometric
        if not isinstance(policies, (tuple, list)) or len(policies) != 2 or not all(map(callable, policies)):
            check.fail("photometric", "a callable or a pair of them", photometric)
        if crop is not None:
            if not isinstance(crop, (tuple, list)) or len(crop) != 2:
                check.fail("crop", "None or two areas", crop)
            for limit in crop:
                check.share("crop", limit)
            if not 0 < crop[0] <= crop[1]:
                check.fail("crop", "two areas above 0 in rising order", crop)
        check.option("complementary", complementary, (True, False))
        if complementary and not quarter_turns and not flips:
            check.fail("complementary", "False without quarter turns and flips", True)
        self.patch_size, self.photometric, self.scale, self.ratio = patch_size, tuple(policies), scale, ratio
        self.quarter_turns, self.flips, self.crop, self.complementary = quarter_turns, flips, crop, complementary
        self._random(0, torch.Generator())  # refuses bad ranges

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches in an image."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, GridTransform, GridTransform]:
        """Views ``x1``, ``x2`` [B, C, H, W], each with its own size, and the elements ``g1``, ``g2`` that made them.

        The views are floating point, on the device of the images.

        Args:
            images: [B, C, height, width] of ``image_size``, floating point in 0 .. 1, or uint8 in 0 .. 255.
            generator: source of all random numbers, on CPU; the global one does not change. None draws from the global
                one.

        Raises:
            TypeError, ValueError: images that are neither floating point nor uint8, not of ``image_size``, or not in 0
                .. 1; overshoots of up to half a range, as by resizing, are clamped. Ranges are checked on CPU.
        """
        check = Arguments("EquivariantViews")
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            images = images / 255
        check.features("images", images, "B C H W")
        if tuple(images.shape[2:]) != self.image_size:
            check.fail("images", f"[B, C, {self.image_size[0]}, {self.image_size[1]}]", list(images.shape))
        check.pixels("images", images, "in 0 .. 1: normalise the views, not what they are made of")
        g1, g2 = (self._random(len(images), generator) for _ in range(2))
        if self.complementary:  # the parity of the turns is g2's own; the size of the view may depend on it
            turns = g2.quarter_turns % 2 + 2 * (1 - g1.quarter_turns // 2) * self.quarter_turns
            g2 = GridTransform(turns, ~g1.flip & self.flips, g2.source, g2.target)
        if self.crop is not None and len(images):
            images = _cropped(images, self.crop, self.ratio, generator)
        x1, x2 = (g.on_images(images, self.patch_size) for g in (g1, g2))
        with _Seeded(generator):
            x1, x2 = (_each(policy, x) for policy, x in zip(self.photometric, (x1, x2)))
        return x1, x2, g1, g2

    def _random(self, count: int, generator: torch.Generator | None) -> GridTransform:
        return GridTransform.random(
            count,
            self.grid,
            scale=self.scale,
            ratio=self.ratio,
            quarter_turns=self.quarter_turns,
            flips=self.flips,
            generator=generator,
        )


def split_batch(batch: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Split a batch in two: ``b1`` for the usual views, and the share ``ratio``, ``b2``, for equivariant ones.

    ``b2`` has ``round(ratio · B)`` samples, and at least two if the ratio is above 0, because one image alone has no
    negatives. It is the end of the batch, so shuffle first, as loaders do.

    Args:
        batch: [B, ...]
        ratio: from 0 to 1; the paper takes 0.01 of 2,048.

    Raises:
        TypeError, ValueError: not a tensor, a ratio outside of 0 .. 1, a batch too small to split so.

    Example:
        >>> b1, b2 = split_batch(torch.rand(256, 3, 32, 32), 0.25)
        >>> len(b1), len(b2)
        (192, 64)
    """
    check = Arguments("split_batch")
    check.tensor("batch", batch)
    check.number("ratio", ratio)
    if not 0 <= ratio <= 1:
        check.fail("ratio", "from 0 to 1", ratio)
    least = 2 if ratio > 0 else 0
    if batch.dim() == 0 or len(batch) < least:
        check.fail("batch", f"of at least {max(least, 1)} samples", list(batch.shape))
    size = max(least, round(ratio * len(batch)))
    return batch[: len(batch) - size], batch[len(batch) - size :]


def _cropped(
    images: Tensor, area: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator | None
) -> Tensor:
    """A box of each image, of a random area, aspect ratio and place, enlarged to the size of the image (bilinear)."""
    draw = torch.rand(4, len(images), generator=generator, device=None if generator is None else generator.device)
    size = area[0] + draw[0] * (area[1] - area[0])
    aspect = (math.log(ratio[0]) + draw[1] * (math.log(ratio[1]) - math.log(ratio[0]))).exp()
    aspect = torch.minimum(torch.maximum(aspect, size), 1 / size)  # so that the box fits into the image
    width, height = (size * aspect).sqrt(), (size / aspect).sqrt()
    # affine_grid's coordinates are -1 .. 1 over the image: a box of width w is centred within 1 - w of the middle.
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * draw[2] - 1) * (1 - width), (2 * draw[3] - 1) * (1 - height)
    # In half precision coordinates are too coarse, and PyTorch's grid_sample on a CPU is wrong.
    exact = torch.promote_types(images.dtype, torch.float32)
    grid = F.affine_grid(theta.to(images.device, exact), list(images.shape), align_corners=False)
    return F.grid_sample(images.to(exact), grid, padding_mode="border", align_corners=False).to(images.dtype)


class _Seeded:
    """Seeds the global random numbers from ``generator`` for a while, and restores them afterwards."""

    def __init__(self, generator: torch.Generator | None):
        self.generator = generator

    def __enter__(self) -> None:
        if self.generator is not None:
            seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
            self.before = torch.get_rng_state()
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too

    def __exit__(self, *_: object) -> None:
        if self.generator is not None:
            torch.set_rng_state(self.before)


def _each(policy: Photometric, images: Tensor) -> Tensor:
    if isinstance(policy, torch.nn.Identity) or not len(images):
        return images
    if isinstance(policy, BatchPolicy):
        return policy(images)
    # torchvision draws once a call, so pass one image at a time; clamp, because resizing overshoots 0 .. 1.
    return torch.stack([policy(image) for image in images.clamp(0, 1)])
