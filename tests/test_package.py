"""What a user installs: both archives, the wheel in an environment that never saw the repository, and its types."""

import io
import os
import re
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import equireg

ROOT = Path(__file__).parent.parent


def run(*command, folder, status=0, **variables):
    """The output of a command that ends with ``status``; it does not see the repository unless ``folder`` is it."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MYPYPATH"}}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(folder)}
    call = [str(part) for part in command]
    result = subprocess.run(call, cwd=folder, env=environment | variables, capture_output=True, text=True)  # noqa: S603
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def sources(*folders):
    """The files below folders of the repository, without what Python and the tools leave there."""
    files = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix in {".py", ".typed", ".json", ".txt"}}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The folder of the wheel and of the source archive, built from the repository."""
    pytest.importorskip("hatchling", reason="needs the dev extra")
    folder = tmp_path_factory.mktemp("archives")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, folder=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(archives):
    (path,) = archives.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(archives):
    """The folder of the unpacked source archive."""
    (path,) = archives.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(archives, filter="data")
    return archives / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of a fresh environment with the wheel; PyTorch and the rest come from the running environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    (python,) = [*folder.glob("bin/python"), *folder.glob("Scripts/python.exe")]
    run(python, "-m", "pip", "install", "--no-deps", wheel, folder=folder)
    # Named in a .pth file, a folder is searched, but its own .pth files, such as an editable install's, are not read.
    packages = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip()
    Path(own, "running.pth").write_text("\n".join(packages))
    return python


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_alone(wheel):
    files = contents(wheel)
    information = f"equireg-{equireg.__version__}.dist-info"
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    about = {f"{information}/{name}" for name in about}
    assert "equireg/py.typed" in files
    assert set(files) == sources("equireg") | about | {"equireg/__init__.pyi"}
    for name in set(files) - about:
        assert files[name] == (ROOT / name).read_bytes(), name
    assert wheel.name == f"equireg-{equireg.__version__}-py3-none-any.whl"


def test_the_wheel_asks_for_three_packages(wheel):
    (metadata,) = [text for name, text in contents(wheel).items() if name.endswith("METADATA")]
    header = HeaderParser().parse(io.StringIO(metadata.decode()))
    needed = [line for line in header.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in needed} == {"torch", "einops", "torchvision"}
    assert all(re.fullmatch(r"\w+>=[\d.]+", line) for line in needed), needed  # a lower bound, and no upper one


def test_an_index_takes_the_archives(archives):
    pytest.importorskip("twine", reason="needs the dev extra")
    run(sys.executable, "-m", "twine", "check", "--strict", *archives.glob("equireg-*.*"), folder=archives)


def description(wheel):
    metadata = next(text.decode() for name, text in contents(wheel).items() if name.endswith("METADATA"))
    header, _, text = metadata.partition("\n\n")
    return re.findall(r"^Project-URL: (\w+), (\S+)$", header, re.M), text


