"""Tile sizes of the Triton kernels: tables, because a choice by trial would differ from run to run.

Where the tiles of a kernel were timed on a card of the same compute capability, the fastest of them serves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from equireg.similarity import cards


class Tile(NamedTuple):
    """Tile sizes of a kernel: a program's rows, the columns of a step, and the part of the width that it holds."""

    rows: int
    cols: int
    width: int
    warps: int
    stages: int


TUNED = cards.TILES
# Where nothing was timed. Keyed by what a kernel sums and the bytes of a number, then by the largest width that an
# entry serves. An entry that holds the whole width keeps a program's rows on the chip. Each fits the shared memory of
# compute capability 8.0 and 9.0 without spills; the tests compile them all.
TILES = {
    ("forward", 2): {64: Tile(128, 128, 64, 8, 3), 128: Tile(128, 128, 128, 8, 2), 512: Tile(128, 64, 64, 8, 3)},
    ("forward", 4): {64: Tile(128, 128, 64, 8, 2), 512: Tile(128, 64, 32, 8, 3)},
    ("weights", 2): {64: Tile(128, 64, 64, 8, 3), 128: Tile(128, 64, 128, 8, 2), 512: Tile(128, 64, 64, 8, 3)},
    ("weights", 4): {64: Tile(128, 64, 64, 8, 2), 512: Tile(128, 64, 32, 8, 3)},
    ("features", 2): {128: Tile(128, 32, 128, 8, 2), 256: Tile(64, 32, 256, 8, 2), 512: Tile(32, 64, 64, 8, 2)},
    ("features", 4): {64: Tile(128, 32, 64, 8, 2), 128: Tile(64, 64, 32, 8, 2), 256: Tile(64, 32, 32, 8, 2),
                      512: Tile(32, 32, 32, 8, 2)},
}  # fmt: skip
# Least number of programs for each processor of the device, while there are columns to split. A split of "features"
# costs memory: its sums are as large as x.
_PROGRAMS = {"forward": 4, "weights": 4, "features": 2}


def tile_of(role: str, size: int, width: int, device: torch.device | None = None) -> Tile:
    """The tile for a role, the bytes of a number, a width and, if it is a GPU, the device."""
    padded = max(16, power_of_two(width))
    entries = TILES[role, size]
    tile = entries[min(limit for limit in entries if limit >= padded)]
    for row in _tuned(device):
        if (row.role, row.size, row.width) == (role, size, padded):
            return Tile(*row.tile)
    return tile._replace(width=min(tile.width, padded))


def _tuned(device: torch.device | None) -> tuple[cards.Tuned, ...]:
    """What was timed on the nearest card of the same capability: on another one a tile might not fit on the chip."""
    if device is None or device.type != "cuda" or not TUNED:
        return ()
    name, capability = cards.here(device)
    alike = tuple(row for row in TUNED if row.capability == capability)
    return cards.of_nearest_card(alike, name, capability) if alike else ()


def cut(role: str, own: Tensor, other: Tensor) -> tuple[Tile, int, int]:
    """A kernel's tile, the number of column splits that keeps the device busy, and the columns of each split."""
    tile = tile_of(role, own.element_size(), own.shape[1], own.device)
    blocks = -(-len(other) // tile.cols)
    row_blocks = max(1, -(-len(own) // tile.rows))
    wanted = -(-_PROGRAMS[role] * _processors(own.device) // row_blocks)
    per_split = max(1, -(-blocks // max(1, min(blocks, wanted)))) * tile.cols
    return tile, max(1, -(-len(other) // per_split)), per_split


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
