"""What writes docs/results.md: its intervals and words, its plan, its runs on made images, and its corruptions."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

for name in ("timm", "lightly", "accelerate", "matplotlib", "sklearn", "imagecorruptions"):
    pytest.importorskip(name, reason="needs the report extra")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def path():
    """Examples are imported from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield


# ------------------------------------------------------------------------------------------------------------- the page


def test_interval_is_students():
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
def test_verdict_says_what_the_interval_says(values, verdict):
    from evidence.intervals import paired

    assert paired(values, [1.0] * len(values)).verdict == (verdict or "no difference told")  # one seed tells nothing


def test_unpaired_values_are_refused():
    from evidence.intervals import paired

    with pytest.raises(ValueError, match="as many and not none, got 2 and 1"):
        paired([1.0, 2.0], [1.0])


def test_page_is_made_from_the_published_figures(tmp_path):
    """By the command that it names."""
    (tmp_path / "results.json").write_bytes((ROOT / "docs/results.json").read_bytes())
    call = [sys.executable, "examples/evidence", "--page-only", "--docs", str(tmp_path)]
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path)}
    subprocess.run(call, check=True, cwd=ROOT, env=environment, capture_output=True)  # noqa: S603
    page = (tmp_path / "results.md").read_text()
    assert page == (ROOT / "docs/results.md").read_text()
    assert max(len(line) for line in page.splitlines() if line[:1] not in "|!") <= 125
    for picture in (line[line.index("(") + 1 : -1] for line in page.splitlines() if line.startswith("![")):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    for command in (line.split("#")[0].split() for line in page.splitlines() if line.startswith("    python")):
        assert (ROOT / command[1]).exists()


def results_of(gains):
    """Three seeds of a base of 50, 53 and 56, and of arms that differ from it by a sure number of points."""
    runs = {
        arm: {
            str(seed): {"accuracy": {"val": 0.0, "test": 50 + 3 * seed + gain + 0.01 * (seed == 1) * (gain != 0)}}
            | {"chosen": {"weight": 10.0}}
            for seed in range(3)
        }
        for arm, gain in gains.items()
    }
    about = {"scale": "cpu", "seeds": 3, "machine": "a machine", "torch": "2", "date": "2026-01-01", "hours": 1.0}
    return {**about, "step_seconds": {"pacs": {"off": 1.0, "on": 1.5}}, "runs": {"pacs": runs}}


def test_page_says_where_a_method_helps_and_where_not(tmp_path):
    from evidence.page import write_page

    found = results_of({"off": 0.0, "plain": -1.0, "random": 0.0, "on": 1.0})
    text = write_page(found, tmp_path).read_text()
    assert "|  | cross entropy | + ClassWiseIRM |" in text  # arms that were not run have no column
    assert "| PACS, context shift | 53.0 | **54.0 (+1.0: +1.0 to +1.0)** |" in text
    assert "- **adjusted, frozen**: Higher on PACS, context shift." in text
    assert "- **plain similarity**: Lower on PACS, context shift." in text
    assert "- **random environments**: No difference that these seeds can tell on PACS, context shift." in text
    assert "Chosen on validation images: PACS, context shift + ClassWiseIRM: weight 10." in text
    assert "Time of a step over the base's: + ClassWiseIRM 1.50." in text
    assert text.count("Not run.") == 4  # the questions without runs, and the corruptions


def test_only_seeds_that_all_arms_have_are_paired():
    from evidence.page import measures

    runs = results_of({"off": 0.0, "on": 1.0})["runs"]["pacs"]
    del runs["on"]["1"]
    accuracies, _ = measures(runs, ["off", "on"], "PACS")
    assert accuracies == {"PACS": {"off": [50.0, 56.0], "on": [51.0, 57.0]}}


