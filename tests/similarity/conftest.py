import pytest
import torch

from equireg.similarity.streamed import bounded
from tests.similarity.pairs import GPU, cut, why_no_triton

CPU = ["dense", "bounded", "online"]


def chosen(name, monkeypatch):
    """The backend; "bounded" and "online" are the two ways of "chunked", which chooses by the size of the logits."""
    if name not in ("bounded", "online"):
        return name
    monkeypatch.setattr(bounded, "BOUND", -1.0 if name == "online" else 40.0)
    return "chunked"


@pytest.fixture(params=CPU[1:])
def streaming(request, monkeypatch):
    return chosen(request.param, monkeypatch)


@pytest.fixture(params=CPU)
def cpu_backend(request, monkeypatch):
    """Those that take float64."""
    return chosen(request.param, monkeypatch)


@pytest.fixture(params=[*CPU, "triton"])
def backend(request, monkeypatch):
    if request.param == "triton":
        request.getfixturevalue("triton_tiles")
    return chosen(request.param, monkeypatch)


@pytest.fixture
def triton_tiles(monkeypatch):
    """In the interpreter several tiles, splits and steps along the width also for small sizes; on a GPU the table's."""
    reason = why_no_triton()
    if reason:
        pytest.skip(reason)
    before = torch.get_float32_matmul_precision()
    if GPU:
        torch.set_float32_matmul_precision("high")
    else:
        cut(monkeypatch, (16, 32, 16, 8, 2), programs=6)
    yield
    torch.set_float32_matmul_precision(before)
