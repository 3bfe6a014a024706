"""What the README and the site show, runs; their commands and links are right."""

import ast
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import equireg

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
SITE = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
PAGES = [README, ROOT / "CONTRIBUTING.md", *SITE]
OPTIONAL = ("accelerate", "datasets", "lightly", "matplotlib", "pytorch_lightning", "pytorch_metric_learning")
OPTIONAL += ("sklearn", "timm", "transformers")  # of the extras


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def name(page):
    return page.relative_to(ROOT).as_posix()


def skip_without(code):
    """Where a package of the extras that the code imports is not installed."""
    for node in ast.walk(ast.parse(code)):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for package in {str(module).split(".")[0] for module in modules} & set(OPTIONAL):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs {package}, of the dev extra")


# ------------------------------------------------------------------------------------------------- the blocks run


def test_readme_blocks_run_each_by_itself():
    assert blocks(README, "python")
    for block in blocks(README, "python"):
        skip_without(block)
        names = {}
        exec(compile(block, str(README), "exec"), names)  # noqa: S102
        assert names["loss"].isfinite()


def test_the_report_that_a_page_shows_is_the_one_its_code_prints(capsys):
    page = DOCS / "is_my_data_biased.md"
    exec(compile(blocks(page, "python")[0], name(page), "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == blocks(page, "text")[0]


WITH_PYTHON = [page for page in SITE if blocks(page, "python")]


@pytest.mark.filterwarnings("default")  # those of other packages are not ours to mend
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    """In one namespace and an empty folder; where the page runs them by torchrun, by that."""
    code = "\n".join(blocks(page, "python"))
    skip_without(code)
    monkeypatch.chdir(tmp_path)
    launch = re.search(r"^torchrun (.*) train\.py$", page.read_text(), re.M)
    if launch:
        (tmp_path / "train.py").write_text(code)
        call = [sys.executable, "-m", "torch.distributed.run", *launch[1].split(), "train.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(call, capture_output=True, text=True, env=environment)  # noqa: S603
        assert result.returncode == 0, result.stderr
        first, *others = re.findall(r"^process \d: (\S+)$", result.stdout, re.M)
        assert others == [first], "both processes report, and the same"
        return
    # The backend that generates code takes a minute of compiling.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    module = ModuleType("page_of_the_site")  # torch.compile of PyTorch 2.6 imports the module a function is from
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), names)  # noqa: S102
    if "loss" in names:
        assert names["loss"].isfinite()


GUIDES = [page for page in WITH_PYTHON if page.parent.name == "guides" and "ClassWiseIRM(" in page.read_text()]


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_who_trains_behind_a_mask_reads_how_to_evaluate(page):
    """A model without its mask has nearly the same accuracy, and other probabilities."""
    text = page.read_text()
    assert "## Evaluate, save, export\n" in text or "your_own_loop.md#evaluate-save-export)" in text
    assert ".fold_into(" in text


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_code_is_no_wider_than_the_page(page):
    for line in "\n".join(blocks(page, "python")).splitlines():
        assert len(line) <= 100, line


# ------------------------------------------------------------------------------------------ the commands are right


def commands():
    for page in PAGES:
        for language in ("bash", "sh", "console"):
            for block in blocks(page, language):
                yield from ((page, part) for line in block.splitlines() for part in line.split(" && ") if part)


@lru_cache
def help_of(*call):
    if call[0] != "-m":  # in this process, which has PyTorch and timm already
        printed, arguments = io.StringIO(), sys.argv
        sys.argv = [*call, "--help"]
        try:
            with redirect_stdout(printed), pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / call[0]), run_name="__main__")
        finally:
            sys.argv = arguments
        assert not ended.value.code
        return printed.getvalue()
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(  # noqa: S603
        [sys.executable, *call, "--help"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_command(page, command):
    """Files exist, options are those of ``--help``, extras are declared. Nothing here is run for long."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    program, *rest = words
    if program == "torchrun":
        rest = rest[next(i for i, word in enumerate(rest) if word.endswith(".py")) :]
        program = "python"
    if Path(program).name in ("pip", "ruff", "mypy", "sphinx-build", "pre-commit", ".ci/run", "run"):
        check_extras(command)
        return
    if program == "equireg":  # the console script, by its module: it may not be installed
        rest = ["-m", "equireg.eqinv._command", *rest]
        program = "python"
    assert Path(program).name in ("python", "python3"), command
    if rest[:2] in (["-m", "pip"], ["-m", "venv"]):
        check_extras(command)
        return
    if rest[0] == "-m":
        module, options, call = rest[1], rest[2:], rest[:2]
        if module.endswith("_command"):
            call = rest[:3]  # a command has flags of its own
        if module == "pytest":
            assert all((ROOT / word).exists() for word in options if word.startswith("tests/")), command
            return
        assert importlib.util.find_spec(module), command
    else:
        script, options, call = rest[0], rest[1:], rest[:1]
        if script == "train.py":
            return  # the page's own blocks
        assert (ROOT / script).is_file() or (ROOT / script / "__main__.py").is_file(), command
        if (ROOT / script).is_dir():
            options, call = options[1:], rest[:2]  # a step, with flags of its own
        if script.startswith("docs/"):
            return
    options = [word for word in options if word.startswith("--")]
    if options:
        known = help_of(*call)
        for option in options:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known), f"{name(page)}: {command}: {option}"


def check_extras(command):
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    declared = re.findall(r"^(\w+) = \[", section, re.M)  # Python 3.10 has no tomllib
    for extras in re.findall(r"\.\[([\w,]+)\]", command):
        assert set(extras.split(",")) <= set(declared), command


def test_commands_exist_and_take_their_options():
    found = list(commands())
    assert len(found) > 10
    for page, command in found:
        skip_without("import matplotlib, timm, lightly, sklearn")
        check_command(page, command)


def test_commands_are_one_line_each():
    """The checks of a clean checkout take the test command from here."""
    lines = [line for line in README.read_text().splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith(".venv/bin/python examples/quickstart.py")
    assert " && .venv/bin/python -m pytest" in lines[1]


def test_table_of_the_papers_tables():
    """It counts itself; its commands, and the groups of the report that it names, exist."""
    page = DOCS / "papers.md"
    text = page.read_text()
    found = Counter(", ".join(re.findall(r"^\| (?:Table|Fig)[^|]*\| ([^|]*) \|", text, re.M)).split(", "))
    count = f"Of {found.total()}, **{found['made']} were made** and **{found['in part']} in part**"
    assert count in text
    assert f"**{found['not made']} were not made**" in text
    assert set(found) == {"made", "in part", "not made"}
    skip_without("import matplotlib, timm, lightly, sklearn")
    for command in set(re.findall(r"`(python [^`]+)`", text)):
        check_command(page, command)
    plan = (ROOT / "examples/evidence/experiments.yaml").read_text()
    for groups in re.findall(r"`--only ([^`]+)`", text):
        assert all(f"\n  {group}:" in plan for group in groups.split()), groups


# -------------------------------------------------------------------------------------------------- links and pictures


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    """On GitHub too, where nobody builds the site."""
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.filterwarnings("default")
def test_pictures_of_the_ideas_are_drawn_anew(tmp_path):
    """By the committed script, all that pages show, and each small enough for a page."""
    pytest.importorskip("matplotlib", reason="needs the examples extra")
    pytest.importorskip("sklearn", reason="needs the examples extra")
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, str(DOCS / "pictures.py"), str(tmp_path)]
    subprocess.run(call, check=True, env=environment)  # noqa: S603
    shown = {found for page in SITE for found in re.findall(r"\]\(([\w-]+-idea\.png)\)", page.read_text())}
    assert {path.name for path in tmp_path.iterdir()} == shown == {path.name for path in DOCS.glob("*-idea.png")}
    for path in tmp_path.iterdir():
        assert 20_000 < path.stat().st_size < 150_000, path.name


# ------------------------------------------------------------------------------------------------------------- the API


def test_every_public_name_is_documented_once(tmp_path):
    pytest.importorskip("sphinx", reason="needs the docs extra")
    runpy.run_path(str(DOCS / "api_pages.py"))["write"](tmp_path)
    pages = "".join(page.read_text() for page in tmp_path.iterdir())
    assert sorted(re.findall(r"^\.\. auto(?:class|function):: (\w+)$", pages, re.M)) == equireg.__all__
