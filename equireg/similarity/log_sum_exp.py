"""Row-wise log-sum-exp of a similarity matrix that is never stored: the checks, and the choice of an implementation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments, refuse_forward_mode
from equireg.similarity import choice, dense, operator
from equireg.similarity.dense import Pairs, Problem, accumulation_dtype
from equireg.similarity.fused.mean_contrast import formed_at_once

__all__ = ["pair_lse"]


def pair_lse(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    relation: str = "all",
    row_group: Tensor | None = None,
    col_group: Tensor | None = None,
    row_id: Tensor | None = None,
    col_id: Tensor | None = None,
    col_weight: Tensor | None = None,
    row_select: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Row-wise log-sum-exp and softmax mean of similarities, without the similarity matrix.

    With logits :math:`l_{ij} = \text{scale} \cdot \langle x_i, y_j \rangle`, kept pairs :math:`k_{ij}` and weights
    :math:`w_{ej} \ge 0` of environment :math:`e`,

    .. math::
        \text{lse}_{ei} = \log \sum_j k_{ij} w_{ej} e^{l_{ij}}, \qquad
        \text{mean}_{ei} = \frac{\sum_j k_{ij} w_{ej} e^{l_{ij}} l_{ij}}{\sum_j k_{ij} w_{ej} e^{l_{ij}}}

    Both are differentiable in ``x``, ``y``, ``scale`` and ``col_weight``. ``mean`` is the derivative of ``lse`` by the
    logarithm of the scale, so an IRMv1 penalty needs no second differentiation. A row that keeps no pair of positive
    weight has ``lse = -inf`` and ``mean = 0``, and passes no gradient. Rows of other processes are not gathered.

    Args:
        x: rows, [M, D], floating point; not normalised here.
        y: columns, [N, D], of the same dtype.
        scale: the factor of the dot products (an inverse temperature), a number or a 0-d tensor.
        relation: which pairs are kept: ``"all"``, ``"ne"`` where the groups differ, ``"eq"`` where they agree.
        row_group: whole numbers [M]; needed with ``"ne"`` and ``"eq"``, refused with ``"all"``.
        col_group: whole numbers [N]; as ``row_group``.
        row_id: whole numbers [M]. A pair with equal ids is never kept, whatever the relation.
        col_id: whole numbers [N]; given together with ``row_id``.
        col_weight: weights of the columns, at least 0, in each of E environments: [E, N]; or, with ``row_select``,
            S rows of weights in each environment: [E, S, N].
        row_select: whole numbers [M] in 0 .. S - 1: row i is weighted by ``col_weight[:, row_select[i]]``.
        backend: ``"dense"`` stores the matrix; ``"chunked"`` streams it in O((M + N) · D) memory; ``"triton"`` streams
            it in kernels for Nvidia GPUs of compute capability 8.0 and later, for float16, bfloat16 and, where
            ``torch.set_float32_matmul_precision`` allows rounded products, float32; D up to 512, E up to 8, without
            ``row_select``. None takes what the environment variable ``EQUIREG_BACKEND`` names; without it the first two
            by size, and ``"triton"`` where it was measured to be faster on a GPU like this one (so far on none). The
            logger ``equireg`` tells once, at INFO, what was chosen. Differentiating a streamed form twice raises.

    Returns:
        ``lse`` and ``mean``, each [E, M] (E = 1 without ``col_weight``), in float32, or float64 for float64 inputs.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, an unknown relation or backend (also in ``EQUIREG_BACKEND``),
            groups or ids of one side only; on CPU also a negative or NaN weight and a selection out of range.
        RuntimeError: ``"triton"`` is asked for where it cannot run, with the reason.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> lse, mean = pair_lse(x, x, 2.0)
        >>> lse.shape, bool(torch.isclose(lse[0, 0], torch.tensor([2.0, 0.0]).logsumexp(0)))
        (torch.Size([1, 2]), True)
        >>> labels = torch.tensor([0, 0])
        >>> pair_lse(x, x, 2.0, relation="ne", row_group=labels, col_group=labels)[0]
        tensor([[-inf, -inf]])
    """
    check = Arguments("pair_lse")
    check.alike(x=(x, "M D"), y=(y, "N D"))
    if check.sizes["D"] == 0:
        check.fail("x", "at least one wide", list(x.shape))
    if isinstance(scale, Tensor):
        check.features("scale", scale, "")
    else:
        check.number("scale", scale)
        if not -math.inf < scale < math.inf:  # torch.compile cannot trace math.isfinite of a symbol
            check.fail("scale", "finite", scale)
        scale = torch.full((), scale, dtype=accumulation_dtype(x.dtype), device=x.device)

    check.option("relation", relation, ("all", "ne", "eq"))
    check.option("backend", backend, (None, *choice.BACKENDS))
    row_group, col_group = _both(check, "group", row_group, col_group)
    if (relation == "all") != (row_group is None):
        rule = "None with relation 'all'" if relation == "all" else f"given with relation {relation!r}"
        check.fail("row_group", rule, "None" if row_group is None else list(row_group.shape))
    row_id, col_id = _both(check, "id", row_id, col_id)

    if row_select is not None and col_weight is None:
        check.fail("row_select", "None without col_weight", "a selection")
    if col_weight is not None:
        check.features("col_weight", col_weight, "E N" if row_select is None else "E S N")
        check.weights("col_weight", col_weight)
        if row_select is not None:
            row_select = check.integers("row_select", row_select, "M")
            check.below("row_select", row_select, check.sizes["S"], "rows of col_weight")

    # Contiguous, because BLAS sums a transposed matrix in another order, which changes the last bits.
    same = y is x
    x = x.contiguous()
    y = x if same else y.contiguous()
    if backend is None:
        backend = choice.chosen(x, y)
    symmetric = y is x and col_group is row_group and col_id is row_id
    pairs = Pairs(relation, row_group, col_group, row_id, col_id)
    problem = Problem(x, None if symmetric else y, scale, pairs, col_weight, row_select)
    if backend != "dense":
        refuse_forward_mode(x, y, scale, col_weight)
        return operator.streamed(problem, backend)
    with torch.autocast(x.device.type, enabled=False):
        return dense.pair_lse(problem)


