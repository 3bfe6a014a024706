"""The Triton kernels against the definition in float64; on a GPU where there is one, otherwise in Triton's interpreter.

What the interpreter computes proves the formulas, the masks and the order of sums, not the precision of a GPU.
"""

import math

import pytest
import torch

from equireg import pair_lse
from equireg.similarity import normalized, operator

pytest.importorskip("triton", reason="Triton is not installed")
from equireg.similarity.triton import kernels
from equireg.similarity.triton import launch as host
from equireg.similarity.triton import tiles as triton_tiles

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def interpreter_fails():
    """NumPy 2.4 made an error of how Triton's interpreter, up to 3.6 at least, reads the ends of a loop."""
    try:
        pair_lse(torch.ones(1, 1), torch.ones(1, 1), 1.0, backend="triton")
    except Exception as error:
        return "only 0-dimensional arrays can be converted" in str(error)
    return False


pytestmark = [
    pytest.mark.skipif(not GPU and interpreter_fails(), reason="this Triton's interpreter needs a NumPy before 2.4"),
    pytest.mark.skipif(not GPU and not kernels.INTERPRETED, reason="neither a GPU nor TRITON_INTERPRET=1"),
    # From NumPy, below the interpreter: of infinities that a later mask removes, and of Triton 3.2's own ways.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
# Of gradients, relative to their norm; logits of fp32 on a GPU are rounded to tf32.
LIMITS = {torch.float32: 5e-3 if GPU else 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FULL, HALF = NUMBERS = torch.float32, torch.float16


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """In the interpreter several tiles, splits and steps along the width also for small sizes; on a GPU the table's."""
    before = torch.get_float32_matmul_precision()
    if GPU:
        torch.set_float32_matmul_precision("high")
    else:
        cut(monkeypatch, triton_tiles.Tile(16, 32, 16, 8, 2), programs=6)
    yield
    torch.set_float32_matmul_precision(before)


def cut(monkeypatch, tile, programs):
    monkeypatch.setattr(triton_tiles, "TILES", {key: {512: tile} for key in triton_tiles.TILES})
    monkeypatch.setattr(triton_tiles, "_PROGRAMS", dict.fromkeys(triton_tiles._PROGRAMS, programs))
    monkeypatch.setattr(triton_tiles, "_processors", lambda device: 1)


def problem(rows, cols, width, relation="all", environments=None, ids=False, symmetric=False, dtype=torch.float32):
    """Arguments of pair_lse. Some rows keep no pair; some weights are zero, and all those of the last environment."""
    x = normalized(torch.randn(rows, width)).to(DEVICE, dtype)
    y = x if symmetric else normalized(torch.randn(cols, width)).to(DEVICE, dtype)
    cols = len(y)
    options = {"relation": relation}
    kinds = (["group"] if relation != "all" else []) + (["id"] if ids else [])
    for kind in kinds:
        # Keys of any size; sorted, so that whole tiles share none.
        values = torch.tensor([-(2**63), -(2**31) - 1, -1, 0, 7, 2**31, 2**63 - 1])
        row = values[(torch.arange(rows) * 6 // max(rows, 1)).flip(0)].to(DEVICE)
        col = row if symmetric else values[1 + torch.arange(cols) * 6 // max(cols, 1)].to(DEVICE)
        options |= {f"row_{kind}": row, f"col_{kind}": col}
    if environments is not None:
        weight = torch.rand(environments, cols, device=DEVICE)
        weight[torch.rand(weight.shape, device=DEVICE) < 0.3] = 0
        if environments > 2:
            weight[-1] = 0
        options["col_weight"] = weight
    return x, y, options


def results(x, y, scale, options, backend):
    """Values, and gradients of a combination that treats every output differently. Where y is x, of one tensor."""
    options, same = dict(options), y is x
    inputs = [x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()]
    inputs += [] if same else [y.detach().clone().requires_grad_()]
    if "col_weight" in options:
        options["col_weight"] = options["col_weight"].clone().requires_grad_()
        inputs.append(options["col_weight"])
    lse, mean = pair_lse(inputs[0], inputs[0] if same else inputs[2], inputs[1], **options, backend=backend)
    slope = torch.arange(1.0, lse.numel() + 1, dtype=torch.float64, device=lse.device).view_as(lse).sin()
    objective = (lse.masked_fill(lse == -math.inf, 0) * slope).sum() + (mean * slope.cos()).sum()
    return lse.detach(), mean.detach(), *torch.autograd.grad(objective, inputs)


def exact(x, y, scale, options):
    options = {name: value.double() if name == "col_weight" else value for name, value in options.items()}
    wide = x.double()
    return results(wide, wide if y is x else y.double(), scale.double(), options, "dense")


def compare(x, y, scale, options, limit=None):
    limit = LIMITS[x.dtype] if limit is None else limit
    found, expected = results(x, y, scale, options, "triton"), exact(x, y, scale, options)
    close = (1e-2 if x.dtype == torch.float32 else 1e-4) if GPU else 1e-5
    for value, other in zip(found[:2], expected[:2]):
        torch.testing.assert_close(value.double(), other, rtol=close, atol=close)
    for gradient, other in zip(found[2:], expected[2:], strict=True):
        # The scale's gradient is one sum of many that cancel: it is compared by what a feature's could be off.
        floor = limit * expected[2].norm() if other.dim() == 0 else 0
        assert (gradient.double() - other).norm() <= limit * other.norm() + floor + 1e-12
    return found


@pytest.mark.parametrize(
    ("environments", "dtype"), [(None, HALF), (2, HALF), (None, FULL), (1, FULL), (2, FULL), (3, FULL)]
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("relation", ["all", "ne", "eq"])
def test_equals_the_definition(relation, ids, environments, symmetric, dtype):
    x, y, options = problem(20, 70, 20, relation, environments, ids, symmetric, dtype)
    compare(x, y, torch.tensor(5.0, device=DEVICE), options)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(
    ("rows", "cols", "width"), [(1, 1, 1), (15, 17, 3), (17, 129, 16), (129, 15, 130), (1, 129, 16), (33, 1, 31)]
)
def test_odd_sizes(rows, cols, width, dtype):  # K4
    x, y, options = problem(rows, cols, width, "ne", 2, True, dtype=dtype)
    compare(x, y, torch.tensor(3.0, device=DEVICE), options)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0, 10.0])
def test_temperatures(temperature, dtype):
    x, y, options = problem(40, 70, 16, "ne", dtype=dtype)
    compare(x, y, torch.tensor(1 / temperature, device=DEVICE), options)


@pytest.mark.skipif(GPU, reason="the table is the GPU's own")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("programs", [1, 4, 1000])
@pytest.mark.parametrize("tile", [(16, 16, 16), (32, 16, 64), (64, 128, 32)])
def test_tiles_and_splits_do_not_matter(tile, programs, symmetric, monkeypatch):  # K8
    cut(monkeypatch, triton_tiles.Tile(*tile, 4, 1), programs)
    x, y, options = problem(50, 90, 40, "eq", 2, True, symmetric)
    compare(x, y, torch.tensor(5.0), options)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_repeats_bit_for_bit(dtype):  # K6
    size = 1000 if GPU else 30
    for symmetric in (False, True):
        x, y, options = problem(size, 2 * size, 24, "ne", 2, True, symmetric, dtype)
        first = results(x, y, torch.tensor(3.0, device=DEVICE), options, "triton")
        for _ in range(20 if GPU else 2):
            for value, other in zip(results(x, y, torch.tensor(3.0, device=DEVICE), options, "triton"), first):
                assert torch.equal(value, other)


def test_fp16_coefficients_do_not_vanish(monkeypatch):
    """In a mean over 64 images of 196 tokens most are near fp16's smallest number, although the gradient is not."""
    if not GPU:
        cut(monkeypatch, triton_tiles.Tile(64, 1024, 64, 8, 2), programs=1)
    x, y, _ = problem(64, 12_544, 64, dtype=torch.float16)

    def gradient(x, y, backend):
        x = x.detach().clone().requires_grad_()
        lse, _ = pair_lse(x, y, 20.0, backend=backend)
        return torch.autograd.grad(lse.sum() / 12_544, x)[0].double()

    expected = gradient(x.double(), y.double(), "dense")
    assert (gradient(x, y, "triton") - expected).norm() <= 2e-3 * expected.norm()
    monkeypatch.setattr(host, "_normalizer", lambda *_: None)
    assert (gradient(x, y, "triton") - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("factor", [1.0, 65536.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_fp16_coefficients_do_not_overflow(factor, symmetric):
    """A gradient scaler multiplies the loss by 65,536."""
    x, y, options = problem(40, 70, 16, "ne", 2, False, symmetric, torch.float16)

    def gradient(x, y, options, backend):
        leaf = x.detach().clone().requires_grad_()
        lse, mean = pair_lse(leaf, leaf if symmetric else y, 20.0, **options, backend=backend)
        loss = lse.masked_fill(lse == -math.inf, 0).mean() + 0.05 * mean.mean()
        return torch.autograd.grad(loss * factor, leaf)[0].double()

    expected = gradient(x.double(), y.double(), options | {"col_weight": options["col_weight"].double()}, "dense")
    assert (gradient(x, y, options, "triton") - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("needed", ["x", "y", "scale", "weight"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_gradient_alone(needed, symmetric):
    x, y, options = problem(30, 50, 16, "ne", 2, True, symmetric)
    if symmetric and needed == "y":
        pytest.skip("y is x")
    scale = torch.tensor(3.0, device=DEVICE)
    names = ["x", "scale", "weight"] if symmetric else ["x", "scale", "y", "weight"]
    expected = dict(zip(names, results(x, y, scale, options, "triton")[2:]))[needed]
    tensors = {"x": x, "y": y, "scale": scale, "weight": options["col_weight"]}
    tensors[needed].requires_grad_()
    lse, mean = pair_lse(x, y, scale, **options, backend="triton")
    slope = torch.arange(1.0, lse.numel() + 1, dtype=torch.float64, device=DEVICE).view_as(lse).sin()
    objective = (lse.masked_fill(lse == -math.inf, 0) * slope).sum() + (mean * slope.cos()).sum()
    (gradient,) = torch.autograd.grad(objective, tensors[needed])
    # Weights alone have tiles of their own, so another order of sums.
    torch.testing.assert_close(gradient, expected, rtol=1e-3 if GPU else 1e-5, atol=1e-4 if GPU else 1e-6)


def test_without_a_gradient_to_the_mean():
    x, y, options = problem(30, 50, 16, "ne", 2)
    grads = []
    for a, b, backend in ((x, y, "triton"), (x.double(), y.double(), "dense")):
        leaf = a.clone().requires_grad_()
        weight = options["col_weight"].to(a.dtype).requires_grad_()
        lse, _ = pair_lse(leaf, b, 3.0, **options | {"col_weight": weight}, backend=backend)
        grads.append(torch.autograd.grad(lse.masked_fill(lse == -math.inf, 0).sum(), [leaf, weight]))
    for value, expected in zip(*grads):
        assert (value.double() - expected).norm() <= LIMITS[torch.float32] * expected.norm()


def test_environments_far_apart():
    """Below a peak common to both, all columns of the second would vanish."""
    y = torch.tensor([[1.0], [0.9], [-1.0], [-0.9]], device=DEVICE)
    weight = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], device=DEVICE)
    compare(torch.ones(2, 1, device=DEVICE), y, torch.tensor(200.0, device=DEVICE), {"col_weight": weight})


def test_zero_weight_far_above_the_others():
    x, y = torch.ones(1, 1, device=DEVICE), torch.tensor([[500.0], [-500.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[0.0, 1.0]], device=DEVICE, requires_grad=True)
    lse, mean = pair_lse(x, y, 1.0, col_weight=weight, backend="triton")
    assert lse.item() == pytest.approx(-500, rel=1e-6)
    assert mean.item() == pytest.approx(-500, rel=1e-6)
    lse.sum().backward()
    torch.testing.assert_close(y.grad.cpu(), torch.tensor([[0.0], [1.0]]), rtol=1e-4, atol=0)
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize(("rows", "cols"), [(0, 3), (3, 0), (0, 0)])
def test_no_rows_or_no_columns(rows, cols):  # F6
    x, y, options = problem(rows, cols, 4, "ne", 2, True)
    lse, mean, *grads = results(x, y, torch.tensor(1.0, device=DEVICE), options, "triton")
    assert lse.shape == mean.shape == (2, rows)
    assert (lse == -math.inf).all()
    assert (mean == 0).all()
    assert all((gradient == 0).all() for gradient in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_dropped_may_be_anything(value):
    y = torch.tensor([[1.0], [value]], device=DEVICE)
    groups = {"row_group": torch.tensor([1], device=DEVICE), "col_group": torch.tensor([0, 1], device=DEVICE)}
    lse, mean = pair_lse(torch.ones(1, 1, device=DEVICE), y, 1.0, relation="ne", **groups, backend="triton")
    assert lse.item() == pytest.approx(1, rel=1e-6)
    assert mean.item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("environments", [None, 2])
def test_nan_is_not_masked(environments):  # F15
    x, y, options = problem(4, 5, 3, "all", environments)
    x[2, 1] = math.nan
    leaf = x.requires_grad_()
    lse, mean = pair_lse(leaf, y, 1.0, **options, backend="triton")
    for value in (lse[0], mean[0], torch.autograd.grad(lse.sum(), leaf)[0][:, 0]):
        assert value.isnan().tolist() == [False, False, True, False]


def test_tiles_that_the_relation_leaves_out_are_not_read():
    """Nor is what they would add, which is NaN here, for a coefficient of zero times NaN is NaN."""
    size = 512 if GPU else 128
    x, y = torch.randn(size, 8, device=DEVICE), torch.randn(size, 8, device=DEVICE)
    y[size // 2 :] = math.nan
    row, col = torch.zeros(size, dtype=torch.int64, device=DEVICE), torch.arange(size, device=DEVICE) // (size // 2)
    leaf = x.requires_grad_()
    lse, _ = pair_lse(leaf, y, 1.0, relation="eq", row_group=row, col_group=col, backend="triton")
    (gradient,) = torch.autograd.grad(lse.sum(), leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_is_read_or_written_beyond_the_tensors(symmetric, monkeypatch):  # K4
    """Each lies between NaN: read, they would be in the results; written over, they would be gone."""
    launch, edge = host._Sides.launch, 64

    def guarded(self, name, tile, splits, rows, *arguments, **constants):
        placed, buffers = [], []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                canary = math.nan if argument.is_floating_point() else 2**30 + 7
                buffer = argument.new_full((argument.numel() + 2 * edge,), canary)
                buffers.append((argument, buffer))
                argument = buffer[edge : edge + argument.numel()].view(argument.shape).copy_(argument)
            placed.append(argument)
        launch(self, name, tile, splits, rows, *placed, **constants)
        for argument, buffer in buffers:
            for end in (buffer[:edge], buffer[buffer.numel() - edge :]):
                assert (end.isnan() if end.is_floating_point() else end == 2**30 + 7).all()
            argument.copy_(buffer[edge : edge + argument.numel()].view(argument.shape))

    monkeypatch.setattr(host._Sides, "launch", guarded)
    for dtype in NUMBERS:
        for relation in ("ne", "eq"):
            x, y, options = problem(37, 45, 19, relation, 3, True, symmetric, dtype)
            compare(x, y, torch.tensor(4.0, device=DEVICE), options)


def test_where_rows_are_columns_one_launch_gives_all_gradients(monkeypatch):
    launched = []
    launch = host._Sides.launch
    monkeypatch.setattr(
        host._Sides, "launch", lambda self, name, *a, **k: [launched.append(name), launch(self, name, *a, **k)]
    )
    x, _, options = problem(20, 20, 8, "ne", 2, True, symmetric=True)
    results(x, x, torch.tensor(2.0, device=DEVICE), options, "triton")
    assert launched == ["forward", "backward"]


def test_strides():  # F22, F24, K3
    x, y, options = problem(30, 40, 6, "ne", 2)
    wide = torch.randn(30, 12, device=DEVICE)
    wide[:, ::2] = x
    options["col_weight"] = options["col_weight"].T.contiguous().T
    scale = torch.tensor(1.0, device=DEVICE)
    expected = results(x, y, scale, options, "triton")
    found = pair_lse(wide[:, ::2], y.T.contiguous().T, scale, **options, backend="triton")
    assert all(torch.equal(value, other) for value, other in zip(found, expected))
    # Upstream gradients with stride 0 and behind a concatenation.
    leaf = x.requires_grad_()
    del options["col_weight"]
    lse, _ = pair_lse(leaf, y, 1.0, **options, backend="triton")
    lse = lse.masked_fill(lse == -math.inf, 0)
    (summed,) = torch.autograd.grad(lse.sum(), leaf, retain_graph=True)
    (weighted,) = torch.autograd.grad((lse * torch.ones_like(lse)).sum(), leaf, retain_graph=True)
    (halves,) = torch.autograd.grad(torch.cat([lse.T, lse.T], 1).sum() / 2, leaf)
    assert torch.equal(summed, weighted)
    assert torch.equal(summed, halves)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised inside opcheck itself
def test_opcheck(symmetric):  # K12
    x, y, options = problem(6, 8, 4, "ne", 2, True, symmetric)
    names = ["row_group", "col_group", "row_id", "col_id", "col_weight", "row_select"]
    options["col_weight"].requires_grad_()
    scale = torch.tensor(1.5, device=DEVICE, requires_grad=True)
    other = None if symmetric else y.requires_grad_()
    arguments = (x.requires_grad_(), other, scale, "ne", *map(options.get, names), "triton")
    torch.library.opcheck(operator.pair_lse, arguments)


def test_compiles_whole_with_changing_shapes():
    def loss(x, y, scale, group):
        total = 0.0
        for other in (x, y):
            lse, mean = pair_lse(x, other, scale, relation="ne", row_group=group, col_group=group, backend="triton")
            total = total + (lse - mean).sum()
        return total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (8, 12, 17):
        x, y = (torch.randn(rows, 4, device=DEVICE, requires_grad=True) for _ in range(2))
        scale, group = torch.tensor(2.0, device=DEVICE, requires_grad=True), torch.arange(rows, device=DEVICE) % 3
        value, expected = compiled(x, y, scale, group), loss(x, y, scale, group)
        assert torch.equal(value, expected)
        for found, other in zip(*(torch.autograd.grad(part, [x, y, scale]) for part in (value, expected))):
            torch.testing.assert_close(found, other)


def test_differentiating_twice_raises():  # K11
    x = torch.randn(5, 3, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(pair_lse(x, x, 1.0, backend="triton")[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.square().sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype, width):
    """The table's own tiles at sizes of several programs; fp32 in tf32 products."""
    if not GPU:
        pytest.skip("no GPU here")
    for symmetric in (False, True):
        for relation in ("all", "ne", "eq"):
            for environments in (None, 2):
                x, y, options = problem(1500, 2100, width, relation, environments, True, symmetric, dtype)
                scale = torch.tensor(10.0, device=DEVICE)
                compare(x, y, scale, options)
                first, again = (results(x, y, scale, options, "triton") for _ in range(2))
                assert all(map(torch.equal, first, again))


@pytest.mark.gpu
def test_medium_precision_is_bf16():
    if not GPU:
        pytest.skip("no GPU here")
    x, y, options = problem(300, 500, 64, "ne", 2)
    torch.set_float32_matmul_precision("medium")
    compare(x, y, torch.tensor(5.0, device=DEVICE), options, limit=1e-2)


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():  # K1
    if not GPU or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("no GPU here of 40 GiB")
    zeros = 2**22 + 100
    last, y = (normalized(torch.randn(size, 512)).to(DEVICE, torch.bfloat16) for size in (100, 40))
    x = torch.cat([last.new_zeros(zeros, 512), last]).requires_grad_()
    lse, _ = pair_lse(x, y, 10.0, backend="triton")
    (gradient,) = torch.autograd.grad(lse[:, zeros:].sum(), x)
    leaf = last.double().requires_grad_()
    expected, _ = pair_lse(leaf, y.double(), 10.0, backend="dense")
    (by_last,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(lse[:, zeros:].double(), expected, rtol=1e-4, atol=1e-4)
    assert (gradient[zeros:].double() - by_last).norm() <= 1e-2 * by_last.norm()

    lse, _ = pair_lse(y, x.detach(), 10.0, backend="triton")
    expected, _ = pair_lse(y.double(), last.double(), 10.0, backend="dense")
    expected = torch.logaddexp(expected, torch.full_like(expected, math.log(zeros)))
    torch.testing.assert_close(lse.double(), expected, rtol=1e-4, atol=1e-4)
