"""The house stands: arrows go down, names are listed once, and no step prints, asserts or waits."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import equireg

ROOT = Path(equireg.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Which modules of the package each may import; a method never imports another method.
ALLOWED = {
    "_checks": set(),
    "image_files": {"_checks", "_progress"},
    "datasets": {"_checks", "image_files"},
    "color_bias": {"_checks", "datasets"},
    "folders": {"_checks", "image_files"},
    "image_folders": {"_checks", "datasets", "folders", "image_files"},
    "domains": {"_checks", "datasets", "folders", "image_files"},
    "nico": {"_checks", "datasets", "folders", "image_files", "nico_contexts"},
    "nico_contexts": {"_checks", "datasets"},
    "invariance": {"_checks"},
    "_progress": set(),
    "features": {"_checks", "_progress"},
    "grid": {"_checks"},
    "distributed": set(),
    "backbones": {"_checks"},
    "late_class_token": {"_checks", "backbones"},
    "token_tap": {"_checks", "backbones", "grid"},
    "views": {"_checks", "grid"},
    "image_transforms": set(),
    "intermediate_views": {"_checks", "image_transforms"},
    "decoder": set(),
    "reconstruction": {"_checks", "decoder"},
    "probes": {"_checks", "_progress", "features", "grid", "probes", "similarity", "token_tap"},
    "decoupled": {"_checks", "similarity"},
    "ser": {"_checks", "distributed", "grid", "similarity"},
    "similarity": {"_checks", "similarity"},
    "info_nce": {"_checks", "distributed", "similarity"},
    "partition_search": {"_progress", "info_nce", "invariance"},
    "partitions": {"_checks", "distributed", "features", "info_nce", "partition_search"},
    "partition_loss": {"_checks", "distributed", "info_nce", "partitions"},
    "ipirm": {"_checks", "distributed", "info_nce", "partition_loss", "partitions", "similarity"},
    "ipirm_methods": {"_checks", "distributed", "info_nce", "partition_loss", "partitions", "similarity"},
    "distillation": {"_checks", "similarity"},
    "contrastive_distillation": {"_checks", "similarity"},
    "inference": {"_checks", "similarity"},
    "class_similarity": {"_checks", "similarity"},
    "environments": {"_checks", "similarity", "class_similarity"},
    "class_risks": {"_checks", "distributed", "similarity"},
    "eqinv": {
        "_checks",
        "distributed",
        "similarity",
        "class_risks",
        "class_similarity",
        "environments",
        "features",
        "invariance",
    },
}


def imports(path):
    """First part below the package of every module that a file imports, and the outside packages."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" if node.module == "equireg" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "equireg":
                inside.add(parts[1] if len(parts) > 1 else "")
            else:
                outside.add(parts[0])
    return inside, outside


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != ROOT or p.name != "__init__.py"], ids=str)
def test_arrows_go_down(path):
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    inside, outside = imports(path)
    assert inside <= ALLOWED[name]
    assert outside <= {"torch", "einops", "tqdm", "torchvision", "PIL", "triton"} | set(sys.stdlib_module_names)


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


def test_public_names_are_there_and_documented_with_an_example():
    assert equireg.__all__ == sorted(equireg.__all__)
    for name in equireg.__all__:
        thing = getattr(equireg, name)
        assert thing.__doc__, name
        if name not in {
            "ClassRisks",
            "Environments",
            "PartitionReport",
        }:  # results, and methods
            assert ">>>" in thing.__doc__, f"{name} has no example"


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
        "print(sorted(new & {'torchvision', 'PIL', 'timm', 'lightly', 'sklearn', 'matplotlib', 'tqdm', 'triton'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_version_stands_in_one_place():
    from importlib.metadata import version

    assert version("equireg") == equireg.__version__
    assert f"version: {equireg.__version__}" in (ROOT.parent / "CITATION.cff").read_text()
