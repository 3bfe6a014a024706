"""Token maps averaged over their places, as a transformation belongs to the whole image."""

from __future__ import annotations

from torch import Tensor

from equireg._checks import Arguments


def pooled(check: Arguments, name: str, features: Tensor) -> Tensor:
    """[B, D], tokens averaged over their places."""
    if check.tensor(name, features).dim() == 3:
        return check.features(name, features, f"B {name}_T D").mean(1)
    return check.features(name, features, "B D")


def pooled_pairs(
    check: Arguments, features: Tensor, transformed: Tensor, parameters: Tensor, why_two: str
) -> tuple[Tensor, Tensor]:
    """Features of images and of their views, [B, D] each, beside [B, P] parameters; of two images at least."""
    before, after = (pooled(check, *named) for named in (("features", features), ("transformed", transformed)))
    check.features("parameters", parameters, "B P")
    if len(before) < 2:
        check.fail("features", f"of at least 2 images: {why_two}", list(features.shape))
    return before, after
