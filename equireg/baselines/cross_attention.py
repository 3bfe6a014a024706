"""Cross-attention reconstruction on any layer: one view is rebuilt from the tokens of another."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.similarity import accumulation_dtype

__all__ = ["CrossAttentionReconstruction"]


class CrossAttentionParts(NamedTuple):
    """The loss of ``CrossAttentionReconstruction``, and the errors it is the mean of."""

    loss: Tensor
    errors: Tensor  # mean squared error of each image, [B]


class CrossAttentionReconstruction(nn.Module):
    r"""Rebuild the first view of an image from the tokens of a second one, which the tokens of the first ask for.

    With the tokens :math:`u, v` of both views after a LayerNorm, :math:`h` heads of width :math:`D / h`, and a decoder
    :math:`d` at each place, the mean over images and pixels of the squared error

    .. math::
        \bigl(d(a) - x_1\bigr)^2, \qquad
        a = W_o \operatorname{softmax}\!\Bigl(\frac{(W_q u)(W_k v)^\top}{\sqrt{D / h}}\Bigr) W_v v

    (Wang, Krajsek and Scharr, "Equivariant Representation Learning for Augmentation-based Self-Supervised Learning via
    Image Reconstruction", 2024, arXiv:2412.03314). The first view's tokens say where to look, but what is painted comes
    from the second view alone: there is no residual connection. So the tokens have to keep how the views differ, which
    nobody tells.

    This is the plain form of what the paper's abstract says: the features of both views are blended by cross-attention,
    and one view is rebuilt. Choices made here: which view asks, one layer of attention, and a decoder of two layers,
    weak on purpose. Where features are split into an invariant and an equivariant part, as in the paper, give it the
    equivariant part.

    Under DistributedDataParallel each process takes the mean over its own images, and the averaged gradients are those
    of the whole batch where all have equally many.

    Args:
        dim: D, the width of the tokens.
        image_size: side of the first view in pixels, or (height, width); whole patches.
        patch_size: pixels of a patch's side.
        num_heads: h, which divides ``dim``.
        hidden_dim: width of the decoder's hidden layer.
        channels: C, of the image.

    Raises:
        TypeError, ValueError: sizes that are no whole numbers above 0, an image of other than whole patches, heads that
            do not divide the width.

    Example:
        >>> import torch
        >>> head = CrossAttentionReconstruction(192, image_size=32, patch_size=4)
        >>> images = torch.rand(8, 3, 32, 32)  # the first views
        >>> tokens1, tokens2 = torch.randn(2, 8, 64, 192)  # your encoder's, of both views
        >>> head(tokens1, tokens2, images).shape, head.reconstruct(tokens1, tokens2).shape
        (torch.Size([]), torch.Size([8, 3, 32, 32]))
    """

    def __init__(
        self,
        dim: int,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        num_heads: int = 4,
        hidden_dim: int = 128,
        channels: int = 3,
    ):
        super().__init__()
        check = Arguments("CrossAttentionReconstruction")
        counts = {"dim": dim, "patch_size": patch_size, "num_heads": num_heads}
        for name, value in (counts | {"hidden_dim": hidden_dim, "channels": channels}).items():
            check.count(name, value)
        height, width = check.sides("image_size", image_size, patch_size)
        if dim % num_heads:
            check.fail("num_heads", f"a divisor of dim = {dim}", num_heads)
        self.dim, self.patch_size, self.num_heads, self.channels = dim, patch_size, num_heads, channels
        self.grid = (height // patch_size, width // patch_size)
        self.norm = nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.decoder = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, channels * patch_size**2)
        )

    def reconstruct(self, tokens1: Tensor, tokens2: Tensor) -> Tensor:
        """The first views, [B, C, H, W], in the range of the images that it was trained on, not clamped.

        Args:
            tokens1: of the first views, [B, T, D], without class and register tokens, row by row.
            tokens2: of the second views, [B, T', D], of any number and order.

        Raises:
            TypeError, ValueError: other types or shapes, tokens that do not fit the grid of the first view.
        """
        self._check(tokens1, tokens2)
        return self._reconstructed(tokens1, tokens2)

    def forward(self, tokens1: Tensor, tokens2: Tensor, images1: Tensor) -> Tensor:
        """The loss, a 0-d tensor.

        Args:
            tokens1: see ``reconstruct``.
            tokens2: see ``reconstruct``.
            images1: the first views, floating point [B, C, H, W], in 0 .. 1 or standardised.

        Raises:
            TypeError, ValueError: as ``reconstruct``; images of another dtype or shape, an empty batch.
        """
        return self.parts(tokens1, tokens2, images1).loss

    def parts(self, tokens1: Tensor, tokens2: Tensor, images1: Tensor) -> CrossAttentionParts:
        """The loss, and in ``.errors`` the mean squared error of each image, detached."""
        check = self._check(tokens1, tokens2)
        height, width = (side * self.patch_size for side in self.grid)
        check.sizes.update(C=self.channels, H=height, W=width)
        check.features("images1", images1, "B C H W")
        if not len(images1):
            check.fail("tokens1", "of at least one image", list(tokens1.shape))
        rebuilt = self._reconstructed(tokens1, tokens2)
        dtype = accumulation_dtype(rebuilt.dtype)
        errors = (rebuilt.to(dtype) - images1.to(dtype)).square().flatten(1).mean(1)
        return CrossAttentionParts(errors.mean(), errors.detach())

    def _check(self, tokens1: Tensor, tokens2: Tensor) -> Arguments:
        check = Arguments("CrossAttentionReconstruction").beside(self)
        check.sizes["D"] = self.dim
        check.features("tokens1", tokens1, "B T D")
        h, w = self.grid
        if tokens1.shape[1] != h * w:
            check.fail("tokens1", f"of {h} x {w} tokens, without class or register tokens", list(tokens1.shape))
        check.features("tokens2", tokens2, "B T' D")
        if not tokens2.shape[1]:
            check.fail("tokens2", "of at least one token", list(tokens2.shape))
        return check

    def _reconstructed(self, tokens1: Tensor, tokens2: Tensor) -> Tensor:
        asked, given = (self.norm(for_layers(self, tokens)) for tokens in (tokens1, tokens2))
        q, k, v = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, T, D / heads]
            for layer, x in ((self.query, asked), (self.key, given), (self.value, given))
        )
        # Not scaled_dot_product_attention, which takes a query of NaN for one that asks for nothing.
        shares = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        found = (shares @ v).transpose(1, 2).flatten(2)
        patches = self.decoder(self.out(found)).transpose(1, 2).unflatten(2, self.grid)
        return F.pixel_shuffle(patches, self.patch_size)
