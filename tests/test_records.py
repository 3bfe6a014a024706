"""Every public loss, by its record: what it computes, how precisely, and that it lives with the rest of PyTorch."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import equireg
import equireg.similarity
from tests.records import RECORDS
from tests.records.record import (
    AS_REFERENCE,
    BATCH,
    DTYPES,
    HALF,
    NO_ENTRIES,
    Refused,
    leaves,
    on_floats,
    outputs,
    replace,
    split,
    take,
)

NO_LOSSES = {
    "ClassRisks",
    "Environments",
    "EquivariantViews",
    "FeatureMask",
    "GridTransform",
    "IntermediateViews",
    "LateClassToken",
    "PartitionReport",
    "PartitionUpdater",
    "TokenTap",
    "WithIndex",
    "adjusted_similarity",
    "ensemble",
    "equivariance_score",
    "extract_features",
    "extract_two_views",
    "extract_view_features",
    "fit_ensemble_weights",
    "knn_accuracy",
    "linear_probe",
    "mix_images",
    "mocov3_photometric",
    "predict_tta",
    "split_batch",
    "transformation_accuracy",
    "transformation_r2",
}

every_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
modules = [record for record in RECORDS if isinstance(record.build(), nn.Module)]
every_module = pytest.mark.parametrize("record", modules, ids=lambda record: record.name)


def test_every_public_loss_has_a_record():
    assert {record.public_name for record in RECORDS} == set(equireg.__all__) - NO_LOSSES
    assert len({record.name for record in RECORDS}) == len(RECORDS)


def parameters_of(loss):
    return dict(loss.named_parameters()) if isinstance(loss, nn.Module) else {}


def state_of(loss):
    return loss.state_dict() if isinstance(loss, nn.Module) else {}


def same(one, other):
    """Equal bits, wherever tensors stand."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return all(torch.equal(a.detach(), b.detach()) for a, b in pairs if isinstance(a, torch.Tensor))


def objective(result):
    """A number that weighs every entry of every output differently, so that each gradient counts."""
    weights = [torch.arange(1.0, part.numel() + 1).view_as(part).cos().to(part.dtype) for part in outputs(result)]
    return sum((part * weight).sum() for part, weight in zip(outputs(result), weights))


def step(loss, args, scale=1.0):
    """Outputs, and the gradients of the inputs that should have one and of every parameter."""
    result = loss(*args)
    gradients = torch.autograd.grad(scale * objective(result), [*leaves(args), *parameters_of(loss).values()])
    return [part.detach() for part in outputs(result)], gradients


def in_float64(loss, args):
    """What the reference takes: the state of a module by name, and the arguments."""
    state = {name: value.detach().clone() for name, value in state_of(loss).items()}
    return on_floats(torch.Tensor.double)((state, *args))


def exactly(record, loss, args, scale=1.0):
    """The same of the reference, on what the inputs and the module hold."""
    p, *args = in_float64(loss, args)
    learned = [p[name].requires_grad_() for name in parameters_of(loss)]
    result = record.reference(p, *args)
    gradients = torch.autograd.grad(scale * objective(result), [*leaves(args), *learned])
    return [part.detach() for part in outputs(result)], gradients


def near(found, expected, limit):
    """Relative to the norm."""
    return found.shape == expected.shape and (found.double() - expected).norm() <= limit * expected.norm()


# ------------------------------------------------------------------------------------------------ values, gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("record", "streamed"),
    [pytest.param(r, s, id=r.name + ", streamed" * s) for r in RECORDS for s in range(1 + r.streams)],
)
def test_values_and_gradients(record, streamed, dtype, monkeypatch):
    """And every input and parameter that should learn gets something finite to learn from."""
    if streamed:  # pair_lse chooses by size
        monkeypatch.setattr(equireg.similarity, "_DENSE_ENTRIES", 0)
    loss, args = record.build(dtype), record.sample(dtype)
    scale = 2.0**10 if dtype == torch.float16 else 1.0  # as a gradient scaler, or small gradients vanish in fp16
    expected, expected_gradients = exactly(record, loss, args, scale)
    found, gradients = step(loss, args, scale)
    limit, limit_of_gradients = record.limits(dtype)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert near(mine, theirs, limit)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert mine.isfinite().all()
        assert mine.any()
        assert near(mine, theirs, limit_of_gradients)


@pytest.mark.parametrize("record", [r for r in RECORDS if leaves(r.sample())], ids=lambda record: record.name)
def test_gradcheck(record):
    loss, args = record.build(), take(record.sample(), slice(3))

    def call(*inputs):
        given = iter(inputs)
        rebuilt = tree_map(lambda x: next(given) if isinstance(x, torch.Tensor) and x.requires_grad else x, args)
        found = copy.deepcopy(loss)(*rebuilt)
        return [part.masked_fill(part == -math.inf, 0) for part in outputs(found)]  # of rows without a pair

    assert torch.autograd.gradcheck(call, leaves(args), atol=1e-8, rtol=1e-6)


