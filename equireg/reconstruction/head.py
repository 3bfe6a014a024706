"""Transformed image reconstruction: weak decoders rebuild the images half-way along a transformation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments, values_visible
from equireg.reconstruction.decoder import Decoder
from equireg.similarity import accumulation_dtype

__all__ = ["IntermediateReconstructionHead"]


class ReconstructionParts(NamedTuple):
    """The loss of ``IntermediateReconstructionHead``, and the errors it is the weighted mean of."""

    loss: Tensor
    errors: Tensor  # mean squared error of each intermediate image, [n]; NaN where its weight is 0


class IntermediateReconstructionHead(nn.Module):
    r"""Features that keep how an image was transformed, by rebuilding what lies half-way, as a loss beside any other.

    ``loss = ssl_loss(invariant1, invariant2) + head(equivariant1, equivariant2, targets)``. Features are split along
    their width; the invariant part is for the self-supervised loss. The equivariant parts of both views, side by side,
    go to :math:`n` independent decoders, one for each intermediate image of ``IntermediateViews``:

    .. math:: L_\text{recon} = \frac{1}{n} \sum_{i=1}^n \operatorname{mean} \bigl(D_i([e_1, e_2]) - x_i\bigr)^2

    (transformed image reconstruction, Section 3). Nobody tells the encoder or the decoders the transformation. A
    decoder is one linear layer on each place and four convolutions, which enlarge the map by the patch size (the last
    ones first, by rearranged channels), and is weak on purpose: it is the encoder that shall learn. Where the map then
    has not the size of the images (a CNN on odd sides), it is resized bilinearly.

    All decoders are built at once, so an optimizer may be made directly afterwards: give it ``head.parameters()``.
    Under DistributedDataParallel each process takes the mean over its own images, and the averaged gradients are those
    of the whole batch where all have equally many.

    Args:
        dim: D, width of the features.
        image_size: side of the targets in pixels, or (height, width).
        patch_size: side of a patch, or the stride of a CNN's feature map.
        num_images: n, as ``num_intermediate`` of the views.
        equivariant_fraction: share of the width that is equivariant, above 0 and up to 1; the paper takes a half. Its
            smaller shares bore a larger weight of this loss.
        head_dim: width of a linear head on the features before the split, as the paper has it, so that the invariant
            part keeps the width of the base method (8,192 with iBOT, 2,048 with DINOv2, 512 with SIE). None splits the
            features themselves.
        hidden_dim: width behind the linear layer, a multiple of 8; each convolution halves it.
        channels: C, of the targets.
        mean: mean of the pixels in each channel, to take the error in units of ``std``; None with ``std`` None takes it
            on the pixels as they are.
        std: standard deviation of the pixels in each channel.
        image_weights: n weights of the images, at least 0, for a weighted mean instead of the plain one. A decoder of
            weight 0 does not run in the loss; its parameters get a gradient of zeros.
        detach: train the decoders alone (not the linear head of ``head_dim`` either), and show what features hold that
            were learned without them.

    Raises:
        TypeError, ValueError: sizes that are not whole numbers above 0, a fraction that leaves no equivariant feature,
            ``mean`` and ``std`` that are not C finite numbers, a ``std`` that is not above 0, weights that are not n
            or all 0.

    Example:
        >>> from equireg import IntermediateViews
        >>> views = IntermediateViews("rotation")
        >>> head = IntermediateReconstructionHead(192, image_size=32, patch_size=4)
        >>> images = torch.rand(8, 3, 32, 32)
        >>> view, targets, _ = views(images)
        >>> tokens1, tokens2 = torch.randn(2, 8, 64, 192)  # your encoder's, of images and of view
        >>> (invariant1, equivariant1), (invariant2, equivariant2) = head.split(tokens1), head.split(tokens2)
        >>> loss = head(equivariant1, equivariant2, targets)
        >>> invariant1.shape, loss.shape, head.reconstruct(equivariant1, equivariant2).shape
        (torch.Size([8, 64, 96]), torch.Size([]), torch.Size([2, 8, 3, 32, 32]))
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        num_images: int = 2,
        equivariant_fraction: float = 0.5,
        head_dim: int | None = None,
        hidden_dim: int = 128,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_weights: Sequence[float] | None = None,
        detach: bool = False,
    ):
        super().__init__()
        check = Arguments("IntermediateReconstructionHead")
        for name, value in (("dim", dim), ("patch_size", patch_size), ("num_images", num_images)):
            check.count(name, value)
        check.count("hidden_dim", hidden_dim, least=8)
        if hidden_dim % 8:
            check.fail("hidden_dim", "a multiple of 8", hidden_dim)
        check.count("channels", channels)
        if head_dim is not None:
            check.count("head_dim", head_dim)
        width = dim if head_dim is None else head_dim
        sides = check.sides("image_size", image_size)
        check.number("equivariant_fraction", equivariant_fraction)
        if not (0 < equivariant_fraction <= 1 and round(equivariant_fraction * width) > 0):
            rule = f"above 0 and up to 1, and one of {width} features or more"
            check.fail("equivariant_fraction", rule, equivariant_fraction)
        check.option("detach", detach, (True, False))
        self.dim, self.equivariant_dim = dim, round(equivariant_fraction * width)
        self.invariant_dim = width - self.equivariant_dim
        self.head = nn.Identity() if head_dim is None else nn.Linear(dim, head_dim)
        self.image_size, self.patch_size, self.channels, self.detach = (*sides,), patch_size, channels, detach
        self.grid = (math.ceil(sides[0] / patch_size), math.ceil(sides[1] / patch_size))
        self.image_weights = _weights(check, image_weights, num_images)

        statistics = _statistics(check, mean, std, channels)
        for name, values in zip(("mean", "std"), statistics or (None, None)):
            self.register_buffer(name, values, persistent=False)  # an option, not a state
        self.decoders = nn.ModuleList(
            Decoder(2 * self.equivariant_dim, hidden_dim, channels, patch_size) for _ in range(num_images)
        )

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Invariant and equivariant part along the width; without ``head_dim`` they are views of ``features``.

        Args:
            features: tokens [B, T, D], with or without class token; pooled ones [B, D]; or a CNN's map [B, D, h, w].

        Returns:
            [..., D - d] and [..., d], of a map [B, D - d, h, w] and [B, d, h, w]; D is ``head_dim`` where it is given.

        Raises:
            TypeError, ValueError: another type, shape or width.
        """
        check = Arguments("IntermediateReconstructionHead.split")
        check.sizes["D"] = self.dim
        shapes = {2: "B D", 3: "B T D", 4: "B D h w"}
        check.floats("features", features)
        if features.dim() not in shapes:
            check.fail("features", "[B, T, D], [B, D, h, w] or [B, D]", list(features.shape))
        check.features("features", features, shapes[features.dim()])
        along = 1 if features.dim() == 4 else -1
        if isinstance(self.head, nn.Linear):
            features = self.head(features.movedim(along, -1).to(self.head.weight.dtype)).movedim(-1, along)
        invariant, equivariant = features.split([self.invariant_dim, self.equivariant_dim], along)
        return invariant, equivariant

    def reconstruct(self, equivariant1: Tensor, equivariant2: Tensor) -> Tensor:
        """What the decoders make of both views: [n, B, C, H, W], in the range of the targets, not clamped.

        Args:
            equivariant1: second part of ``split`` of the first views' features, [B, T, d] without class and register
                tokens, row by row; or a map [B, d, h, w].
            equivariant2: likewise, of the transformed views.

        Raises:
            TypeError, ValueError: other types or shapes, views of different batches, tokens that do not fit the grid.
        """
        self._check(Arguments("IntermediateReconstructionHead").beside(self), equivariant1, equivariant2)
        joined = self._joined(equivariant1, equivariant2)
        images = torch.stack([self._decode(decoder, joined) for decoder in self.decoders])
        if self.mean is None or self.std is None:
            return images
        return images * self.std + self.mean

    def forward(self, equivariant1: Tensor, equivariant2: Tensor, targets: Tensor) -> Tensor:
        """The loss, a 0-d tensor, in float32 or float64.

        Args:
            equivariant1: see ``reconstruct``.
            equivariant2: see ``reconstruct``.
            targets: the intermediate images [n, B, C, H, W], floating point, in 0 .. 1, or standardised where the head
                has no ``mean`` and ``std``, not 0 .. 255.

        Raises:
            TypeError, ValueError: as ``reconstruct``; targets of another dtype, shape or, where looking is free, range.
        """
        return self.parts(equivariant1, equivariant2, targets).loss

    def parts(self, equivariant1: Tensor, equivariant2: Tensor, targets: Tensor) -> ReconstructionParts:
        """The loss, and in ``.errors`` the mean squared error of each intermediate image, detached."""
        check = Arguments("IntermediateReconstructionHead").beside(self)
        self._check(check, equivariant1, equivariant2)
        self._check_targets(check, equivariant1, targets)
        joined = self._joined(equivariant1, equivariant2)
        total = torch.zeros((), dtype=accumulation_dtype(targets.dtype), device=joined.device)
        errors = []
        for decoder, weight, target in zip(self.decoders, self.image_weights, targets):
            if weight == 0:  # DistributedDataParallel wants to see every parameter used
                total = total + sum(parameter.flatten()[:0].sum() for parameter in decoder.parameters())
                errors.append(torch.full_like(total, math.nan))
                continue
            goal = target.to(total.dtype)
            if self.mean is not None and self.std is not None:
                goal = (goal - self.mean) / self.std
            error = (self._decode(decoder, joined).to(total.dtype) - goal).square().mean()
            total = total + weight * error
            errors.append(error.detach())
        return ReconstructionParts(total, torch.stack(errors).detach())

    def _check(self, check: Arguments, equivariant1: Tensor, equivariant2: Tensor) -> None:
        """Features of both views, at the same places of the grid."""
        check.sizes["d"] = self.equivariant_dim
        for name, given in (("equivariant1", equivariant1), ("equivariant2", equivariant2)):
            check.floats(name, given)
            if given.dim() not in (3, 4):
                check.fail(name, "[B, T, d] or [B, d, h, w]", list(given.shape))
            check.features(name, given, "B T d" if given.dim() == 3 else "B d h w")
        if equivariant2.shape != equivariant1.shape:
            check.fail("equivariant2", f"{list(equivariant1.shape)} as equivariant1", list(equivariant2.shape))
        h, w = self.grid
        if equivariant1.dim() == 3 and equivariant1.shape[1] != h * w:
            rule = f"of {h} x {w} tokens, without class or register tokens"
            check.fail("equivariant1", rule, list(equivariant1.shape))
        if equivariant1.dim() == 4:  # a stride rounds up or down
            for place, side in zip(equivariant1.shape[2:], self.image_size):
                if not max(1, side // self.patch_size) <= place <= math.ceil(side / self.patch_size):
                    rule = f"of {h} x {w} places (images over patch_size)"
                    check.fail("equivariant1", rule, list(equivariant1.shape))

    def _check_targets(self, check: Arguments, equivariant1: Tensor, targets: Tensor) -> None:
        height, width = self.image_size
        check.sizes.update(n=len(self.decoders), B=len(equivariant1), C=self.channels, H=height, W=width)
        check.features("targets", targets, "n B C H W")
        if len(equivariant1) == 0:
            check.fail("equivariant1", "of at least one image", list(equivariant1.shape))
        if values_visible(targets):
            low, high = (float(bound) for bound in targets.detach().aminmax())
            if not (low >= -_LARGEST_PIXEL and high <= _LARGEST_PIXEL):
                check.fail("targets", "in 0 .. 1, or standardised, not 0 .. 255", f"{low:g} .. {high:g}")

    def _joined(self, equivariant1: Tensor, equivariant2: Tensor) -> Tensor:
        """Both views' features side by side at each place, [B, h, w, 2 d]."""
        # Half precision from an encoder under autocast; under autocast the decoders go back to it by themselves.
        like = next(self.decoders.parameters())
        first, second = (part.to(like.dtype) for part in (equivariant1, equivariant2))
        if first.dim() == 4:
            joined = torch.cat([first, second], 1).permute(0, 2, 3, 1)
        else:
            joined = torch.cat([first, second], 2).unflatten(1, self.grid)
        return joined.detach() if self.detach else joined

    def _decode(self, decoder: nn.Module, joined: Tensor) -> Tensor:
        image: Tensor = decoder(joined)
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        if image.shape[2:] != self.image_size:
            image = F.interpolate(image, self.image_size, mode="bilinear", align_corners=False)
        return image

    def extra_repr(self) -> str:
        size = sum(parameter.numel() for parameter in self.decoders.parameters()) / len(self.decoders)
        return (
            f"dim={self.dim}, equivariant_dim={self.equivariant_dim}, grid={self.grid}, image_size={self.image_size}, "
            f"decoders={len(self.decoders)} x {size / 1e6:.2f} M parameters"
        )


