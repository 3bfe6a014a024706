"""``python -m tests.gpu``: what it finds, prints and returns."""

import pytest
import torch

from tests.gpu import __main__ as command

EXAMPLE = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 2])
def test_of_numbers(number):
    print("it was", number)
    assert number == {number}

@pytest.mark.gpu
def test_of_a_card():
    pytest.skip("no card of this kind")

def test_without_a_gpu():
    raise AssertionError
"""


def example(folder, number="number"):
    """A file of tests, of a name of its own: two modules of one name cannot be imported."""
    path = folder / f"test_{folder.name}.py"
    path.write_text(EXAMPLE.replace("{number}", str(number)))
    return str(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert command.main([]) == 5
    text = capsys.readouterr().out
    assert "nothing is proven" in text
    assert f"torch {torch.__version__}" in text


def test_it_finds_the_tests_marked_for_a_gpu():
    found = {path.rsplit("/", 1)[1] for path in command.files()}
    assert {"test_triton.py", "test_precision.py", "test_graphs.py", "test_waits.py", "test_memory.py"} <= found
    assert "test_command.py" not in found


@pytest.mark.parametrize(("number", "status"), [(1, 1), ("number", 0)])
def test_table(number, status, tmp_path, capsys):
    assert command.run(60, only=[example(tmp_path, number)]) == status
    text = capsys.readouterr().out
    assert f"{2 - status} passed, {status} failed, 1 skipped" in text
    assert "  skipped: no card of this kind" in text
    assert "  it was 1\n" in text


def test_what_comes_too_late_is_skipped(tmp_path, capsys):
    assert command.run(-1, only=[example(tmp_path)]) == 0
    assert "skipped: the -1 seconds are spent" in capsys.readouterr().out
