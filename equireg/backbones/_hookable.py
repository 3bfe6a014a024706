"""Checks and facts about a backbone before its layers are hooked."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from equireg._checks import Arguments


def check_plain(check: Arguments, name: str, model: Any, allow_parallel: bool = False) -> None:
    """Require a module that is not compiled yet: hooks added after the first compiled call are silently ignored."""
    if not isinstance(model, nn.Module):
        check.fail_type(name, "a torch.nn.Module", type(model).__name__)
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    if parallel and not allow_parallel:
        check.fail(name, "wrapped before DistributedDataParallel", type(model).__name__)
    modules: tuple[Any, ...] = (model, model.module) if parallel else (model,)
    for module in modules:
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            check.fail(name, "wrapped first and compiled after", "a model compiled already")


def is_torchvision_vit(model: nn.Module) -> bool:
    """Whether it is torchvision's ``VisionTransformer``, judged by its parts, as torchvision may be missing."""
    return all(hasattr(model, part) for part in ("class_token", "conv_proj", "encoder", "image_size"))


def prefix_tokens(model: nn.Module) -> int:
    """The number of class, register and distillation tokens before the patches."""
    return int(getattr(model, "num_prefix_tokens", 1 if is_torchvision_vit(model) else 0))


def calling_thread() -> int:
    """The key that separates the forward passes of several threads; a compiled pass has no thread."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
