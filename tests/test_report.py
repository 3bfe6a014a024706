"""The report: its intervals, its words, and a whole one at the size of a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("timm", "lightly", "matplotlib", "imagecorruptions"):
    pytest.importorskip(name, reason="needs the report extra")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "vipriors"))
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_interval_is_students(evidence):
    """As scipy's paired test gives it, and a hand-worked case."""
    from evidence.intervals import paired
    from scipy.stats import ttest_rel

    values, base = [3.0, 5.5, 4.0, 6.0, 5.0], [2.0, 5.0, 4.5, 4.0, 3.5]
    found, expected = paired(values, base), ttest_rel(values, base).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert paired([2.0, 4.0], [1.0, 1.0]).mean == 2.0  # differences 1 and 3: 2 ± 12.706 · √2 / √2
    assert paired([2.0, 4.0], [1.0, 1.0]).high == pytest.approx(2 + 12.7062047)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([2.0, 2.1, 2.2], "higher"), ([0.0, 0.1, 0.2], "lower"), ([0.0, 1.1, 2.2], "no difference told"), ([5.0], None)],
)
def test_verdict_says_what_the_interval_says(values, verdict, evidence):
    from evidence.intervals import paired

    base = [1.0] * len(values)
    assert paired(values, base).verdict == (verdict or "no difference told")  # one seed tells nothing


def test_unpaired_values_are_refused(evidence):
    from evidence.intervals import paired

    with pytest.raises(ValueError, match="as many and not none, got 2 and 1"):
        paired([1.0, 2.0], [1.0])


def results_of(offset):
    """Three seeds of a base, of an arm that is better by a sure point, and of one that is worse."""
    arms = {"off": 0.0, "plain": -offset, "random": 0.0, "open": 0.0, "on": offset}
    runs = {
        arm: {
            str(seed): {"accuracy": {"val": 0.0, "test": 50 + 3 * seed + gain + 0.01 * (seed == 1) * (gain != 0)}}
            | {"chosen": {"weight": 10.0}, "seconds": 60.0}
            for seed in range(3)
        }
        for arm, gain in arms.items()
    }
    return {
        "scale": "cpu",
        "seeds": 3,
        "machine": "a machine",
        "torch": "2",
        "date": "2026-01-01",
        "hours": 1.0,
        "step_seconds": {},
        "runs": {"pacs": runs},
    }


def test_page_says_where_a_method_helps_and_where_not(evidence, tmp_path):
    from evidence.page import write_page

    text = write_page(results_of(1.0), tmp_path).read_text()
    assert "| PACS, context shift | 53.0 | **54.0 (+1.0: +1.0 to +1.0)** |" in text
    assert "- **adjusted, frozen**: Higher on PACS, context shift." in text
    assert "- **plain similarity**: Lower on PACS, context shift." in text
    assert "- **random environments**: No difference that these seeds can tell on PACS, context shift." in text
    assert "Chosen on validation images: PACS, context shift + ClassWiseIRM: weight 10." in text
    assert text.count("Not run.") == 3  # the questions without runs
    assert max(len(line) for line in text.splitlines() if line[:1] not in "|!") <= 125
    assert (tmp_path / "results-eqinv.png").read_bytes()[:4] == b"\x89PNG"


def test_only_seeds_that_all_arms_have_are_paired(evidence):
    from evidence.page import measures
    from evidence.questions import QUESTIONS

    found = results_of(1.0)["runs"]
    del found["pacs"]["on"]["1"]
    comparison = next(c for c in QUESTIONS[0].comparisons if c.group == "pacs")
    accuracies, _ = measures(found, comparison)
    assert accuracies == {"PACS, context shift": {"off": [50.0, 56.0], "on": [51.0, 57.0]}}


def test_setting_is_chosen_on_validation_images(evidence, tmp_path):
    """The one with the best validation accuracy, which ablations share; test accuracies are not looked at."""
    from evidence.plan import Arm, Group
    from evidence.runs import FOUND, choose, tuning

    group = Group({"off": Arm(None), "on": Arm(None, "weight", (2.0, 10.0)), "plain": Arm(None, like="on")})
    for job in tuning("test", tmp_path, tmp_path, "pacs", group):
        job.folder.mkdir(parents=True)
        val = {2.0: 30.0, 10.0: 20.0}[job.chosen["weight"]]
        (job.folder / FOUND).write_text(json.dumps({"accuracy": {"val": val, "test": -val}}))
    assert choose("test", tmp_path, tmp_path, "pacs", group) == {
        "off": {},
        "on": {"weight": 2.0},
        "plain": {"weight": 2.0},
    }


@pytest.mark.skipif("EQUIREG_DATA" not in os.environ, reason="EQUIREG_DATA names no folder of real images")
def test_whole_report_of_one_group(tmp_path):
    """Trained, measured, written; a second start trains nothing and writes the same page."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path)}
    docs = tmp_path / "docs"
    docs.mkdir()
    where = ["--runs", str(tmp_path / "runs"), "--docs", str(docs)]
    call = [sys.executable, str(EXAMPLES / "report.py"), "--scale", "test", "--only", "digits", *where]
    subprocess.run(call, check=True, capture_output=True, env=environment)  # noqa: S603
    text, results = (docs / "results.md").read_text(), json.loads((docs / "results.json").read_text())
    assert "coloured digits" in text
    assert set(results["runs"]["digits"]) == {"off", "on", "weight 0", "random"}
    assert set(results["runs"]["digits"]["on"]) == {"0", "1"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("found.json")}
    subprocess.run(call, check=True, capture_output=True, env=environment)  # noqa: S603
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("found.json")} == before
    assert (docs / "results.md").read_text() == text


@pytest.mark.skipif("EQUIREG_DATA" not in os.environ, reason="EQUIREG_DATA names no folder of real images")
def test_validation_images_are_neither_trained_on_nor_tested_on(evidence):
    """Also where a data set has no folder of them."""
    from images import read_folders

    for name in ("cifar10", "tiny-vipriors64"):
        parts = [read_folders(Path(os.environ["EQUIREG_DATA"]) / name, split) for split in ("train", "val", "test")]
        paths = [set(part.paths) for part in parts]
        assert len(set.union(*paths)) == sum(map(len, parts))
        assert all(torch.bincount(part.labels).unique().numel() == 1 for part in parts)