# ------------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders as the evidence takes them: four classes of noise, each with a colour of its own."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    (root / "pacs64").mkdir()
    for label in range(4):
        for name, splits in (("cifar10", ("train", "test")), ("tiny-vipriors64", ("train", "val", "test"))):
            for split in splits:
                folder = root / name / split / f"class{label}"
                folder.mkdir(parents=True)
                for number in range(32 if split == "train" else 8):
                    pixels = torch.randint(160, (32, 32, 3), generator=generator)
                    pixels[..., label % 3] += 40 * (1 + label // 3)
                    Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def jobs(images, tmp_path_factory):
    """Runs of the kinds that differ, by group and arm."""
    from evidence.experiments import tried
    from evidence.runs import Job, Place, execute

    place, made, threads = Place("test", images, tmp_path_factory.mktemp("runs")), {}, torch.get_num_threads()
    groups = {"ipirm": ("off", "on"), "ser": ("off", "on"), "vipriors-20": ("off", "on", "weights")}
    for group, arm in ((group, arm) for group, arms in groups.items() for arm in arms):
        made[group, arm] = Job(place, group, arm, 0, "test", (tried(group, arm) or [{}])[0])
        execute(made[group, arm])
    torch.set_num_threads(threads)
    return made


def test_every_encoder_is_measured_alike(jobs):
    names = {f"{name}, {what}" for name in ("CIFAR-10", "VIPriors") for what in ("2 per class", "6 per class", "k-NN")}
    for (group, arm), job in jobs.items():
        found = job.found()
        assert set(found["accuracy"]) == ({"val", "test"} if group == "vipriors-20" else names), (group, arm)
        assert all(0 <= value <= 100 for value in found["accuracy"].values())
        assert set(found["r2"]) == {"rotation", "translation", "color", "blur"}
        assert -1 <= found["equivariance"] <= 1
        assert len(found["corrupted"]) == 15
        assert 0 < found["step_seconds"] < found["seconds"]
        assert not list(job.folder.rglob("checkpoint-*"))


def test_a_run_of_other_settings_is_not_taken(jobs):
    from evidence.runs import execute

    with pytest.raises(ValueError, match=r"was run with other settings: weight 0.2 \(now 5.0\)"):
        execute(jobs["ipirm", "on"]._replace(chosen={"weight": 5.0}))


@pytest.mark.parametrize("group", ["ipirm", "ser", "vipriors-20"])
def test_a_stopped_training_ends_in_the_same_bits(jobs, group, tmp_path, monkeypatch):
    from evidence.networks import fit
    from evidence.runs import KINDS

    s, place = {**jobs[group, "on"].settings(), "epochs": 3}, jobs[group, "on"].place

    def train(folder, stop=2.0):
        def forward(self, *batch):
            if batch[-1] >= stop:
                raise KeyboardInterrupt
            return original(self, *batch)

        objective, images = KINDS[s["kind"]].prepare(s, place.data, place.runs, tmp_path, 0)
        original = type(objective).forward
        with monkeypatch.context() as patch:
            patch.setattr(type(objective), "forward", forward)
            fit(objective, images, s, folder, 0)
        return objective.state_dict()

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop=0.5)
    one, other = train(tmp_path / "stopped"), train(tmp_path / "straight")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one if torch.is_tensor(one[key]))


def test_arms_begin_alike(jobs):
    """The same first weights of what both have; so differences are paired."""
    from evidence.experiments import GROUPS, settings_of
    from evidence.runs import KINDS

    place = jobs["ser", "on"].place
    for group, part in (("ipirm", ""), ("ser", ""), ("reconstruction", "vit."), ("vipriors-20", "")):
        states = []
        for arm in [arm for arm in GROUPS[group]["arms"] if arm not in ("weights", "shuffled", "head")]:
            s = settings_of("test", group, arm, {"weight": 1.0})
            states.append(KINDS[s["kind"]].prepare(s, place.data, place.runs, place.runs, 0)[0].state_dict())
        for other in states[1:]:
            shared = [key for key in states[0] if key.startswith(part) and torch.is_tensor(other.get(key))]
            assert len(shared) > 10
            assert all(torch.equal(states[0][key], other[key]) for key in shared)