_LARGEST_PIXEL = 16.0  # beyond any standardised image, below the bytes of one


def _weights(check: Arguments, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Weights of the images that sum to 1."""
    if given is not None and not isinstance(given, Iterable):
        check.fail_type("image_weights", f"{count} numbers, one for each image", type(given).__name__)
    weights = [1.0] * count if given is None else list(given)
    if len(weights) != count:
        check.fail("image_weights", f"{count} numbers, one for each image", weights)
    for weight in weights:
        check.not_negative("image_weights", weight)
    if sum(weights) == 0:
        check.fail("image_weights", "above 0 for one image at least", weights)
    shares = [weight / max(weights) for weight in weights]  # whose sum cannot overflow
    return tuple(share / sum(shares) for share in shares)


def _statistics(
    check: Arguments, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[Tensor, Tensor] | None:
    if mean is None and std is None:
        return None
    for name, given in (("mean", mean), ("std", std)):
        if not isinstance(given, Sized) or len(given) != channels:
            check.fail(name, f"{channels} numbers, as there are channels, where mean or std is given", given)
        for value in given:
            check.number(name, value)
            if not math.isfinite(value) or (name == "std" and value <= 0):
                check.fail(name, "finite and above 0" if name == "std" else "finite", given)
    first, second = (torch.tensor([float(value) for value in given]).view(-1, 1, 1) for given in (mean, std))  # type: ignore[union-attr]
    return first, second
