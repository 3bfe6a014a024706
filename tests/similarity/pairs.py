"""What the tests of ``pair_lse`` share: a problem with all kinds of pairs, its gradients, and where Triton runs."""

import math
from importlib.util import find_spec

import torch

from equireg import pair_lse

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def problem(rows=7, cols=9, width=5, relation="all", weights="none", ids=False, dtype=torch.float64, zeros=0.3):
    """Arguments of pair_lse, and the kept pairs and weights as plain tables."""
    x, y = torch.randn(rows, width, dtype=dtype), torch.randn(cols, width, dtype=dtype)
    keep = torch.ones(rows, cols, dtype=torch.bool)
    table = torch.ones(1, rows, cols, dtype=torch.float64)
    options = {"relation": relation}
    if relation != "all":
        row_group, col_group = torch.randint(3, (rows,)), torch.randint(3, (cols,))
        options |= {"row_group": row_group, "col_group": col_group}
        keep &= (row_group[:, None] == col_group) == (relation == "eq")
    if ids:
        options |= {"row_id": torch.arange(rows), "col_id": torch.arange(cols)}
        keep &= ~torch.eye(rows, cols, dtype=torch.bool)
    if weights != "none":
        weight = torch.rand(*((2, cols) if weights == "columns" else (2, 4, cols)), dtype=dtype)
        weight[torch.rand(weight.shape) < zeros] = 0
        options["col_weight"] = weight
        if weights == "columns":
            table = weight.double()[:, None].expand(2, rows, cols)
        else:
            options["row_select"] = torch.randint(4, (rows,))
            table = weight.double()[:, options["row_select"]]
    return x, y, options, keep, table


def objective(lse, mean):
    """A number that treats every output differently; rows without a pair count nothing."""
    slope = torch.arange(1.0, lse.numel() + 1, dtype=torch.float64, device=lse.device).view_as(lse).sin()
    return (lse.masked_fill(lse == -math.inf, 0) * slope).sum() + (mean * slope.cos()).sum()


def results(x, y, scale, options, backend):
    """Values, and the gradients to x, the scale, y and the weights. Where y is x they are given as one tensor."""
    options, same = dict(options), y is x
    inputs = [part.detach().clone().requires_grad_() for part in ((x, scale) if same else (x, scale, y))]
    if "col_weight" in options:
        options["col_weight"] = options["col_weight"].detach().clone().requires_grad_()
        inputs.append(options["col_weight"])
    lse, mean = pair_lse(inputs[0], inputs[0] if same else inputs[2], inputs[1], **options, backend=backend)
    return lse.detach(), mean.detach(), *torch.autograd.grad(objective(lse, mean), inputs)


def why_no_triton():
    """Why its kernels cannot run here, not even interpreted; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    from equireg.similarity.triton import kernels

    if not GPU and not kernels.INTERPRETED:
        return "neither a GPU nor TRITON_INTERPRET=1"
    try:
        pair_lse(torch.ones(1, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE), 1.0, backend="triton")
    except Exception as error:  # NumPy 2.4 made an error of how the interpreter, up to 3.6, reads the ends of a loop
        if "only 0-dimensional arrays can be converted" in str(error):
            return "this Triton's interpreter needs a NumPy before 2.4"
    return None


def cut(monkeypatch, tile, programs):
    """The kernels in tiles of one size, split between so many programs."""
    from equireg.similarity.triton import tiles

    monkeypatch.setattr(tiles, "TILES", {key: {512: tiles.Tile(*tile)} for key in tiles.TILES})
    monkeypatch.setattr(tiles, "_PROGRAMS", dict.fromkeys(tiles._PROGRAMS, programs))
    monkeypatch.setattr(tiles, "_processors", lambda device: 1)
