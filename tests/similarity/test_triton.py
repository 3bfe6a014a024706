"""The Triton kernels against the definition in float64; on a GPU where there is one, otherwise in Triton's interpreter.

What the interpreter computes proves the formulas, the masks and the order of sums, not the precision of a GPU.
"""

import math

import pytest
import torch

from equireg import pair_lse
from equireg.similarity import normalized

pytest.importorskip("triton", reason="Triton is not installed")
from equireg.similarity.triton import launch as host
from tests.similarity.pairs import DEVICE, GPU, cut, results

pytestmark = [
    pytest.mark.usefixtures("triton_tiles"),
    # From NumPy, below the interpreter: of infinities that a later mask removes, and of Triton 3.2's own ways.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
# Of gradients, relative to their norm; logits of fp32 on a GPU are rounded to tf32.
LIMITS = {torch.float32: 5e-3 if GPU else 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FULL, HALF = NUMBERS = torch.float32, torch.float16


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


@pytest.mark.parametrize(("environments", "dtype"), [(None, HALF), (2, HALF), (1, FULL), (3, FULL)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("relation", ["all", "ne", "eq"])
def test_equals_the_definition(relation, ids, environments, symmetric, dtype):
    x, y, options = problem(20, 70, 20, relation, environments, ids, symmetric, dtype)
    compare(x, y, torch.tensor(5.0, device=DEVICE), options)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(
    ("rows", "cols", "width"), [(1, 1, 1), (15, 17, 3), (17, 65, 16), (65, 15, 34), (1, 65, 16), (33, 1, 31)]
)
def test_odd_sizes(rows, cols, width, dtype):  # K4
    x, y, options = problem(rows, cols, width, "ne", 2, True, dtype=dtype)
    compare(x, y, torch.tensor(3.0, device=DEVICE), options)


@pytest.mark.skipif(GPU, reason="the table is the GPU's own")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("programs", [1, 4, 1000])
@pytest.mark.parametrize("tile", [(16, 16, 16), (32, 16, 64), (64, 128, 32)])
def test_tiles_and_splits_do_not_matter(tile, programs, symmetric, monkeypatch):  # K8
    cut(monkeypatch, (*tile, 4, 1), programs)
    x, y, options = problem(36, 50, 24, "eq", 2, True, symmetric)
    compare(x, y, torch.tensor(5.0), options)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_repeats_bit_for_bit(dtype):  # K6
    size = 1000 if GPU else 20
    for symmetric in (False, True):
        x, y, options = problem(size, 2 * size, 24, "ne", 2, True, symmetric, dtype)
        first = results(x, y, torch.tensor(3.0, device=DEVICE), options, "triton")
        for _ in range(20 if GPU else 1):
            for value, other in zip(results(x, y, torch.tensor(3.0, device=DEVICE), options, "triton"), first):
                assert torch.equal(value, other)


def test_fp16_coefficients_do_not_vanish(monkeypatch):
    """In a mean over 64 images of 196 tokens most are near fp16's smallest number, although the gradient is not."""
    if not GPU:
        cut(monkeypatch, (64, 1024, 64, 8, 2), programs=1)
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


def test_environments_far_apart():
    """Below a peak common to both, all columns of the second would vanish."""
    y = torch.tensor([[1.0], [0.9], [-1.0], [-0.9]], device=DEVICE)
    weight = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], device=DEVICE)
    compare(torch.ones(2, 1, device=DEVICE), y, torch.tensor(200.0, device=DEVICE), {"col_weight": weight})


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
    for relation, dtype in (("ne", FULL), ("eq", HALF)):
        x, y, options = problem(19, 37, 19, relation, 3, True, symmetric, dtype)
        compare(x, y, torch.tensor(4.0, device=DEVICE), options)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype, width):
    """The table's own tiles at sizes of several programs; fp32 in tf32 products."""
    if not GPU:
        pytest.skip("no GPU here")
    kinds = [("all", None, False), ("all", 2, True), ("ne", None, True)]
    kinds += [("ne", 2, False), ("eq", None, False), ("eq", 2, True)]
    for relation, environments, symmetric in kinds:  # each compiles two or three kernels
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
