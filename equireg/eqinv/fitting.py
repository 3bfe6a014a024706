"""Environments of a data set from its features, or from a loader and an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from equireg._checks import Arguments
from equireg.eqinv.environments import Environments
from equireg.features import extract_features


def fitted_environments(
    features: Tensor | Iterable[Any],
    labels: Tensor | None,
    indices: Tensor | None,
    *,
    num_classes: int,
    encoder: Callable[[Tensor], Tensor] | None,
    num_samples: int | None,
    progress: bool,
    **options: Any,
) -> Environments:
    """As ``ClassWiseIRM.fit_environments`` describes it."""
    check = Arguments("ClassWiseIRM.fit_environments")
    if encoder is not None:
        if isinstance(features, Tensor):
            check.fail_type("features", "a loader where encoder is given", "a tensor")
        if labels is not None or indices is not None:
            check.fail("labels and indices", "None where encoder is given: the loader gives them", "given")
        loader = features
        features, labels, indices = extract_features(encoder, loader, progress=progress)
        if num_samples is None:
            _check_complete(check, loader, indices)
    elif not isinstance(features, Tensor):
        check.fail_type("features", "a tensor, or a loader together with encoder", type(features).__name__)
    elif labels is None:
        check.fail("labels", "given with features", None)
    environments = Environments.split(
        features, labels, num_classes, indices=indices, num_samples=num_samples, **options
    )
    if encoder is not None:
        environments.release()  # nobody else holds these features, and they may be gigabytes
    return environments


def _check_complete(check: Arguments, loader: Any, indices: Tensor) -> None:
    """A sample that is left out here would be missed in the middle of the training."""
    try:
        size = len(loader.dataset)
    except (AttributeError, TypeError):  # a loader without a dataset, or one without a length
        return
    found = len(indices.unique())
    if found < size:
        rule = f"one that gives each of the {size} samples of its dataset (drop_last=False, no sampler)"
        check.fail("loader", f"{rule}, unless num_samples is given", f"{found} of them")
