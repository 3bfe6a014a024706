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


def check_images(check: Arguments, images: Any) -> None:
    """Require one batch: a list of batches, as multi-crop methods make of views of several sizes, is many."""
    if isinstance(images, (list, tuple)) and any(isinstance(x, torch.Tensor) and x.dim() == 4 for x in images):
        sizes = sorted({f"{x.shape[-2]} x {x.shape[-1]}" for x in images})
        got = f"a {type(images).__name__} of {len(images)} batches, of {', '.join(sizes)}"
        check.fail_type("images", "one batch [B, C, H, W]; call the model once for each size of the views", got)


def is_torchvision_vit(model: nn.Module) -> bool:
    """Whether it is torchvision's ``VisionTransformer``, judged by its parts, as torchvision may be missing."""
    return all(hasattr(model, part) for part in ("class_token", "conv_proj", "encoder", "image_size"))


def prefix_tokens(model: nn.Module) -> int:
    """The number of class, register and distillation tokens before the patches."""
    return int(getattr(model, "num_prefix_tokens", 1 if is_torchvision_vit(model) else 0))


def calling_thread() -> int:
    """The key that separates the forward passes of several threads; a compiled pass has no thread."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
