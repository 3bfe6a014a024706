"""Mean contrast of rows with their positives, whose gradients are formed in the forward pass.

    mean over i of  log(1 + sum_j k_ij e^{l_ij} / e^{s_i}),     s_i = scale <x_i, p_i>,     l_ij = scale <x_i, y_j>

The columns ``y`` are all keys, ``k`` keeps the pairs of different groups, and all vectors have unit length. Once a
row's sum is known, so is each of its pairs' share of the gradient. The tiles of a block of rows are kept until then
instead of being formed again: three products for each pair, not four. Between ``x`` and itself, half of the tiles
suffice and are formed twice: two products.

Where the tiles of a block of rows are too many to be kept, or kernels were measured to be faster, the sums and the
gradient are those of ``pair_lse``, with four products.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import refuse_forward_mode, values_visible
from equireg.similarity import choice, operator
from equireg.similarity.dense import Pairs, Problem
from equireg.similarity.products import times_transposed
from equireg.similarity.streamed.bounded import BOUND
from equireg.similarity.streamed.exponential import LOG2E
from equireg.similarity.streamed.tiles import ROWS, Tiles

# Entries of the tiles that are kept for one block of rows: 64 MB of fp32 on a CPU. Elsewhere its rows are half as many
# as usual, so that 64 images of 196 tokens need 150 MB in all.
_KEPT, _DEVICE_KEPT, _DEVICE_ROWS = 2**24, 2**26, 1024

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def few(rows: int, columns: int, device: torch.device) -> bool:
    """Whether the tiles of a block of rows are few enough to be kept."""
    on_cpu = device.type == "cpu"
    return min(rows, ROWS if on_cpu else _DEVICE_ROWS) * columns <= (_KEPT if on_cpu else _DEVICE_KEPT)


def formed_at_once(
    x: Tensor,
    p: Tensor,
    keys: tuple[Tensor, Tensor] | None,
    scale: float | Tensor,
    row_group: Tensor,
    key_group: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The loss of ``mean_contrast``, which documents the arguments."""
    if isinstance(scale, Tensor):
        bounded = values_visible(scale) and float(scale.detach()) <= BOUND
    else:
        bounded, scale = scale <= BOUND, torch.full((), scale, dtype=x.dtype, device=x.device)
    first, second = keys if keys is not None else (None, None)
    refuse_forward_mode(x, p, first, second, scale)
    wanted = [
        torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)
        for parts in ((x, first, scale), (p, second))
    ]
    loss: Tensor = _contrast(x, p, first, second, scale, row_group, key_group, dtype, bounded, *wanted)[0]
    return loss


def _shapes(
    x: Tensor, p: Tensor, keys: Tensor | None, keys_prime: Tensor | None, needs_x: bool, needs_p: bool
) -> list[tuple[int, ...]]:
    """Shapes of the gradients to all four tensors; zero rows if a tensor is absent or needs no gradient."""
    parts = ((x, needs_x), (p, needs_p), (keys, needs_x), (keys_prime, needs_p))
    return [tuple(part.shape) if part is not None and needs else (0, x.shape[1]) for part, needs in parts]