def mean_contrast(
    x: Tensor,
    p: Tensor,
    keys: tuple[Tensor] | tuple[Tensor, Tensor] | None,
    temperature: float | Tensor,
    row_group: Tensor,
    key_group: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Mean over the rows of :math:`\log(1 + \sum_j k_{ij} e^{l_{ij}} / e^{s_i})`, a 0-d tensor.

    Args:
        x: rows, [M, D]; :math:`l_{ij} = \langle x_i, y_j \rangle / \tau`.
        p: their positives, [M, D]; :math:`s_i = \langle x_i, p_i \rangle / \tau`.
        keys: one or two sets of columns y [N, D] that share their groups; None for ``x`` and ``p`` themselves.
        temperature: τ, a number or a 0-d tensor.
        row_group: whole numbers [M]; pairs of different groups are kept.
        key_group: whole numbers [N].
        dtype: what kernels on a GPU may round the vectors to, such as that of the tokens; None does not round.

    All vectors are in fp32 or fp64 and of unit length. Differentiable once, in all of them and in a temperature.
    Loss and gradients are formed in one operator, which follows the table of measurements where there is one (see
    ``choice.py``). One set of columns takes ``pair_lse`` instead, and ``EQUIREG_BACKEND`` takes it in that form.
    """
    scale = 1 / temperature
    if choice.override() is None and (keys is None or len(keys) == 2):
        return formed_at_once(x, p, keys, scale, row_group, key_group, dtype or x.dtype)
    columns = torch.cat((x, p) if keys is None else keys)
    col_group = key_group.repeat(len(columns) // len(key_group))
    lse, _ = pair_lse(x, columns, scale, relation="ne", row_group=row_group, col_group=col_group)
    return F.softplus(lse[0] - (x * p).sum(1) * scale, threshold=50).mean()


def _both(check: Arguments, kind: str, row: Tensor | None, col: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if (row is None) != (col is None):
        missing, given = ("row", "col") if row is None else ("col", "row")
        check.fail(f"{missing}_{kind}", f"given together with {given}_{kind}", None)
    if row is None or col is None:
        return None, None
    rows = check.integers(f"row_{kind}", row, "M")
    return rows, check.integers(f"col_{kind}", rows if col is row else col, "N")
