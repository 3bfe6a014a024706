"""The log-sum-exp over pairs: every backend against a loop in float64, and what each must do alike."""

import math

import pytest
import torch

from equireg import pair_lse
from equireg.similarity import gram, normalized
from equireg.similarity.products import _gram, times_transposed
from equireg.similarity.streamed import tiles
from tests import references
from tests.gpu.inside import Inside
from tests.similarity.pairs import DEVICE, objective, problem, results

RELATIONS = ["all", "ne", "eq"]
WEIGHTS = ["none", "columns", "selected"]
# From NumPy, below Triton's interpreter: of infinities that a later mask removes, and of Triton 3.2's own ways.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]


class Watch(Inside):
    """How many numbers the largest tensor holds that any operation makes, also inside of the package's operators."""

    largest = 0

    def seen(self, function, given, made):
        self.largest = max([self.largest, *(part.numel() for part in made)])


# ------------------------------------------------------------------------------------------------ values, gradients


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_equals_the_loop(relation, weights, ids, cpu_backend):
    x, y, options, keep, table = problem(relation=relation, weights=weights, ids=ids)
    found, expected = pair_lse(x, y, 0.7, **options, backend=cpu_backend), references.pair_lse(x, y, 0.7, keep, table)
    torch.testing.assert_close(found, tuple(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_streamed_gradients_equal_dense_ones_over_many_tiles(relation, weights, ids, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 16)
    monkeypatch.setattr(tiles, "COLS", 7)
    x, y, options, *_ = problem(53, 41, 6, relation, weights, ids)
    scale = torch.tensor(-20.0 if ids else 0.7, dtype=torch.float64)
    streamed, dense = (results(x, y, scale, options, backend) for backend in ("chunked", "dense"))
    torch.testing.assert_close(streamed, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0, 100.0])  # F13
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_of_values_and_gradients(dtype, temperature, cpu_backend):
    """Against float64 on the same rounded input: values within 2e-6, gradients within 1e-5 (half: 2e-3, bf16: 1e-2)."""
    x, y = normalized(torch.randn(40, 16)).to(dtype), normalized(torch.randn(50, 16)).to(dtype)
    group = {"relation": "ne", "row_group": torch.arange(40) % 5, "col_group": torch.arange(50) % 5}
    scale = torch.tensor(1 / temperature)
    lse, mean, *grads = results(x, y, scale, group, cpu_backend)
    lse64, mean64, *grads64 = results(x.double(), y.double(), scale.double(), group, "dense")
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
@pytest.mark.parametrize("relation", RELATIONS)
def test_large_upstream_gradients(relation):
    """A gradient scaler multiplies the loss by 65,536; what is dropped must not overflow."""
    x, y, options, *_ = problem(30, 40, 6, relation, "selected", True, torch.float32)
    grads = []
    for backend in ("dense", "chunked"):
        leaf = x.clone().requires_grad_()
        lse, mean = pair_lse(leaf, y, 1.0, **options, backend=backend)
        (65536 * (mean.sum() + lse.masked_fill(lse == -math.inf, 0).sum())).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("needed", ["x", "scale", "y", "weight"])
def test_each_gradient_alone(needed, symmetric, backend):
    x, y, options, *_ = problem(30, 30 if symmetric else 50, 16, weights="columns", ids=True, dtype=torch.float32)
    x, y, weight = (part.to(DEVICE) for part in (0.3 * x, 0.3 * y, options.pop("col_weight")))
    options = {name: value.to(DEVICE) for name, value in options.items() if name != "relation"}
    tensors = {"x": x, "scale": torch.tensor(1.5, device=DEVICE), "y": x if symmetric else y, "weight": weight}
    names = [name for name in tensors if not (symmetric and name == "y")]
    if needed not in names:
        pytest.skip("y is x")
    expected = results(x, tensors["y"], tensors["scale"], {**options, "col_weight": weight}, backend)[2:]
    tensors[needed].requires_grad_()
    lse, mean = pair_lse(x, tensors["y"], tensors["scale"], col_weight=weight, **options, backend=backend)
    (gradient,) = torch.autograd.grad(objective(lse, mean), tensors[needed])
    # Weights alone have tiles of their own in Triton, so another order of sums.
    limits = {"rtol": 1e-3, "atol": 1e-4} if DEVICE == "cuda" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(gradient, expected[names.index(needed)], **limits)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("relation", RELATIONS)
def test_same_tensor_twice(relation, weighted, monkeypatch):  # F23
    """Where rows and columns are one tensor, each tile serves twice; it gives what two tensors give."""
    monkeypatch.setattr(tiles, "ROWS", 7)
    x, _, options, *_ = problem(40, 40, 5, relation, "columns" if weighted else "none", True)
    options |= {f"col_{kind}": options[f"row_{kind}"] for kind in ("group", "id") if f"row_{kind}" in options}
    scale = torch.tensor(0.7, dtype=torch.float64)
    lse, mean, by_row, by_scale, by_col, *others = results(x, x.clone(), scale, options, "dense")
    expected = (lse, mean, by_row + by_col, by_scale, *others)
    torch.testing.assert_close(results(x, x, scale, options, "chunked"), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weight", [1e-38, 1e-20, 1e15, 1e37])
def test_weights_of_any_size(weight):
    x, scale, weights = normalized(torch.randn(40, 8)), torch.tensor(14.0), torch.full((2, 40), weight)
    lse, mean, *grads = results(x, x.clone(), scale, {"col_weight": weights}, "chunked")
    x = x.double()
    exact, exact_mean, *_ = results(x, x, scale.double(), {"col_weight": weights.double()}, "dense")
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-4, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in grads[:3])


# ------------------------------------------------------------------------------------- the same of every backend


def test_rows_without_a_kept_pair(backend):
    """KERNELS: lse = -inf, mean = 0, gradients 0, even when what comes back into the row is not finite."""
    x, y = (torch.randn(count, 4, device=DEVICE, requires_grad=True) for count in (3, 2))
    groups = {"row_group": torch.tensor([0, 1, 1], device=DEVICE), "col_group": torch.tensor([0, 0], device=DEVICE)}
    weight = torch.tensor([[0.0, 0.0], [1.0, 1.0]], device=DEVICE, requires_grad=True)
    lse, mean = pair_lse(x, y, 2.0, relation="ne", **groups, col_weight=weight, backend=backend)
    assert (lse[:, 0] == -math.inf).all()
    assert (lse[0] == -math.inf).all()
    assert (mean[:, 0] == 0).all()
    assert torch.isfinite(lse[1, 1:]).all()
    (lse.exp().sum() + mean.sum()).backward()
    assert (x.grad[0] == 0).all()
    assert x.grad[1:].abs().sum() > 0
    for gradient in (x.grad, y.grad, weight.grad):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("rows", "cols"), [(0, 3), (3, 0), (0, 0)])
