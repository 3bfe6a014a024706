"""Token maps averaged over their places, as a transformation belongs to the whole image."""

from __future__ import annotations

from torch import Tensor

from equireg._checks import Arguments


def pooled(check: Arguments, name: str, features: Tensor) -> Tensor:
    """[B, D], tokens averaged over their places."""
    if check.tensor(name, features).dim() == 3:
        return check.features(name, features, f"B {name}_T D").mean(1)
    return check.features(name, features, "B D")
