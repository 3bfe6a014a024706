"""A progress bar where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any, TypeVar

Item = TypeVar("Item")


def progress_bar(iterable: Iterable[Item], description: str, *, shown: bool = True) -> Iterable[Item]:
    """The same items, counted on a bar that goes away at the end."""
    if not shown:
        return iterable
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iterable
    return _counted(iterable, tqdm(total=length_hint(iterable) or None, desc=description, leave=False))


def _counted(iterable: Iterable[Item], bar: Any) -> Iterator[Item]:
    # tqdm.auto's own iteration begins a second one: a DataLoader would start its workers, and draw its seed, twice.
    with bar:
        for item in iterable:
            yield item
            bar.update()