def test_no_rows_or_no_columns(rows, cols, backend):  # F6
    x, y = (torch.randn(count, 4, device=DEVICE) for count in (rows, cols))
    weight = torch.ones(2, cols, device=DEVICE)
    lse, mean, *grads = results(x, y, torch.tensor(1.0, device=DEVICE), {"col_weight": weight}, backend)
    assert lse.shape == mean.shape == (2, rows)
    assert (lse == -math.inf).all()
    assert (mean == 0).all()
    assert all((gradient == 0).all() for gradient in grads)


def test_a_gradient_to_the_mean_alone(backend):
    """It is the derivative of the log-sum-exp by the scale, times the scale."""
    x, y = 0.5 * torch.randn(6, 4, device=DEVICE), 0.5 * torch.randn(5, 4, device=DEVICE)
    wide = x.double().requires_grad_()
    _, expected = references.pair_lse(wide, y.double(), 1.5, torch.ones(6, 5).bool(), torch.ones(1, 6, 5))
    _, mean = pair_lse(x.requires_grad_(), y, 1.5, backend=backend)
    grads = (torch.autograd.grad(part.square().sum(), leaf)[0] for part, leaf in ((mean, x), (expected, wide)))
    torch.testing.assert_close(*(part.double() for part in grads), rtol=1e-2 if DEVICE == "cuda" else 1e-5, atol=1e-4)


