"""How equivariant a token map is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from equireg._checks import Arguments
from equireg.features import check_callable
from equireg.grid import GridTransform
from equireg.similarity import normalized

__all__ = ["equivariance_score"]


@torch.no_grad()
def equivariance_score(
    encode: Callable[[Tensor], Tensor], images: Tensor, transform: GridTransform, *, shuffled: bool = False
) -> Tensor:
    r"""Equivariance of a token map: 1 if it turns exactly as its image does.

    :math:`\cos(\rho_g(f(x)), f(\rho_g(x)))`, averaged over the places of each map (soft equivariance regularization,
    Appendix A.2). Tokens that are alike everywhere score high without turning, so compare with ``shuffled=True``, the
    level reached without equivariance. Call it with the model in eval mode; no gradient is recorded.

    Args:
        encode: images [B, C, height, width] to tokens [B, T, D], at the source grid and at the target grid.
        images: [B, C, h·p, w·p] for a source grid (h, w) and patches of p pixels.
        transform: the group elements, one for each image.
        shuffled: compare each image with the next one of the batch, turned.

    Returns:
        The score of each image, [B], from -1 to 1, in float32 or float64.

    Raises:
        TypeError, ValueError: images that are not whole patches of the source grid, tokens of other grids; one image
            alone where ``shuffled``.

    Example:
        >>> def patch_means(images):  # an encoder that is exactly equivariant
        ...     return torch.nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        >>> g = GridTransform(torch.arange(4), torch.tensor([True] * 4), (8, 8), (8, 8))
        >>> score = equivariance_score(patch_means, torch.rand(4, 3, 32, 32), g)
        >>> torch.allclose(score, torch.ones(4))
        True
    """
    check = Arguments("equivariance_score")
    check_callable(check, "encode", encode)
    if not isinstance(transform, GridTransform):
        check.fail_type("transform", "a GridTransform", type(transform).__name__)
    check.option("shuffled", shuffled, (True, False))
    check.sizes["B"] = len(transform)
    check.features("images", images, "B C H W")
    if shuffled and len(images) < 2:
        check.fail("images", "at least 2 to compare with others, shuffled", len(images))
    (h, w), (height, width) = transform.source, images.shape[2:]
    if height % h or width % w or height // h != width // w:
        check.fail("images", f"of whole square patches on the grid {transform.source}", list(images.shape))
    check.sizes["T"] = h * w
    moved = transform.on_tokens(check.features("encode(images)", encode(images), "B T D"))
    turned = encode(transform.on_images(images, height // h))
    check.sizes["T"] = moved.shape[1]
    check.features("encode(transformed images)", turned, "B T D")
    if shuffled:
        turned = turned.roll(-1, 0)
    return (normalized(moved) * normalized(turned)).sum(-1).mean(-1)