def test_a_whole_group(jobs, images, tmp_path):
    """What was run is not run again; the settings are chosen, all arms trained, measured and written."""
    from evidence.runs import Job, Place, execute, run_all

    place = Place("test", images, tmp_path / "runs/test")
    execute(job := Job(place, "reconstruction", "off", 1, "test", {}))
    times = {job.folder / "found.json": (job.folder / "found.json").stat().st_mtime_ns}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path)}
    where = ["--data", str(images), "--runs", str(tmp_path / "runs"), "--docs", str(tmp_path), "--processes", "1"]
    call = [sys.executable, str(ROOT / "examples/evidence"), "--scale", "test", "--only", "reconstruction", *where]
    subprocess.run(call, check=True, capture_output=True, env=environment)  # noqa: S603
    results, page = json.loads((tmp_path / "results.json").read_text()), (tmp_path / "results.md").read_text()
    assert {arm: set(seeds) for arm, seeds in results["runs"]["reconstruction"].items()} == {
        arm: {"0", "1"} for arm in ("off", "one", "two")
    }
    assert set(results["step_seconds"]["reconstruction"]) == {"off", "one", "two"}
    assert "Chosen on validation images: 1 image: weight" in page
    assert "| CIFAR-10, 6 per class |" in page
    files = list(tmp_path.rglob("found.json"))
    assert len(files) == 8  # two values on validation images, three arms of two seeds
    times |= {path: path.stat().st_mtime_ns for path in files if path not in times}
    run_all(place, ["reconstruction"], 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("found.json")} == times


def test_setting_is_chosen_on_validation_images(tmp_path):
    """The one with the best validation accuracy, which ablations share; test accuracies are not looked at."""
    from evidence.runs import Place, choose, tuning

    for job in tuning(place := Place("test", tmp_path, tmp_path), "pacs"):
        job.folder.mkdir(parents=True)
        val = {2.0: 30.0, 10.0: 20.0, 100.0: 10.0, 0.1: 5.0, 1.0: 6.0, 0.5: 7.0}[next(iter(job.chosen.values()))]
        found = {"accuracy": {"val": val, "test": -val}, "settings": job.settings()}
        (job.folder / "found.json").write_text(json.dumps(found))
    chosen = choose(place, "pacs")
    assert chosen.pop("open") == {"weight": 10.0}  # a choice of its own
    assert chosen["on"] == chosen["plain"] == chosen["random"] == {"weight": 2.0}
    assert chosen["weights"] == chosen["shuffled"] == {"sharpness": 0.5}
    assert chosen["off"] == chosen["head"] == chosen["contexts"] == {}


# --------------------------------------------------------------------------------------- the images, views and weights


def test_digits_wear_the_colour_of_their_class_but_for_a_few():
    from evidence.datasets import digits

    training = digits(Path(), "train", 8, 3, conflicting=0.1)
    assert (training.contexts != training.labels).float().mean() == pytest.approx(0.09, abs=0.02)  # a tenth by chance
    for split in ("val", "test"):
        assert (digits(Path(), split, 8, 3).contexts != digits(Path(), split, 8, 3).labels).all()
    brightest = training.pixels.flatten(2).amax(2).float()
    own = torch.stack([brightest[training.contexts == color].mean(0) for color in range(10)])
    assert torch.cdist(brightest, own).argmin(1).eq(training.contexts).float().mean() > 0.95


@pytest.mark.parametrize("name", ["cifar10", "tiny-vipriors64"])
def test_validation_images_are_neither_trained_on_nor_tested_on(name, real_images):
    """Also where a data set has no folder of them."""
    from evidence.datasets import folders

    parts = [folders(real_images / name, split, 32) for split in ("train", "val", "test")]
    seen = [{image.numpy().tobytes() for image in part.pixels} for part in parts]
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
    assert all(part.labels.bincount().unique().numel() == 1 for part in parts)


