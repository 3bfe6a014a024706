"""What a batch must be like before ``ClassWiseIRM``, here ``irm``, compares its classes; what processes agree on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equireg._agreement import Agreement, Facts, checksum, world_size
from equireg._checks import Arguments
from equireg.eqinv.class_risks import check_batch
from equireg.similarity import accumulation_dtype

SETTINGS = (
    *("weight", "penalty", "temperature", "denominator", "detach", "contrast", "penalty_on", "risk_weight"),
    "sample_weights",
)


def checked_batch(irm: Any, features: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Labels and indices as int64."""
    check = Arguments("ClassWiseIRM").beside(irm)
    check.sizes["D"] = irm.num_features
    labels = check_batch(check, "features", features, labels)
    check.below("labels", labels, irm.num_classes, "num_classes")
    used = irm.sample_weights or indices is not None  # else nothing is read, which could wait for a GPU
    fitted = used and irm.environments is not None and irm.environments.fitted
    if irm.sample_weights and not fitted:
        check.fail("fit_environments", "called first, as sample_weights are those of its environments", "none")
    if indices is not None:
        indices = check.integers("indices", indices, "B")
        if not fitted:
            check.fail("indices", "None before fit_environments", list(indices.shape))
        check.below("indices", indices, irm.environments.num_samples, "samples of the environments")
        irm.environments.check_labels(check, indices, labels)
    elif irm.sample_weights:
        check.fail("indices", "given with sample_weights", None)
    alone = len(features) == 1 and irm.processes.size > 1 and irm.training
    if alone and any(isinstance(module, nn.BatchNorm1d) for module in irm.projection.modules()):
        check.fail("features", "of at least 2 samples, for the projection's BatchNorm", list(features.shape))
    return labels, indices


def check_projection(check: Arguments, projection: nn.Module | None, num_features: int) -> None:
    """Where it begins with a linear layer, which is of so many features."""
    while isinstance(projection, nn.Sequential) and len(projection):
        projection = projection[0]
    if isinstance(projection, nn.Linear) and projection.in_features not in (num_features, 0):  # 0: lazy
        check.fail("projection", f"of {num_features} features (num_features)", f"one of {projection.in_features}")


def check_mask_alike(irm: Any) -> None:
    """Outside DistributedDataParallel each process would train a mask of its own, from another start or another batch.

    Looked at in every call that trains, up to the first one after the optimizer moved the mask: not at once where
    gradients are accumulated, or where a GradScaler skips steps. All processes have to take part in these calls.
    """
    if torch.compiler.is_compiling() or not (irm.training and torch.is_grad_enabled()) or irm._moved_alike:
        return
    group = irm.processes.group
    if (size := world_size(group)) == 1:
        return
    with Agreement("ClassWiseIRM", size, group) as facts:
        seen = checksum(irm.mask.weight.detach().float().view(torch.int32))
        facts["the mask (wrap it in DistributedDataParallel together with the backbone)"] = seen
    irm._moved_alike = irm._mask_seen not in (None, seen)
    irm._mask_seen = seen


def facts_of(irm: Any, features: Tensor, labels: Tensor, indices: Tensor | None) -> Facts:
    """What processes have to agree on."""
    bits = None if indices is None or irm.environments is None else irm.environments.bits
    return {
        "features": features,
        "labels": labels,
        "indices": indices,
        "environments": bits,
        "environments' sum": None if bits is None else partial(irm.checksum.of, bits),
        "settings": {name: getattr(irm, name) for name in SETTINGS},
        "whether parameters learn": torch.is_grad_enabled() and any(p.requires_grad for p in irm.parameters()),
    }


def zero_of(irm: Any, features: Tensor) -> Tensor:
    """Zero, with a zero gradient for all the loss can reach: distributed training waits for every parameter."""
    zero = features.new_zeros((), dtype=accumulation_dtype(features.dtype))
    for part in [*irm.parameters()] if irm.detach is True else [features, *irm.parameters()]:
        zero = zero + part.flatten()[:0].sum()
    return zero
