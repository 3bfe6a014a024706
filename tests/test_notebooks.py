"""The notebooks of the site run, and what is committed of them is what their sources say."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
FOLDER = DOCS / "notebooks"
EVERY = pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.ipynb")))

# What makes each of them small: its code, and what stands there in a test.
SMALLER = {
    "find_the_shortcut": {"epochs=12": "epochs=1", "(1, 2, 3)": "(1,)"},
    "a_token_map_that_turns": {"range(100)": "range(2)"},
    "what_features_know": {"range(15)": "range(1)", "hidden_dim=128": "hidden_dim=8, epochs=1"},
}


@pytest.fixture(scope="module")
def build():
    """What the script that builds the notebooks defines."""
    for package in ("jupytext", "nbclient", "PIL"):
        pytest.importorskip(package, reason="needs the docs extra")
    return runpy.run_path(str(FOLDER / "build.py"))


def committed(name):
    nbformat = pytest.importorskip("nbformat", reason="needs the docs extra")
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def printed(name):
    """What the committed notebook shows as text."""
    outputs = [output for cell in committed(name).cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@EVERY
def test_a_source_runs_from_top_to_bottom(name, tmp_path):
    """Smaller, in a folder of its own, where a warning is an error."""
    for package in ("matplotlib", "sklearn", "timm"):
        pytest.importorskip(package, reason="needs the examples extra")
    code = (FOLDER / f"{name}.py").read_text()
    for full, small in SMALLER[name].items():
        assert code.count(full) == 1, full
        code = code.replace(full, small)
    (tmp_path / "notebook.py").write_text(code)
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parent)}
    # Agg shows nothing, and says so; NumPy 2 asks more of tensors than PyTorch gives.
    allowed = ("FigureCanvasAgg is non-interactive", "__array")
    filters = [part for message in allowed for part in ("-W", f"ignore:{message}")]
    call = [sys.executable, "-W", "error", *filters, "notebook.py"]
    result = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)  # noqa: S603
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"notebook.py"}


def test_every_source_was_built(build):
    assert build["NAMES"] == sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(SMALLER)


@EVERY
def test_a_notebook_has_the_cells_of_its_source(name, build):
    source, notebook = build["cells_of"](name), committed(name)
    for mine, theirs in zip(source.cells, notebook.cells, strict=True):
        for part in ("id", "cell_type", "source", "metadata"):
            assert mine[part] == theirs[part], f"python docs/notebooks/build.py {name}"
    assert source.metadata == notebook.metadata


@EVERY
def test_a_notebook_shows_what_it_prints_and_draws(name):
    notebook = committed(name)
    counts = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        counts.append(cell.execution_count)
        kinds = {output.output_type for output in cell.outputs}
        assert kinds <= {"stream", "display_data", "execute_result"}
        assert all(output.get("name", "stdout") == "stdout" for output in cell.outputs)
        code = cell.source.splitlines()
        assert max(map(len, code)) <= 100, "wider than the page"
        if any(re.match(r"(    )*print\(", line) for line in code):
            assert "stream" in kinds, cell.source
        if any(re.match(r"plt\.show\(|weight_sheet\(", line) for line in code):
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
            assert cell.metadata.mystnb.image.alt
    assert counts == list(range(1, len(counts) + 1)), "run once, in order"


@EVERY
def test_a_notebook_is_small_and_knows_no_machine(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= 150_000
    assert (FOLDER / f"{name}.png").stat().st_size <= 30_000
    assert not re.search(r"(?<![\w.])(/\w[\w.-]*){2,}|[A-Z]:\\", printed(name)), "a path"
    assert "http" not in printed(name)


@EVERY
def test_the_gallery_leads_there(name):
    index = (DOCS / "index.md").read_text()
    assert f"(notebooks/{name}.png)](notebooks/{name}.ipynb)" in index
    assert f"\nnotebooks/{name}\n" in index


# ---------------------------------------------------------------------------------------------- what they claim


def test_the_one_line_gains_and_its_control_does_not():
    found = {}
    pattern = r"^(plain|one line|control) +\d+% +(\d+)% +(\d+)%"
    for arm, other, own in re.findall(pattern, printed("find_the_shortcut"), re.M):
        found.setdefault(arm, []).append((int(other), int(own)))
    assert {arm: len(runs) for arm, runs in found.items()} == {"plain": 3, "one line": 3, "control": 3}
    plain, one_line, control = (tuple(map(sum, zip(*found[arm]))) for arm in ("plain", "one line", "control"))
    assert one_line[0] > plain[0] + 3 * 20
    assert control[0] < plain[0]
    assert plain[1] - 3 * 2 < one_line[1] < plain[1]


def test_a_trained_map_turns_better():
    pattern = r"^(photographs|digits) +\w+ +(\S+) +(\S+) +(\S+) +(\S+)$"
    rows = re.findall(pattern, printed("a_token_map_that_turns"), re.M)
    assert len(rows) == 6
    for kind, *values in rows:
        before, floor_before, after, floor_after = map(float, values)
        assert after > before
        assert (floor_after > floor_before) == (kind == "digits")


def test_the_output_forgets_what_the_features_keep():
    """Of the network that was trained on moved digits."""
    rows = {}
    for line in printed("what_features_know").splitlines():
        if found := re.match(r"(\S.*?) \((?:accuracy|R²)\) ", line):
            table = rows.setdefault(found[1], {})
        elif found := re.match(r"    (\w+) +(.*)", line):
            table[found[1]] = list(map(float, found[2].split()))
    features, output = rows["movement, from features"], rows["movement, from the output"]
    for i in range(3):
        assert output["moved"][i] < min(output["random"][i], output["upright"][i])
        assert features["moved"][i] > output["moved"][i] + 0.3
    assert min(rows["class"]["random"]) > 0.9
    assert min(rows["class"]["upright"]) > max(rows["class"]["random"])
