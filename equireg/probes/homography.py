"""How well frozen features of two views tell the homography between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg._progress import progress_bar
from equireg.features import check_callable, encoded, frozen, images_of
from equireg.image_transforms import projected
from equireg.probes._features import enough_for_epochs, seeded, split_rows, standardized
from equireg.probes._mlp import fit_mlp, mlp

__all__ = ["homography_probe"]

_CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)


@torch.no_grad()
def homography_probe(
    encoder: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    patch_size: int,
    *,
    max_displacement: float | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    progress: bool = True,
    hidden_dim: int = 512,
    epochs: int = 100,
    weight_decay: float = 0.05,
) -> float:
    r"""Mean corner error, in pixels, of a random homography regressed from the frozen features of two views.

    The task of S-COCO (DeTone et al., 2016; transformed image reconstruction, Section 4.3.2). The first view is a
    square patch at a random place of the image. Each of its corners :math:`c_k` moves by :math:`d_k`, uniform in
    :math:`[-\rho, \rho]^2`; the second view shows the quadrangle of the moved corners as a square. An MLP with two
    hidden layers, as ``transformation_r2``'s, predicts the eight numbers from both features, on images never seen:

    .. math:: \text{MCE} = \frac{1}{4 N} \sum_{n=1}^N \sum_{k=1}^4 \lVert \hat d_{nk} - d_{nk} \rVert_2

    Features that tell nothing have the error of the mean, about :math:`0.765\, \rho`.

    Args:
        encoder: patches [B, C, patch_size, patch_size] to features [B, D]; pooled features lose places, so flatten a
            token map. It runs in eval mode.
        loader: batches of images [B, C, H, W] in the range that the encoder wants, or tuples that begin with them; both
            sides at least ``patch_size + 2 * ceil(max_displacement)``, so that no view leaves the image.
        patch_size: side of the views in pixels.
        max_displacement: ρ in pixels, above 0 and below half of the patch; None takes a quarter of it, which is
            S-COCO's 32 of 128.
        held_out: share of the images to measure on, above 0 and below 1.
        seed: decides places, displacements, the split and the regressor; the global random state does not change.
        progress: whether to show bars, where tqdm is installed.
        hidden_dim: width of the hidden layers.
        epochs: passes over the training rows.
        weight_decay: of AdamW, at least 0.

    Returns:
        The mean corner error; 0 is exact.

    Raises:
        TypeError, ValueError: images that are too small, features that are not [B, D] or not finite, too few images.

    Example:
        >>> def encode(patches):  # tokens of four pixels each
        ...     return torch.nn.functional.avg_pool2d(patches, 2).flatten(1)
        >>> places = torch.linspace(0, 1, 24).expand(200, 1, 24, 24)
        >>> images = torch.cat([places, places.transpose(2, 3)], 1)  # each pixel tells where it is
        >>> error = homography_probe(encode, [images], 16, epochs=20, progress=False)
        >>> error < 0.3 * 4  # of the largest displacement, a quarter of 16
        True
    """
    check = Arguments("homography_probe")
    check_callable(check, "encoder", encoder)
    for name, count in (("patch_size", patch_size), ("hidden_dim", hidden_dim), ("epochs", epochs)):
        check.count(name, count)
    reach = patch_size / 4 if max_displacement is None else max_displacement
    check.positive("max_displacement", reach)
    if not reach < patch_size / 2:  # beyond, corners may pass each other
        check.fail("max_displacement", f"below half of patch_size, {patch_size / 2:g}", reach)
    check.not_negative("weight_decay", weight_decay)
    generator = seeded(check, seed)
    parts: list[tuple[Tensor, Tensor]] = []
    outputs = Arguments("homography_probe")  # all batches share the width
    with frozen(encoder) as device:
        for batch in progress_bar(loader, "features of two patches", shown=progress):
            check = Arguments("homography_probe")  # a loader may give images on a device that features do not stay on
            images = check.features("images", images_of(check, batch), "B C H W").to(device)
            first, second, moved = _pairs(check, images, patch_size, reach, generator)
            outputs.sizes.pop("B", None)
            found = [encoded(outputs, encoder, view) for view in (first, second)]
            parts.append((torch.cat(found, 1), moved))
    if not parts:
        check.fail("loader", "of at least one batch", "none")
    features, displacements = (torch.cat(part) for part in zip(*parts))
    check.finite("encoder's output", features)
    train, test = split_rows(check, "loader", len(features), held_out, generator)
    enough_for_epochs(check, "loader", len(train), len(features))
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        _, x = standardized(features[train], features)
        t = displacements / reach
        layers = fit_mlp(x, t, train, 8, F.mse_loss, hidden_dim, epochs, weight_decay, generator, progress=progress)
        error = (mlp(x[test], layers) - t[test]).unflatten(1, (4, 2)).double().norm(dim=2).mean()
    return float(error) * reach


def _pairs(
    check: Arguments, images: Tensor, size: int, reach: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A patch of each image, the same patch with moved corners, and their displacements [B, 8] in pixels."""
    count, margin = len(images), math.ceil(reach)
    room = torch.tensor([images.shape[3], images.shape[2]]) - size - 2 * margin
    if room.min() < 0:
        check.fail("images", f"of at least {size + 2 * margin} pixels to a side", list(images.shape))
    corner = margin + (torch.rand(count, 1, 2, generator=generator, dtype=torch.float64) * (room + 1)).floor()
    moved = reach * (2 * torch.rand(count, 4, 2, generator=generator, dtype=torch.float64) - 1)
    square = (size * _CORNERS).expand(count, -1, -1)
    first, second = (
        projected(images, homographies(square, quad), padding="border", size=(size, size))
        for quad in (square + corner, square + corner + moved)
    )
    return first, second, moved.flatten(1).float()


def homographies(source: Tensor, target: Tensor) -> Tensor:
    """The matrices [B, 3, 3] that take four places [B, 4, 2] to four others, with a 1 in the last entry."""
    (x, y), (u, v) = source.unbind(2), target.unbind(2)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    # u (h6 x + h7 y + 1) = h0 x + h1 y + h2, and likewise v: two rows for each place.
    rows_u = torch.stack((x, y, one, zero, zero, zero, -u * x, -u * y), 2)
    rows_v = torch.stack((zero, zero, zero, x, y, one, -v * x, -v * y), 2)
    entries = torch.linalg.solve(torch.cat((rows_u, rows_v), 1), torch.cat((u, v), 1))
    matrices: Tensor = F.pad(entries, (0, 1), value=1).unflatten(1, (3, 3))
    return matrices
