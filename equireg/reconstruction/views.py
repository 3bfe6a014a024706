"""Views along the path of a transformation: the complete one, and intermediate ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from equireg._checks import Arguments, values_visible
from equireg.image_transforms import gaussian_blur, in_blocks, jitter_colors, rigid_motion

__all__ = ["IntermediateViews"]

Range = float | tuple[float, float]

_PARAMETERS = {
    "rotation": ("angle",),
    "translation": ("dx", "dy"),
    "color": ("brightness", "contrast", "saturation", "hue"),
    "blur": ("sigma",),
}
_COMPOSED = {"se2": ("rotation", "translation"), "all": tuple(_PARAMETERS)}
_FACTORS = ("brightness", "contrast", "saturation")  # 1 changes nothing; for all others, 0 does


class IntermediateViews:
    r"""A transformed view of each image, and intermediate images, for ``IntermediateReconstructionHead``.

    Each image draws its own parameters :math:`t`. The view is the image under the whole transformation. Target
    :math:`i = 1 \dots n` is the image at the fraction :math:`i / (n + 1)` of the **same** path: for 30° of rotation
    and two intermediate images, 10° and 20° (transformed image reconstruction, Section 3). Kinds:

    - ``"rotation"`` about the centre, counter-clockwise; ``"translation"``; ``"se2"``, both: turned, then moved, angle
      and displacement growing together. Bilinear; ``padding`` fills what lies outside of the frame.
    - ``"color"``: brightness, contrast, saturation, hue, in this order, as torchvision's ``adjust_*``; the factors
      change linearly from 1 to their values, the hue's shift from 0.
    - ``"blur"``: Gaussian, σ from 0 to its value, edges mirrored, the kernel cut at four times the largest σ.
    - ``"all"``, or several of them, as ``("rotation", "color")``: one after the other in the order of this list.

    ``reconstruct`` limits what the targets undergo: the paper's best rows apply all and reconstruct one,
    ``IntermediateViews("all", reconstruct="rotation")``.

    Args:
        kind: what the view undergoes.
        num_intermediate: number of intermediate images, n. Two were best, one was poor, three gained nothing (the
            paper's Table 7).
        reconstruct: a kind, or several; None for all of ``kind``.
        degrees: lowest and highest angle, or one number for minus to plus. Up to a quarter turn, as SIE: near a half
            turn, opposite paths end in the same view.
        translate: largest displacement to either side as a share of the width and of the height, or one number for
            both. With a quarter, at least 9/16 of the image stay in the frame.
        brightness: lowest and highest factor, or one number b for 1 - b (at least 0) to 1 + b; likewise ``contrast``
            and ``saturation``. The defaults of these and ``hue`` are BYOL's, which most later methods use.
        contrast: see ``brightness``.
        saturation: see ``brightness``.
        hue: lowest and highest shift as a share of the circle, within -0.5 .. 0.5, or one number for minus to plus.
        sigma: lowest and highest σ in pixels. The default is SimCLR's; on images of 32 pixels its upper end is strong.
        padding: fills what lies outside of the frame: "zeros" (black, torchvision's default), "border" (the nearest
            pixel) or "reflection". Black corners reveal the angle; reflections reveal less.

    Raises:
        TypeError, ValueError: an unknown kind, ``reconstruct`` that is no part of ``kind``, ranges out of order or
            outside of what a transform can do.

    Example:
        >>> views = IntermediateViews("rotation", degrees=(30, 30), num_intermediate=2)
        >>> images = torch.rand(4, 3, 32, 32)
        >>> view, targets, parameters = views(images, torch.Generator().manual_seed(0))
        >>> view.shape, targets.shape, views.parameter_names, parameters[0]
        (torch.Size([4, 3, 32, 32]), torch.Size([2, 4, 3, 32, 32]), ('angle',), tensor([30.]))
        >>> torch.allclose(targets[1], views.transform(images, torch.full((4, 1), 20.0)))
        True
    """

    def __init__(
        self,
        kind: str | Sequence[str] = "rotation",
        *,
        num_intermediate: int = 2,
        reconstruct: str | Sequence[str] | None = None,
        degrees: Range = 90.0,
        translate: Range = 0.25,
        brightness: Range = 0.4,
        contrast: Range = 0.4,
        saturation: Range = 0.2,
        hue: Range = 0.1,
        sigma: tuple[float, float] = (0.1, 2.0),
        padding: str = "zeros",
    ):
        check = Arguments("IntermediateViews")
        self.parts = _parts(check, "kind", kind)
        self.reconstructed = self.parts if reconstruct is None else _parts(check, "reconstruct", reconstruct)
        if not set(self.reconstructed) <= set(self.parts):
            check.fail("reconstruct", f"a part of kind {kind!r}", repr(reconstruct))
        check.count("num_intermediate", num_intermediate)
        check.option("padding", padding, ("zeros", "border", "reflection"))
        self.kind, self.reconstruct, self.num_intermediate, self.padding = kind, reconstruct, num_intermediate, padding

        most = translate if isinstance(translate, (tuple, list)) else (translate, translate)
        if len(most) != 2:
            check.fail("translate", "a number or a pair", translate)
        for share in most:
            check.not_negative("translate", share)
        self.ranges = {
            "angle": _range(check, "degrees", degrees, 0),
            "dx": (-most[0], most[0]),  # shares of the side, until the images are there
            "dy": (-most[1], most[1]),
            "brightness": _range(check, "brightness", brightness, 1, low=0),
            "contrast": _range(check, "contrast", contrast, 1, low=0),
            "saturation": _range(check, "saturation", saturation, 1, low=0),
            "hue": _range(check, "hue", hue, 0, low=-0.5, high=0.5),
            "sigma": _range(check, "sigma", sigma, None, low=0),
        }

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of the parameters' columns, out of angle (degrees), dx, dy (pixels), brightness ..."""
        return tuple(name for part in self.parts for name in _PARAMETERS[part])

    @property
    def kernel_size(self) -> int:
        """Side of the blur's kernel in pixels."""
        return 2 * math.ceil(4 * self.ranges["sigma"][1]) + 1

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """View, intermediate targets and parameters of each image.

        Args:
            images: the first views, [B, C, H, W], floating point in 0 .. 1; C = 3 for colours.
            generator: source of the parameters; None draws from the global one.

        Returns:
            view [B, C, H, W]; targets [n, B, C, H, W]; parameters [B, P], in float32, with the columns
            ``parameter_names``. The parameters are for probes; the encoder and the decoders must not see them.

        Raises:
            TypeError, ValueError: images that are not floating point, of another shape, or for colours not in 0 .. 1;
                overshoots of up to half a range, as by resizing, are clamped. Ranges are checked on CPU.
        """
        self._check_images(images)
        parameters = self.draw(len(images), (images.shape[2], images.shape[3]), generator).to(images.device)
        steps = [i / (self.num_intermediate + 1) for i in range(1, self.num_intermediate + 1)]
        path = [self.at(parameters, fraction, only_reconstructed=True) for fraction in steps]
        # One batch, the whole transformation last; parts that are not reconstructed apply to these last ones alone.
        stacked = images.repeat(len(path) + 1, 1, 1, 1)
        result = self._apply(stacked, torch.cat([*path, parameters]), len(path) * len(images))
        view, targets = result[len(path) * len(images) :], result[: len(path) * len(images)]
        return view, targets.view(len(path), *images.shape), parameters

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Tensor:
        """Random parameters [count, P] for images of ``size`` (height, width), each column uniform over its range."""
        check = Arguments("IntermediateViews.draw")
        check.count("count", count, least=0)
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            check.fail("size", "(height, width)", size)
        for side in size:
            check.count("size", side)
        if generator is not None and not isinstance(generator, torch.Generator):
            check.fail_type("generator", "a torch.Generator or None", type(generator).__name__)
        device = generator.device if generator is not None else torch.device("cpu")
        shape = (count, len(self.parameter_names))
        uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
        sides = {"dx": size[1], "dy": size[0]}
        columns = []
        for name, column in zip(self.parameter_names, uniform.unbind(1)):
            low, high = (bound * sides.get(name, 1) for bound in self.ranges[name])
            columns.append(torch.lerp(torch.full_like(column, low), torch.full_like(column, high), column))
        return torch.stack(columns, 1)

    def at(self, parameters: Tensor, fraction: float, *, only_reconstructed: bool = False) -> Tensor:
        """The parameters at a fraction of the path, 0 (nothing) to 1 (all): [B, P].

        ``only_reconstructed`` leaves out what the targets do not undergo.

        Raises:
            TypeError, ValueError: parameters that are not [B, P], a fraction that is not a number in 0 .. 1.
        """
        check = Arguments("IntermediateViews.at")
        check.share("fraction", fraction)
        check.option("only_reconstructed", only_reconstructed, (True, False))
        check.sizes["P"] = len(self.parameter_names)
        check.features("parameters", parameters, "B P")
        names = self.parameter_names
        kept = {name for part in self.reconstructed for name in _PARAMETERS[part]} if only_reconstructed else set(names)
        still = torch.tensor([float(name in _FACTORS) for name in names], device=parameters.device)
        share = torch.tensor([fraction if name in kept else 0.0 for name in names], device=parameters.device)
        return torch.lerp(still.to(parameters.dtype).expand_as(parameters), parameters, share.to(parameters.dtype))

    def transform(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Transform each image by given parameters [B, P], such as those drawn for another crop of it.

        Raises:
            TypeError, ValueError: as on calling; parameters that are not [B, P] on the images' device, on CPU also
                values that are not finite, below 0 for a factor or σ, or a σ beyond the range of these views.
        """
        check = self._check_images(images)
        check.sizes["P"] = len(self.parameter_names)
        check.features("parameters", parameters, "B P")
        if values_visible(parameters):
            check.finite("parameters", parameters)
            for name, column in zip(self.parameter_names, parameters.detach().unbind(1)):
                most = self.ranges["sigma"][1] if name == "sigma" else math.inf  # the kernel is made for it
                wrong = (column < 0) | (column > most * (1 + 1e-6))
                if name in (*_FACTORS, "sigma") and wrong.any():
                    check.fail("parameters", f"in 0 .. {most:g} for {name}", f"{float(column[wrong][0]):g}")
        return self._apply(images, parameters, 0)

    def _apply(self, images: Tensor, parameters: Tensor, whole: int) -> Tensor:
        """Apply everything to the images from ``whole`` on, and to those before only what is reconstructed."""
        column = dict(zip(self.parameter_names, parameters.unbind(1)))
        still = torch.zeros_like(parameters[:, 0])  # rotation alone does not move, translation alone does not turn
        for parts in (("rotation", "translation"), ("color",), ("blur",)):
            if not set(parts) & set(self.parts):
                continue
            first = 0 if set(parts) & set(self.reconstructed) else whole
            values = [column.get(name, still)[first:] for part in parts for name in _PARAMETERS[part]]
            change: Callable[..., Tensor] = jitter_colors
            if parts == ("blur",):
                change = partial(gaussian_blur, radius=self.kernel_size // 2)
            elif "rotation" in parts:
                change = partial(rigid_motion, padding=self.padding)
            images = torch.cat([images[:first], in_blocks(change, images[first:], *values)])
        return images

    def _check_images(self, images: Tensor) -> Arguments:
        check = Arguments("IntermediateViews")
        check.features("images", images, "B C H W")
        if 0 in images.shape[1:]:
            check.fail("images", "of at least one channel and pixel", list(images.shape))
        if "color" in self.parts:
            if images.shape[1] != 3:
                check.fail("images", "[B, 3, H, W] for colours", list(images.shape))
            check.pixels("images", images, "in 0 .. 1 for colours: normalise the views, not what they are made of")
        return check

    def __repr__(self) -> str:
        of = f"{self.kind!r}, num_intermediate={self.num_intermediate}, reconstruct={self.reconstruct!r}"
        return f"IntermediateViews({of})"


def _parts(check: Arguments, name: str, kind: str | Sequence[str]) -> tuple[str, ...]:
    """The elementary kinds, in the order in which they are applied."""
    if not isinstance(kind, (str, tuple, list)):
        check.fail_type(name, "a kind, or several in a tuple", type(kind).__name__)
    found: set[str] = set()
    for one in (kind,) if isinstance(kind, str) else kind:
        check.option(name, one, (*_PARAMETERS, *_COMPOSED))
        found |= set(_COMPOSED.get(one, (one,)))
    if not found:
        check.fail(name, "at least one kind", "none")
    return tuple(part for part in _PARAMETERS if part in found)


def _range(
    check: Arguments,
    name: str,
    given: Range,
    center: float | None,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[float, float]:
    """Lowest and highest value; one number is a distance to both sides of ``center``, cut at ``low``."""
    got = given
    if not isinstance(given, (tuple, list)):
        if center is None:
            check.fail_type(name, "a pair of numbers", type(given).__name__)
        check.not_negative(name, given)
        given = (max(low, center - given), center + given)
    if len(given) != 2:
        check.fail(name, "a pair of numbers", given)
    for bound in given:
        check.number(name, bound)
        if not (math.isfinite(bound) and low <= bound <= high):
            check.fail(name, f"finite and within {low} .. {high}", got)
    if given[0] > given[1]:
        check.fail(name, "the lowest value first", given)
    return float(given[0]), float(given[1])
