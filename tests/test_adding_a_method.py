"""A method costs one module and one record: docs/adding_a_method.md, applied to a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/adding_a_method.md"

TESTS = ["tests/test_house.py", "tests/test_records.py", "tests/test_docs.py", "tests/test_package.py"]
CHOSEN = "ConfidencePenalty or confidence_penalty or circle or public or type_checkers"
AMONG_THEM = [
    r"test_house.py::test_arrows_go_down\[\S*confidence_penalty.py\]",
    r"test_house.py::test_no_circle",
    r"test_house.py::test_a_name_is_public_once",
    r"test_records.py::test_every_public_loss_has_a_record",
    r"test_records.py::test_values_and_gradients\[ConfidencePenalty-torch.float16\]",
    r"test_records.py::test_refuses\[ConfidencePenalty, F34 weight\]",
    r"test_docs.py::test_every_public_name_is_documented_once",
    r"test_package.py::test_public_names_are_those_of_the_inventory",
    r"test_package.py::test_type_checkers_see_the_names_that_python_finds",
    r"confidence_penalty.py::equireg.baselines.confidence_penalty.ConfidencePenalty",  # its docstring's example
]


@pytest.fixture
def copy(tmp_path):
    """Of what the chosen tests need, without what is built."""
    ignored = shutil.ignore_patterns("__pycache__", "_build", "__init__.pyi", "*.png", "*.rst")
    for name in ("equireg", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", *map(str, arguments)]
    result = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)  # noqa: S603
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_page_adds_a_method_in_two_files(copy):
    """A line of the page is a path, and the block below it the whole file; no other file is touched."""
    for package in ("hatchling", "latex2mathml", "ruff", "sphinx"):
        pytest.importorskip(package, reason="needs the dev extra")
    files = dict(re.findall(r"^`([\w/]+\.py)`\n\n```py\n(.*?)^```$", PAGE.read_text(), re.S | re.M))
    assert [Path(path).parts[0] for path in files] == ["equireg", "tests"]
    for path, text in files.items():
        assert not (copy / path).exists(), path
        (copy / path).write_text(text)
    run(copy, "ruff", "check", "--no-cache", *files)
    run(copy, "ruff", "format", "--check", "--no-cache", *files)
    output = run(copy, "pytest", "-vv", "-p", "no:cacheprovider", "-k", CHOSEN, *TESTS, next(iter(files)))
    for test in AMONG_THEM:
        assert re.search(test + r" PASSED", output), output
