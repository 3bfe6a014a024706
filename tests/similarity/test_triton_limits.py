"""Where the Triton kernels refuse to run, and what they ask of a GPU that need not be there."""

import json
import os
import re
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import equireg.similarity.triton
from equireg import pair_lse

pytest.importorskip("triton", reason="Triton is not installed")
from equireg.similarity.triton import kernels
from equireg.similarity.triton import launch as host


def tensor(dtype=torch.bfloat16, width=64, is_cuda=True):
    """What of a tensor on a GPU the refusal looks at."""
    return types.SimpleNamespace(
        dtype=dtype, shape=(8, width), is_cuda=is_cuda, device=types.SimpleNamespace(type="cuda" if is_cuda else "cpu")
    )


@pytest.mark.parametrize(
    ("arguments", "capability", "precision", "reason"),
    [
        ({"x": tensor()}, (8, 0), "highest", None),
        ({"x": tensor(torch.float32)}, (9, 0), "high", None),
        ({"x": tensor(torch.float32)}, (9, 0), "medium", None),
        ({"x": tensor(torch.float32)}, (9, 0), "highest", "float32 products at full precision use no tensor core"),
        ({"x": tensor(is_cuda=False)}, (9, 0), "high", "x is on cpu, and the kernels are for CUDA"),
        ({"x": tensor()}, (7, 5), "high", "the compute capability is 7.5, and the kernels need 8.0"),
        ({"x": tensor(torch.float64)}, (9, 0), "high", "x is of torch.float64, and the kernels are for float16"),
        ({"x": tensor(width=513)}, (9, 0), "high", "x is 513 wide, and the kernels are for at most 512"),
        ({"x": tensor(), "row_select": torch.zeros(8)}, (9, 0), "high", "the kernels know no row_select"),
        (
            {"x": tensor(), "col_weight": torch.ones(9, 4)},
            (9, 0),
            "high",
            "col_weight has 9 environments, .* at most 8",
        ),
    ],
)
def test_refusals(arguments, capability, precision, reason, monkeypatch):  # K7
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    found = host.refusal(**{"col_weight": None, "row_select": None} | arguments)
    if reason is None:
        assert found is None
    else:
        assert re.match(reason, found)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton does not interpret here")
def test_the_interpreter_refuses_bf16():
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    with pytest.raises(
        RuntimeError, match="pair_lse: backend 'triton' cannot run here: .*interpreter.*; 'chunked' runs"
    ):
        pair_lse(x, x, 1.0, backend="triton")


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "equireg.similarity.triton.kernels", None)
    monkeypatch.delattr(equireg.similarity.triton, "kernels")
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="pair_lse: backend 'triton' cannot run here: Triton is not installed"):
        pair_lse(x, x, 1.0, backend="triton")
    assert pair_lse(x, x, 1.0, backend="chunked")[0].isfinite().all()


@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_within_the_limits_of_a_gpu(architecture):
    """For every entry of the table, and every tile that may replace one.

    In a process of its own, for in this one Triton interprets.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_kernels", str(architecture)]
    run = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) >= 20
    for kernel in found:
        assert kernel["shared"] <= {80: 163, 90: 227}[architecture] * 1024, kernel
    if any("stack" not in kernel for kernel in found):
        pytest.skip("this Triton has no cuobjdump: shared memory is within the limits, spills are not known")
    if not version("triton").startswith("3.2."):  # whose compiler spills some registers
        for kernel in found:
            assert kernel["stack"] == 0 or len(kernel["case"]) == 8, kernel  # a tile that spills loses by its time
