"""How well frozen features predict the transformation of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg._progress import progress_bar
from equireg.backbones.token_tap import TokenTap
from equireg.features import check_callable, frozen, images_of
from equireg.probes._features import enough_for_epochs, seeded, split_rows, standardized
from equireg.probes._mlp import fit_mlp, mlp
from equireg.probes.classification import linear_probe
from equireg.similarity import exactly

__all__ = ["transformation_accuracy", "transformation_r2"]


@torch.no_grad()
def transformation_r2(
    features1: Tensor,
    features2: Tensor,
    parameters: Tensor,
    *,
    held_out: float = 0.2,
    seed: int = 0,
    progress: bool = True,
    hidden_dim: int = 512,
    epochs: int = 100,
    weight_decay: float = 0.05,
) -> Tensor:
    r"""R² of each transformation parameter, regressed from the frozen features of an image and its view.

    :math:`R^2 = 1 - \sum (t - \hat t)^2 / \sum (t - \bar t)^2` on rows that the regressor never saw: 1 if the
    prediction is exact, 0 if it is as good as the mean, below 0 if it is worse (SIE; transformed image reconstruction,
    Eq. 2). The regressor is an MLP with two hidden layers on both features concatenated, fitted by AdamW; the epoch
    that is best on a tenth of the training rows is kept.

    Rows are held out at random, the same for one ``seed``, so give each image one row only.

    Args:
        features1: of the images, [N, D], floating point; standardised here.
        features2: of their transformed views, [N, D].
        parameters: [N, P], as ``IntermediateViews`` returns them.
        held_out: share of the rows to measure on, above 0 and below 1.
        seed: decides the split, the initial weights and the order of the rows; the global random state does not change.
        progress: whether to show a bar, where tqdm is installed.
        hidden_dim: width of the hidden layers.
        epochs: passes over the training rows.
        weight_decay: of AdamW, at least 0.

    Returns:
        R² of each parameter, [P], at most 1, on the CPU.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices, values that are not finite, too few rows for the
            split, a parameter that does not vary.

    Example:
        >>> t = torch.rand(400, 2)
        >>> first = torch.randn(400, 5)
        >>> second = first + torch.cat([5 * t[:, :1], torch.zeros(400, 4)], 1)  # moved by the first parameter alone
        >>> r2 = transformation_r2(first, second, t, progress=False)
        >>> bool(r2[0] > 0.8), bool(r2[1] < 0.2)
        (True, True)
    """
    check = Arguments("transformation_r2")
    for name, given in (("features1", features1), ("features2", features2)):
        check.finite(name, check.features(name, given, "N D"))
    check.features("parameters", parameters, "N P")
    check.finite("parameters", parameters)
    for name, count in (("hidden_dim", hidden_dim), ("epochs", epochs)):
        check.count(name, count)
    check.not_negative("weight_decay", weight_decay)
    generator = seeded(check, seed)
    train, test = split_rows(check, "features1", len(features1), held_out, generator)
    enough_for_epochs(check, "features1", len(train), len(features1))
    for name, given in (("features1", features1), ("parameters", parameters)):
        if given.shape[1] == 0:
            check.fail(name, "of at least one column", list(given.shape))
    constant = (parameters[train].amax(0) == parameters[train].amin(0)) | (
        parameters[test].amax(0) == parameters[test].amin(0)
    )
    if constant.any():
        check.fail("parameters", "different from row to row", f"a constant column {int(constant.nonzero()[0])}")

    # The regressor runs in full precision, whatever the encoder used.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(features1.device.type, enabled=False):
        both = torch.cat([features1, features2], 1)
        (_, x), (_, t) = (standardized(part[train], part) for part in (both, parameters))
        layers = fit_mlp(
            x, t, train, t.shape[1], F.mse_loss, hidden_dim, epochs, weight_decay, generator, progress=progress
        )
        residual = exactly(t[test] - mlp(x[test], layers)).square().sum(0)
    return (1 - residual / exactly(t[test] - t[test].mean(0)).square().sum(0)).float().cpu()


@torch.no_grad()
def transformation_accuracy(
    model: Callable[[Tensor], Any],
    loader: Iterable[Any],
    layers: Sequence[str] | None = None,
    *,
    transformation: str = "rotation",
    held_out: float = 0.2,
    hidden_dim: int | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Accuracy of a classifier that predicts quarter turns, or flips, from frozen features of each layer.

    Each image is encoded under every transformation. Features are the means of a layer's tokens (soft equivariance
    regularization, Table 7), and the classifier is ``linear_probe``'s. All versions of an image fall on one side of the
    split, which is the same on every call.

    Args:
        model: any module that takes images, in eval mode during the call; without ``layers`` any callable.
        loader: batches of images [B, C, H, W] in the range that the model wants, or tuples that begin with them.
        layers: names of submodules, as for ``TokenTap``; None takes the model's own output [B, D], as "output".
        transformation: "rotation" by 0, 90, 180 and 270 degrees, of square images; or "flip", left to right or not.
        held_out: share of the images to measure on, above 0 and below 1.
        hidden_dim: None for the linear classifier, or the width of ``linear_probe``'s MLP.
        progress: whether to show a bar, where tqdm is installed.

    Returns:
        The accuracy for each layer; chance is 0.25 for rotations and 0.5 for flips.

    Raises:
        TypeError, ValueError: unknown layers or transformation, images that are not square, too few images.

    Example:
        >>> def left_and_right(images):  # how bright the sides are
        ...     return images.mean((1, 2)).unflatten(1, (2, -1)).mean(-1)
        >>> images = torch.rand(50, 3, 8, 8) + torch.linspace(0, 5, 8)  # brighter to the right
        >>> transformation_accuracy(left_and_right, [images], transformation="flip", progress=False)
        {'output': 1.0}
    """
    check = Arguments("transformation_accuracy")
    check.option("transformation", transformation, ("rotation", "flip"))
    if layers is not None and not (isinstance(layers, (list, tuple)) and layers):
        check.fail("layers", "names of layers in a list, or None", repr(layers))
    check_callable(check, "model", model)
    found: dict[str, list[Tensor]] = {name: [] for name in layers or ("output",)}
    with frozen(model) as device, ExitStack() as stack:
        taps = {name: stack.enter_context(TokenTap(model, name)) for name in layers or ()}  # type: ignore[arg-type]
        for batch in progress_bar(loader, f"features under {transformation}", shown=progress):
            images = images_of(check, batch).to(device)
            versions = _versions(check, images, transformation)
            output = model(torch.cat(versions))
            for name, parts in found.items():
                if layers is None:
                    pooled = Arguments("transformation_accuracy").features("model's output", output, "B D")
                else:
                    pooled = taps[name].tokens.mean(1)
                if len(pooled) != len(versions) * len(images):
                    check.fail("model", "one that gives a row for each image", list(pooled.shape))
                parts.append(pooled.unflatten(0, (len(versions), len(images))).float().cpu())
    if not next(iter(found.values())):
        check.fail("loader", "of at least one batch", "none")
    features = {name: torch.cat(parts, 1) for name, parts in found.items()}
    kinds, count = next(iter(features.values())).shape[:2]
    train, test = split_rows(check, "loader", count, held_out, torch.Generator().manual_seed(0))

    def labelled(of_layer: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        return of_layer[:, images].flatten(0, 1), torch.arange(kinds).repeat_interleave(len(images))

    return {
        name: linear_probe(
            *labelled(of_layer, train), *labelled(of_layer, test), hidden_dim=hidden_dim, progress=progress
        )
        for name, of_layer in progress_bar(features.items(), "probes of layers", shown=progress)
    }


def _versions(check: Arguments, images: Tensor, transformation: str) -> list[Tensor]:
    if images.dim() != 4:
        check.fail("loader", "a loader of images [B, C, H, W]", list(images.shape))
    if transformation == "flip":
        return [images, images.flip(-1)]
    if images.shape[2] != images.shape[3]:
        check.fail("loader", "a loader of square images, to turn them", list(images.shape))
    return [images.rot90(turns, (2, 3)) for turns in range(4)]
