"""Soft equivariance regularization: token maps that turn with the image, without being told how.

Of each image two views are taken by known elements ``g1`` and ``g2`` of D4 × scale. The token map of the first,
moved by ``g2 @ g1.inverse()``, should be that of the second: at each place, against the tokens of all other images
(Lee et al., ICLR 2026).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.distributed import Group, Processes
from equireg.grid import GridTransform
from equireg.similarity import mean_contrast, normalized

__all__ = ["SERLoss", "patch_nt_xent"]

_NEGATIVES = ("both", "moved")


def patch_nt_xent(z: Tensor, z_prime: Tensor, *, temperature: float | Tensor = 0.3, negatives: str = "both") -> Tensor:
    r"""Contrastive loss between the tokens of two aligned maps, with negatives from other images only.

    With :math:`s(x, y) = \cos(x, y) / \tau`, image :math:`i` and place :math:`j`,

    .. math::
        \ell_{ij} = -\log \frac{e^{s(z_{ij}, z'_{ij})}}{e^{s(z_{ij}, z'_{ij})}
            + \sum_{m \ne i} \sum_n e^{s(z_{ij}, z_{mn})} + \sum_{m \ne i} \sum_n e^{s(z_{ij}, z'_{mn})}}

    averaged over images and places (soft equivariance regularization, Section 3.3). The matrix of similarities is never
    stored. In a process group the negatives are those of this process; ``SERLoss`` can gather the others.

    Args:
        z: tokens of the first view, moved onto the second, [B, T, D]. They are normalised here.
        z_prime: tokens of the second view at the same places, [B, T, D].
        temperature: τ, above 0; a number, or a 0-d tensor that learns.
        negatives: "both" views' tokens, the equation above; or "moved", the released code's: :math:`z'_{ij}` repels
            :math:`z_{mn}` alone.

    Returns:
        The loss, a 0-d tensor at least 0, in float32, or float64 for float64 tokens.

    Raises:
        TypeError: not floating point, or two dtypes that differ.
        ValueError: shapes or devices that differ, no tokens, a batch of fewer than two images (which has no negatives),
            a temperature that is not above 0, other ``negatives``.

    Example:
        >>> z = torch.eye(4).view(2, 2, 4)  # two images of two places, all tokens different
        >>> loss = patch_nt_xent(z, z, temperature=0.5)  # -log(e^2 / (e^2 + 2 + 2))
        >>> round(float(loss), 4)
        0.4327
    """
    _check_maps(z, z_prime, temperature)
    Arguments("patch_nt_xent").option("negatives", negatives, _NEGATIVES)
    processes = Processes("patch_nt_xent", False)
    return _contrast(normalized(z), normalized(z_prime), temperature, negatives, processes, z.dtype)


class SERParts(NamedTuple):
    """``SERLoss`` and what it is made of, means over images and places: log_denominator - alignment / temperature."""

    loss: Tensor
    alignment: Tensor  # cosine similarity of the tokens of both views at the same place
    log_denominator: Tensor  # logarithm of the positive and negatives' sum of exponentials


class SERLoss(nn.Module):
    r"""Soft equivariance of a token map, as a loss beside any self-supervised objective.

    ``loss = ssl_loss + 0.5 * ser(tokens1, tokens2, g1, g2)``. The tokens of an intermediate layer (3 of 12 in the
    paper) are projected by a two-layer GELU MLP, those of the first view after moving them by
    :math:`g = g_2 g_1^{-1}`, and compared by ``patch_nt_xent`` (Eq. 2 and 3).

    Args:
        dim: D, the width of the tokens.
        projection_dim: width of the projection, and of its hidden layer.
        temperature: τ, above 0; the paper takes 0.3 with MoCo-v3 and Barlow Twins, 0.5 with DINO.
        token_norm: put a LayerNorm of its own on the tokens before they are moved, as the released code does. Worth it
            for the residual stream of a pre-norm ViT, whose tokens have very different lengths.
        negatives: "both" views' tokens of other images (Eq. 2); or "moved": tokens of the second view repel only
            moved ones, those of other images, as in the released code.
        layers: None for the map of one layer; or how many layers' maps a call takes, in two lists. Each has a
            projection (and norm) of its own, and the loss is the mean over the layers (the paper's Table 10: all blocks
            gain slightly less than the third alone, and cost more).
        gather_distributed: take negatives from all processes, or from those of a process group, with their gradient.
            Under DistributedDataParallel the loss and its gradients are then those of one process with the whole batch.
            Every process must bring the same number of images and places: draw the sizes of the views from generators
            of one seed. Where they do not fit, all processes raise the same ValueError. In a single process it changes
            nothing.

    Raises:
        TypeError, ValueError: a width or number of layers that is no whole number above 0, a temperature that is not
            above 0, other ``negatives``.

    Example:
        >>> ser = SERLoss(dim=32)
        >>> g1, g2 = (GridTransform.random(4, (8, 8)) for _ in range(2))
        >>> tokens1, tokens2 = (torch.randn(4, g.target[0] * g.target[1], 32) for g in (g1, g2))
        >>> loss = ser(tokens1, tokens2, g1, g2)
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)
        >>> of_two = SERLoss(dim=32, layers=2)
        >>> of_two([tokens1, tokens1], [tokens2, tokens2], g1, g2).shape
        torch.Size([])
    """

    def __init__(
        self,
        dim: int,
        *,
        projection_dim: int = 512,
        temperature: float = 0.3,
        token_norm: bool = False,
        negatives: str = "both",
        layers: int | None = None,
        gather_distributed: bool | Group = False,
    ):
        super().__init__()
        check = Arguments("SERLoss")
        check.count("dim", dim)
        check.count("projection_dim", projection_dim)
        check.positive("temperature", temperature)
        check.option("token_norm", token_norm, (True, False))
        check.option("negatives", negatives, _NEGATIVES)
        self.dim, self.temperature, self.negatives = dim, temperature, negatives
        self.processes = Processes("SERLoss", gather_distributed)
        self.layers: nn.ModuleList | None = None
        if layers is not None:
            check.count("layers", layers)
            of_layer = partial(
                SERLoss,
                dim,
                projection_dim=projection_dim,
                temperature=temperature,
                token_norm=token_norm,
                negatives=negatives,
                gather_distributed=gather_distributed,
            )
            self.layers = nn.ModuleList(of_layer() for _ in range(layers))
            return
        self.token_norm = nn.LayerNorm(dim) if token_norm else nn.Identity()
        self.projection = nn.Sequential(
            nn.Linear(dim, projection_dim), nn.GELU(), nn.Linear(projection_dim, projection_dim)
        )

    def forward(
        self,
        tokens1: Tensor | Sequence[Tensor],
        tokens2: Tensor | Sequence[Tensor],
        g1: GridTransform,
        g2: GridTransform,
    ) -> Tensor:
        """The loss, a 0-d tensor.

        Args:
            tokens1: tokens of the first views, [B, T1, D], where T1 is the number of places of ``g1.target``; class and
                register tokens left out.
            tokens2: tokens of the second views, [B, T2, D], likewise with ``g2.target``. With ``layers``, both are
                lists of that many maps.
            g1: what took the images to the first views.
            g2: what took the same images to the second views.

        Raises:
            TypeError, ValueError: tokens that do not fit the elements, each other or ``layers``, elements of different
                source grids, a batch of one image without others to gather.
        """
        return self.parts(tokens1, tokens2, g1, g2).loss

    def parts(
        self,
        tokens1: Tensor | Sequence[Tensor],
        tokens2: Tensor | Sequence[Tensor],
        g1: GridTransform,
        g2: GridTransform,
    ) -> SERParts:
        """The loss and, detached, what it is made of: ``.loss``, ``.alignment`` and ``.log_denominator``."""
        if self.layers is None:
            return self._parts(tokens1, tokens2, g1, g2)
        with self.processes.alike():
            for name, maps in (("tokens1", tokens1), ("tokens2", tokens2)):
                if not isinstance(maps, (list, tuple)) or len(maps) != len(self.layers):
                    got = len(maps) if isinstance(maps, (list, tuple)) else type(maps).__name__
                    Arguments("SERLoss").fail(name, f"a list of {len(self.layers)} maps, one of each layer", got)
        layers: Iterable[Any] = self.layers
        of_layers = [ser.parts(one, two, g1, g2) for ser, one, two in zip(layers, tokens1, tokens2)]
        return SERParts(*(torch.stack(part).mean() for part in zip(*of_layers)))

    def _parts(self, tokens1: Any, tokens2: Any, g1: GridTransform, g2: GridTransform) -> SERParts:
        """Of one map of each view."""
        processes = self.processes
        with processes.alike() as facts:
            _check_views(self, tokens1, tokens2, g1, g2, least=2 if processes.size == 1 else 1)
            relative = g2.__matmul__(g1.inverse())  # g2 @ g1⁻¹; torch.compile of PyTorch 2.6 cannot trace the operator
            tokens1, tokens2 = (for_layers(self.projection, tokens) for tokens in (tokens1, tokens2))
            projected = self.projection(relative.on_tokens(self.token_norm(tokens1)))
            z, z_prime = normalized(projected), normalized(self.projection(self.token_norm(tokens2)))
            facts.update({"projected tokens1": z, "projected tokens2": z_prime})
        loss = _contrast(z, z_prime, self.temperature, self.negatives, processes, projected.dtype)
        alignment = (z.detach() * z_prime.detach()).sum(-1).mean()
        loss, alignment = processes.total(torch.stack([loss, alignment])) / processes.size
        return SERParts(loss, alignment.detach(), (loss + alignment / self.temperature).detach())

    def extra_repr(self) -> str:
        layers = "" if self.layers is None else f"layers={len(self.layers)}, "
        negatives = "" if self.negatives == "both" else f"negatives={self.negatives!r}, "
        return f"dim={self.dim}, temperature={self.temperature}, {negatives}{layers}gather_distributed={self.processes}"


def _contrast(
    z: Tensor,
    z_prime: Tensor,
    temperature: float | Tensor,
    negatives: str,
    processes: Processes,
    dtype: torch.dtype,
) -> Tensor:
    """Mean over the tokens [B, T, D] of this process, with those of all processes as keys; unit lengths.

    ``dtype`` is that of the projected tokens, in which kernels on a GPU may form products.
    """
    if isinstance(temperature, Tensor):  # of half precision it would round its inverse
        temperature = temperature.to(z.dtype)
    image_of_key = torch.arange(processes.size * len(z), device=z.device).repeat_interleave(z.shape[1])
    image = image_of_key.unflatten(0, (processes.size, -1))[processes.rank]
    rows, rows_prime = z.flatten(0, 1), z_prime.flatten(0, 1)
    if negatives == "moved":
        keys = (processes.gather(z).flatten(0, 2),)
        return mean_contrast(rows_prime, rows, keys, temperature, image, image_of_key, dtype)
    everyone = None  # the anchors and their positives themselves
    if processes.size > 1:
        everyone = processes.gather(z).flatten(0, 2), processes.gather(z_prime).flatten(0, 2)
    return mean_contrast(rows, rows_prime, everyone, temperature, image, image_of_key, dtype)


def _check_maps(z: Tensor, z_prime: Tensor, temperature: float | Tensor) -> None:
    check = Arguments("patch_nt_xent")
    check.alike(z=(z, "B T D"), z_prime=(z_prime, "B T D"))
    if check.sizes["T"] == 0 or check.sizes["D"] == 0:
        check.fail("z", "of at least one token, at least one wide", list(z.shape))
    check.positive("temperature", temperature)
    if len(z) < 2:
        check.fail("z", "of at least 2 images: negatives come from other images", list(z.shape))


def _check_views(
    ser: SERLoss, tokens1: Tensor, tokens2: Tensor, g1: GridTransform, g2: GridTransform, *, least: int
) -> None:
    """Tokens at the places of their elements' target grids, ``ser.dim`` wide, of ``least`` images or more."""
    check = Arguments("SERLoss").beside(ser)
    for name, g in (("g1", g1), ("g2", g2)):
        if not isinstance(g, GridTransform):
            check.fail_type(name, "a GridTransform", type(g).__name__)
    if g1.source != g2.source:
        check.fail("g2", f"of g1's source grid {g1.source}", g2.source)
    if len(g2) != len(g1):
        check.fail("g2", f"of {len(g1)} elements as g1", len(g2))
    check.sizes.update(B=len(g1), D=ser.dim)
    for name, g, number, tokens in (("tokens1", g1, "T1", tokens1), ("tokens2", g2, "T2", tokens2)):
        check.features(name, tokens, f"B {number} D")
        if tokens.shape[1] != g.target[0] * g.target[1]:
            rule = f"of {g.target[0]} x {g.target[1]} tokens, without class or register tokens"
            check.fail(name, rule, list(tokens.shape))
    if len(g1) < least:
        check.fail("tokens1", f"of at least {least} images: negatives come from others", list(tokens1.shape))
