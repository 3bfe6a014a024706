"""The same sums as ``chunked``, in kernels for Nvidia GPUs: a tile of logits never leaves the chip.

``kernels.py`` needs Triton and is imported only when a kernel is requested.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from equireg.similarity.dense import Outcome, Problem
from equireg.similarity.products import matmul_precision
from equireg.similarity.triton.tiles import Tile, cut, power_of_two

_WIDEST, _MOST_ENVIRONMENTS = 512, 8


def refusal(x: Tensor, col_weight: Tensor | None, row_select: Tensor | None) -> str | None:
    """Why the kernels cannot serve these arguments; None where they can."""
    try:
        from equireg.similarity.triton import kernels
    except ImportError as error:
        return f"Triton is not installed ({error})"
    interpreted = kernels.INTERPRETED
    if not interpreted:
        if not x.is_cuda:
            return f"x is on {x.device.type}, and the kernels are for CUDA"
        if torch.version.hip is not None:
            return "the kernels are for CUDA, and this PyTorch is built for ROCm"
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 0):
            return f"the compute capability is {capability[0]}.{capability[1]}, and the kernels need 8.0"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x is of {x.dtype}, and the kernels are for float16, bfloat16 and float32"
    if interpreted and _working_dtype(x) == torch.bfloat16:
        return "Triton's interpreter forms wrong products of bfloat16"
    if not interpreted and x.dtype == torch.float32 and matmul_precision("cuda") == "highest":
        precise = "float32 products at full precision use no tensor core"
        return f"{precise} (torch.set_float32_matmul_precision('high') allows rounded ones)"
    if x.shape[1] > _WIDEST:
        return f"x is {x.shape[1]} wide, and the kernels are for at most {_WIDEST}"
    if row_select is not None:
        return "the kernels know no row_select"
    if col_weight is not None and len(col_weight) > _MOST_ENVIRONMENTS:
        return f"col_weight has {len(col_weight)} environments, and the kernels are for at most {_MOST_ENVIRONMENTS}"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """``lse`` and ``mean``, each [E, M]."""
    reason = refusal(problem.x, problem.col_weight, problem.row_select)
    if reason is not None:
        raise RuntimeError(f"pair_lse: backend 'triton' cannot run here: {reason}; 'chunked' runs on every device")
    sides = _Sides(problem)
    rows, cols = len(sides.x), len(sides.y)
    tile, splits, per_split = cut("forward", sides.x, sides.y)
    partial = [sides.scale.new_empty(splits, sides.environments, rows) for _ in range(3)]
    if rows and cols:
        sides.launch("forward", tile, splits, rows,
            sides.x, sides.y, sides.scale, *sides.keys, sides.weight, *partial, rows, cols, per_split,
        )  # fmt: skip
    peaks, totals, moments = partial
    if not cols:
        return sides.scale.new_full(totals.shape[1:], -math.inf), sides.scale.new_zeros(totals.shape[1:])
    peak = peaks.amax(0)
    peak = peak.masked_fill(peak < -1e29, 0)  # where no pair counts; the fade below makes it zero
    fade = torch.exp2(peaks - peak)
    total, moment = (totals * fade).sum(0), (moments * fade).sum(0)
    return math.log(2) * (peak + total.log2()), (math.log(2) * moment / total).masked_fill(total == 0, 0)


def backward(problem: Problem, outcome: Outcome) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, without the factor of the scale, to y and to col_weight; empty where they are not needed."""
    sides = _Sides(problem)
    stats = _Statistics(sides, outcome)
    needs_x, needs_y = outcome.needs_x, outcome.needs_y
    needs_weight = outcome.needs_weight and problem.col_weight is not None
    by_row, by_col, by_weight = (sides.scale.new_zeros(0) for _ in range(3))
    if problem.y is None:
        if needs_x or needs_weight:
            by_row, by_weight = _owned(sides, stats, needs_x, True, needs_x, needs_weight)
    else:
        if needs_x:
            by_row, _ = _owned(sides, stats, True, False, True, False)
        if needs_y or needs_weight:
            by_col, by_weight = _owned(sides, stats, False, True, needs_y, needs_weight)
    if needs_y and problem.y is not None:
        by_col.mul_(problem.scale)
    return by_row, by_col, by_weight


