"""Test-time augmentation and ensembles: merged class probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from equireg._checks import Arguments, values_visible
from equireg.similarity import accumulation_dtype

__all__ = ["ensemble", "fit_ensemble_weights", "predict_tta"]

MERGES = ("mean", "gmean", "tsharpen")


@torch.no_grad()
def predict_tta(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    crops: str = "flip",
    merge: str = "mean",
    crop_size: int | tuple[int, int] | None = None,
    sharpening: float = 0.5,
) -> Tensor:
    r"""Class probabilities, merged over flipped and cropped versions of each image.

    Args:
        model: images [B, C, H, W] to logits [B, classes]. Call ``model.eval()`` first; its mode is not changed.
        images: floating point, [B, C, H, W], as the model wants them.
        crops: ``"flip"``: the image and its mirror image; ``"five"``: the corners and the centre; ``"ten"``: these and
            their mirror images.
        merge: ``"mean"``; ``"gmean"``, the geometric mean; ``"tsharpen"``, the mean of :math:`p^t` (as in ttach); each
            normalised to a sum of 1.
        crop_size: side of the crops, or (height, width), passed to the model in this size; None takes 7/8 of each side,
            resized to the size of the images.
        sharpening: t, above 0; at 0.5, less certain versions count more.

    Returns:
        [B, classes], in float32 or float64; each row sums to 1.

    Raises:
        TypeError, ValueError: images of another type or shape, unknown options, crops larger than the images, a model
            that does not give logits [B, classes].

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18(num_classes=10).eval()
        >>> probabilities = predict_tta(model, torch.rand(2, 3, 64, 64), crops="ten", merge="gmean")
        >>> probabilities.shape, bool(torch.allclose(probabilities.sum(1), torch.ones(2)))
        (torch.Size([2, 10]), True)
    """
    check = Arguments("predict_tta")
    check.features("images", images, "B C H W")
    if images.numel() == 0:
        check.fail("images", "of at least one image and pixel", list(images.shape))
    if not callable(model):
        check.fail_type("model", "a module or a function", type(model).__name__)
    check.option("crops", crops, ("flip", "five", "ten"))
    _check_merge(check, merge, sharpening)
    versions = [images] if crops == "flip" else _five(check, images, crop_size)
    if crops != "five":
        versions += [version.flip(-1) for version in versions]
    logits = []
    for version in versions:  # one after the other: ten versions of a batch at once would be ten times its memory
        output = check.floats("model's output", model(version))
        if output.dim() != 2 or len(output) != len(images):
            check.fail("model's output", f"[{len(images)}, classes]", list(output.shape))
        logits.append(output)
    log_p = torch.stack(logits).to(accumulation_dtype(logits[0].dtype)).log_softmax(-1)
    return _merged(log_p, log_p.new_zeros(len(log_p)), merge, sharpening)


def ensemble(
    probabilities: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | Tensor | None = None,
    merge: str = "mean",
    sharpening: float = 0.5,
) -> Tensor:
    r"""Merge the class probabilities of several models.

    Args:
        probabilities: [M, B, classes], or M tensors [B, classes]; each row sums to 1.
        weights: M numbers, one for each model, at least 0 and not all 0, as ``fit_ensemble_weights`` finds them; None
            weights all alike.
        merge: ``"mean"``; ``"gmean"``; ``"tsharpen"``, the mean of :math:`p^t`; each weighted, and normalised to 1.
        sharpening: t, above 0.

    Returns:
        [B, classes], in float32 or float64; each row sums to 1.

    Raises:
        TypeError, ValueError: wrong types, shapes or ranges; on CPU also rows that are no probabilities.

    Example:
        >>> one, other = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.4, 0.6]])
        >>> ensemble([one, other])
        tensor([[0.6000, 0.4000]])
        >>> ensemble([one, other], weights=[3, 1])
        tensor([[0.7000, 0.3000]])
    """
    check = Arguments("ensemble")
    log_p = _stacked(check, probabilities)
    _check_merge(check, merge, sharpening)
    if isinstance(weights, (tuple, list)):
        for weight in weights:
            check.number("weights", weight)
    given = torch.ones(len(log_p)) if weights is None else torch.as_tensor(weights)
    if given.shape != (len(log_p),):
        check.fail("weights", f"{len(log_p)} numbers, one for each model", list(given.shape))
    given = given.to(log_p)
    if values_visible(given) and not (bool((given >= 0).all()) and 0 < float(given.sum().detach()) < float("inf")):
        check.fail("weights", "finite, at least 0, and not all 0", given.tolist())
    return _merged(log_p, given.log(), merge, sharpening)


def fit_ensemble_weights(
    probabilities: Tensor | Sequence[Tensor], labels: Tensor, *, merge: str = "mean", sharpening: float = 0.5
) -> Tensor:
    """Fit the models' weights by maximum likelihood of the ensemble on validation samples.

    L-BFGS in float64 starts from equal weights and keeps their sum at 1. For the mean the problem is convex.

    Args:
        probabilities: as of ``ensemble``, on samples that none of the models was trained on.
        labels: their classes, whole numbers [B].
        merge: how the ensemble will be merged.
        sharpening: t, above 0.

    Returns:
        float64 [M], on the CPU: at least 0, with a sum of 1.

    Raises:
        TypeError, ValueError: as ``ensemble``; labels of another length or out of range.

    Example:
        >>> good, bad = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> weights = fit_ensemble_weights([good, bad], torch.tensor([0, 1]))
        >>> bool(weights[0] > 0.99), weights.sum()
        (True, tensor(1., dtype=torch.float64))
    """
    check = Arguments("fit_ensemble_weights")
    log_p = _stacked(check, probabilities)
    _check_merge(check, merge, sharpening)
    check.sizes["B"] = log_p.shape[1]
    labels = check.integers("labels", labels, "B")
    if not ((labels >= 0) & (labels < log_p.shape[2])).all():
        check.fail("labels", f"in 0 .. {log_p.shape[2] - 1} (classes)", labels.unique().tolist())
    with torch.inference_mode(False), torch.enable_grad():
        log_p, labels = log_p.detach().cpu().double().clone(), labels.cpu().clone()
        logits = torch.zeros(len(log_p), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def objective() -> Tensor:
            optimizer.zero_grad()
            merged = _merged(log_p, logits.log_softmax(0), merge, sharpening, log=True)
            loss = -merged.gather(1, labels[:, None]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(objective)  # type: ignore[arg-type]
    return logits.detach().softmax(0)


def _merged(log_p: Tensor, log_weights: Tensor, merge: str, sharpening: float, *, log: bool = False) -> Tensor:
    """[B, classes] from log-probabilities [M, B, classes]; in logarithms, so that nothing small is lost."""
    log_weights = log_weights[:, None, None] - log_weights.logsumexp(0)
    if merge == "gmean":
        weights = log_weights.exp()
        # A model of weight 0 has no effect, even if it rules a class out.
        together = torch.where(weights > 0, weights * log_p.clamp(min=_IMPOSSIBLE), 0).sum(0)
    else:
        power = sharpening if merge == "tsharpen" else 1.0
        together = (power * log_p.clamp(min=_IMPOSSIBLE) + log_weights).logsumexp(0)
    return together.log_softmax(-1) if log else together.softmax(-1)


_IMPOSSIBLE = -1e4  # log of a probability of 0: finite, so that a class that every model rules out is 0 and not NaN


def _five(check: Arguments, images: Tensor, size: int | tuple[int, int] | None) -> list[Tensor]:
    """Corners and centre, as torchvision's FiveCrop."""
    height, width = images.shape[2:]
    sides = (max(1, round(height * 7 / 8)), max(1, round(width * 7 / 8))) if size is None else size
    h, w = sides if isinstance(sides, (tuple, list)) and len(sides) == 2 else (sides, sides)
    for side, most in ((h, height), (w, width)):
        check.count("crop_size", side)  # type: ignore[arg-type]
        if side > most:  # type: ignore[operator]
            check.fail("crop_size", f"at most the images' {height} x {width}", size)
    y, x = round((height - h) / 2), round((width - w) / 2)  # type: ignore[operator]
    corners = [(0, 0), (0, width - w), (height - h, 0), (height - h, width - w), (y, x)]  # type: ignore[operator]
    crops = [images[:, :, top : top + h, left : left + w] for top, left in corners]
    if size is not None:
        return crops
    exact = (crop.to(accumulation_dtype(crop.dtype)) for crop in crops)  # CPUs do not resize half precision
    resized = (nn.functional.interpolate(crop, (height, width), mode="bicubic", antialias=True) for crop in exact)
    return [crop.to(images.dtype) for crop in resized]


