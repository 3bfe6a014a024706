"""Features of a whole dataset from a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from equireg._checks import Arguments

_PARTS = ("images", "labels", "indices")


@torch.no_grad()
def extract_features(
    encoder: Callable[[Tensor], Tensor], loader: Iterable[Any], *, progress: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an encoder over a loader that tells the index of each sample.

    An ``nn.Module`` is put in eval mode for the time, and put back afterwards, also where it fails. Images go to the
    device of its first parameter; what comes back lies on the CPU. A progress bar shows where tqdm is installed.

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
    modes = {module: module.training for module in encoder.modules()} if isinstance(encoder, nn.Module) else {}
    first = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    device = torch.device("cpu") if first is None else first.device
    try:
        if isinstance(encoder, nn.Module):
            encoder.eval()
        for batch in _bar(loader) if progress else loader:
            check = Arguments("extract_features")
            if not isinstance(batch, (tuple, list)) or len(batch) != 3:
                got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
                check.refuse_type("loader", "a loader of (images, labels, indices), see WithIndex", got)
            images, labels, indices = (check.tensor(name, part) for name, part in zip(_PARTS, batch))
            output = check.tensor("encoder's output", encoder(images.to(device)))
            features = check.features("encoder's output", output.cpu(), "B D")
            labels, indices = check.integers("labels", labels.cpu(), "B"), check.integers("indices", indices.cpu(), "B")
            parts.append((features, labels, indices))
    finally:
        for module, training in modes.items():
            module.training = training
    if not parts:
        Arguments("extract_features").refuse("loader", "of at least one batch", "none")
    features, labels, indices = (torch.cat(part) for part in zip(*parts))
    return features, labels, indices


def _bar(loader: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return loader
    return tqdm(loader, desc="features", leave=False)  # type: ignore[no-any-return]
