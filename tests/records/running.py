"""Running a loss of the table, and its reference, on the same arguments."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tests.records import RECORDS
from tests.records.record import leaves, on_floats, outputs

every_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
modules = [record for record in RECORDS if isinstance(record.build(), nn.Module)]
every_module = pytest.mark.parametrize("record", modules, ids=lambda record: record.name)


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
    places = [torch.arange(1.0, part.numel() + 1, device=part.device) for part in outputs(result)]
    weights = [place.view_as(part).cos().to(part.dtype) for place, part in zip(places, outputs(result))]
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


def copied(value, learning):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(learning and value.requires_grad)
