"""Other tiles for the Triton kernels than those of their table, in the shapes in which ``pair_lse`` has to be fast.

Each changes one entry and leaves the others. The fastest serves what is timed after it, and is written to
``choice.json``. The tests compile every candidate with all options of its kernels: it fits on the chip.
"""

import contextlib
from collections.abc import Iterator

import torch

from equireg.similarity.cards import Tuned, here
from equireg.similarity.triton import tiles
from equireg.similarity.triton.tiles import Tile, power_of_two, tile_of
from tests.benchmarks.gpu_choice import KERNELS, fastest_tiles
from tests.benchmarks.gpu_losses import FAILURES
from tests.benchmarks.gpu_shapes import Shape, partition, ser
from tests.benchmarks.measure import Row, Runs, Settings, compare, difference, reason

CANDIDATES = {
    "forward": (Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 8, 3)),
    "weights": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 64, 128, 4, 3)),
    "features": (Tile(64, 64, 256, 8, 2), Tile(64, 32, 256, 4, 2), Tile(64, 64, 64, 8, 3)),
}


@contextlib.contextmanager
def instead(role: str, tile: Tile) -> Iterator[None]:
    """The kernels of a role, of 16 bits, in another tile."""
    before, tuned = tiles.TILES[role, 2], tiles.TUNED
    tiles.TILES[role, 2] = {512: tile}
    tiles.TUNED = tuple(row for row in tuned if row.role != role)
    try:
        yield
    finally:
        tiles.TILES[role, 2], tiles.TUNED = before, tuned


def other_tiles(settings: Settings) -> Iterator[Row]:
    for shape in (ser(settings), partition(settings)):
        for role in ("forward", shape.learns):
            rows = []
            for row in of_role(shape, role, settings):
                rows.append(row)
                yield row
            if settings.device == "cuda":
                about = (*here(torch.device("cuda")), "in this run")
                tiles.TUNED = (*(Tuned(*about, **found) for found in fastest_tiles(rows)), *tiles.TUNED)


def of_role(shape: Shape, role: str, settings: Settings) -> Iterator[Row]:
    dtype = torch.float16 if settings.quick else torch.bfloat16  # the interpreter has no bf16
    small, arguments = (shape.inputs(size, dtype) for size in (shape.small, shape.sizes[0]))
    work, labels = f"Tiles of {role}, {shape.title}, bf16", {"size": shape.sizes[0], "unit": shape.unit}
    labels |= {"role": role, "width": power_of_two(shape.width)}
    candidates: dict[str, Tile] = {}
    runs: Runs = {}
    expected = run(shape, "dense eager", small)
    others = CANDIDATES[role][:1] if settings.quick else CANDIDATES[role]
    for tile in dict.fromkeys((tile_of(role, 2, shape.width), *others)):
        name = f"{KERNELS} with {tile.rows} x {tile.cols} x {tile.width}, {tile.warps} warps, {tile.stages} stages"
        try:
            with instead(role, tile):
                if not difference(run(shape, KERNELS, small), expected) <= 5e-2:
                    raise RuntimeError("its values are not those of the dense form")
        except FAILURES as error:
            yield {"work": work, "version": name, **labels, "not_measured": reason(error)}
            continue

        def in_tile(tile: Tile = tile) -> None:
            with instead(role, tile):
                run(shape, KERNELS, arguments)

        runs[name], candidates[name] = in_tile, tile
    for row in compare(work, runs, settings, repeats=3, may_fail=FAILURES, **labels):
        yield {**row, "tile": [*candidates[row["version"]]]}


def run(shape: Shape, version: str, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The gradients of a step."""
    learning = [part for part in arguments if part.requires_grad]
    return list(torch.autograd.grad(shape.versions[version](*arguments).mean(), learning))
