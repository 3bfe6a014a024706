"""Whether a loss waits for the device: on a GPU as PyTorch reports it, elsewhere on tensors without values.

A fake tensor says that it is on a GPU and holds nothing. What has to know a value (``.item()``, ``bool(tensor)``, a
selection by a mask) raises, and a copy from one device to the other is seen: both would wait. There it is the forward
pass alone, for PyTorch's engine of gradients asks the GPU.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from equireg import GridTransform
from tests.gpu.inside import Inside
from tests.records.running import step

# Records whose forward pass waits, and why it has to.
BY_DESIGN = {
    "class_wise_risks/own": "how many classes it returns depends on the labels",
    "class_wise_risks/all": "how many classes it returns depends on the labels",
    "ContrastiveDistillation": "it draws its negatives on the CPU, so that they are the same on every device",
}

Move = Callable[[Tensor], Tensor]


def moved(loss: Any, args: Any, move: Move, move_loss: Move | None = None) -> tuple[Any, Any]:
    """The loss itself, and its arguments, with their tensors moved, also those of group elements; leaves stay leaves.

    ``move_loss`` is for the tensors of the loss, where they move otherwise.
    """
    of_loss = move if move_loss is None else move_loss

    def argument(value: Any) -> Any:
        if isinstance(value, GridTransform):
            turns, flip = move(value.quarter_turns), move(value.flip)
            return GridTransform(turns, flip, value.source, value.target)
        if isinstance(value, Tensor):
            return move(value.detach()).detach().requires_grad_(value.requires_grad)
        return value

    if isinstance(loss, nn.Module):
        # Parameters by hand: ``Module.to`` would write into the old ones, which a fake tensor cannot take.
        found = {module: module._parameters for module in loss.modules()}
        for module in found:
            module._parameters = {}
        loss._apply(of_loss)
        for module, parameters in found.items():
            module._parameters = {
                name: None if value is None else nn.Parameter(of_loss(value.detach()), value.requires_grad)
                for name, value in parameters.items()
            }
    return loss, tree_map(argument, args)


class _Copies(Inside):
    """Refuses copies between the devices; a number of no dimension may come from the CPU without one."""

    def seen(self, function, given, made):
        devices = {x.device.type for x in [*given, *made] if x.dim()}
        if len(devices) > 1:
            raise RuntimeError(f"{function} copies between {' and '.join(sorted(devices))}")


def forward_on_a_fake_gpu(loss: Callable[..., Any], args: Any) -> Any:
    """What the loss gives on a GPU that is not there: tensors of shapes, dtypes and devices, without values."""
    loss = copy.deepcopy(loss)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss, args = moved(loss, args, lambda tensor: mode.from_tensor(tensor).to("cuda"))
        with _Copies():
            return loss(*args)


def step_that_may_not_wait(loss: Callable[..., Any], args: Any) -> Any:
    """Forward and backward pass on a GPU; raises where the CPU waits for it. Once before, to load what is needed."""
    loss, args = moved(copy.deepcopy(loss), args, lambda tensor: tensor.to("cuda", copy=True))
    step(loss, args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return step(loss, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
