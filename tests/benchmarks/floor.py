"""The floor below a streamed similarity loss: its matrix products and nothing else."""

from torch import Tensor

from equireg.similarity import times_transposed

# On a CPU the tiles of `chunked`, by the same oneDNN; on a GPU tiles that fill it.
CPU_TILE, GPU_TILE = (392, 784), (8192, 8192)


def bare_products(x: Tensor, y: Tensor | None = None, *, recomputed: bool = True) -> None:
    """The similarities of rows with rows, tile by tile, and the gradients of both sides.

    Where the gradients are formed in a backward pass of its own the similarities are computed twice (``recomputed``).
    Without ``y`` it is ``x``, and a tile serves its mirror image too.
    """
    rows, cols = CPU_TILE if x.device.type == "cpu" else GPU_TILE
    symmetric = y is None
    y, cols = (x, rows) if y is None else (y, cols)
    for i in range(0, len(x), rows):
        for j in range(i if symmetric else 0, len(y), cols):
            left, right = x[i : i + rows], y[j : j + cols]
            tile = times_transposed(left, right)
            if recomputed:
                times_transposed(left, right)
            times_transposed(tile, right.T)
            if not symmetric or j > i:
                times_transposed(left.T, tile.T)
