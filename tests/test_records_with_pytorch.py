"""Every public loss, by its record, with the rest of PyTorch: compiled, under autocast, in any layout, copied."""

import copy
import io
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from tests.records import RECORDS
from tests.records.record import (
    HALF,
    leaves,
    on_floats,
    outputs,
    replace,
    split,
)
from tests.records.running import (
    every_module,
    every_record,
    near,
    objective,
    parameters_of,
    same,
    step,
)


@every_record
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(record, dynamic):
    """With gradients; and, of dynamic shapes, once for all sizes of the batch."""
    torch._dynamo.reset()
    gathering = {"gather_distributed": True} if record.processes == "gather" and not dynamic else {}
    loss, args = record.build(torch.float32, **gathering), record.sample(torch.float32)
    compiled = torch.compile(copy.deepcopy(loss), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch._dynamo.config.patch(**record.compile_options):
        if not record.compiles:
            with pytest.raises(torch._dynamo.exc.TorchDynamoException):
                compiled(*args)
            return
        for world in (1, 2, 3) if dynamic else (1,):
            # PyTorch 2.6 takes the sizes of tensors in a dictionary for constants.
            once = world > 1 and torch.__version__ >= "2.7"
            with torch._dynamo.config.patch(error_on_recompile=once):
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


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # PyTorch's own, of its forward mode
@pytest.mark.parametrize("record", [r for r in RECORDS if leaves(r.sample())], ids=lambda record: record.name)
def test_forward_mode_is_right_or_refused(record):
    """A registered operator has no such derivative, and PyTorch would take it for zero."""
    loss, args = record.build(), record.sample()
    expected = torch.autograd.grad(objective(copy.deepcopy(loss)(*args)), leaves(args))
    tangents = iter([torch.randn_like(gradient) for gradient in expected])
    slope = 0.0

    def dual(value):
        nonlocal slope
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        tangent = next(tangents)
        slope += (next(gradients) * tangent).sum()
        return forward_ad.make_dual(value.detach(), tangent)

    gradients = iter(expected)
    with forward_ad.dual_level():
        try:
            result = objective(loss(*tree_map(dual, args)))
        except (RuntimeError, NotImplementedError) as error:
            assert "forward" in str(error).lower()  # noqa: PT017
            return
        tangent = forward_ad.unpack_dual(result).tangent
    torch.testing.assert_close(tangent, slope)


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