def test_weight_gradient_is_finite_where_the_weight_is_zero(backend):
    x, y = torch.randn(4, 3, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    weight = torch.tensor([[0.0, 1.0, 0.5, 0.0, 2.0]], device=DEVICE, requires_grad=True)
    lse, _ = pair_lse(x, y, 1.0, col_weight=weight, backend=backend)
    (gradient,) = torch.autograd.grad(lse.sum(), weight)
    expected = (x @ y.T - lse.detach().T).exp().sum(0)  # q = exp(l - lse), without the weight
    torch.testing.assert_close(gradient[0], expected, rtol=1e-2 if DEVICE == "cuda" else 1e-5, atol=1e-5)


def test_zero_weight_far_above_the_others(backend):
    x, y = torch.ones(1, 1, device=DEVICE), torch.tensor([[500.0], [-500.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[0.0, 1.0]], device=DEVICE, requires_grad=True)
    lse, mean = pair_lse(x, y, 1.0, col_weight=weight, backend=backend)
    assert lse.item() == pytest.approx(-500, rel=1e-6)
    assert mean.item() == pytest.approx(-500, rel=1e-6)
    lse.sum().backward()
    torch.testing.assert_close(y.grad.cpu(), torch.tensor([[0.0], [1.0]]), rtol=1e-4, atol=0)
    assert not weight.grad.isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_dropped_may_be_anything(value, backend):
    y = torch.tensor([[1.0], [value]], device=DEVICE)
    groups = {"row_group": torch.tensor([1], device=DEVICE), "col_group": torch.tensor([0, 1], device=DEVICE)}
    lse, mean = pair_lse(torch.ones(1, 1, device=DEVICE), y, 1.0, relation="ne", **groups, backend=backend)
    assert lse.item() == pytest.approx(1, rel=1e-6)
    assert mean.item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("environments", [None, 2])
def test_nan_is_not_masked(environments, backend):  # F15
    x, y = torch.randn(4, 3, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    x[2, 1] = math.nan
    weight = None if environments is None else torch.rand(environments, 5, device=DEVICE)
    lse, mean = pair_lse(x.requires_grad_(), y, 1.0, col_weight=weight, backend=backend)
    seen = [lse[0], mean[0], torch.autograd.grad(lse.sum(), x)[0][:, 0]]
    assert [value.isnan().tolist() for value in seen] == [[False, False, True, False]] * len(seen)


def test_strides(backend):  # F22, F24, K3
    x, y, options, *_ = problem(30, 40, 6, weights="columns", dtype=torch.float32)
    x, y, weight = (part.to(DEVICE) for part in (x, y, options["col_weight"]))
    wide = torch.randn(30, 12, device=DEVICE)
    wide[:, ::2] = x
    turned = [part.T.contiguous().T for part in (y, weight)]
    versions = [part._version for part in (wide, *turned)]
    expected = pair_lse(x, y, 1.0, col_weight=weight, backend=backend)
    found = pair_lse(wide[:, ::2], turned[0], 1.0, col_weight=turned[1], backend=backend)
    torch.testing.assert_close(found, expected)
    assert versions == [part._version for part in (wide, *turned)]
    # Upstream gradients with stride 0 and behind a concatenation.
    lse, _ = pair_lse(x.requires_grad_(), y, 1.0, backend=backend)
    (summed,) = torch.autograd.grad(lse.sum(), x, retain_graph=True)
    (weighted,) = torch.autograd.grad((lse * torch.ones_like(lse)).sum(), x, retain_graph=True)
    (halves,) = torch.autograd.grad(torch.cat([lse.T, lse.T], 1).sum() / 2, x)
    torch.testing.assert_close((weighted, halves), (summed, summed))


def test_compiles_whole_with_changing_shapes(backend):
    def loss(x, y, scale, group):
        total = 0.0
        for other in (x, y):
            lse, mean = pair_lse(x, other, scale, relation="ne", row_group=group, col_group=group, backend=backend)
            total = total + (lse - mean).sum()
        return total

    if backend == "dense":
        pytest.skip("as every loss by its record")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (8, 12, 17):
        x, y = (torch.randn(rows, 4, device=DEVICE, requires_grad=True) for _ in range(2))
        scale, group = torch.tensor(2.0, device=DEVICE, requires_grad=True), torch.arange(rows, device=DEVICE) % 3
        value, expected = compiled(x, y, scale, group), loss(x, y, scale, group)
        torch.testing.assert_close(value, expected)
        grads = (torch.autograd.grad(part, [x, y, scale]) for part in (value, expected))
        torch.testing.assert_close(*grads)


def test_differentiating_twice_raises_and_is_never_zero(backend):  # K11
    x = torch.randn(5, 3, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(pair_lse(x, x, 1.0, backend=backend)[0].sum(), x, create_graph=True)
    if backend == "dense":
        gradient.square().sum().backward()
        assert x.grad.abs().sum() > 0
        return
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.square().sum().backward()


def test_autocast_does_not_reach_the_sums(cpu_backend):
    """Nor, in the streamed form, a backward pass that runs inside it; a dense one runs as any product of PyTorch."""
    x = torch.randn(30, 8, requires_grad=True)
    lse, mean = pair_lse(x, x, 5.0, backend=cpu_backend)
    (expected,) = torch.autograd.grad(lse.sum() + mean.sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half_lse, half_mean = pair_lse(x, x, 5.0, backend=cpu_backend)
        with torch.autocast("cpu", enabled=cpu_backend == "chunked", dtype=torch.bfloat16):
            (gradient,) = torch.autograd.grad(half_lse.sum() + half_mean.sum(), x)
    assert all(map(torch.equal, (half_lse, half_mean, gradient), (lse, mean, expected)))


def test_input_changed_between_forward_and_backward_raises():  # K14
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(6, 3)
    lse, _ = pair_lse(x, y, 1.0, backend="chunked")
    y.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        lse.sum().backward()


WRONG = {
    "x is a list": ({"x": [[1.0]]}, TypeError, "x must be a tensor of floating point numbers, got list"),
    "complex": ({"x": torch.ones(3, 2, dtype=torch.complex64)}, TypeError, "x .* got torch.complex64"),
    "width": ({"y": torch.ones(4, 3)}, ValueError, r"y must be \[N, D\] = \[N, 2\], got \[4, 3\]"),
    "no width": ({"x": torch.ones(3, 0), "y": torch.ones(4, 0)}, ValueError, r"x must be at least one wide"),
    "scale text": ({"scale": "1"}, TypeError, "scale must be a number, got str '1'"),
    "scale shape": ({"scale": torch.ones(2)}, ValueError, r"scale must be \[\], got \[2\]"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
    "no groups": ({"relation": "ne"}, ValueError, "row_group must be given with relation 'ne', got None"),
    "groups with all": (
        {"row_group": torch.zeros(3).long(), "col_group": torch.zeros(4).long()},
        ValueError,
        r"row_group must be None with relation 'all', got \[3\]",
    ),
    "half a group": ({"relation": "ne", "row_group": torch.zeros(3).long()}, ValueError, "col_group must be given"),
    "half an id": ({"col_id": torch.zeros(4).long()}, ValueError, "row_id must be given together with col_id"),
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
    "device": ({"y": torch.ones(4, 2, device="meta")}, ValueError, "y must be on cpu as x is, got meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):  # F1, F2, F4, F5, F7, F27
    changes, error, message = WRONG[case]
    arguments = {"x": torch.ones(3, 2), "y": torch.ones(4, 2), "scale": 1.0} | changes
    with pytest.raises(error, match=f"pair_lse: {message}"):
        pair_lse(arguments.pop("x"), arguments.pop("y"), arguments.pop("scale"), **arguments)


# ------------------------------------------------------------------------------------------------ the products


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised inside opcheck itself
def test_gram():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gram(x), x @ x.T)
    assert torch.autograd.gradcheck(gram, x)
    assert torch.autograd.gradgradcheck(gram, x)
    torch.library.opcheck(_gram, (torch.randn(5, 3, requires_grad=True),))
    torch.testing.assert_close(gram(x.float()), (x @ x.T).float())
    assert gram(torch.ones(0, 3)).shape == (0, 0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_follow_the_precision_that_is_set(precision):
    """In "medium" they are PyTorch's own, which is in bfloat16 where the processor has it."""
    a, b = torch.randn(300, 64), torch.randn(200, 64)
    torch.set_float32_matmul_precision(precision)
    try:
        product, theirs = times_transposed(a, b), a @ b.T
    finally:
        torch.set_float32_matmul_precision("highest")
    if precision == "medium":
        assert torch.equal(product, theirs)
    else:
        torch.testing.assert_close(product.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4)
