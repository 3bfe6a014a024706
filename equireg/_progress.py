"""A progress bar where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def progress_bar(iterable: Iterable[Item], description: str, *, shown: bool = True) -> Iterable[Item]:
    """The same items, counted on a bar that goes away at the end."""
    if not shown:
        return iterable
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, desc=description, leave=False)  # type: ignore[no-any-return]
