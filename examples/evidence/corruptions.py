"""The fifteen corruptions of ImageNet-C on images in memory; this file alone can be copied beside a script.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019),
in the implementation of imagecorruptions-imaug, with the constants for 224 pixels: on smaller images error rates
compare between models here, not with CIFAR-10-C or Tiny ImageNet-C.
"""

import numpy as np
import torch
from imagecorruptions import corrupt, get_corruption_names
from torch import Tensor

KINDS = tuple(get_corruption_names("common"))
SEEDED_BY_ARGUMENT = {"impulse_noise", "glass_blur"}  # every other kind draws from NumPy's global generator


def corrupted(images: Tensor, kind: str, severity: int, seed: int) -> Tensor:
    """Corrupt every image, uint8 [N, 3, H, W] of at least 32 pixels a side, with random numbers of its own.

    The severity is 1 (mild) to 5. The same seed and images give the same bits, and no global generator is changed.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
        rule = "uint8 [N, 3, H, W] with H and W >= 32"
        raise ValueError(f"corrupted: images must be {rule}, got {images.dtype} {list(images.shape)}")
    state = np.random.get_state()  # noqa: NPY002 - the library draws from it
    try:
        np.random.seed(seed)  # noqa: NPY002
        result = torch.empty_like(images)
        for row, image in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
            own = {"seed": np.random.randint(2**31)} if kind in SEEDED_BY_ARGUMENT else {}  # noqa: NPY002
            result[row] = torch.tensor(corrupt(image, severity, kind, **own)).permute(2, 0, 1)
        return result
    finally:
        np.random.set_state(state)  # noqa: NPY002