@torch.library.custom_op(
    "equireg::mean_contrast",
    mutates_args=(),
    schema="(Tensor x, Tensor p, Tensor? keys, Tensor? keys_prime, Tensor scale, Tensor row_group, Tensor key_group, "
    "ScalarType dtype, bool bounded, bool needs_x, bool needs_p) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _contrast(
    x: Tensor,
    p: Tensor,
    keys: Tensor | None,
    keys_prime: Tensor | None,
    scale: Tensor,
    row_group: Tensor,
    key_group: Tensor,
    dtype: torch.dtype,
    bounded: bool,
    needs_x: bool,
    needs_p: bool,
) -> Result:
    """The loss, and its gradients to x, p, keys, keys_prime and scale."""
    shapes = _shapes(x, p, keys, keys_prime, needs_x, needs_p)
    grad_x, grad_p, grad_keys, grad_prime = (x.new_zeros(shape) for shape in shapes)
    if keys is None or keys_prime is None:
        own, columns = True, [(x, grad_x), (p, grad_p)]
    else:
        own, columns = False, [(keys, grad_keys), (keys_prime, grad_prime)]
    form = choice.of_contrast(x.new_empty(0, x.shape[1], dtype=dtype), few(len(x), 2 * len(key_group), x.device))
    if form != "at once":
        dtype = dtype if form == "triton" else x.dtype  # only kernels round
        left = x.to(dtype)
        right = torch.cat([part.to(dtype) for part, _ in columns])
        inputs = left, right, scale, "ne", row_group, key_group.repeat(2), None, None, None, None, form
        loss, grad_scale = _by_pair_lse(inputs, x, p, grad_x, grad_p, [grad for _, grad in columns], needs_x, needs_p)
        return loss, grad_x, grad_p, grad_keys, grad_prime, grad_scale
    # In base 2, for which the exponential is cheap.
    scaled, pairs = x * (scale * LOG2E), Pairs("ne", row_group, key_group, None, None)
    mirrored = own and bounded  # then the first set uses mirrored tiles
    # Autocast stays active inside an operator and would turn the products to half precision.
    with torch.autocast(x.device.type, enabled=False):
        streams = [
            (Tiles(Problem(x, part, scale, pairs), scaled, _DEVICE_ROWS), grad) for part, grad in columns[mirrored:]
        ]
        mirror = Tiles(Problem(x, None, scale, pairs), scaled) if mirrored else None
        total, share, loss, grad_scale = x.new_zeros(len(x)), x.new_zeros(len(x)), x.new_zeros(()), x.new_zeros(())
        if mirror is not None:
            _add_mirrored(mirror, total)
        for rows in streams[0][0].row_blocks:
            tiles = [[stream.logits(rows, cols) for cols in stream.col_blocks] for stream, _ in streams]
            peak = 0 if bounded else _subtract_peak(tiles, streams[0][0].empty)
            for tile in chain(*tiles):
                total[rows] += tile.exp2_().sum(1)
            gap = total[rows].log() + peak - (x[rows] * p[rows]).sum(1) * scale
            # log(e^a + e^b) - a as softplus(b - a): the difference of two large numbers would lose a small loss.
            loss += F.softplus(gap, threshold=50).sum() / len(x)
            if not needs_x and not needs_p:
                del tiles, tile  # or they would stay in memory beside those of the next rows
                continue
            pull = gap.sigmoid() / len(x)  # towards the positive; each negative pushes by its share of it
            share[rows] = (pull / total[rows]).masked_fill_(total[rows] == 0, 0)
            left, by_row = (x[rows] * (share[rows, None] * scale)).T.contiguous(), torch.zeros_like(x[rows])
            for (stream, grad), masses in zip(streams, tiles):
                for cols, mass in zip(stream.col_blocks, masses):
                    if needs_x:
                        by_row += times_transposed(mass, stream.y[cols].T)
                    if grad.numel():
                        grad[cols] += times_transposed(left, mass.T).T
            if needs_x:
                by_row.mul_(share[rows, None]).addcmul_(p[rows], pull[:, None], value=-1)
                grad_scale += (by_row * x[rows]).sum()
                grad_x[rows] += by_row.mul_(scale)
            if needs_p:
                grad_p[rows] -= x[rows] * (pull[:, None] * scale)
            del tiles, tile, masses, mass
        if mirror is not None and needs_x:
            grad_scale += _add_mirrored_gradient(mirror, share, grad_x, scale)
        return loss, grad_x, grad_p, grad_keys, grad_prime, grad_scale


