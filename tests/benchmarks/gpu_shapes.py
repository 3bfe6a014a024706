"""The two shapes in which ``pair_lse`` has to be fast, and in each the versions that are compared.

That of the SER loss learns the features, that of the search for a partition (IP-IRM) the weights of the columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg import pair_lse
from tests.benchmarks import flex
from tests.benchmarks.floor import bare_products
from tests.benchmarks.measure import Settings, compiled

Version = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    title: str
    unit: str
    sizes: tuple[int, ...]
    versions: dict[str, Version | None]  # None: not installed
    inputs: Callable[[int, torch.dtype], tuple[Tensor, Tensor]]  # of a size
    learns: str  # as the table of the automatic choice calls it
    width: int
    flops: Callable[[int], float]  # of the products that a version which keeps no matrix has to form
    floor: Callable[[Tensor, Tensor], None]

    @property
    def small(self) -> int:
        """The size at which versions are checked to agree."""
        return 64 if self.unit == "rows" else 4  # tokens divide by 16, as at full size: one kernel serves both


def versions(dense: Version, streamed: Callable[[str], Version], by_flex: Version, settings: Settings):
    return {
        "dense eager": dense,
        "dense, torch.compile": compiled(dense, settings),
        "FlexAttention": by_flex,
        "pair_lse, chunked": streamed("chunked"),
        "pair_lse, triton": streamed("triton"),
    }


def ser(settings: Settings) -> Shape:
    """Tokens of one view against those of both, of other images."""
    tokens, width = (8, 16) if settings.quick else (196, 256)
    scale = 1 / 0.3

    def inputs(images: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        x, y = (torch.randn(n * images * tokens, width, device=settings.device) for n in (1, 2))
        return F.normalize(x, dim=1).to(dtype).requires_grad_(), F.normalize(y, dim=1).to(dtype).requires_grad_()

    def dense(x: Tensor, y: Tensor) -> Tensor:
        image = torch.arange(len(x), device=x.device) // tokens
        logits = (x @ y.T * scale).masked_fill((image[:, None] == image).repeat(1, 2), -torch.inf)
        return logits.logsumexp(1)

    def streamed(backend: str) -> Version:
        def version(x: Tensor, y: Tensor) -> Tensor:
            image = torch.arange(len(x), device=x.device) // tokens
            groups = {"row_group": image, "col_group": image.repeat(2)}
            return pair_lse(x, y, scale, relation="ne", **groups, backend=backend)[0][0]

        return version

    return Shape(
        title=f"SER shape, {tokens} tokens an image, D = {width}, forward + backward",
        unit="images",
        sizes=(2,) if settings.quick else (64, 512),
        versions=versions(dense, streamed, lambda x, y: flex.lse_of_other_images(x, y, tokens, scale), settings),
        inputs=inputs,
        learns="features",
        width=width,
        flops=lambda images: 4 * 2 * (images * tokens) * (2 * images * tokens) * width,
        floor=bare_products,
    )


def partition(settings: Settings) -> Shape:
    """All rows against all of other samples, the columns weighted by soft groups."""
    width, groups, scale = 8 if settings.quick else 128, 2, 1 / 0.5

    def inputs(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        x = F.normalize(torch.randn(rows, width, device=settings.device), dim=1).to(dtype)
        weights = torch.randn(rows // 2, groups, device=settings.device).softmax(1)
        return x, weights.T.repeat_interleave(2, 1).contiguous().requires_grad_()

    def dense(x: Tensor, weights: Tensor) -> Tensor:
        sample = torch.arange(len(x), device=x.device) // 2
        mass = (x @ x.T * scale).exp().masked_fill(sample[:, None] == sample, 0)
        return (weights @ mass.to(weights.dtype).T).log()

    def streamed(backend: str) -> Version:
        def version(x: Tensor, weights: Tensor) -> Tensor:
            ids = torch.arange(len(x), device=x.device) // 2
            return pair_lse(x, x, scale, row_id=ids, col_id=ids, col_weight=weights, backend=backend)[0]

        return version

    def floor(x: Tensor, weights: Tensor) -> None:
        """Forward pass and gradient form the similarities of rows with rows."""
        for block in x.split(8192):
            x @ block.T
            x @ block.T

    return Shape(
        title=f"IP-IRM shape, D = {width}, K = {groups}, forward + backward to the weights",
        unit="rows",
        sizes=(64,) if settings.quick else (100_000,),
        versions=versions(dense, streamed, lambda x, w: flex.lse_with_weights(x, w, scale), settings),
        inputs=inputs,
        learns="weights",
        width=width,
        flops=lambda rows: 2 * 2 * rows * rows * width,
        floor=floor,
    )
