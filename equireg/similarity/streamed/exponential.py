"""The exponential of a whole tile, by powers of two.

On a CPU, ``torch.exp`` calls MKL, which takes four times as long as ``torch.exp2`` on AMD processors.
"""

from __future__ import annotations

import math

from torch import Tensor

LOG2E = 1 / math.log(2)


def exp_(x: Tensor) -> Tensor:
    """``e^x``, in place."""
    return x.mul_(LOG2E).exp2_()
