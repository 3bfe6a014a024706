"""Where a test runs: on the CPU at a tiny size with every run of the suite, on a GPU at its full size."""

import pytest
import torch

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu])
every_device = pytest.mark.parametrize("device", ["cpu", GPU])
