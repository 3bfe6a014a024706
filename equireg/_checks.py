"""Argument checks with one style of messages for the whole package.

Every message reads ``function: argument must be <rule>, got <what came>``. Shapes are written as names, and a
name bound by one argument holds for the next: after ``features("z", z, "B D")`` an argument of shape ``"B B"``
must agree with it.

Type, shape, dtype and device are always checked. Values (label ranges, NaN) are checked where reading them costs
nothing: on CPU. On an accelerator reading waits for the device, so values are checked there only with
``EQUIREG_CHECKS=1``; inside ``torch.compile`` they never are.
"""

from __future__ import annotations

import math
import numbers
import os
from itertools import chain
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def values_visible(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be read without a wait or a graph break."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    return tensor.device.type == "cpu" or os.environ.get("EQUIREG_CHECKS") == "1"


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Refuse forward mode: a registered operator has no such derivative, and PyTorch would take it for zero.

    Raises:
        RuntimeError: one of the tensors carries a tangent, as in ``torch.func.jvp``.
    """
    if torch.compiler.is_compiling():
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("equireg: forward-mode derivatives (jvp) are not implemented; reverse mode has them")


def for_layers(layers: nn.Module, features: Tensor) -> Tensor:
    """Features of any floating dtype in that of the layers' weights, as a linear map takes no other."""
    weight = next(layers.parameters(), features)
    return features.to(weight.dtype)


class Arguments:
    """The arguments of one call to ``function``, checked one after the other."""

    def __init__(self, function: str):
        self.function = function
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None
        self.device_of = ""

    def beside(self, module: nn.Module, *of_module: Tensor) -> Arguments:
        """All tensors belong on the device of the module, that of each of its own tensors, parameters and buffers."""
        first = next(chain(of_module, module.parameters(), module.buffers()), None)
        if first is not None:
            self.device, self.device_of = first.device, "the loss module (its .to(device) moves it)"
        return self

    def fail(self, name: str, rule: str, got: object) -> NoReturn:
        raise ValueError(f"{self.function}: {name} must be {rule}, got {got}")

    def fail_type(self, name: str, rule: str, got: object) -> NoReturn:
        raise TypeError(f"{self.function}: {name} must be {rule}, got {got}")

    def tensor(self, name: str, value: object, of_what: str = "any kind") -> Tensor:
        """A tensor of any dtype, on any device."""
        if not isinstance(value, Tensor):
            self.fail_type(name, f"a tensor of {of_what}", type(value).__name__)
        return value

    def floats(self, name: str, value: object) -> Tensor:
        """A tensor of floating point numbers, of any shape."""
        tensor = self.placed(name, value, "floating point numbers")
        if not tensor.is_floating_point():
            self.fail_type(name, "a tensor of floating point numbers", tensor.dtype)
        return tensor

    def features(self, name: str, value: object, shape: str) -> Tensor:
        """A tensor of floating point numbers with the given shape."""
        return self._shaped(name, self.floats(name, value), shape)

    def integers(self, name: str, value: object, shape: str) -> Tensor:
        """A tensor of whole numbers (labels, ids, indices) with the given shape, as int64."""
        tensor = self.placed(name, value, "whole numbers")
        if tensor.dtype not in _INTEGERS:
            self.fail_type(name, "a tensor of whole numbers", tensor.dtype)
        return self._shaped(name, tensor, shape).long()

    def booleans(self, name: str, value: object, shape: str) -> Tensor:
        """A bool tensor with the given shape."""
        tensor = self.placed(name, value, "booleans")
        if tensor.dtype != torch.bool:
            self.fail_type(name, "a bool tensor", tensor.dtype)
        return self._shaped(name, tensor, shape)

    def positive(self, name: str, value: object) -> None:
        """A finite number above zero, or a learnable 0-d floating point tensor."""
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                self.fail_type(name, "a number or a 0-d floating point tensor", value.dtype)
            if value.dim() != 0:
                self.fail(name, "a number or a 0-d tensor", list(value.shape))
            if not values_visible(value):
                return
            value = float(value.detach())
        self.number(name, value)
        if not 0 < value < math.inf:  # type: ignore[operator]  # torch.compile cannot trace math.isinf of a symbol
            self.fail(name, "finite and above 0", value)

    def not_negative(self, name: str, value: object) -> None:
        """A finite number, zero or above."""
        self.number(name, value)
        if not 0 <= value < math.inf:  # type: ignore[operator]
            self.fail(name, "finite and at least 0", value)

    def share(self, name: str, value: object) -> None:
        """A number in 0 .. 1."""
        self.number(name, value)
        if not 0 <= value <= 1:  # type: ignore[operator]
            self.fail(name, "in 0 .. 1", value)

    def weights(self, name: str, tensor: Tensor) -> None:
        """Finite numbers of at least 0; read only where that is free."""
        if values_visible(tensor):
            wrong = ~((tensor >= 0) & (tensor < math.inf))
            if wrong.any():
                self.fail(name, "finite and at least 0", float(tensor.detach()[wrong][0]))

    def pixels(self, name: str, images: Tensor, rule: str = "in 0 .. 1") -> None:
        """Images in 0 .. 1, or by half beyond, as resizing overshoots; read only where that is free."""
        if values_visible(images) and images.numel():
            low, high = (float(bound) for bound in images.detach().aminmax())
            if not (low >= -0.5 and high <= 1.5):
                self.fail(name, rule, f"{low:g} .. {high:g}")

    def alike(self, **features: tuple[Tensor, str]) -> None:
        """Tensors of floating point numbers, each with its shape, of the dtype of the first."""
        (first, (like, _)), *_ = features.items()
        for name, (tensor, shape) in features.items():
            self.features(name, tensor, shape)
            if tensor.dtype != like.dtype:
                self.fail_type(name, f"of {first}'s dtype {like.dtype}", tensor.dtype)

    def number(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            self.fail_type(name, "a number", f"{type(value).__name__} {value!r}")

    def count(self, name: str, value: object, least: int = 1) -> None:
        """A whole number, ``least`` or more."""
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            self.fail_type(name, "a whole number", f"{type(value).__name__} {value!r}")
        if value < least:
            self.fail(name, f"at least {least}", value)

    def sides(self, name: str, value: object, patch_size: int = 1) -> tuple[int, int]:
        """(height, width) of images or grids, given as that or as one side; of whole patches."""
        both = value if isinstance(value, (tuple, list)) else (value, value)
        if len(both) != 2:
            self.fail(name, "a side or (height, width)", value)
        for side in both:
            self.count(name, side)
            if side % patch_size:
                self.fail(name, f"whole patches of {patch_size}", value)
        return both[0], both[1]

    def span(self, name: str, limits: object) -> None:
        """Two finite numbers above zero, the first no larger than the second."""
        if not isinstance(limits, (tuple, list)) or len(limits) != 2:
            self.fail(name, "two numbers above 0 in rising order", limits)
        for limit in limits:
            self.number(name, limit)
        if not 0 < limits[0] <= limits[1] < math.inf:
            self.fail(name, "two numbers above 0 in rising order", limits)

    def option(self, name: str, value: object, allowed: tuple[object, ...]) -> None:
        # `is` for booleans: 1 == True, yet 1 is no spelling of True here.
        for choice in allowed:
            if value is choice or (isinstance(value, str) and value == choice):
                return
        self.fail(name, "one of " + ", ".join(repr(choice) for choice in allowed), repr(value))

    def below(self, name: str, tensor: Tensor, limit: int, what: str) -> None:
        """Every entry of ``tensor`` in ``0 .. limit - 1``; read only where that is free."""
        if not values_visible(tensor) or tensor.numel() == 0:
            return
        wrong = (tensor < 0) | (tensor >= limit)
        if wrong.any():
            place = int(wrong.flatten().nonzero()[0])
            self.fail(name, f"in 0 .. {limit - 1} ({what})", f"{int(tensor.flatten()[place])} at position {place}")

    def finite(self, name: str, tensor: Tensor) -> None:
        """No NaN and no infinity in ``tensor``; for set-up calls, which may wait for the device."""
        # The extremes are NaN where an entry is; a mask of all entries is made only where one is wrong.
        if tensor.numel() and not all(math.isfinite(extreme) for extreme in tensor.detach().aminmax()):
            wrong = ~torch.isfinite(tensor)
            row = int(wrong.nonzero()[0][0])
            self.fail(name, "finite", f"{float(tensor[wrong][0])} in row {row}")

    def placed(self, name: str, value: object, of_what: str) -> Tensor:
        """A tensor on the device of the arguments before it."""
        tensor = self.tensor(name, value, of_what)
        if self.device is None:
            self.device, self.device_of = tensor.device, name
        elif tensor.device != self.device:
            self.fail(name, f"on {self.device} as {self.device_of} is", tensor.device)
        return tensor

    def _shaped(self, name: str, tensor: Tensor, shape: str) -> Tensor:
        dims = shape.split()
        sizes = dict(self.sizes)
        fits = tensor.dim() == len(dims)
        if fits:
            for dim, size in zip(dims, tensor.shape):
                if sizes.setdefault(dim, size) != size:
                    fits = False
        if fits:
            self.sizes = sizes
        else:
            known = [str(self.sizes[dim]) if dim in self.sizes else dim for dim in dims]
            rule = f"[{', '.join(dims)}]"
            if known != dims and tensor.dim() == len(dims):
                rule += f" = [{', '.join(known)}]"
            self.fail(name, rule, list(tensor.shape))
        return tensor
