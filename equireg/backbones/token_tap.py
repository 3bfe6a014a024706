"""Reading the token map of any layer of any model, and its grid."""

from __future__ import annotations

import difflib
import math
import sys
import threading
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from equireg._checks import Arguments
from equireg.backbones._hookable import calling_thread, check_images, check_plain, prefix_tokens
from equireg.grid import Grid

__all__ = ["TokenTap"]


class TokenTap:
    r"""Reads the tokens that leave a layer of any model, and their grid, without changing the model.

    A context manager: inside, every forward pass of ``model`` stores the layer's output in ``tokens`` and ``grid`` (the
    last one, if a layer runs twice). On exit all hooks are removed; the last output stays readable. It works under
    DistributedDataParallel, activation checkpointing and, if the model is compiled inside of the context,
    ``torch.compile``. Rows and columns follow from the layer's output and the images' sides, so non-square images and
    dynamic sizes work.

    Args:
        model: any module that takes images [B, C, H, W] first.
        layer: the name of a submodule, as in ``model.named_modules()``: ``"blocks.2"``, ``"layer3"``, ``"stages.1"``.
        num_prefix_tokens: class, register and distillation tokens before the patches in an output [B, N, D]. None takes
            the ``num_prefix_tokens`` of the model, or of the part of it that has the layer; 1 for torchvision's ViT,
            otherwise 0.
        channels_last: whether an output with four dimensions is [B, H, W, D] (Swin) and not [B, D, H, W]. None decides
            by the images' aspect and the model's ``output_fmt``.

    A grid follows from the number of tokens alone. Of an encoder that drops tokens (MAE) what is kept may look like a
    smaller grid, so tap it on whole images.

    Raises:
        TypeError: ``model`` is not a module; on running, a list of batches, or an output that is not one tensor.
        ValueError: a model compiled already, no such layer; on running, an output without a grid; on reading ``tokens``
            or ``grid``, that the layer has not run, that its output was changed in place afterwards, or that reentrant
            activation checkpointing hid a layer that learns from autograd.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18()
        >>> with TokenTap(model, "layer2") as tap:
        ...     logits = model(torch.rand(2, 3, 64, 96))
        >>> tap.tokens.shape, tap.grid
        (torch.Size([2, 96, 128]), (8, 12))
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        *,
        num_prefix_tokens: int | None = None,
        channels_last: bool | None = None,
    ):
        self._check = check = Arguments("TokenTap")
        check_plain(check, "model", model, allow_parallel=True)
        if num_prefix_tokens is not None:
            check.count("num_prefix_tokens", num_prefix_tokens, least=0)
        check.option("channels_last", channels_last, (None, True, False))
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        names = dict(self.model.named_modules())
        if not isinstance(layer, str) or layer not in names or layer == "":
            close = difflib.get_close_matches(str(layer), names, n=3, cutoff=0.4) or list(names)[1:4]
            check.fail("layer", f"the name of a submodule, such as {', '.join(map(repr, close))}", repr(layer))
        if hasattr(self.model, "unroll") and hasattr(self.model, "reroll"):
            check.fail("model", "one that keeps its tokens row by row", f"{type(self.model).__name__}, which reorders")
        self.layer, self.channels_last = layer, channels_last
        if num_prefix_tokens is None:  # of the model, or of the part of it that has the layer
            owners = [self.model.get_submodule(owner) for owner in _prefixes(layer)]
            num_prefix_tokens = next(filter(None, map(prefix_tokens, owners)), 0)
        self.num_prefix_tokens = num_prefix_tokens
        self._running: dict[int, tuple[Grid | None, bool]] = {}  # by thread: sides of the images, whether it learns
        self._taken: dict[int, _Taken] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> TokenTap:
        if self._handles:
            self._check.fail("the tap", "entered once at a time", "a second entry")
        self._handles = [
            self.model.register_forward_pre_hook(self._before),
            self.model.get_submodule(self.layer).register_forward_hook(self._record),
            self.model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks; the last output stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        # A model copied inside of the context keeps its hooks, but not the last output.
        return {**self.__dict__, "_running": {}, "_taken": {}}

    @property
    def tokens(self) -> Tensor:
        """Tokens of the last forward pass in this thread, [B, T, D], prefix tokens left out, row by row of ``grid``."""
        key, taken = self._last()
        if taken.version >= 0 and taken.output._version != taken.version:
            raise ValueError(
                f"TokenTap: layer {self.layer!r} must not be followed by an operation in place on its output, such as "
                "ReLU(inplace=True); tap the module that does that"
            )
        if not torch.is_grad_enabled():
            return _as_tokens(taken.output, taken.layout)
        if taken.hidden and taken.output.grad_fn is None:
            raise ValueError("TokenTap: model must checkpoint with use_reentrant=False, got tokens without gradient")
        if taken.tokens is not None:
            return taken.tokens
        tokens = _as_tokens(taken.output, taken.layout)
        self._taken[key] = taken._replace(tokens=tokens)
        return tokens

    @property
    def grid(self) -> Grid:
        """Rows and columns of ``tokens``."""
        return self._last()[1].grid

    def _last(self) -> tuple[int, _Taken]:
        key = threading.get_ident()
        key = key if key in self._taken else 0
        if key not in self._taken:
            raise ValueError(
                f"TokenTap: layer {self.layer!r} must run inside of the context before its tokens are read; "
                "a model compiled before that does not see the tap"
            )
        return key, self._taken[key]

    def _before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            check_images(self._check, args[0])
        known = args and isinstance(args[0], Tensor) and args[0].dim() >= 3
        image = (args[0].shape[-2], args[0].shape[-1]) if known else None
        self._running[calling_thread()] = image, torch.is_grad_enabled()

    def _after(self, *_: Any) -> None:
        self._running.pop(calling_thread(), None)

    def _record(self, module: nn.Module, _: Any, output: Any) -> None:
        # A checkpointed layer runs again in the backward pass, after its output was recorded.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        if not isinstance(output, Tensor):
            self._check.fail_type("layer", f"one whose output is a tensor ({self.layer!r})", type(output).__name__)
        image, learns = self._running.get(calling_thread(), (None, False))
        layout, grid = self._layout(output, image)
        if torch.compiler.is_compiling():  # a graph has no thread, so all threads share its output
            self._taken = {0: _Taken(_as_tokens(output, layout), 0, grid, -1, False)}
            return
        self._taken.pop(0, None)
        version = -1 if output.is_inference() else output._version
        # Reentrant checkpointing runs layers without gradient, and gives some of their outputs one afterwards.
        hidden = learns and not torch.is_grad_enabled() and not _frozen(module) and _in_autograd_function()
        self._taken[calling_thread()] = _Taken(output, layout, grid, version, hidden)

    def _layout(self, output: Tensor, image: Grid | None) -> tuple[str | int, Grid]:
        """Where the channels are, or how many tokens come before the patches; and the grid."""
        shape = list(output.shape)
        if output.dim() == 4:
            last = self.channels_last
            if last is None:
                first_fits, last_fits = _fits((shape[2], shape[3]), image), _fits((shape[1], shape[2]), image)
                says = getattr(self.model, "output_fmt", None) == "NHWC"
                last = last_fits and (says or not first_fits)
            if last:
                return "NHWC", (shape[1], shape[2])
            return "NCHW", (shape[2], shape[3])
        if output.dim() == 3:
            # Some layers run before the class token joins (CaiT), so the prefix may be there or not.
            prefixes = (self.num_prefix_tokens, 0)
            for exact in (True, False):
                for prefix in prefixes:
                    grid = _grid_of(shape[1] - prefix, image, exact)
                    if grid is not None:
                        return prefix, grid
        of = f"images of {image[0]} x {image[1]}" if image else "unknown images"
        rule = f"one whose output is a map of tokens ({self.layer!r})"
        if output.dim() == 3:
            rule += f", of all patches, none masked, after {self.num_prefix_tokens} others (num_prefix_tokens)"
        self._check.fail("layer", rule, f"{shape} for {of}")


class _Taken(NamedTuple):
    """An output of the layer: whole, as autograd may join it only after it left the layer."""

    output: Tensor
    layout: str | int
    grid: Grid
    version: int  # -1 where it has none
    hidden: bool  # from autograd, when it was recorded
    tokens: Tensor | None = None  # once read: one tensor however often, so that it can be asked for its gradient


def _frozen(module: nn.Module) -> bool:
    """Whether it has parameters, of which none learns."""
    return {parameter.requires_grad for parameter in module.parameters()} == {False}


def _in_autograd_function() -> bool:
    """Whether the forward pass of one, such as that of reentrant checkpointing, is what runs the layer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        named = "ctx" in frame.f_code.co_varnames  # only then, as looking into a frame keeps alive what is in it
        if named and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return True
        frame = frame.f_back
    return False


