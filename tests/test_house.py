"""The house stands: arrows go down, names are listed once, and no step prints, asserts or waits."""

import ast
import inspect
import re
import subprocess
import sys
import typing
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from PIL import Image

import equireg

ROOT = Path(equireg.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

GROUND = {"similarity", "distributed", "grid", "invariance", "features", "image_transforms"}
GROUND |= {"_agreement", "_checks", "_progress"}
OUTSIDE = {"torch", "einops", "tqdm", "torchvision", "PIL", "triton", "matplotlib"} | set(sys.stdlib_module_names)
OUTSIDE |= {"typing_extensions", "numpy"}  # torch depends on the one, torchvision on the other
# The arrows between rooms: a probe reads token maps; what serves another package's trainer puts rooms together.
NEIGHBOURS = {"probes": {"backbones"}, "integrations": {"data", "eqinv"}}
TRAINERS = {"timm", "lightning", "pytorch_lightning"}  # imported by the integrations alone


def imports(path):
    """The modules that a file imports, by their full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # ``from package import name`` may import a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def place_of(name):
    """``equireg.ser.loss.SERLoss`` is in the room, or on the ground, ``ser``."""
    return name.split(".")[1]


@pytest.mark.parametrize("path", [p for p in MODULES if p != ROOT / "__init__.py"], ids=str)
def test_arrows_go_down(path):
    """Ground, then rooms; a room imports the ground and itself, never another room."""
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    inside = {place_of(name) for name in imports(path) if name.startswith("equireg.")}
    assert inside <= GROUND | ({here} | NEIGHBOURS.get(here, set()) if here not in GROUND else set())
    outside = OUTSIDE | (TRAINERS if here == "integrations" else set())
    assert {name.split(".")[0] for name in imports(path)} <= outside | {"equireg"}


def test_no_circle():
    """Not between modules either, so that any of them can be read, and imported, first."""
    names = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in MODULES}
    needs = {}
    for name, path in names.items():
        imported = {full if full in names else full.rpartition(".")[0] for full in imports(path)}
        needs[name] = imported & set(names) - {name}
    TopologicalSorter(needs).prepare()  # raises CycleError


def test_few_things_lie_at_the_top():
    written = {"__pycache__", "__init__.pyi"}  # by Python, and when the package is installed
    assert len([p for p in ROOT.iterdir() if p.name not in written]) <= 22


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_step_prints_or_asserts(path):
    """An assert vanishes under -O; a print in a loss is noise."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "eval", "exec"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_labels_of_pictures_can_be_read():
    """No smaller than 9 points, wherever a picture is drawn."""
    makers = [
        path
        for folder in ("docs", "examples", "tests", "equireg")
        for path in (Path(__file__).parent.parent / folder).rglob("*.py")
    ]
    sizes = re.compile(r"\b(?:fontsize|labelsize|label_fontsize|title_fontsize)=([\d.]+)")
    found = {path: [float(size) for size in sizes.findall(path.read_text())] for path in makers}
    assert sum(map(len, found.values())) > 10
    assert not [path for path, own in found.items() if min(own, default=9) < 9]


def test_pictures_of_the_docs_are_no_wider_than_their_labels_allow():
    """A column of the site is 9 inches wide: in a picture of 10, labels of 10 points are shown with 9."""
    folder = Path(__file__).parent.parent / "docs"
    wide = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            wide[path.name] = picture.width / picture.info["dpi"][0]
    assert len(wide) > 20
    assert {name: inches for name, inches in wide.items() if inches > 10.05} == {}


def test_a_name_is_public_once():
    """``import equireg`` takes the last module that has it, and says nothing."""
    found = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and path.stem != "__init__":
                for name in ast.literal_eval(node.value):
                    found.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    twice = {name: files for name, files in found.items() if len(files) > 1}
    assert not twice, f"two modules have the same public name: {twice}"
    hidden = [name for name in found if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()]
    assert not hidden, f"public names that hide a module of the package: {hidden}"


def test_public_names_are_there_and_documented_with_an_example():
    assert equireg.__all__ == sorted(equireg.__all__)
    for name in equireg.__all__:
        thing = getattr(equireg, name)
        assert thing.__doc__, name
        if name not in {
            "ClassRisks",
            "Environments",
            "EnvironmentsReport",
            "GroupAccuracy",
            "PartitionReport",
            "Stability",
        }:  # results, and methods
            assert ">>>" in thing.__doc__, f"{name} has no example"


def test_annotations_can_be_read_at_run_time():
    """``typing.get_type_hints`` of every public function and method, as tools that document or validate call it."""
    for name in equireg.__all__:
        public = getattr(equireg, name)
        typing.get_type_hints(public)
        for method in vars(public).values() if isinstance(public, type) else ():
            if inspect.isfunction(method):
                typing.get_type_hints(method)
    assert typing.get_type_hints(equireg.read_vipriors)["reading"] is not None


def test_examples_import_public_names_only():
    for path in (ROOT.parent / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("equireg"):
                assert node.module == "equireg", path
                assert {alias.name for alias in node.names} <= set(equireg.__all__), path


def test_import_brings_no_optional_package():
    """``import equireg`` works with torch and einops alone, opens no socket and draws no random number."""
    code = (
        "import sys, socket, torch\n"
        "def refuse(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket = refuse\n"
        "state = torch.get_rng_state()\n"
        "before = set(sys.modules)\n"
        "import equireg\n"
        "assert torch.equal(torch.get_rng_state(), state)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'torchvision', 'PIL', 'timm', 'lightly', 'sklearn', 'matplotlib', 'tqdm', 'triton', "
        "'lightning', 'pytorch_lightning'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_version_stands_in_one_place():
    """And the changelog tells of it, with its day: what is not released yet stands above."""
    from importlib.metadata import version

    assert version("equireg") == equireg.__version__
    assert f"version: {equireg.__version__}" in (ROOT.parent / "CITATION.cff").read_text()
    first, *released = re.findall("^## (.*)", (ROOT.parent / "CHANGELOG.md").read_text(), re.M)
    assert first == "Unreleased"
    assert re.fullmatch(re.escape(equireg.__version__) + r" - \d{4}-\d\d-\d\d", released[0])


def test_faults_that_tests_cite_are_explained():
    """``# F23`` in a comment, or ``"F23 twice"`` as the name of a case."""
    lines = [line for path in (ROOT.parent / "tests").rglob("*.py") for line in path.read_text().splitlines()]
    comments = "\n".join(line.partition("# ")[2] for line in lines)
    cited = set(re.findall(r"\b[A-Z]\d{1,2}\b", comments)) | set(re.findall(r'"([A-Z]\d{1,2}) \w', "\n".join(lines)))
    explained = re.findall(r"^\| ([A-Z]\d+) \|", (ROOT.parent / "docs/faults.md").read_text(), re.M)
    assert len(explained) == len(set(explained))
    assert sorted(cited - set(explained)) == [], "explain them in docs/faults.md"
    assert sorted(set(explained) - cited) == [], "no test cites them: take them out of docs/faults.md"
