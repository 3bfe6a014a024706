"""A weak decoder from a map of tokens to an image."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class Decoder(nn.Sequential):
    """One linear layer at each place and four convolutions: [B, h, w, dim] to [B, channels, h·p, w·p]."""

    def __init__(self, dim: int, hidden_dim: int, channels: int, patch_size: int):
        widths = [hidden_dim, hidden_dim // 2, hidden_dim // 4, hidden_dim // 8, channels]
        layers: list[nn.Module] = [nn.Linear(dim, hidden_dim), _ChannelsFirst()]
        for (width, following), factor in zip(pairwise(widths), enlargements(patch_size)):
            # Convolved on the small map and rearranged after: the same work as on the large map, a part of the memory.
            layers += [nn.GELU(), _subpixel(width, following, factor), nn.PixelShuffle(factor)]
        super().__init__(*layers)


def _subpixel(width: int, following: int, factor: int) -> nn.Conv2d:
    """A convolution whose channels are the pixels of a larger map, at first alike: no checkerboard to begin with."""
    convolution = nn.Conv2d(width, following * factor**2, 3, padding=1)
    for parameter in convolution.parameters():
        alike = parameter.detach()[:following].repeat_interleave(factor**2, 0)
        parameter.data.copy_(alike)
    return convolution


def enlargements(patch_size: int) -> list[int]:
    """Four whole factors of ``patch_size``, as alike as its prime factors let them be, the largest last."""
    primes, rest, divisor = [], patch_size, 2
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    factors = [1, 1, 1, 1]
    for prime in reversed(primes):  # the largest to begin with, each to the smallest factor so far
        factors = sorted([factors[0] * prime, *factors[1:]])
    return factors


class _ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)