class Calls(TorchDispatchMode):
    """Remembers the calls of the package's own operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "equireg":
            self.calls.setdefault(function, []).append(args)
        return function(*args, **(kwargs or {}))


def copied(value, learning):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(learning and value.requires_grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised inside opcheck itself
def test_opcheck_of_every_registered_operator(monkeypatch):  # K12
    """With arguments that they get from the losses; one that no loss calls fails."""
    monkeypatch.setattr(equireg.similarity, "_DENSE_ENTRIES", 0)
    forward, backward = Calls(), Calls()
    for record in RECORDS:
        loss, args = record.build(torch.float32), record.sample(torch.float32)
        with forward:
            total = objective(loss(*args))
        with backward:
            total.backward()
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("equireg::")}
    assert {op.name() for op in {*forward.calls, *backward.calls}} == registered
    for calls, learning in ((forward.calls, True), (backward.calls, False)):
        for operator, arguments in calls.items():
            for args in arguments[:: max(1, len(arguments) // 4)]:
                torch.library.opcheck(operator, tree_map(partial(copied, learning=learning), args))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("record", "case"), [pytest.param(r, case, id=f"{r.name}, {case}") for r in RECORDS for case in r.refused]
)
def test_refuses(record, case):
    """And before any state changes."""
    wrong = record.refused[case]
    loss = record.build() if not wrong.options else None
    before = copy.deepcopy(state_of(loss))
    with pytest.raises(wrong.error, match=wrong.message):
        (loss or record.build(**wrong.options))(*wrong.change(record.sample()))
    assert same(state_of(loss), before)


DEGENERATE = {
    "empty": lambda args: take(args, slice(0)),
    "one": lambda args: take(args, slice(1)),
    "identical": on_floats(lambda x: x[:1].expand_as(x).clone() if x.dim() else x),
    "zero": on_floats(lambda x: x.index_fill(0, torch.tensor([0, 5]), 0) if x.dim() and len(x) == BATCH else x),
}


@every_record
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches(record, case, dtype):  # F6, F8, F9, F10
    """No NaN and no silent zero: the result that the record states, with finite gradients."""
    loss, args = record.build(dtype), DEGENERATE[case](record.sample(dtype))
    expected = getattr(record, case)
    if isinstance(expected, Refused):
        with pytest.raises(expected.error, match=expected.message):
            loss(*args)
        return
    if expected == AS_REFERENCE:
        expected = record.reference(*in_float64(loss, args))
    found, gradients = step(loss, args)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if expected == NO_ENTRIES:
        assert all(part.numel() == 0 for part in found)
        return
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, theirs in zip(found, expected, strict=True):
        theirs = torch.as_tensor(theirs, dtype=torch.float64).detach().expand_as(mine)
        torch.testing.assert_close(mine.double(), theirs, rtol=10 * record.limits(dtype)[0], atol=1e-6)


# ------------------------------------------------------------------------------------------------ with all of PyTorch


@every_record
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(record, dynamic):
    """With gradients; and, of dynamic shapes, once for all sizes of the batch."""
    torch._dynamo.reset()
    loss, args = record.build(torch.float32), record.sample(torch.float32)
    compiled = torch.compile(copy.deepcopy(loss), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch._dynamo.config.patch(**record.compile_options):
        if not record.compiles:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                compiled(*args)
            return
        for world in (1, 2, 3) if dynamic else (1,):
            with torch._dynamo.config.patch(error_on_recompile=world > 1):
                found, gradients = step(compiled, split(args, 0, world))
            expected, expected_gradients = step(loss, split(args, 0, world))
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(gradients, expected_gradients)


@every_record
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(record, dtype):  # F26
    """Layers may run in half precision; sums do not."""
    loss, args = record.build(torch.float32), record.sample(torch.float32)
    expected, expected_gradients = step(copy.deepcopy(loss), args)
    with torch.autocast("cpu", dtype):
        result = loss(*args)
    gradients = torch.autograd.grad(objective(result), [*leaves(args), *parameters_of(loss).values()])
    for mine, theirs in zip(outputs(result), expected, strict=True):
        assert mine.dtype == torch.float32
        assert near(mine.detach(), theirs.double(), 2e-2) if parameters_of(loss) else torch.equal(mine, theirs)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert near(mine, theirs.double(), 0.25)


LAYOUTS = {
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "sliced": lambda x: torch.cat([x, x])[: len(x)] if x.dim() else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x,
    "turned": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1) if x.dim() > 1 else x,
}


def laid_out(args, layout):
    def change(x):
        return layout(x.detach()).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    return tree_map(change, args)


@every_record
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_layouts(record, layout):  # F22
    """The same bits, from inputs that stay as they are."""
    args = record.sample(torch.float32)
    if layout == "expanded":
        other = on_floats(lambda x: x[:1].expand_as(x) if x.dim() else x)(args)
        args = on_floats(torch.Tensor.contiguous)(other)
    else:
        other = laid_out(args, LAYOUTS[layout])
    tensors = [x for x in tree_leaves(other) if isinstance(x, torch.Tensor)]
    versions, copies = [x._version for x in tensors], [x.detach().clone() for x in tensors]
    found, expected = (step(record.build(torch.float32), given) for given in (other, args))
    if record.same_bits:
        assert same(found, expected)
    torch.testing.assert_close(found, expected)
    assert [x._version for x in tensors] == versions
    assert same(tensors, copies)


@every_record
def test_upstream_gradients(record):  # F24
    """Of stride 0, from a concatenation, negative, zero, and a gradient scaler's."""
    loss, args = record.build(torch.float32), record.sample(torch.float32)

    def gradients(of):
        mine = copy.deepcopy(loss)
        total = sum(of(part) for part in outputs(mine(*args)))
        return torch.autograd.grad(total, [*leaves(args), *parameters_of(mine).values()])

    expected = gradients(lambda part: (part * torch.ones_like(part)).sum())
    assert same(gradients(lambda part: part.sum()), expected)
    joined = gradients(lambda part: torch.cat([part.flatten(), part.flatten()]).sum() / 2)
    torch.testing.assert_close(joined, expected)
    for factor in (-1.0, 0.0, 2.0**16):
        torch.testing.assert_close(
            list(gradients(lambda part, factor=factor: factor * part.sum())),
            [factor * gradient for gradient in expected],
        )


