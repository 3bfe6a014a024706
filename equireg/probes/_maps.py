"""Token maps of images, and the ways in which an image and what lies on it are moved."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from equireg._checks import Arguments

# Of [..., H, W]: the torch.rot90 direction, counter-clockwise.
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "90": lambda x: x.rot90(1, (-2, -1)),
    "180": lambda x: x.rot90(2, (-2, -1)),
    "flip": lambda x: x.flip(-1),
}


def token_map(probe: str, encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The tokens of images as a map [B, D, h, w], in fp32; errors name the probe."""
    check = Arguments(probe)
    check.sizes["B"] = len(images)
    tokens = check.floats("encode(images)", encode(images)).detach().float()
    if tokens.dim() == 4:
        check.features("encode(images)", tokens, "B D h w")
        return tokens
    check.features("encode(images)", tokens, "B T D")
    height, width = images.shape[2:]
    h = round(math.sqrt(tokens.shape[1] * height / width))
    if h < 1 or tokens.shape[1] % h or h * width != tokens.shape[1] // h * height:
        rule = f"tokens of a grid with the aspect of images of {height} x {width}, without class or register tokens"
        check.fail("encode(images)", rule, list(tokens.shape))
    placed: Tensor = tokens.transpose(1, 2).unflatten(2, (h, -1))
    return placed