class _Sides:
    """The arguments as the kernels read them: contiguous, of few types."""

    def __init__(self, problem: Problem):
        x, y, scale, pairs, col_weight, _ = problem
        dtype = _working_dtype(x)
        self.x = x.to(dtype).contiguous()
        self.y = self.x if y is None else y.to(dtype).contiguous()
        self.scale = scale.float()
        self.width = x.shape[1]
        self.relation = pairs.relation
        self.keys = (*_ranks(pairs.row_group, pairs.col_group), *_ranks(pairs.row_id, pairs.col_id))
        self.weight = None if col_weight is None else col_weight.float().contiguous()
        self.environments = problem.environments

    def launch(self, name: str, tile: Tile, splits: int, rows: int, *arguments: Any, **constants: Any) -> None:
        from equireg.similarity.triton import kernels

        full = self.x.dtype != torch.float32 or kernels.INTERPRETED or matmul_precision("cuda") == "highest"
        with torch.cuda.device(self.x.device) if self.x.is_cuda else contextlib.nullcontext():
            getattr(kernels, name)[(-(-rows // tile.rows), splits)](
                *arguments, **constants, D=self.width, E=self.environments, EP=power_of_two(self.environments),
                RELATION=self.relation, PRECISION="ieee" if full else "tf32",
                ROWS=tile.rows, COLS=tile.cols, WIDTH=tile.width, num_warps=tile.warps, num_stages=tile.stages,
                enable_fp_fusion=True,  # the default differs between releases of Triton
            )  # fmt: skip


class _Statistics:
    """The values that a program reads for each row, [E, M]; zero gradients for rows that keep no pair."""

    def __init__(self, sides: _Sides, outcome: Outcome):
        lse, mean, grad_lse, grad_mean = outcome[:4]
        empty = lse == -math.inf
        constant, slope = grad_lse.float().masked_fill(empty, 0), None
        if grad_mean is not None:
            slope = grad_mean.float().masked_fill(empty, 0)
            constant = constant - slope * mean  # dl = p (constant + g_mean (1 + l)), dw = q (constant + g_mean l)
        self.rows = (
            (lse / math.log(2)).masked_fill(empty, 0).contiguous(),
            constant.contiguous(),
            None if slope is None else (slope * math.log(2)).contiguous(),  # the kernels' logits are in base 2
        )
        self.normalizer = None
        if sides.x.dtype == torch.float16:
            self.normalizer = _normalizer(sides, constant, slope)


def _normalizer(sides: _Sides, constant: Tensor, slope: Tensor | None) -> Tensor:
    """Factor that brings the coefficients dl into fp16's range, where small ones would vanish and large ones overflow.

    The softmax is at most 1, so no coefficient is larger than the sum over environments of its row's weight.
    """
    weight = constant.abs()
    if slope is not None:
        longest = [_largest(torch.linalg.vector_norm(part.float(), dim=1)) for part in (sides.x, sides.y)]
        weight = weight + slope.abs() * (1 + longest[0] * longest[1] * sides.scale.abs())
    # Half of 2^15, because two coefficients are added where own is other.
    return 2.0**14 / _largest(weight.sum(0)).clamp(min=1e-30)


def _largest(numbers: Tensor) -> Tensor:
    """The largest finite number: a single row that is not finite would otherwise spoil all others."""
    return numbers.where(numbers.isfinite(), 0).amax() if len(numbers) else numbers.sum()


def _owned(
    sides: _Sides, stats: _Statistics, by_own: bool, by_other: bool, features: bool, weights: bool
) -> tuple[Tensor, Tensor]:
    """The backward kernel's sums for one side (x with ``by_own``, otherwise y): dl times the other side, and dw."""
    own, other, keys = sides.x, sides.y, sides.keys
    if not by_own:
        own, other, keys = other, own, (keys[1], keys[0], keys[3], keys[2])
    tile, splits, per_split = cut("features" if features else "weights", own, other)
    padded = max(16, power_of_two(sides.width))
    by_feature = sides.scale.new_empty((splits, *own.shape) if features else (1, 0))
    by_weight = sides.scale.new_empty((splits, sides.environments, len(own)) if weights else (1, 0))
    absent = (None, None, None)
    if not len(own) or not len(other):
        return by_feature.zero_().sum(0), by_weight.zero_().sum(0)
    sides.launch("backward", tile, splits, len(own),
        own, other, sides.scale, *keys, sides.weight if by_other else None, sides.weight if by_own else None,
        *(stats.rows if by_own else absent), *(stats.rows if by_other else absent), stats.normalizer,
        by_feature, by_weight, len(own), len(other), per_split,
        PADDED=padded, BY_OWN=by_own, BY_OTHER=by_other, FEATURES=features, WEIGHTS=weights,
    )  # fmt: skip
    feature = by_feature[0] if splits == 1 else by_feature.sum(0)
    if features and stats.normalizer is not None:
        feature = feature / stats.normalizer
    return feature, by_weight[0] if splits == 1 else by_weight.sum(0)


def _ranks(rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The keys of both sides as ranks among all keys: ranks fit int32 and keep the order, whatever the keys."""
    if rows is None or cols is None:
        return None, None
    keys = rows.contiguous() if cols is rows else torch.cat([rows, cols])
    ranks = torch.searchsorted(keys.sort().values, keys, out_int32=True)
    return ranks[: len(rows)], ranks[len(keys) - len(cols) :]


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.float32 and matmul_precision("cuda") == "medium" else x.dtype
