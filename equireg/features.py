"""Features of a whole dataset from a frozen encoder."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from equireg._checks import Arguments
from equireg._progress import progress_bar

__all__ = ["extract_features", "extract_two_views", "extract_view_features"]

_PARTS = ("images", "labels", "indices")
Views = Callable[[Tensor, "torch.Generator | None"], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def extract_features(
    encoder: Callable[[Tensor], Tensor], loader: Iterable[Any], *, progress: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an encoder over a loader that gives the index of each sample.

    An ``nn.Module`` runs in eval mode and gets its own mode back afterwards, also after an error. So do the modules of
    a bound method (``model.forward_features``), and those that a function or a partial refers to. Images are moved to
    the device of its first parameter, and results to the CPU. A progress bar shows if tqdm is installed.

    Args:
        encoder: images [B, ...] to features [B, D].
        loader: batches ``(images, labels, indices)``, as a ``DataLoader`` over ``WithIndex(dataset)`` gives them.
        progress: whether to show the bar.

    Returns:
        features [N, D], labels int64 [N], indices int64 [N], in the order of the loader.

    Raises:
        TypeError: a batch that is not a triple of tensors.
        ValueError: an empty loader, or features that are not [B, D].

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from equireg import WithIndex
        >>> dataset = WithIndex(TensorDataset(torch.rand(6, 3, 8, 8), torch.arange(6) % 2))
        >>> loader = DataLoader(dataset, batch_size=4)
        >>> features, labels, indices = extract_features(nn.Flatten(), loader, progress=False)
        >>> features.shape, indices
        (torch.Size([6, 192]), tensor([0, 1, 2, 3, 4, 5]))
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    check_callable(Arguments("extract_features"), "encoder", encoder)
    with frozen(encoder) as device:
        for batch in progress_bar(loader, "features", shown=progress):
            check = Arguments("extract_features")
            if not isinstance(batch, (tuple, list)) or len(batch) != 3:
                got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
                check.fail_type("loader", "a loader of (images, labels, indices), see WithIndex", got)
            images, labels, indices = (check.tensor(name, part) for name, part in zip(_PARTS, batch))
            features = encoded(check, encoder, images.to(device))
            labels, indices = check.integers("labels", labels.cpu(), "B"), check.integers("indices", indices.cpu(), "B")
            parts.append((features, labels, indices))
    if not parts:
        Arguments("extract_features").fail("loader", "of at least one batch", "none")
    features, labels, indices = (torch.cat(part) for part in zip(*parts))
    return features, labels, indices


@torch.no_grad()
def extract_view_features(
    encoder: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    views: Views,
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of images and of their transformed views, and the parameters: the input of ``transformation_r2``.

    The encoder is handled as by ``extract_features``.

    Args:
        encoder: images [B, C, H, W], in the loader's range, to features [B, D].
        loader: batches of images, or tuples that begin with them.
        views: such as ``IntermediateViews("all")``.
        generator: source of the parameters; None draws from the global one.
        progress: whether to show the bar.

    Returns:
        features of the images [N, D], features of their views [N, D], parameters [N, P].

    Raises:
        TypeError: a batch without images.
        ValueError: an empty loader, or features that are not [B, D].

    Example:
        >>> from equireg import IntermediateViews
        >>> batches = torch.rand(20, 3, 8, 8).split(8)
        >>> generator = torch.Generator().manual_seed(0)
        >>> views = IntermediateViews("all")
        >>> x, x_view, t = extract_view_features(nn.Flatten(), batches, views, generator=generator, progress=False)
        >>> x.shape, x_view.shape, t.shape
        (torch.Size([20, 192]), torch.Size([20, 192]), torch.Size([20, 8]))
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    check = Arguments("extract_view_features")
    check_callable(check, "encoder", encoder)
    check_callable(check, "views", views)
    with frozen(encoder) as device:
        for batch in progress_bar(loader, "features of two views", shown=progress):
            images = images_of(check, batch).to(device)
            view, _, parameters = views(images, generator)
            x, x_view = (encoded(Arguments("extract_view_features"), encoder, part) for part in (images, view))
            parts.append((x, x_view, parameters.cpu()))
    if not parts:
        check.fail("loader", "of at least one batch", "none")
    first, second, parameters = (torch.cat(part) for part in zip(*parts))
    return first, second, parameters


@torch.no_grad()
def extract_two_views(
    encoder: Callable[[Tensor], Tensor], loader: Iterable[Any], *, progress: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an encoder over a loader of two views: the input of ``PartitionUpdater.update`` without an encoder.

    The encoder is handled as by ``extract_features``.

    Args:
        encoder: views [B, C, H, W] to features [B, d].
        loader: batches ``((view1, view2), ..., indices)``, as over a ``WithIndex(dataset)`` of pairs of images.
        progress: whether to show the bar.

    Returns:
        features of the first views [N, d] and of the second ones [N, d], int64 indices [N], in the order of the loader.

    Raises:
        TypeError: a batch without two views and indices.
        ValueError: an empty loader, or features that are not [B, d].

    Example:
        >>> batches = [((torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)), torch.arange(4))]
        >>> z1, z2, indices = extract_two_views(nn.Flatten(), batches, progress=False)
        >>> z1.shape, z2.shape, indices
        (torch.Size([4, 192]), torch.Size([4, 192]), tensor([0, 1, 2, 3]))
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    check = Arguments("extract_two_views")
    check_callable(check, "encoder", encoder)
    if not isinstance(loader, Iterable):
        check.fail_type("loader", "a loader of ((view1, view2), ..., indices)", type(loader).__name__)
    with frozen(encoder) as device:
        for batch in progress_bar(loader, "features of two views", shown=progress):
            pair = batch[0] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                check.fail_type("loader", "a loader of ((view1, view2), ..., indices)", type(batch).__name__)
            views = [check.tensor("a view", view, "images").to(device) for view in pair]
            check.sizes.pop("B", None)  # all batches share the width; both views and the indices share the size
            first, second = (encoded(check, encoder, view) for view in views)
            indices = check.tensor("indices", batch[-1], "whole numbers").cpu()
            parts.append((first, second, check.integers("indices", indices, "B")))
    if not parts:
        check.fail("loader", "of at least one batch", "none")
    first, second, indices = (torch.cat(part) for part in zip(*parts))
    return first, second, indices


@contextmanager
def frozen(encoder: Any) -> Iterator[torch.device]:
    """Put an encoder's modules in eval mode for a while; yield the device of their parameters, or the CPU."""
    owners = list(_modules_of(encoder, set()))
    modes = {module: module.training for owner in owners for module in owner.modules()}
    first = next((parameter for owner in owners for parameter in owner.parameters()), None)
    try:
        for owner in owners:
            owner.eval()
        yield torch.device("cpu") if first is None else first.device
    finally:
        for module, training in modes.items():
            module.training = training


