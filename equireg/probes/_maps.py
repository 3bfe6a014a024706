"""Token maps of images, and the ways in which an image and what lies on it are moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from equireg._checks import Arguments
from equireg._progress import progress_bar

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


def image_batches(
    probe: str, name: str, loader: Iterable[Any], what: str, progress: bool
) -> Iterator[tuple[Arguments, Tensor, Any]]:
    """Of each batch (images, ``what``) its checks, which know B, H and W, the images, and the other part as it is."""
    empty = True
    for batch in progress_bar(loader, f"{probe.replace('_', ' ')}, {name}", shown=progress):
        check, empty = Arguments(probe), False
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            check.fail_type(name, f"a loader of (images, {what})", type(batch).__name__)
        yield check, check.features(f"images of {name}", batch[0], "B C H W"), batch[1]
    if empty:
        Arguments(probe).fail(name, "of at least one batch", "none")