def test_the_description_links_to_the_repository(wheel, tmp_path):
    """Where its address is given: an index has no file of the repository. Else the README is taken as it is."""
    pages = (ROOT / "README.md").read_text()
    assert description(wheel) == ([], pages)
    where = "https://example.org/equireg"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    run(*build, folder=ROOT, EQUIREG_REPOSITORY=f"{where}/")
    urls, text = description(next(tmp_path.glob("*.whl")))
    assert dict(urls)["Repository"] == where
    relative, absolute = (re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", page) for page in (pages, text))
    assert len(relative) > 20
    for (picture, before), (_, after) in zip(relative, absolute, strict=True):
        leads = f"{where}/{'raw' if picture else 'blob'}/HEAD/{before}"
        assert after == (before if before.startswith("#") else leads)  # a place on the page itself is on the index too
    assert re.findall("```.*?```", text, re.S) == re.findall("```.*?```", pages, re.S)  # code stays


def test_the_source_archive_holds_what_the_tests_need(unpacked):
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert sources("equireg", "examples", "tests") <= held
    assert {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "pyproject.toml", "hatch_build.py"} <= held


def test_the_suite_is_collected_from_the_source_archive(unpacked):
    """And those of its tests that read files beside the package run there."""
    here = {"folder": unpacked, "PYTHONPATH": str(unpacked), "TRITON_INTERPRET": "1"}
    beside = "test_readme or test_version_stands or test_examples_import or test_public_names_are"
    output = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", beside, **here)
    assert re.search(r"\b5 passed, \d{4} deselected", output), output  # each of the names above, and the whole suite


def test_the_source_archive_builds_the_same_wheel(unpacked, wheel):
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", unpacked / "dist", folder=unpacked)
    (again,) = (unpacked / "dist").glob("*.whl")
    assert contents(again) == contents(wheel)


def test_the_environment_sees_the_wheel_and_not_the_repository(installed, tmp_path):
    code = "import sys, equireg; print(equireg.__file__, equireg.__version__, *sys.path, sep='\\n')"
    file, version, *searched = run(installed, "-c", code, folder=tmp_path).splitlines()
    assert installed.parent.parent in Path(file).parents
    assert version == equireg.__version__
    assert {ROOT, Path(equireg.__file__).parent.parent}.isdisjoint(Path(path) for path in searched if path)


def test_the_command_is_installed(installed, tmp_path):
    command = installed.with_name("equireg" + installed.suffix)
    assert "is my data biased?" in run(command, "--help", folder=tmp_path)
    assert "nowhere.npz" in run(command, "environments", "nowhere.npz", folder=tmp_path, status=1)


def test_the_quickstart_runs_against_the_wheel(installed, tmp_path):
    for package in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package, reason="needs the examples extra")
    (tmp_path / "quickstart.py").write_bytes((ROOT / "examples/quickstart.py").read_bytes())
    output = run(installed, "quickstart.py", "--seeds", "1", "--epochs", "1", folder=tmp_path)
    assert "+ ClassWiseIRM" in output
    assert (tmp_path / "runs/quickstart/accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_importing_costs_at_most_a_twentieth_of_pytorch(installed, tmp_path):
    """Timed side by side in the same processes, and the least of three, whatever else the machine does."""
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import equireg; "
    code += "print(b - a, time.perf_counter() - b)"
    costs = [[float(cost) for cost in run(installed, "-c", code, folder=tmp_path).split()] for _ in range(3)]
    of_torch, beyond = map(min, zip(*costs))
    assert beyond <= 0.05 * of_torch, costs  # seconds


def test_public_names_are_those_of_the_inventory():
    """A name that is gone breaks a user's program: taking it out of the inventory needs a word in the changelog."""
    names = (ROOT / "tests/public_names.txt").read_text().split()
    assert names == sorted(set(names))
    beside = {name for name in names if "." in name}  # of integrations/, whose tests look for them
    assert set(names) - beside <= set(equireg.__all__), "removed; a new name needs no edit of the inventory"
    assert all(hasattr(equireg, name) for name in equireg.__all__)
    # Whatever else can be reached from the package is a module of it.
    others = {name for name in vars(equireg) if not name.startswith("_")} - set(equireg.__all__)
    assert {name for name in others if f"equireg.{name}" not in sys.modules} == set()


def test_type_checkers_see_the_names_that_python_finds():
    """The stub is read from the source of the modules, the names come from importing them."""
    pytest.importorskip("hatchling", reason="needs the dev extra")
    package = Path(equireg.__file__).parent
    names = {}
    exec(runpy.run_path(str(ROOT / "hatch_build.py"))["stub"](package), names)  # noqa: S102
    assert names.pop("__all__") == equireg.__all__
    assert {name: names[name] for name in equireg.__all__} == {name: getattr(equireg, name) for name in equireg.__all__}


def test_an_editable_install_brings_the_types(unpacked):
    """Into the folder it points to, where a type checker looks for them; so a new method needs another install."""
    stub = unpacked / "equireg/__init__.pyi"
    stub.unlink(missing_ok=True)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel:editable", "-d", unpacked / "dist", folder=unpacked)
    assert "import ClassWiseIRM as ClassWiseIRM" in stub.read_text()


USER = """\
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import equireg
from equireg import ClassWiseIRM, Environments, FeatureMask, GridTransform, PartitionUpdater, SERLoss, patch_nt_xent

tokens = torch.randn(2, 4, 8)
irm = ClassWiseIRM(16, 3, penalty="irmv1", projection=nn.Linear(16, 8))
assert_type(irm.mask, FeatureMask)
assert_type(patch_nt_xent(tokens, tokens, temperature=0.3), Tensor)
assert_type(GridTransform.identity(2, (2, 2)).inverse(), GridTransform)
assert_type(Environments.split(tokens[0], torch.arange(4)).members(0), tuple[Tensor, Tensor])
assert_type(equireg.pair_lse(tokens[0], tokens[1], 2.0), tuple[Tensor, Tensor])
updater = PartitionUpdater(num_samples=64)

ClassWiseIRM("16", 3)  # arg-type
ClassWiseIRM(16)  # call-arg
SERLoss(8, temprature=0.3)  # call-arg
patch_nt_xent(tokens, tokens, 0.3)  # call-arg
number: float = patch_nt_xent(tokens, tokens)  # assignment
GridTransform.identity(2, 4)  # arg-type
Environments.split(tokens[0], torch.arange(4)).similar([0], tokens[1])  # arg-type
equireg.read_nico("nico", brokn="skip")  # call-arg
equireg.read_domains("pacs", max_pixels="all")  # arg-type
equireg.NTXent  # attr-defined
"""


def test_a_users_types_are_checked_against_the_wheel(installed, tmp_path):
    """mypy finds the wrong calls and nothing else; without py.typed it would find none of them."""
    pytest.importorskip("mypy", reason="needs the dev extra")
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed, "user.py"]
    output = run(*command, folder=tmp_path, status=1)
    found = re.findall(r"user\.py:(\d+): error: .*\[([\w-]+)\]", output)
    marked = [(str(row), line.partition("  # ")[2]) for row, line in enumerate(USER.splitlines(), 1) if "  # " in line]
    assert found == marked, output
