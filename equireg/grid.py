"""The group D4 × scale, acting on batches of images and of token maps, with an element for each image.

Flips and quarter turns permute the grid, exactly; scaling resamples it, with one operator for images and tokens (soft
equivariance regularization, Lee et al., ICLR 2026, Section 3).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments

__all__ = ["GridTransform"]

Grid = tuple[int, int]
_INTERPOLATIONS = ("bicubic", "bilinear")


class GridTransform:
    r"""One element of D4 × scale for each image of a batch.

    An image is flipped left to right (where ``flip``), then turned by ``quarter_turns`` counter-clockwise (the
    direction of ``torch.rot90``), then resized to the target grid. Elements compose: ``g2 @ g1`` acts as ``g1`` and
    then ``g2``, exactly if no size changes. Otherwise it resizes once, straight to the last grid, and differs from two
    resizings by what the grid between them loses.

    Args:
        quarter_turns: whole numbers [B], counted modulo 4.
        flip: bool [B].
        source: (h, w), the grid it acts on, in patches.
        target: (H, W), the grid of the result, in patches. After an odd number of turns without scaling, that is (w,
            h).
        interpolation: ``"bicubic"`` or ``"bilinear"``, for images and tokens alike.
        antialias: whether to smooth when shrinking.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, a grid that is not two whole numbers above 0, an unknown
            interpolation.

    Example:
        >>> g = GridTransform(torch.tensor([1]), torch.tensor([False]), (2, 3), (3, 2))
        >>> tokens = torch.arange(6.0).view(1, 6, 1)  # 0 1 2 / 3 4 5
        >>> g.on_tokens(tokens).view(3, 2)
        tensor([[2., 5.],
                [1., 4.],
                [0., 3.]])
        >>> torch.equal((g.inverse() @ g).on_tokens(tokens), tokens)
        True
    """

    def __init__(
        self,
        quarter_turns: Tensor,
        flip: Tensor,
        source: Grid,
        target: Grid,
        *,
        interpolation: str = "bicubic",
        antialias: bool = False,
    ):
        check = Arguments("GridTransform")
        self.quarter_turns = check.integers("quarter_turns", quarter_turns, "B") % 4
        self.flip = check.booleans("flip", flip, "B")
        self.source, self.target = _grid(check, "source", source), _grid(check, "target", target)
        check.option("interpolation", interpolation, _INTERPOLATIONS)
        check.option("antialias", antialias, (True, False))
        self.interpolation, self.antialias = interpolation, antialias

    @classmethod
    def identity(cls, batch_size: int, grid: Grid) -> GridTransform:
        """The element that changes nothing, ``batch_size`` times."""
        Arguments("GridTransform.identity").count("batch_size", batch_size, least=0)
        return cls(torch.zeros(batch_size, dtype=torch.int64), torch.zeros(batch_size, dtype=torch.bool), grid, grid)

    @classmethod
    def random(
        cls,
        batch_size: int,
        grid: Grid,
        *,
        scale: tuple[float, float] = (0.7, 1.3),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        quarter_turns: bool = True,
        flips: bool = True,
        interpolation: str = "bicubic",
        antialias: bool = False,
        generator: torch.Generator | None = None,
    ) -> GridTransform:
        """A random element for each image, with one target grid for the batch.

        The area is scaled by a factor uniform in ``scale``, the aspect ratio by one log-uniform in ``ratio``, and both
        sides are rounded to whole patches. Flips and half turns are drawn for each image. Odd quarter turns are drawn
        for each image if both grids are square; otherwise once for the batch, because they swap the sides.

        Args:
            batch_size: how many elements, B.
            grid: (h, w), the source grid.
            scale: lowest and highest factor of the area, above 0.
            ratio: lowest and highest factor of width over height, above 0.
            quarter_turns: whether to turn, by 90, 180 and 270 degrees; without, flips are from left to right alone.
            flips: whether to flip.
            interpolation: as in the constructor.
            antialias: as in the constructor.
            generator: source of the random numbers.

        Raises:
            ValueError: a range that is not two numbers above 0 in rising order, other options.
        """
        check = Arguments("GridTransform.random")
        check.count("batch_size", batch_size, least=0)
        h, w = _grid(check, "grid", grid)
        for name, limits in (("scale", scale), ("ratio", ratio)):
            check.span(name, limits)
        check.option("quarter_turns", quarter_turns, (True, False))
        check.option("flips", flips, (True, False))
        device = generator.device if generator is not None else None
        draw = torch.rand(2, generator=generator, device=device).tolist()
        area = scale[0] + draw[0] * (scale[1] - scale[0])
        aspect = math.exp(math.log(ratio[0]) + draw[1] * (math.log(ratio[1]) - math.log(ratio[0])))
        sides = max(1, round(h * math.sqrt(area / aspect))), max(1, round(w * math.sqrt(area * aspect)))

        odd, half, flip = torch.randint(2, (3, batch_size), generator=generator, device=device)
        odd, half, flip = odd * quarter_turns, half * quarter_turns, flip * flips
        if batch_size and (h != w or sides[0] != sides[1]):
            odd = odd[:1].expand(batch_size)
            sides = sides[::-1] if bool(odd[0]) else sides
        return cls(odd + 2 * half, flip.bool(), grid, sides, interpolation=interpolation, antialias=antialias)

    def __len__(self) -> int:
        return len(self.quarter_turns)

    def __repr__(self) -> str:
        return (
            f"GridTransform(quarter_turns={self.quarter_turns.tolist()}, flip={self.flip.tolist()}, "
            f"source={self.source}, target={self.target})"
        )

    def to(self, device: torch.device | str) -> GridTransform:
        """The same elements on another device; acting moves them to the device of the images or tokens anyway."""
        return self._like(self.quarter_turns.to(device), self.flip.to(device), self.source, self.target)

    def inverse(self) -> GridTransform:
        """The elements that undo these: turned back, and resized to the source grid."""
        # A flip followed by turns is a reflection, which undoes itself.
        turns = torch.where(self.flip, self.quarter_turns, -self.quarter_turns)
        return self._like(turns, self.flip, self.target, self.source)

    def __matmul__(self, first: GridTransform) -> GridTransform:
        """``g2 @ g1``: the elements that act as ``g1`` and then ``g2``."""
        if not isinstance(first, GridTransform):
            return NotImplemented
        check = Arguments("GridTransform @")
        for name, operand in (("the left operand", self), ("the right operand", first)):
            check.placed(name, operand.quarter_turns, "quarter turns")
        if len(first) != len(self):
            check.fail("the right operand", f"of {len(self)} elements", len(first))
        if first.target != self.source:
            check.fail("the right operand", f"onto the grid {self.source} of the left", first.target)
        # A flip reverses the turns before it: F R = R^-1 F.
        before = torch.where(self.flip, -first.quarter_turns, first.quarter_turns)
        return self._like(self.quarter_turns + before, self.flip ^ first.flip, first.source, self.target)

    def on_tokens(self, tokens: Tensor) -> Tensor:
        """Act on token maps, [B, h·w, D] to [B, H·W, D], row by row of the grid; prefix tokens left out.

        Raises:
            TypeError, ValueError: not floating point, or another batch or number of tokens.
        """
        check = Arguments("GridTransform.on_tokens")
        check.sizes["B"] = len(self)
        check.features("tokens", tokens, "B T D")
        h, w = self.source
        if check.sizes["T"] != h * w:
            rule = f"of {h} x {w} = {h * w} tokens for each image, without class or register tokens"
            check.fail("tokens", rule, list(tokens.shape))
        return self._act(tokens, self.source, self.target, places_first=True)

    def on_images(self, images: Tensor, patch_size: int) -> Tensor:
        """Act on images, [B, C, h·p, w·p] to [B, C, H·p, W·p], with p = ``patch_size`` pixels for each place.

        Raises:
            TypeError, ValueError: not floating point, or a shape that is not the source grid's.
        """
        check = Arguments("GridTransform.on_images")
        check.count("patch_size", patch_size)
        check.sizes["B"] = len(self)
        check.features("images", images, "B C height width")
        source = self.source[0] * patch_size, self.source[1] * patch_size
        target = self.target[0] * patch_size, self.target[1] * patch_size
        if tuple(images.shape[2:]) != source:
            check.fail("images", f"[B, C, {source[0]}, {source[1]}]", list(images.shape))
        moved = self._act(images.flatten(2), source, target, places_first=False)
        return moved.view(*images.shape[:2], *target)

    def _act(self, maps: Tensor, source: Grid, target: Grid, places_first: bool) -> Tensor:
        """Act on [B, h·w, D] or, with the places last, on [B, C, h·w].

        Permuting and resizing commute; this takes the order that resizes once.
        """
        if source[0] == source[1]:
            return self._resize(self._permute(maps, source, places_first), source, target, places_first)
        resized = self._resize(maps, source, target, places_first)
        if target[0] != target[1]:  # an odd turn swaps the sides, so it starts from the swapped target
            odd = (self.quarter_turns % 2 == 1).to(maps.device)[:, None, None]
            resized = torch.where(odd, self._resize(maps, source, target[::-1], places_first), resized)
        return self._permute(resized, target, places_first)

    def _permute(self, maps: Tensor, grid: Grid, places_first: bool) -> Tensor:
        """Flip and turn by one gather, to ``grid``: from ``grid`` or, for odd turns, from its transpose."""
        rows = []
        for flipped in (False, True):
            for turns in range(4):
                start = grid[::-1] if turns % 2 else grid
                index = torch.arange(grid[0] * grid[1], device=maps.device).view(start)
                rows.append(torch.rot90(index.flip(1) if flipped else index, turns).flatten())
        element = (4 * self.flip + self.quarter_turns).to(maps.device)
        where = torch.stack(rows)[element]  # [B, H·W]
        if not places_first:
            return maps.gather(2, where[:, None].expand(maps.shape))
        offset = maps.shape[1] * torch.arange(len(maps), device=maps.device)
        return maps.flatten(0, 1).index_select(0, (where + offset[:, None]).flatten()).view(maps.shape)

    def _resize(self, maps: Tensor, source: Grid, target: Grid, places_first: bool) -> Tensor:
        if source == target:
            return maps
        whole = maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps
        if not places_first:
            return self._interpolate(whole.unflatten(2, source), target).flatten(2).to(maps.dtype)
        # For wide tokens, a product for each side is faster than the same operator on a transposed layout.
        rows, cols = (self._operator(n, m, whole) for n, m in zip(source, target))
        on = "cpu" if maps.device.type == "meta" else maps.device.type  # meta tensors know no autocast
        with torch.autocast(on, enabled=False):
            tall = (rows @ whole.unflatten(1, source).flatten(2)).unflatten(2, (source[1], maps.shape[2]))
            resized: Tensor = (cols @ tall).flatten(1, 2).to(maps.dtype)
            return resized

    def _operator(self, n: int, m: int, like: Tensor) -> Tensor:
        """The matrix [m, n] that resizes n places to m: the resized identity."""
        return self._interpolate(torch.eye(n, dtype=like.dtype, device=like.device)[None, None], (m, n))[0, 0]

    def _interpolate(self, images: Tensor, target: Grid) -> Tensor:
        return F.interpolate(images, target, mode=self.interpolation, align_corners=False, antialias=self.antialias)

    def _like(self, quarter_turns: Tensor, flip: Tensor, source: Grid, target: Grid) -> GridTransform:
        kinds = {"interpolation": self.interpolation, "antialias": self.antialias}
        return GridTransform(quarter_turns, flip, source, target, **kinds)  # type: ignore[arg-type]


def _grid(check: Arguments, name: str, grid: Grid) -> Grid:
    if not isinstance(grid, (tuple, list)):
        check.fail_type(name, "(height, width)", f"{type(grid).__name__} {grid!r}")
    return check.sides(name, grid)
