"""Compiles the kernels for a GPU that need not be there; prints a line of JSON for each: shared memory and spills.

A process of its own, for where the environment variable TRITON_INTERPRET is set Triton compiles nothing:
``python -m tests.compile_kernels 90``.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from equireg.similarity.triton import kernels
from equireg.similarity.triton import tiles as triton_tiles
from tests.benchmarks.gpu_tiles import CANDIDATES

TENSORS = {
    "bf16": {"x", "y", "own", "other"},
    "i32": {"row_group", "col_group", "row_id", "col_id", "own_group", "other_group", "own_id", "other_id"},
}
ROLES = {  # by_own, by_other, features, weights
    "rows": (True, False, True, False),
    "columns": (False, True, True, True),
    "both": (True, True, True, False),
    "weights": (False, True, False, True),
}


PARTS = {"features": ("rows", "columns", "both")}


def kernel_source(kernel, number, constants, absent):
    """What Triton would compile at a launch with 16-byte aligned tensors and sizes of no special value."""
    signature, values, aligned = {}, dict(constants) | dict.fromkeys(absent), []
    for position, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name] = "constexpr"
        elif name in ("M", "N", "per_split"):
            signature[name] = "i32"
        else:
            kind = next((kind for kind, names in TENSORS.items() if name in names), "fp32")
            signature[name] = "*" + (number if kind == "bf16" else kind)
            aligned.append(position)
    if triton.__version__.startswith("3.2"):
        from triton.backends.compiler import AttrsDescriptor

        attrs = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
        signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        return ASTSource(kernel, signature, values, attrs)
    return ASTSource(kernel, signature, values, {(position,): [["tt.divisibility", 16]] for position in aligned})


def resources(compiled):
    """Shared memory in bytes, registers a thread, and bytes of its stack, on which only spilled registers lie."""
    result = {"shared": compiled.metadata.shared}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            log = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout  # noqa: S603
        result |= {"registers": int(re.search(r"REG:(\d+)", log)[1]), "stack": int(re.search(r"STACK:(\d+)", log)[1])}
    return result


TIMED = {"forward": (128, 256), "weights": (128,), "features": (256,)}  # widths at which candidates are timed


def cases():
    """Every entry of the table in bf16, in each role and with all options; some in fp16 and tf32 or with fewer.

    And every tile that is timed beside them on a GPU, in bf16 with all options.
    """
    for name, widths in TIMED.items():
        for width, role, tile in product(widths, PARTS.get(name, (name,)), CANDIDATES[name]):
            yield "bf16", name, 2, width, role, "ne", 2, tile
    for (name, bytes_), entries in triton_tiles.TILES.items():
        for width in entries:
            for role in PARTS.get(name, (name,)):
                if bytes_ == 2:
                    yield "bf16", name, bytes_, width, role, "ne", 2
                elif role in ("forward", "both"):
                    yield "fp32", name, bytes_, width, role, "ne", 2
    yield "bf16", "forward", 2, 128, "forward", "eq", 1
    yield "bf16", "forward", 2, 64, "forward", "all", 1
    yield "fp16", "features", 2, 256, "both", "eq", 1


def compiled(arch, number, name, size, width, role, relation, environments, tile=None):
    tile = tile or triton_tiles.tile_of(name, size, width)
    constants = {"D": width, "E": environments, "EP": triton_tiles.power_of_two(environments), "RELATION": relation,
                 "PRECISION": "tf32" if number == "fp32" else "ieee",
                 "ROWS": tile.rows, "COLS": tile.cols, "WIDTH": tile.width}  # fmt: skip
    kernel, absent = kernels.forward, []
    if relation == "all":
        absent += ["row_group", "col_group", "own_group", "other_group"]
    if environments == 1:
        absent += ["row_id", "col_id", "own_id", "other_id", "weight", "own_weight", "other_weight"]
    if role != "forward":
        kernel = kernels.backward
        by_own, by_other, features, weights = ROLES[role]
        constants |= {"PADDED": triton_tiles.power_of_two(width), "BY_OWN": by_own, "BY_OTHER": by_other,
                      "FEATURES": features, "WEIGHTS": weights}  # fmt: skip
        for side, there in (("own", by_own), ("other", by_other)):
            if not there:
                absent += [f"{side}_lse", f"{side}_constant", f"{side}_steep"]
                absent.append("other_weight" if side == "own" else "own_weight")
        if number != "fp16":
            absent.append("normalizer")
    absent = [name for name in absent if name in kernel.arg_names]
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    source = kernel_source(kernel, number, constants, absent)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


if __name__ == "__main__":
    for case in cases():
        print(json.dumps({"case": list(case), **resources(compiled(int(sys.argv[1]), *case))}), flush=True)
