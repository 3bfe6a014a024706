"""``python -m tests.gpu``: all tests that need an Nvidia GPU, in at most eight minutes on one H100; downloads nothing.

It prints the card, the versions and a table of what passed, with times. Past ``--seconds`` the tests that are left are
skipped, and the table says so. It ends with 0 where all passed, 1 where one failed, and 5, as pytest does where it ran
no test, without a GPU: then nothing is proven, and a script sees it.
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NO_GPU = 5
LAST = ("test_memory.py", "two_to_the_31")  # they fill the memory, and are worth the least if the time is short


def files() -> list[str]:
    """Those with a test for a GPU: others import what need not be installed here."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.name != "test_command.py"]
    return [str(path) for path in found if "mark.gpu" in (text := path.read_text()) or "every_device" in text]


def about() -> str:
    """The card, its driver and the versions."""
    lines = [f"Python {sys.version.split()[0]}, torch {torch.__version__}"]
    if find_spec("triton"):
        import triton

        lines[0] += f", Triton {triton.__version__}"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        card = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        lines.insert(
            0, f"{card}, {properties.total_memory / 2**30:.0f} GiB, driver {_driver()}, CUDA {torch.version.cuda}"
        )
    return "\n".join(lines)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


class Table:
    """Counts what passed, by test; skips what comes after the time is spent."""

    def __init__(self, seconds: float):
        self.start, self.limit = time.monotonic(), seconds
        self.counts: dict[str, Counter[str]] = {}
        self.seconds: Counter[str] = Counter()
        self.notes: dict[str, dict[str, None]] = {}  # what was printed and why tests were skipped, in order

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: any(name in item.nodeid for name in LAST))

    def pytest_runtest_setup(self) -> None:
        if time.monotonic() - self.start > self.limit:
            pytest.skip(f"the {self.limit:g} seconds are spent")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.split("[")[0].removeprefix("tests/")
        self.seconds[test] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.counts.setdefault(test, Counter())[report.outcome] += 1
        notes = self.notes.setdefault(test, {})
        if report.skipped and isinstance(report.longrepr, tuple):
            notes[report.longrepr[2].replace("Skipped:", "skipped:")] = None
        elif report.when == "call" and report.passed:
            notes.update(dict.fromkeys(report.capstdout.splitlines()))

    def lines(self) -> list[str]:
        width = max((len(test) for test in self.counts), default=4)
        found = [f"{'test':<{width}}  passed  failed  skipped  seconds"]
        for test, count in self.counts.items():
            numbers = f"{count['passed']:>6}  {count['failed']:>6}  {count['skipped']:>7}  {self.seconds[test]:>7.1f}"
            found.append(f"{test:<{width}}  {numbers}")
            found += [f"  {note}" for note in self.notes[test]]
        total = sum(self.counts.values(), Counter())
        taken = time.monotonic() - self.start
        found.append(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped in {taken:.0f} s")
        return found


def run(seconds: float, marked: str = "gpu", only: list[str] | None = None) -> int:
    """The exit status; the table is printed."""
    table = Table(seconds)
    # A warning of a release that the suite does not know is no failure of the card.
    options = [
        "-q",
        "-W",
        "default",
        "-m",
        marked,
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"--rootdir={ROOT}",
        "-o",
        "addopts=",
    ]
    status = pytest.main([*options, *(only or files())], plugins=[table])
    print("\n" + "\n".join(table.lines()), flush=True)
    return int(status)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the tests that need an Nvidia GPU.")
    parser.add_argument("--seconds", type=float, default=420, help="what is left after these is skipped")
    options = parser.parse_args(arguments)
    print(about(), flush=True)
    if not torch.cuda.is_available():
        print(f"No GPU here: the tests marked gpu were not run, and nothing is proven (exit status {NO_GPU}).")
        return NO_GPU
    return run(options.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
