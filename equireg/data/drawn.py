"""Random orders that are the same on every machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from equireg.data.image_files import ImageFiles


def drawn_order(names: Sequence[str], seed: int) -> list[int]:
    """A random order by ``seed``, the same on every machine; adding a name does not reorder the others."""

    def key(place: int) -> bytes:
        return hashlib.sha256(f"{seed} ".encode() + os.fsencode(names[place])).digest()

    return sorted(range(len(names)), key=key)


def drawn_cells(files: ImageFiles, seed: int) -> dict[tuple[int, int], list[int]]:
    """The images of each (label, context), in a random order by ``seed``."""
    if files.contexts is None:
        return {}
    cells: dict[tuple[int, int], list[int]] = {}
    for index, pair in enumerate(zip(files.labels.tolist(), files.contexts.tolist())):
        cells.setdefault(pair, []).append(index)
    for pair, cell in cells.items():
        # Names that are the same on every machine, wherever the folder lies.
        names = ["/".join(files.paths[index].split(os.sep)[-3:]) for index in cell]
        cells[pair] = [cell[place] for place in drawn_order(names, seed)]
    return cells
