"""The fifteen corruptions of ImageNet-C on images in memory, to be copied beside a script that measures robustness.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019),
in the implementation of imagecorruptions-imaug (``pip install "equireg[report]"``): the published constants, pictures
of frost inside of the package, nothing downloaded at run time. The constants are those of ImageNet-C, for 224 pixels,
and the images are corrupted at their own size. CIFAR-10-C and Tiny ImageNet-C have constants of their own, so on images
of 32 or 64 pixels error rates compare between models here, not with the tables of those benchmarks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NOISE = ("gaussian_noise", "shot_noise", "impulse_noise")
BLUR = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")
WEATHER = ("snow", "frost", "fog", "brightness")
DIGITAL = ("contrast", "elastic_transform", "pixelate", "jpeg_compression")
KINDS = (*NOISE, *BLUR, *WEATHER, *DIGITAL)

SEEDED_BY_ARGUMENT = {"impulse_noise", "glass_blur"}  # every other kind draws from NumPy's global generator


def corrupted(images: np.ndarray | Tensor, kind: str, severity: int, seed: int) -> np.ndarray | Tensor:
    """Corrupt every image with random numbers of its own.

    Args:
        images: uint8 array ``[N, H, W, 3]``, or float tensor ``[N, 3, H, W]`` in [0, 1], which is rounded to 8 bits;
            H and W at least 32 pixels.
        kind: One of ``KINDS``.
        severity: 1 (mild) to 5.
        seed: 0 to 2³² - 1; the same seed and images give the same bits. No global generator is left changed.

    Returns:
        Of the same type, dtype, shape and device.

    Raises:
        ValueError: If an argument is not as above.
        ImportError: If imagecorruptions-imaug cannot be imported.
    """
    if kind not in KINDS:
        raise ValueError(f"corrupted: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"corrupted: severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    if isinstance(images, Tensor):
        check_float_images(images)
        pixels = (images.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        result = torch.from_numpy(corrupted_pixels(pixels, kind, severity, seed)).permute(0, 3, 1, 2)
        return (result.to(images.device, torch.float32) / 255).to(images.dtype).contiguous()
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < 32:
        rule = "a uint8 array [N, H, W, 3] with H and W >= 32, or a float tensor [N, 3, H, W]"
        raise ValueError(f"corrupted: images must be {rule}, got {images.dtype} {list(images.shape)}")
    return corrupted_pixels(images, kind, severity, seed)


def check_float_images(images: Tensor) -> None:
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
        rule = "a float tensor [N, 3, H, W] with H and W >= 32, or a uint8 array [N, H, W, 3]"
        raise ValueError(f"corrupted: images must be {rule}, got {images.dtype} {list(images.shape)}")
    if not bool(((images >= 0) & (images <= 1)).all()):  # a NaN fails it too
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"corrupted: images must be in [0, 1], before any normalization, got {low:.4g} to {high:.4g}")


def corrupted_pixels(pixels: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
    """The same for a checked uint8 array."""
    try:
        from imagecorruptions import corrupt
    except ImportError as error:
        message = f'corrupted: imagecorruptions-imaug cannot be imported ({error}); pip install "equireg[report]"'
        raise ImportError(message) from error
    state = np.random.get_state()  # noqa: NPY002 - the library draws from it
    try:
        np.random.seed(seed)  # noqa: NPY002
        result = np.empty_like(pixels, order="C")
        for row, image in enumerate(pixels):
            own = {"seed": np.random.randint(2**31)} if kind in SEEDED_BY_ARGUMENT else {}  # noqa: NPY002
            result[row] = corrupt(np.ascontiguousarray(image), severity, kind, **own)
        return result
    finally:
        np.random.set_state(state)  # noqa: NPY002
