"""Spectral decoupling: a penalty on the logits, which EqInv's Table 2 compares with."""

from __future__ import annotations

from torch import Tensor

from equireg._checks import Arguments
from equireg.similarity import accumulation_dtype

__all__ = ["spectral_decoupling"]


def spectral_decoupling(logits: Tensor, *, weight: float = 0.1) -> Tensor:
    r"""Penalize large logits, so that features that fit first do not starve the others of gradient.

    With the logits :math:`h` of a batch (Pezeshki et al., "Gradient starvation", NeurIPS 2021):

    .. math:: \frac{\lambda}{2} \frac{1}{BC} \sum_{i, c} h_{ic}^2

    Add it to the cross entropy, in place of weight decay. The paper has one logit for each sample; over several classes
    this is their mean, as in DomainBed, whose ``sd_reg`` is half of λ. It is 0 for an empty batch. Each process takes
    its own samples; the mean over processes with equal batches is the loss of the whole batch.

    Args:
        logits: floating point [B, C].
        weight: λ, finite and at least 0.

    Returns:
        the loss, a 0-d tensor.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a weight that is no such number.

    Example:
        >>> import torch
        >>> spectral_decoupling(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), weight=0.1)
        tensor(0.1750)
    """
    check = Arguments("spectral_decoupling")
    check.features("logits", logits, "B C")
    check.not_negative("weight", weight)
    squares = logits.contiguous().to(accumulation_dtype(logits.dtype)).square()
    return weight / 2 * squares.sum() / max(squares.numel(), 1)