def _modules_of(thing: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a callable runs: itself, or those that it refers to, wherever a script may have put them."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    parts: list[Any] = []
    if isinstance(thing, nn.Module):
        yield thing
    elif isinstance(thing, functools.partial):
        parts = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, MethodType):
        parts = [thing.__self__]
    elif isinstance(thing, FunctionType) and not (thing.__module__ or "").startswith("torch."):
        parts = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        parts += [thing.__globals__.get(name) for name in _globals_of(thing.__code__)]
    elif isinstance(thing, (list, tuple)):
        parts = [*thing]
    elif isinstance(thing, dict):
        parts = [*thing.values()]
    elif callable(thing) and not isinstance(thing, type):
        parts = [*_attribute(thing, "__dict__", {}).values()]
    elif not isinstance(thing, (type, ModuleType)):  # an object that holds a model, such as a trainer, and much else
        parts = [part for part in _attribute(thing, "__dict__", {}).values() if isinstance(part, nn.Module)]
    if isinstance(thing, FunctionType):  # a decorator, such as torch.no_grad(), keeps the function itself
        parts += [cell.cell_contents for cell in thing.__closure__ or () if cell != CellType()]
    for part in (_attribute(thing, "__wrapped__", None), *parts):
        yield from _modules_of(part, seen)


def _attribute(thing: Any, name: str, default: Any) -> Any:
    try:
        return getattr(thing, name, default)
    except Exception:  # the ``__getattr__`` of a configuration may raise a KeyError
        return default


def _globals_of(code: CodeType) -> Iterator[str]:
    """The global names that a function reads, in functions inside it too."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def images_of(check: Arguments, batch: Any) -> Tensor:
    """The images of a batch: the batch itself, or its first part."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        check.fail_type("loader", "a loader of images, or of tuples that begin with them", type(images).__name__)
    return images


def check_callable(check: Arguments, name: str, value: object) -> None:
    if not callable(value):
        check.fail_type(name, "a module or a function", type(value).__name__)


def encoded(check: Arguments, encoder: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Features [B, D] of images, on the CPU."""
    output = check.tensor("encoder's output", encoder(images))
    return check.features("encoder's output", output.cpu(), "B D")
