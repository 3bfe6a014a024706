"""Semantic segmentation by a linear map on frozen tokens, upright and turned."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg.features import check_callable, frozen
from equireg.probes._features import standardizer
from equireg.probes._linear import linear
from equireg.probes._maps import MOVES, image_batches, token_map
from equireg.probes.classification import logistic_regression

__all__ = ["dense_probe"]


@torch.no_grad()
def dense_probe(
    encode: Callable[[Tensor], Tensor],
    train_loader: Iterable[Any],
    loader: Iterable[Any],
    num_classes: int,
    *,
    ignore_index: int | None = None,
    weight_decay: float = 1e-3,
    max_iterations: int = 100,
    progress: bool = True,
) -> dict[str, float]:
    r"""Mean IoU of a linear map from frozen tokens to the classes of pixels, on images upright, turned and flipped.

    The linear classifier :math:`W` of dense evaluations (as in DINOv2, Oquab et al., 2023), fitted on upright images
    alone. A class map turns with its image, so an encoder whose tokens turn with the image loses nothing where another
    one does:

    .. math::
        \text{mIoU}(g) = \frac{1}{|C|} \sum_{c \in C} \frac{|P_c \cap M_c|}{|P_c \cup M_c|}, \qquad
        P = \text{argmax}(\text{resize}(W f(\rho_g(x)))), \quad M = \rho_g(m)

    with the pixels :math:`P_c` predicted to be of class c, and :math:`M_c` those of class c, over all images;
    :math:`C` are the classes that occur in the masks. Scores of tokens are resized to pixels bilinearly.

    :math:`W` minimises the cross entropy of each token's score with the classes of the pixels it covers, with
    ``linear_probe``'s standardised features, weight decay and L-BFGS: convex, without a learning rate or a seed. All
    training tokens are held in memory.

    Args:
        encode: images [B, C, H, W] to tokens [B, T, D], row by row of a grid with the image's aspect, or to a map
            [B, D, h, w]. With ``TokenTap``, a function that runs the model and returns ``tap.tokens``. It runs in eval
            mode, also on images whose sides are swapped by a quarter turn.
        train_loader: batches (images, masks) to fit on; masks are whole numbers [B, H, W]; sides are whole tokens.
        loader: batches (images, masks) to measure on.
        num_classes: C, with classes 0 .. C - 1.
        ignore_index: the label of pixels that do not count, such as 255; None takes C, the first number that is no
            class: 11 for CamVid with 11 classes.
        weight_decay: at least 0.
        max_iterations: of L-BFGS.
        progress: whether to show bars, where tqdm is installed.

    Returns:
        The mean IoU, 0 to 1: "upright"; "90" and "180", turned counter-clockwise; "flip", left to right.

    Raises:
        TypeError, ValueError: batches that are not (images, masks), masks of another size or with other labels, tokens
            that fit no grid, no labelled pixel.

    Example:
        >>> masks = torch.randint(3, (8, 4, 6))
        >>> images = torch.nn.functional.one_hot(masks, 3).permute(0, 3, 1, 2).float()
        >>> images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        >>> masks = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
        >>> def encode(images):  # tokens that say which class they are of
        ...     return torch.nn.functional.avg_pool2d(images, 2).flatten(2).transpose(1, 2)
        >>> found = dense_probe(encode, [(images[:4], masks[:4])], [(images[4:], masks[4:])], 3, progress=False)
        >>> list(found), all(share > 0.9 for share in found.values())
        (['upright', '90', '180', 'flip'], True)
    """
    check = Arguments("dense_probe")
    check_callable(check, "encode", encode)
    check.count("num_classes", num_classes, least=2)
    ignored = num_classes if ignore_index is None else ignore_index
    if isinstance(ignored, bool) or not isinstance(ignored, numbers.Integral):
        check.fail_type("ignore_index", "a whole number or None", type(ignored).__name__)
    check.not_negative("weight_decay", weight_decay)
    check.count("max_iterations", max_iterations)
    with frozen(encode) as device:
        x, counts = _training_tokens(encode, train_loader, num_classes, ignored, device, progress)
        standardize = standardizer(x)
        weight, bias = logistic_regression(standardize(x), counts, num_classes, weight_decay, max_iterations)

        table = {name: torch.zeros(num_classes, num_classes, dtype=torch.int64) for name in MOVES}
        for images, masks in _batches("loader", loader, num_classes, ignored, progress):
            for name, move in MOVES.items():
                tokens = token_map("dense_probe", encode, move(images).to(device))
                scores = linear(standardize(tokens.movedim(1, -1)), weight, bias).movedim(-1, 1)
                truth = move(masks).to(scores.device)
                answers = F.interpolate(scores, truth.shape[1:], mode="bilinear", align_corners=False).argmax(1)
                table[name] += _confusion(answers, truth, num_classes, ignored).cpu()
    if not table["upright"].any():
        check.fail("loader", "of masks with at least one pixel that is not ignored", "none")
    return {name: _mean_iou(found) for name, found in table.items()}


def _training_tokens(
    encode: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    classes: int,
    ignored: int,
    device: torch.device,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens [N, D] that cover a labelled pixel, and how many of each class they cover, with a mean sum of 1."""
    features, counts = [], []
    for images, masks in _batches("train_loader", loader, classes, ignored, progress):
        tokens = token_map("dense_probe", encode, images.to(device))
        (h, w), (height, width) = tokens.shape[2:], masks.shape[1:]
        if height % h or width % w:
            Arguments("dense_probe").fail("train_loader", f"of masks of whole tokens, {h} x {w}", [height, width])
        kept = F.one_hot(torch.where(masks == ignored, classes, masks), classes + 1)[..., :classes]
        covered = kept.unflatten(1, (h, height // h)).unflatten(3, (w, width // w)).sum((2, 4)).flatten(0, 2)
        some = covered.sum(1) > 0
        features.append(tokens.permute(0, 2, 3, 1).flatten(0, 2)[some.to(tokens.device)])
        counts.append(covered[some].float())
    x, covered = torch.cat(features), torch.cat(counts)
    if not len(x):
        Arguments("dense_probe").fail("train_loader", "of masks with at least one pixel that is not ignored", "none")
    Arguments("dense_probe").finite("encode(images)", x)
    return x, (covered / covered.sum(1).mean()).to(x.device)


def _batches(
    name: str, loader: Iterable[Any], classes: int, ignored: int, progress: bool
) -> Iterable[tuple[Tensor, Tensor]]:
    """The images and masks of each batch, checked."""
    for check, images, given in image_batches("dense_probe", name, loader, "masks", progress):
        masks = check.integers(f"masks of {name}", given, "B H W")
        check.below(f"masks of {name}", masks.masked_fill(masks == ignored, 0), classes, f"or {ignored}, ignored")
        yield images, masks


def _confusion(answers: Tensor, truth: Tensor, classes: int, ignored: int) -> Tensor:
    """How many pixels of each class (rows) were given which answer (columns)."""
    kept = truth != ignored
    cells: Tensor = (classes * truth[kept] + answers[kept]).bincount(minlength=classes**2)
    return cells.view(classes, classes)


def _mean_iou(table: Tensor) -> float:
    both, of_class, answered = table.diagonal(), table.sum(1), table.sum(0)
    iou = both / (of_class + answered - both)
    return float(iou[of_class > 0].double().mean())
