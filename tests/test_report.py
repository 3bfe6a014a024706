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
    from evidence.plan import SCALES, Arm, Group, settings_of
    from evidence.runs import FOUND, choose, tuning

    group = Group({"off": Arm(None), "on": Arm(None, "weight", (2.0, 10.0)), "plain": Arm(None, like="on")})
    for job in tuning("test", tmp_path, tmp_path, "pacs", group):
        job.folder.mkdir(parents=True)
        val = {2.0: 30.0, 10.0: 20.0}[job.chosen["weight"]]
        settings = {"settings": settings_of(SCALES["test"], "pacs"), "chosen": job.chosen}
        (job.folder / FOUND).write_text(json.dumps({"accuracy": {"val": val, "test": -val}, **settings}))
    assert choose("test", tmp_path, tmp_path, "pacs", group) == {
        "off": {},
        "on": {"weight": 2.0},
        "plain": {"weight": 2.0},
    }


@pytest.fixture(scope="module")
def made_images(tmp_path_factory):
    """Folders as the report takes them: four classes of noise, each with a colour of its own."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)

    def make(folder, label, count):
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(160, (32, 32, 3), generator=generator)
            pixels[..., label % 3] += 40 * (1 + label // 3)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")

    for label in range(4):
        for name, splits in (("cifar10", ("train", "test")), ("tiny-vipriors64", ("train", "val", "test"))):
            for split in splits:
                make(root / name / split / f"class{label}", label, 32)
        for domain in ("photo", "sketch"):
            make(root / "pacs64" / domain / f"class{label}", label, 4)
    return root


def test_whole_report_of_one_group(made_images, tmp_path):
    """Trained, measured, written; a second start trains nothing and writes the same page."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path)}
    docs = tmp_path / "docs"
    docs.mkdir()
    where = ["--data", str(made_images), "--runs", str(tmp_path / "runs"), "--docs", str(docs)]
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


@pytest.fixture(scope="module")
def runs(made_images, tmp_path_factory):
    """One run of every kind of arm, and its results by group and arm."""
    runs, found = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from evidence.runs import Job, execute

        threads = torch.get_num_threads()
        try:
            for group, arms in {
                "ipirm": {"off": {}, "on": {"weight": 0.2}},
                "ser": {"views": {}, "on": {"weight": 0.5}},
                "reconstruction": {"off": {}, "two": {"weight": 1.0}},
                "vipriors-20": {"off": {}, **{arm: {"weight": 2.0} for arm in ("on", "plain", "random", "open")}},
            }.items():
                for arm, chosen in arms.items():
                    job = Job("test", made_images, runs, group, arm, 0, "test", chosen)
                    found.setdefault(group, {})[arm] = json.loads(execute(job).read_text())
        finally:
            torch.set_num_threads(threads)
    return runs, found


def test_every_encoder_is_measured_alike(runs):
    _, found = runs
    expected = {f"{name}, {k} per class" for name in ("CIFAR-10", "VIPriors") for k in (2, 6)}
    for group in ("ipirm", "ser", "reconstruction"):
        for arm, run in found[group].items():
            assert set(run["accuracy"]) == expected | {"CIFAR-10, k-NN", "VIPriors, k-NN"}
            assert all(0 <= value <= 100 for value in run["accuracy"].values())
            assert set(run["r2"]) == {"rotation", "translation", "color", "blur"}
            assert -1 <= run["equivariance"] <= 1
            assert len(run["corrupted"]) == 15, (group, arm)


def test_a_classifier_is_measured_too(runs):
    for run in runs[1]["vipriors-20"].values():
        assert set(run["accuracy"]) == {"val", "test"}
        assert len(run["corrupted"]) == 15
        assert set(run["r2"]) == {"rotation", "translation", "color", "blur"}


def test_environments_are_those_of_the_arm(runs):
    """Half of the other classes' samples each, and not the same by similarity and by chance."""
    bits = {}
    for arm in ("on", "plain", "random", "open"):
        saved = torch.load(runs[0] / "vipriors-20" / arm / "0" / "environments.pt", weights_only=True)
        bits[arm] = saved["bits"]
        assert len(saved["labels"]) == 80  # 20 of each of four classes
    assert torch.equal(bits["on"], bits["open"])
    for one, other in (("on", "plain"), ("on", "random"), ("plain", "random")):
        assert not torch.equal(bits[one], bits[other])
    assert not (runs[0] / "vipriors-20" / "off" / "0" / "environments.pt").exists()


def test_a_run_of_other_settings_is_not_taken(runs, made_images, evidence):
    from evidence.runs import Job, execute

    with pytest.raises(ValueError, match="was run with other settings"):
        execute(Job("test", made_images, runs[0], "ipirm", "on", 0, "test", {"weight": 5.0}))


def test_step_times_of_every_kind(made_images, tmp_path, evidence):
    from evidence.timing import step_times

    threads = torch.get_num_threads()
    try:
        found = step_times("test", made_images, tmp_path, {"ipirm", "ser", "reconstruction", "vipriors-20"}, repeats=1)
    finally:
        torch.set_num_threads(threads)
    assert {group: set(times) for group, times in found.items()} == {
        "ipirm": {"off", "on"},
        "ser": {"off", "on"},
        "reconstruction": {"off", "one", "two"},
        "vipriors-20": {"off", "on"},
    }
    assert all(seconds > 0 for times in found.values() for seconds in times.values())


def test_arms_begin_alike(made_images, tmp_path, evidence):
    """The same first weights of the backbone and, where both have one, of the head; so differences are paired."""
    from evidence import trainings
    from evidence.plan import SCALES
    from training import seed_everything

    def first_weights(make, *arguments):
        seed_everything(0, -1)
        return make(*arguments).state_dict()

    for trainer, variants in (("ipirm", (False, True)), ("ser", (False, True)), ("reconstruction", (0, 1, 2))):
        own = {**getattr(SCALES["test"], trainer), "data": made_images / "cifar10", "amp": "none"}
        options = trainings.options_of(trainer, own, 0, tmp_path)
        make = trainings.PRETRAININGS[trainer].make_objective
        states = [first_weights(make, options, variant) for variant in variants]
        shared = [key for key in states[0] if key.startswith("method.backbone.") or trainer != "reconstruction"]
        assert any(key.startswith("method.backbone.") for key in shared)
        for other in states[1:]:
            assert all(torch.equal(states[0][key], other[key]) for key in shared if torch.is_tensor(states[0][key]))
    where = {**SCALES["test"].finetuning, "data": made_images / "tiny-vipriors64", "amp": "none"}
    states = []
    for penalty in ("off", "rex"):
        options = trainings.finetuning_options({**where, "penalty": penalty}, 0)
        states.append(first_weights(trainings.finetune.Objective, options, 4))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["cifar10", "tiny-vipriors64"])
def test_validation_images_are_neither_trained_on_nor_tested_on(name, evidence, real_images):
    """Also where a data set has no folder of them."""
    from vipriors.images import read_folders

    parts = [read_folders(real_images / name, split) for split in ("train", "val", "test")]
    assert len(set.union(*(set(part.paths) for part in parts))) == sum(map(len, parts))
    assert all(torch.bincount(part.labels).unique().numel() == 1 for part in parts)