def _as_tokens(output: Tensor, layout: str | int) -> Tensor:
    if layout == "NHWC":
        return output.flatten(1, 2)
    if layout == "NCHW":
        return output.flatten(2).transpose(1, 2)
    return output[:, layout:]


def _prefixes(name: str) -> list[str]:
    """``"a.b.c"`` to ``["", "a", "a.b", "a.b.c"]``."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _fits(sides: Grid, image: Grid | None) -> bool:
    """Whether one stride, rounded up or down, takes the image to a grid of these sides."""
    if image is None:
        return True
    (h, w), (height, width) = sides, image
    low = max(height / (h + 1), width / (w + 1))
    high = min(height / max(h - 1, 0.5), width / max(w - 1, 0.5))
    return low < high and h <= height and w <= width


def _grid_of(tokens: int, image: Grid | None, exact: bool) -> Grid | None:
    """The sides whose product is ``tokens`` and whose aspect is the image's; without an image, a square."""
    if tokens < 1:
        return None
    height, width = image or (1, 1)
    h = round(math.sqrt(tokens * height / width))
    for rows in (h,) if exact else (h, h - 1, h + 1):
        if rows > 0 and tokens % rows == 0:
            sides = rows, tokens // rows
            # One stride takes a square image to a square grid alone.
            close = not exact and image is not None and height != width and _fits(sides, image)
            if rows * width == sides[1] * height or close:
                return sides
    return None