@every_record
def test_nan_is_not_masked(record):  # F15
    """In any argument: the loss is NaN, or refuses it."""
    args = tree_map(lambda x: copied(x, False), record.sample())
    count = len([x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.is_floating_point()])
    for place in range(count):
        left = iter(range(count))
        spoiled = on_floats(lambda x, left=left, place=place: spoiled_first(x) if next(left) == place else x)(args)
        try:
            found = outputs(record.build()(*spoiled))
        except ValueError as error:
            found = [torch.tensor(math.nan)] if "got nan" in str(error) else []
        assert any(part.isnan().any() for part in found)


def spoiled_first(x):
    x = x.clone()
    x.view(-1)[0] = math.nan
    return x


@every_record
def test_modes_and_repetition(record):  # F25, F26
    """The same bits without a gradient, again, and from a second backward; the global generator is not drawn from."""
    loss, args = record.build(torch.float32), record.sample(torch.float32)
    state = torch.get_rng_state()
    expected = step(copy.deepcopy(loss), args)
    assert same(step(copy.deepcopy(loss), args), expected)
    assert torch.equal(torch.get_rng_state(), state)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same(list(outputs(copy.deepcopy(loss)(*args))), expected[0])
    wrt = [*leaves(args), *parameters_of(loss).values()]
    total = objective(loss(*args))
    assert same(torch.autograd.grad(total, wrt, retain_graph=True), expected[1])
    assert same(torch.autograd.grad(total, wrt), expected[1])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, wrt)


@pytest.mark.parametrize("record", [r for r in RECORDS if r.frozen], ids=lambda record: record.name)
def test_what_is_frozen_gets_no_gradient(record):
    loss, args = record.build(), record.sample()
    for place in record.frozen:
        args = replace(place, on_floats(lambda x: x.clone()))(args)
        frozen = [x.requires_grad_() for x in tree_leaves(args[place])]
        gradients = torch.autograd.grad(objective(copy.deepcopy(loss)(*args)), frozen, allow_unused=True)
        assert gradients == (None,) * len(frozen)


@every_module
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies(record, how):
    """A copy goes on where the module was after a step: the same outputs, gradients and state."""
    loss, args = record.build(torch.float32), record.sample(torch.float32)
    loss(*args)
    if how == "deepcopy":
        other = copy.deepcopy(loss)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(loss))  # noqa: S301
    else:
        file = io.BytesIO()
        torch.save(loss.state_dict(), file)
        file.seek(0)
        other = record.build(torch.float32, seed=1)
        other.load_state_dict(torch.load(file, weights_only=True))
    following = record.sample(torch.float32, seed=1)
    assert same(step(other, following), step(loss, following))
    assert same(other.state_dict(), loss.state_dict())
