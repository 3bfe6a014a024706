import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equireg import pair_lse
from equireg.similarity import gram, normalized, operator
from equireg.similarity.products import _gram, times_transposed
from equireg.similarity.streamed import bounded, tiles
from tests import references

RELATIONS = ["all", "ne", "eq"]
WEIGHTS = ["none", "columns", "selected"]
BACKENDS = ["dense", "chunked"]


@pytest.fixture(params=["bounded", "online"])
def streaming(request, monkeypatch):
    """Both ways of ``backend="chunked"``, which chooses by the size of the logits."""
    monkeypatch.setattr(bounded, "BOUND", -1.0 if request.param == "online" else 40.0)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """How many numbers the largest tensor holds that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor):
                self.largest = max(self.largest, part.numel())
        return result


def problem(rows=7, cols=9, width=5, relation="all", weights="none", ids=False, dtype=torch.float64, zeros=0.3):
    """Arguments of pair_lse, and the kept pairs and weights as plain tables."""
    x, y = torch.randn(rows, width, dtype=dtype), torch.randn(cols, width, dtype=dtype)
    keep = torch.ones(rows, cols, dtype=torch.bool)
    table = torch.ones(1, rows, cols, dtype=torch.float64)
    options = {"relation": relation}
    if relation != "all":
        row_group, col_group = torch.randint(3, (rows,)), torch.randint(3, (cols,))
        options |= {"row_group": row_group, "col_group": col_group}
        keep &= (row_group[:, None] == col_group) == (relation == "eq")
    if ids:
        options |= {"row_id": torch.arange(rows), "col_id": torch.arange(cols)}
        keep &= ~torch.eye(rows, cols, dtype=torch.bool)
    if weights != "none":
        weight = torch.rand(*((2, cols) if weights == "columns" else (2, 4, cols)), dtype=dtype)
        weight[torch.rand(weight.shape) < zeros] = 0
        options["col_weight"] = weight
        if weights == "columns":
            table = weight.double()[:, None].expand(2, rows, cols)
        else:
            options["row_select"] = torch.randint(4, (rows,))
            table = weight.double()[:, options["row_select"]]
    return x, y, options, keep, table


def gradients(x, y, scale, options, backend):
    """Values, and gradients of a combination that treats every output differently."""
    inputs = [x.clone().requires_grad_(), y.clone().requires_grad_(), scale.clone().requires_grad_()]
    options = dict(options)
    if "col_weight" in options:
        options["col_weight"] = options["col_weight"].clone().requires_grad_()
        inputs.append(options["col_weight"])
    lse, mean = pair_lse(*inputs[:3], **options, backend=backend)
    slope = torch.arange(1.0, lse.numel() + 1, dtype=lse.dtype).view_as(lse).sin()
    objective = (lse.masked_fill(lse == -math.inf, 0) * slope).sum() + (mean * slope.cos()).sum()
    return lse.detach(), mean.detach(), *torch.autograd.grad(objective, inputs)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_equals_the_loop(relation, weights, ids, backend):
    x, y, options, keep, table = problem(relation=relation, weights=weights, ids=ids)
    lse, mean = pair_lse(x, y, 0.7, **options, backend=backend)
    expected_lse, expected_mean = references.pair_lse(x, y, 0.7, keep, table)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_streamed_gradients_equal_dense_ones_over_many_tiles(relation, weights, ids, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 16)
    monkeypatch.setattr(tiles, "COLS", 7)
    x, y, options, *_ = problem(53, 41, 6, relation, weights, ids)
    scale = torch.tensor(0.7, dtype=torch.float64)
    for streamed, dense in zip(gradients(x, y, scale, options, "chunked"), gradients(x, y, scale, options, "dense")):
        torch.testing.assert_close(streamed, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 7), (64, 64), (10**6, 10**6)])
def test_tile_size_does_not_matter(rows, cols, monkeypatch):  # K8
    x, y, options, *_ = problem(65, 70, 8, "ne", "columns", True, torch.float32)
    expected = gradients(x, y, torch.tensor(1.3), options, "chunked")
    monkeypatch.setattr(tiles, "ROWS", rows)
    monkeypatch.setattr(tiles, "COLS", cols)
    for value, other in zip(gradients(x, y, torch.tensor(1.3), options, "chunked"), expected):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_gradcheck(relation, weights, backend):
    x, y, options, *_ = problem(4, 5, 3, relation, weights, True, zeros=0)
    inputs = [x.requires_grad_(), y.requires_grad_(), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)]
    weight = options.pop("col_weight", None)
    if weight is not None:
        inputs.append(weight.add(0.1).requires_grad_())

    def outputs(x, y, scale, weight=None):
        lse, mean = pair_lse(x, y, scale, **options, col_weight=weight, backend=backend)
        return lse.masked_fill(lse == -math.inf, 0), mean

    assert torch.autograd.gradcheck(outputs, inputs, atol=1e-7, rtol=1e-5)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_is_the_slope_in_the_scale(backend):
    x, y, options, *_ = problem(relation="ne", weights="columns")
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    lse, mean = pair_lse(x, y, scale, **options, backend=backend)
    kept = lse != -math.inf
    (slope,) = torch.autograd.grad(lse[kept].sum(), scale)
    torch.testing.assert_close(slope * scale.detach(), mean[kept].sum())


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_kept_pair(backend):
    """KERNELS: lse = -inf, mean = 0, gradients 0, even when what comes back into the row is not finite."""
    x = torch.randn(3, 4, requires_grad=True)
    y = torch.randn(2, 4, requires_grad=True)
    group = torch.tensor([0, 0])
    weight = torch.tensor([[0.0, 0.0], [1.0, 1.0]], requires_grad=True)
    lse, mean = pair_lse(
        x, y, 2.0, relation="ne", row_group=torch.tensor([0, 1, 1]), col_group=group, col_weight=weight, backend=backend
    )
    assert (lse[:, 0] == -math.inf).all()
    assert (lse[0] == -math.inf).all()
    assert (mean[:, 0] == 0).all()
    assert torch.isfinite(lse[1, 1:]).all()
    (lse.exp().sum() + mean.sum()).backward()
    assert (x.grad[0] == 0).all()
    assert x.grad[1:].abs().sum() > 0
    for gradient in (x.grad, y.grad, weight.grad):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols"), [(0, 3), (3, 0), (0, 0)])
def test_no_rows_or_no_columns(rows, cols, backend):  # F6
    x, y = torch.randn(rows, 2, requires_grad=True), torch.randn(cols, 2, requires_grad=True)
    lse, mean = pair_lse(x, y, 1.0, backend=backend)
    assert lse.shape == mean.shape == (1, rows)
    assert (lse == -math.inf).all()
    mean.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradient_is_finite_where_the_weight_is_zero(backend):
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    weight = torch.tensor([[0.0, 1.0, 0.5, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    lse, _ = pair_lse(x, y, 1.0, col_weight=weight, backend=backend)
    (gradient,) = torch.autograd.grad(lse.sum(), weight)
    expected = (x @ y.T - lse.detach().T).exp().sum(0)  # q = exp(l - lse), without the weight
    torch.testing.assert_close(gradient[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_weight_far_above_the_others_gives_no_nan(backend):
    x, y = torch.ones(1, 1), torch.tensor([[500.0], [-500.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 1.0]], requires_grad=True)
    lse, mean = pair_lse(x, y, 1.0, col_weight=weight, backend=backend)
    assert lse.item() == mean.item() == -500
    lse.sum().backward()
    assert torch.equal(y.grad, torch.tensor([[0.0], [1.0]]))
    assert not weight.grad.isnan().any()


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.1, 1.0, 10.0, 100.0])  # F13
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_of_values_and_gradients(dtype, temperature, backend):
    """Against float64 on the same rounded input: values within 2e-6, gradients within 1e-5 (half: 2e-3, bf16: 1e-2)."""
    x, y = normalized(torch.randn(40, 16)).to(dtype), normalized(torch.randn(50, 16)).to(dtype)
    group = {"relation": "ne", "row_group": torch.arange(40) % 5, "col_group": torch.arange(50) % 5}
    scale = torch.tensor(1 / temperature)
    lse, mean, *grads = gradients(x, y, scale, group, backend)
    lse64, mean64, *grads64 = gradients(x.double(), y.double(), scale.double(), group, "dense")
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), lse64, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(mean.double(), mean64, rtol=5e-6, atol=5e-6 * max(1, 1 / temperature))
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    # Beyond a temperature of about 0.01 the rounding of the logits alone is exp(1000 · 2^-24) off.
    limit = max(limit, 1e-6 / temperature)
    for gradient, expected in zip(grads, grads64):
        assert (gradient.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.usefixtures("streaming")
def test_streams_larger_than_stored(monkeypatch):
    """The largest buffer is a tile: no tensor of the size of the matrix is ever made."""
    monkeypatch.setattr(tiles, "ROWS", 32)
    monkeypatch.setattr(tiles, "COLS", 32)
    x = torch.randn(500, 8, requires_grad=True)
    with Watch() as watch:
        lse, mean = pair_lse(x, x, 1.0, backend="chunked")
        (lse.sum() + mean.sum()).backward()
    assert watch.largest <= 500 * 8


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("relation", ["all", "ne", "eq"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_large_upstream_gradients(relation, weights):
    """A gradient scaler multiplies the loss by 65,536; what is dropped must not overflow."""
    x, y, options, *_ = problem(30, 40, 6, relation, weights, True, torch.float32)
    grads = []
    for backend in BACKENDS:
        leaf = x.clone().requires_grad_()
        lse, mean = pair_lse(leaf, y, 1.0, **options, backend=backend)
        (65536 * (mean.sum() + lse.masked_fill(lse == -math.inf, 0).sum())).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_dropped_may_be_anything(value, backend):
    y = torch.tensor([[1.0], [value]])
    lse, mean = pair_lse(
        torch.ones(1, 1),
        y,
        1.0,
        relation="ne",
        row_group=torch.tensor([1]),
        col_group=torch.tensor([0, 1]),
        backend=backend,
    )
    assert lse.item() == mean.item() == 1


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("needed", ["x", "y", "scale"])
def test_each_gradient_alone(needed):
    x, y, options, *_ = problem(30, 40, 6, "ne", "columns")
    tensors = {"x": x, "y": y, "scale": torch.tensor(0.7, dtype=torch.float64)}
    expected = dict(zip(tensors, gradients(*tensors.values(), options, "dense")[2:]))
    tensors[needed].requires_grad_()
    lse, mean = pair_lse(*tensors.values(), **options, backend="chunked")
    slope = torch.arange(1.0, lse.numel() + 1, dtype=lse.dtype).view_as(lse).sin()
    ((lse.masked_fill(lse == -math.inf, 0) * slope).sum() + (mean * slope.cos()).sum()).backward()
    torch.testing.assert_close(tensors[needed].grad, expected[needed], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("relation", RELATIONS)
def test_same_tensor_twice(relation, weighted, monkeypatch):  # F23
    """Where rows and columns are one tensor, each tile serves twice; it gives what two tensors give."""
    monkeypatch.setattr(tiles, "ROWS", 7)
    x, _, options, *_ = problem(40, 40, 5, relation, "columns" if weighted else "none", True)
    for kind in ("group", "id"):
        if f"row_{kind}" in options:
            options[f"col_{kind}"] = options[f"row_{kind}"]
    scale = torch.tensor(0.7, dtype=torch.float64)
    lse, mean, by_row, by_col, *others = gradients(x, x, scale, options, "dense")
    expected = (lse, mean, by_row + by_col, *others)

    inputs = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    if weighted:
        options["col_weight"] = options["col_weight"].clone().requires_grad_()
        inputs.append(options["col_weight"])
    lse, mean = pair_lse(inputs[0], inputs[0], inputs[1], **options, backend="chunked")
    slope = torch.arange(1.0, lse.numel() + 1, dtype=lse.dtype).view_as(lse).sin()
    objective = (lse.masked_fill(lse == -math.inf, 0) * slope).sum() + (mean * slope.cos()).sum()
    found = (lse.detach(), mean.detach(), *torch.autograd.grad(objective, inputs))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):  # F22, F24, K3
    x, y, options, *_ = problem(30, 40, 6, "ne", "columns")
    wide = torch.randn(30, 12, dtype=torch.float64)
    wide[:, ::2] = x
    turned = y.T.contiguous().T
    versions = wide._version, turned._version
    expected = gradients(x, y, torch.tensor(1.0).double(), options, backend)
    got = gradients(wide[:, ::2], turned, torch.tensor(1.0).double(), options, backend)
    for value, other in zip(got, expected):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
    assert versions == (wide._version, turned._version)

    # Upstream gradients with stride 0 (a plain sum) and behind a concatenation.
    x = x.requires_grad_()
    group = {key: value for key, value in options.items() if key != "col_weight"}
    lse, _ = pair_lse(x, y, 1.0, **group, backend=backend)
    (summed,) = torch.autograd.grad(lse.sum(), x, retain_graph=True)
    (weighted,) = torch.autograd.grad((lse * torch.ones_like(lse)).sum(), x, retain_graph=True)
    joined = torch.cat([lse.T, lse.T], 1)
    (halves,) = torch.autograd.grad(joined.sum() / 2, x)
    torch.testing.assert_close(summed, weighted)
    torch.testing.assert_close(summed, halves)


@pytest.mark.parametrize("weight", [1e-38, 1e-30, 1e-20, 1e15, 1e30, 1e37])
def test_weights_of_any_size(weight):
    x = normalized(torch.randn(40, 8))
    lse, mean, *grads = gradients(
        x, x.clone(), torch.tensor(14.0), {"col_weight": torch.full((2, 40), weight)}, "chunked"
    )
    exact, exact_mean, *_ = gradients(
        x.double(),
        x.double(),
        torch.tensor(14.0).double(),
        {"col_weight": torch.full((2, 40), weight).double()},
        "dense",
    )
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-4, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in grads[:3])


@pytest.mark.usefixtures("streaming")
def test_repeats_bit_for_bit():
    x, y, options, *_ = problem(300, 400, 16, "ne", "selected", dtype=torch.float32)
    first = gradients(x, y, torch.tensor(3.0), options, "chunked")
    for _ in range(3):
        for value, other in zip(gradients(x, y, torch.tensor(3.0), options, "chunked"), first):
            assert torch.equal(value, other)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised inside opcheck itself
def test_opcheck(relation, weights):  # K12
    x, y, options, *_ = problem(6, 8, 4, relation, weights, True, torch.float32)
    names = ["row_group", "col_group", "row_id", "col_id", "col_weight", "row_select"]
    weight = options.get("col_weight")
    if weight is not None:
        weight.requires_grad_()
    arguments = (x.requires_grad_(), y.requires_grad_(), torch.tensor(1.5, requires_grad=True), relation)
    torch.library.opcheck(operator.pair_lse, (*arguments, *(options.get(name) for name in names), "chunked"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_with_changing_shapes(backend):
    def loss(x, y, scale, group):
        total = 0.0
        for other in (x, y):
            lse, mean = pair_lse(x, other, scale, relation="ne", row_group=group, col_group=group, backend=backend)
            total = total + (lse - mean).sum()
        return total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (8, 12, 17, 33):
        x, y = (torch.randn(rows, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        group = torch.arange(rows) % 3
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        value, expected = compiled(x, y, scale, group), loss(x, y, scale, group)
        torch.testing.assert_close(value, expected)
        for got, other in zip(
            torch.autograd.grad(value, [x, y, scale]), torch.autograd.grad(expected, [x, y, scale]), strict=True
        ):
            torch.testing.assert_close(got, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_sums(dtype, backend):
    """Nor, in the streamed form, a backward pass that runs inside it; a dense one runs as any product of PyTorch."""
    x = torch.randn(30, 8, requires_grad=True)
    lse, mean = pair_lse(x, x, 5.0, backend=backend)
    (expected,) = torch.autograd.grad(lse.sum() + mean.sum(), x)
    with torch.autocast("cpu", dtype=dtype):
        half_lse, half_mean = pair_lse(x, x, 5.0, backend=backend)
        with torch.autocast("cpu", enabled=backend == "chunked", dtype=dtype):
            (gradient,) = torch.autograd.grad(half_lse.sum() + half_mean.sum(), x)
    assert torch.equal(half_lse, lse)
    assert torch.equal(half_mean, mean)
    assert torch.equal(gradient, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised inside opcheck itself
def test_gram():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gram(x), x @ x.T)
    assert torch.autograd.gradcheck(gram, x)
    assert torch.autograd.gradgradcheck(gram, x)
    torch.library.opcheck(_gram, (torch.randn(5, 3, requires_grad=True),))
    torch.testing.assert_close(gram(x.float()), (x @ x.T).float())
    assert gram(torch.ones(0, 3)).shape == (0, 0)


def test_differentiating_twice_raises_and_is_never_zero():  # K11
    x = torch.randn(5, 3, requires_grad=True)
    lse, _ = pair_lse(x, x, 1.0, backend="chunked")
    (gradient,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.square().sum().backward()
    lse, _ = pair_lse(x, x, 1.0, backend="dense")
    (gradient,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_input_changed_between_forward_and_backward_raises():  # K14
    x = torch.randn(5, 3, requires_grad=True)
    y = torch.randn(6, 3)
    lse, _ = pair_lse(x, y, 1.0, backend="chunked")
    y.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        lse.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_masked(backend):  # F15
    x = torch.randn(4, 3)
    x[2, 1] = math.nan
    lse, mean = pair_lse(x, torch.randn(5, 3), 1.0, backend=backend)
    assert lse[0].isnan().tolist() == mean[0].isnan().tolist() == [False, False, True, False]


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    width=st.integers(1, 9),
    relation=st.sampled_from(RELATIONS),
    weights=st.sampled_from(WEIGHTS),
    ids=st.booleans(),
    scale=st.floats(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_streamed_equals_dense(rows, cols, width, relation, weights, ids, scale, seed):
    torch.manual_seed(seed)
    x, y, options, *_ = problem(rows, cols, width, relation, weights, ids)
    scale = torch.tensor(scale, dtype=torch.float64)
    for streamed, dense in zip(gradients(x, y, scale, options, "chunked"), gradients(x, y, scale, options, "dense")):
        torch.testing.assert_close(streamed, dense, rtol=1e-8, atol=1e-8)


@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
def test_weights_scale_out(seed, shift):
    """Multiplying every weight by c adds log c to the log-sum-exp and leaves the mean."""
    torch.manual_seed(seed)
    x, y, options, *_ = problem(weights="columns", zeros=0)
    lse, mean = pair_lse(x, y, 1.0, **options, backend="chunked")
    options["col_weight"] = options["col_weight"] * math.exp(shift)
    moved, same = pair_lse(x, y, 1.0, **options, backend="chunked")
    torch.testing.assert_close(moved, lse + shift)
    torch.testing.assert_close(same, mean)


WRONG = {
    "x is a list": ({"x": [[1.0]]}, TypeError, "x must be a tensor of floating point numbers, got list"),
    "integers": ({"x": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "x .* got torch.int64"),
    "complex": ({"x": torch.ones(3, 2, dtype=torch.complex64)}, TypeError, "x .* got torch.complex64"),
    "rank": ({"x": torch.ones(3, 2, 1)}, ValueError, r"x must be \[M, D\], got \[3, 2, 1\]"),
    "width": ({"y": torch.ones(4, 3)}, ValueError, r"y must be \[N, D\] = \[N, 2\], got \[4, 3\]"),
    "no width": ({"x": torch.ones(3, 0), "y": torch.ones(4, 0)}, ValueError, r"x must be at least one wide"),
    "dtypes": ({"y": torch.ones(4, 2).double()}, TypeError, "y must be of x's dtype torch.float32, got torch.float64"),
    "scale text": ({"scale": "1"}, TypeError, "scale must be a number, got str '1'"),
    "scale shape": ({"scale": torch.ones(2)}, ValueError, r"scale must be \[\], got \[2\]"),
    "relation": ({"relation": "neq"}, ValueError, "relation must be one of 'all', 'ne', 'eq', got 'neq'"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
    "no groups": ({"relation": "ne"}, ValueError, "row_group must be given with relation 'ne', got None"),
    "groups with all": (
        {"row_group": torch.zeros(3).long(), "col_group": torch.zeros(4).long()},
        ValueError,
        r"row_group must be None with relation 'all', got \[3\]",
    ),
    "half a group": ({"relation": "ne", "row_group": torch.zeros(3).long()}, ValueError, "col_group must be given"),
    "half an id": ({"col_id": torch.zeros(4).long()}, ValueError, "row_id must be given together with col_id"),
    "float groups": (
        {"relation": "eq", "row_group": torch.zeros(3), "col_group": torch.zeros(4).long()},
        TypeError,
        "row_group must be a tensor of whole numbers, got torch.float32",
    ),
    "group length": (
        {"relation": "eq", "row_group": torch.zeros(3).long(), "col_group": torch.zeros(5).long()},
        ValueError,
        r"col_group must be \[N\] = \[4\], got \[5\]",
    ),
    "weight shape": ({"col_weight": torch.ones(2, 5)}, ValueError, r"col_weight must be \[E, N\] = \[E, 4\], got"),
    "negative weight": ({"col_weight": -torch.ones(1, 4)}, ValueError, "col_weight must be finite .*, got -1.0"),
    "infinite weight": ({"col_weight": torch.full((1, 4), math.inf)}, ValueError, "col_weight must be .*, got inf"),
    "scale NaN": ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "NaN weight": ({"col_weight": torch.full((1, 4), math.nan)}, ValueError, "col_weight must be finite .*, got nan"),
    "selection alone": ({"row_select": torch.zeros(3).long()}, ValueError, "row_select must be None without"),
    "selection out of range": (
        {"col_weight": torch.ones(1, 2, 4), "row_select": torch.tensor([0, 1, 2])},
        ValueError,
        r"row_select must be in 0 .. 1 .*, got 2 at position 2",
    ),
    "device": ({"y": torch.ones(4, 2, device="meta")}, ValueError, "y must be on cpu as x is, got meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):  # F1 to F5, F7, F27, K7
    changes, error, message = WRONG[case]
    arguments = {"x": torch.ones(3, 2), "y": torch.ones(4, 2), "scale": 1.0} | changes
    with pytest.raises(error, match=f"pair_lse: {message}"):
        pair_lse(arguments.pop("x"), arguments.pop("y"), arguments.pop("scale"), **arguments)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_follow_the_precision_that_is_set(precision):
    """In "medium" they are PyTorch's own, which is in bfloat16 where the processor has it."""
    a, b = torch.randn(300, 64), torch.randn(200, 64)
    expected = a.double() @ b.double().T
    torch.set_float32_matmul_precision(precision)
    try:
        product, theirs = times_transposed(a, b), a @ b.T
    finally:
        torch.set_float32_matmul_precision("highest")
    if precision == "medium":
        assert torch.equal(product, theirs)
    else:
        torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


def test_blocks_are_not_thin():
    """Of fewer rows, products were seen to take 20 times as long on a CPU with other work."""
    assert tiles.ROWS >= 256