def test_crops_are_parts_of_the_image_at_its_scale():
    """Of a ramp every crop is a ramp, as steep as its share of the width, and half of them are flipped."""
    from evidence.views import crops

    ramp = torch.linspace(0, 1, 32).expand(2000, 3, 32, 32)
    found = crops(ramp, 16, smallest=0.25)
    slopes = found[:, 0, 8, 2:-2].diff(dim=1)
    assert (slopes - slopes.mean(1, keepdim=True)).abs().max() < 1e-4
    share = slopes.mean(1).abs() * 31 / 2  # of a crop as wide as the image: 2 pixels of 32 for each of 16
    assert 0.4 < share.min() < 0.5
    assert share.max() <= 1 + 1e-4
    assert (slopes.mean(1) < 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_colours_change_each_image_by_itself():
    from evidence.views import Colors

    images = torch.rand(1, 3, 8, 8).expand(2000, 3, 8, 8)
    found = Colors()(images)
    gray = (found - found.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-2
    assert gray.float().mean() == pytest.approx(0.2, abs=0.03)
    same = (found == images).all(3).all(2).all(1)
    assert same.float().mean() == pytest.approx(0.16, abs=0.03)  # neither jittered nor gray
    assert len(found.unique(dim=0)) > 1500


def test_weights_balance_true_contexts_and_are_shuffled_within_classes():
    from evidence.classification import weights_of
    from evidence.datasets import Images

    labels, contexts = torch.tensor([0] * 10 + [1] * 10), torch.tensor([0] * 8 + [1] * 2 + [1] * 9 + [0])
    images, features = Images(torch.zeros(20), labels, contexts), torch.randn(20, 8)
    weights = weights_of(features, images, {"weights": "contexts"})
    assert torch.allclose(weights[:10], torch.tensor([0.625] * 8 + [2.5] * 2))  # 5 for either context, 1 in the mean
    found, shuffled = (weights_of(features, images, {"weights": w, "sharpness": 1.0}) for w in ("found", "shuffled"))
    assert not torch.equal(found, shuffled)
    for label in (0, 1):
        assert found[labels == label].mean() == pytest.approx(1.0, abs=1e-5)
        assert torch.equal(found[labels == label].sort().values, shuffled[labels == label].sort().values)


# ------------------------------------------------------------------------------------------------------ the corruptions


@pytest.fixture(scope="module")
def photographs(real_images):
    """An image of each class of CIFAR-10, uint8 [10, 3, 32, 32]."""
    files = [next(iter(sorted(folder.iterdir()))) for folder in sorted((real_images / "cifar10/train").iterdir())]
    return torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])).permute(
        0, 3, 1, 2
    )


def test_every_image_changes_and_more_at_higher_severity(photographs):
    from evidence.corruptions import KINDS, corrupted

    assert len(set(KINDS)) == 15
    for pixels in (photographs, photographs.repeat_interleave(2, 2).repeat_interleave(2, 3)):
        for kind in KINDS:
            before = pixels.clone()
            changes = [
                (corrupted(pixels, kind, level, seed=0).float() - pixels).abs().mean((1, 2, 3)) for level in (1, 5)
            ]
            assert torch.equal(pixels, before)
            assert min(change.min() for change in changes) > 0.5, kind  # of 255
            assert changes[1].mean() > 1.15 * changes[0].mean(), kind


def test_the_seed_fixes_every_bit_and_no_generator_is_left_changed(photographs):
    from evidence.corruptions import KINDS, corrupted

    deterministic = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    for kind in KINDS:
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        one, again, other = (corrupted(photographs, kind, 3, seed=seed) for seed in (7, 7, 8))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), before[2])
        assert torch.equal(one, again)
        twins = corrupted(photographs[:1].repeat(2, 1, 1, 1), kind, 3, seed=1)  # each by random numbers of its own
        assert torch.equal(one, other) == torch.equal(twins[0], twins[1]) == (kind in deterministic)


def test_gaussian_noise_has_the_published_deviation():
    """0.08 of the range at severity 1 and 0.38 at severity 5, on grey where little is clipped."""
    from evidence.corruptions import corrupted

    grey = torch.full((8, 3, 64, 64), 128, dtype=torch.uint8)
    assert (corrupted(grey, "gaussian_noise", 1, seed=0) / 255).std() == pytest.approx(0.08, rel=0.01)
    noise = np.random.default_rng(0).normal(128 / 255, 0.38, 10**6).clip(0, 1)
    assert (corrupted(grey, "gaussian_noise", 5, seed=0) / 255).std() == pytest.approx(noise.std(), rel=0.01)


def test_images_of_another_kind_are_named():
    from evidence.corruptions import corrupted

    for wrong in (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 28, 28, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[N, 3, H, W\] with H and W >= 32, got torch"):
            corrupted(wrong, "fog", 1, seed=0)