def _by_pair_lse(
    inputs: tuple[Any, ...],
    x: Tensor,
    p: Tensor,
    grad_x: Tensor,
    grad_p: Tensor,
    of_columns: list[Tensor],
    needs_x: bool,
    needs_p: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient to the scale, from the inputs of ``pair_lse``; adds to the other gradients."""
    scale = inputs[2]
    lse, mean = operator.pair_lse(*inputs)
    positive = (x * p).sum(1)
    gap = lse[0] - positive * scale
    loss, grad_scale = F.softplus(gap, threshold=50).mean(), x.new_zeros(())
    if needs_x or needs_p:
        pull = gap.sigmoid() / len(x)
        by_row, by_col, grad_scale, _ = operator.pair_lse_backward(
            *inputs, lse, mean, pull[None], None, needs_x, True, False
        )
        grad_scale -= (pull * positive).sum()
        for grad, part in zip(of_columns, by_col.chunk(2)):
            if grad.numel():
                grad += part
        if needs_x:
            grad_x += by_row - p * (pull * scale)[:, None]
        if needs_p:
            grad_p -= x * (pull * scale)[:, None]
    return loss, grad_scale


def _subtract_peak(tiles: list[list[Tensor]], empty: float) -> Tensor:
    """Subtract each row's largest logit in place, and return it in base e; 0 for a row without pairs."""
    peak = torch.stack([tile.amax(1) for tile in chain(*tiles)]).amax(0)
    peak = peak.masked_fill(peak <= empty, 0)
    for tile in chain(*tiles):
        tile.sub_(peak[:, None])
    return peak / LOG2E


def _halves(mirror: Tiles) -> Iterator[tuple[slice, slice, Tensor]]:
    """The exponentials of the tiles on and above the diagonal."""
    for rows in mirror.row_blocks:
        for cols in mirror.col_blocks:
            if rows.start <= cols.start:
                yield rows, cols, mirror.logits(rows, cols).exp2_()


def _add_mirrored(mirror: Tiles, total: Tensor) -> None:
    for rows, cols, mass in _halves(mirror):
        total[rows] += mass.sum(1)
        if rows != cols:
            total[cols] += mass.sum(0)


def _add_mirrored_gradient(mirror: Tiles, share: Tensor, grad_x: Tensor, scale: Tensor) -> Tensor:
    """Add to the gradient of ``x``, and return that of the scale."""
    both = torch.zeros_like(mirror.y)
    for rows, cols, mass in _halves(mirror):
        mass *= share[rows, None] + share[None, cols]  # a pair pulls at both of its ends
        both[rows] += times_transposed(mass, mirror.y[cols].T)
        if rows != cols:
            both[cols] += times_transposed(mirror.y[rows].T, mass.T).T
    grad_x.addcmul_(both, scale)
    return (both * mirror.y).sum() / 2  # each pair counts twice


@_contrast.register_fake
def _(x: Tensor, p: Tensor, keys: Tensor | None, keys_prime: Tensor | None, *others: Any) -> Result:
    grad_x, grad_p, grad_keys, grad_prime = (
        x.new_empty(shape) for shape in _shapes(x, p, keys, keys_prime, *others[-2:])
    )
    return x.new_empty(()), grad_x, grad_p, grad_keys, grad_prime, x.new_empty(())


@torch.library.custom_op(
    "equireg::mean_contrast_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor loss, Tensor[] gradients) -> Tensor[]",
)
def _scaled(upstream: Tensor, loss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Takes the loss to depend on it, without a derivative: differentiating twice raises instead of giving 0."""
    return [gradient * upstream for gradient in gradients]


@_scaled.register_fake
def _(upstream: Tensor, loss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output)


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    loss, *gradients = ctx.saved_tensors
    scaled = iter(_scaled(upstream, loss, [g for g in gradients if g.numel()]))
    gradients = [next(scaled) if g.numel() else None for g in gradients]
    return (*(g if need else None for g, need in zip(gradients, ctx.needs_input_grad)), *[None] * 6)


_contrast.register_autograd(_differentiate, setup_context=_save)
