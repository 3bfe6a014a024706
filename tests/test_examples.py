"""The examples run as a user runs them, and do what they claim."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments, folder):
    """The output of an example, run as a file copied out of the repository."""
    copy = folder / name
    copy.write_text((EXAMPLES / name).read_text())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(folder)}
    result = subprocess.run(  # noqa: S603
        [sys.executable, str(copy), *arguments], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000


def test_quickstart_beats_cross_entropy(tmp_path):
    """On validation images of two seeds, by half of what it gains on average."""
    pytest.importorskip("sklearn", reason="needs the examples extra")
    output = run("quickstart.py", "--seeds", "2", "--split", "validation", folder=tmp_path)
    rows = {line[:32].strip(): re.findall(r"([\d.]+) ± [\d.]+", line) for line in output.splitlines()}
    conflicting = {name: float(cells[1]) for name, cells in rows.items() if cells}
    assert conflicting["+ ClassWiseIRM"] > conflicting["cross entropy"] + 6
    assert float(rows["+ ClassWiseIRM"][0]) > 97  # and nothing is lost where the bias holds
    assert is_picture(tmp_path / "runs" / "quickstart.png")


def test_quickstart_controls(tmp_path):
    pytest.importorskip("sklearn", reason="needs the examples extra")
    output = run("quickstart.py", "--seeds", "1", "--epochs", "1", "--controls", folder=tmp_path)
    assert "without the penalty (weight 0)" in output
    assert "random environments" in output


def test_colored_mnist_shows_the_papers_figure(tmp_path):
    """Plain similarity splits by digit, adjusted similarity by the class's colour alone (EqInv, Fig. 5)."""
    pytest.importorskip("sklearn", reason="needs the examples extra")
    output = run("colored_mnist.py", "--source", "digits", "--unbiased", "0.05", folder=tmp_path)
    pattern = r"^(\w+) +similarity.*: (\d+) to (\d+)% of each other digit, (\d+)% of colour 0"
    found = {name: [int(n) for n in shares] for name, *shares in re.findall(pattern, output, re.M)}
    low, high, _ = found["plain"]
    assert high - low > 80
    low, high, own_color = found["adjusted"]
    assert low > 30
    assert high < 70
    assert own_color > 90
    assert is_picture(tmp_path / "runs" / "colored_mnist.png")
