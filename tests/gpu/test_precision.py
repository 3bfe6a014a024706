"""The losses on a GPU, in each precision, against float64 on the CPU; repeated, and compiled."""

import pytest
import torch

from tests.benchmarks.ser import precision
from tests.gpu.devices import every_device
from tests.gpu.work import PRECISIONS, WORK, every_work, example, on
from tests.records.running import near, same, step


@every_device
@pytest.mark.parametrize("kind", PRECISIONS)
@every_work
def test_equals_float64_on_the_cpu(name, kind, device):
    """Of the same rounded inputs and parameters: the float64 form is itself compared with loops, by its record."""
    if kind == "tf32" and device == "cpu":
        pytest.skip("a CPU has no TF32")
    wanted = PRECISIONS[kind]
    rounded = on(WORK[name](device != "cpu"), "cpu", wanted.dtype)
    scale = 2.0**10 if kind == "fp16" else 1.0  # as a gradient scaler, or small gradients vanish
    with precision(wanted.products):
        found, gradients = step(*on(rounded, device, wanted.dtype), scale)
    if "pair_lse" in name:
        rounded = WORK["pair_lse, chunked"](False)[0], rounded[1]  # the kernels take no float64
    expected, exact_gradients = step(*on(rounded, "cpu", torch.float64), scale)
    for mine, theirs in zip(found, expected, strict=True):
        assert near(mine.cpu(), theirs, wanted.of_loss)
    for mine, theirs in zip(gradients, exact_gradients, strict=True):
        assert theirs.any()
        assert near(mine.cpu(), theirs, wanted.of_gradients)


@every_device
@every_work
def test_repeats_bit_for_bit(name, device):
    case = example(name, device, torch.float16 if "triton" in name else torch.float32)
    first = step(*on(case, device, case[1][0].dtype))
    for _ in range(2 if device == "cpu" else 10):
        assert same(step(*on(case, device, case[1][0].dtype)), first)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # that the test does without them
@every_device
@every_work
def test_compiles_whole(name, device):
    """By Inductor on a GPU; on a CPU the trace alone."""
    torch._dynamo.reset()
    loss, args = case = example(name, device, torch.float16 if "triton" in name else torch.float32)
    expected = step(*on(case, device, args[0].dtype))
    compiled = torch.compile(
        loss, fullgraph=True, dynamic=False, backend="aot_eager" if device == "cpu" else "inductor"
    )
    found = step(compiled, args)
    for mine, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert near(mine, theirs.double(), 1e-4 if mine.dtype == torch.float32 else 5e-3)