def _check_merge(check: Arguments, merge: str, sharpening: float) -> None:
    check.option("merge", merge, MERGES)
    check.positive("sharpening", sharpening)


def _stacked(check: Arguments, probabilities: Tensor | Sequence[Tensor]) -> Tensor:
    """Log-probabilities [M, B, classes]."""
    if not isinstance(probabilities, Tensor):
        if not isinstance(probabilities, (list, tuple)) or not probabilities:
            check.fail_type("probabilities", "a tensor, or a list of one or more", type(probabilities).__name__)
        for part in probabilities:
            check.features("probabilities", part, "B classes")
        probabilities = torch.stack(list(probabilities))
    check.features("probabilities", probabilities, "M B classes")
    if probabilities.numel() == 0:
        check.fail("probabilities", "of at least one model, sample and class", list(probabilities.shape))
    p = probabilities.to(accumulation_dtype(probabilities.dtype))
    if values_visible(p):
        off = (p.detach().sum(-1) - 1).abs().amax()
        tolerance = 1e-3 if probabilities.dtype.itemsize >= 4 else 2e-2  # half precision rounds each of them
        if not (bool((p.detach() >= 0).all()) and float(off) <= tolerance):
            check.fail("probabilities", "at least 0, with a sum of 1 in each row", f"rows that are {float(off):g} off")
    return p.log()
