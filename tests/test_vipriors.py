"""The VIPriors recipe: each step on small images, as a user runs it, and alone in an empty place."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest
import torch

from equireg import Environments

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPE = EXAMPLES / "vipriors"
for package in ("accelerate", "timm", "lightly", "matplotlib"):
    pytest.importorskip(package, reason="needs the examples extra")

RESNET = {"model": "test_resnet", "image-size": 32}
VIT = {"model": "test_vit", "image-size": 32, "patch-size": 8, "late-class-token": 2}
SMALL = {"shots": 6, "mixed-precision": "no"}
SMALL |= {"pretrain-hidden-dim": 32, "pretrain-output-dim": 16, "pretrain-queue-size": 16, "pretrain-epochs": 2}
SMALL |= {"pretrain-warmup-epochs": 1, "pretrain-update-every": 1, "pretrain-batch-size": 16, "finetune-epochs": 2}
SMALL |= {"finetune-batch-size": 8, "distill-epochs": 1, "distill-warmup-epochs": 0, "distill-batch-size": 8}


@pytest.fixture(scope="module")
def recipe():
    """The module behind ``python vipriors``; its own are found as there."""
    before = list(sys.path)
    sys.path[:0] = ["", str(EXAMPLES)]  # the first is what `__main__` replaces
    spec = util.spec_from_file_location("vipriors_main", RECIPE / "__main__.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four classes of noise, each with a colour of its own; two have names that must not be taken for markup."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("val", 4), ("test", 4)):
        for label, name in enumerate(("ant", "bee", r"$\frac{x", "<b>cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(100, (34, 30, 3), generator=generator)
                pixels[..., label % 3] += 100 * (1 + label // 3) // 2
                image.fromarray(pixels.to(torch.uint8).numpy()).save(root / part / name / f"{i}.png")
    return root


def flags(*tables, **changes):
    chosen = {**SMALL, **{key: value for table in tables for key, value in table.items()}}
    chosen |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [str(part) for key, value in chosen.items() for part in (f"--{key}", value)]


def options_of(recipe, step, data, table, **changes):
    arguments = flags(table, data=data, **{f"{step}_{key}": value for key, value in changes.items()})
    return recipe.options_of("all", [*arguments, "--steps", step])[step]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(recipe, data, tmp_path_factory):
    """A folder that ``all`` left, with everything that pretraining can have."""
    out = tmp_path_factory.mktemp("whole")
    parts = {"pretrain_method": "mocov2", "pretrain_ser": 0.5, "pretrain_reconstruction": 1}
    parts |= {"finetune_objective": "released", "finetune_augment": "rand", "finetune_sample_weights": "auto"}
    recipe.main(["all", *flags(RESNET, data=data, out=out, **parts)])
    return out, ["all", *flags(RESNET, data=data, **parts)]


@pytest.fixture
def again(whole, tmp_path):
    """A copy of it, and the arguments that go on in it."""
    shutil.copytree(whole[0], tmp_path / "out")
    return tmp_path / "out", [*whole[1], "--out", str(tmp_path / "out")]


# ---------------------------------------------------------------------------------------------------- the whole recipe


def test_all_leaves_a_folder_for_each_step(whole):
    out, _ = whole
    for step, names in {
        "pretrain": ("log.jsonl", "encoder.pt", "curves.png"),
        "environments": ("environments.pt", "weight-sheet.png"),
        "finetune": ("log.jsonl", "model.pt", "curves.png"),
        "distill": ("log.jsonl", "model.pt", "curves.png"),
        "test": ("predictions.pt", "submission.csv"),
    }.items():
        assert {*names, "options.json", "results.json"} <= {path.name for path in (out / step).iterdir()}, step
        assert all(path.stat().st_size > 5_000 for path in (out / step).glob("*.png"))
    # 6 of the 8 training images of each class and all of val, 16 of the 40 a step.
    log = [json.loads(line) for line in (out / "pretrain" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    for row in log:  # 4 keys
        total = row["contrast"] + row["group_contrast"] + 0.2 * row["group_penalty"]
        assert row["loss"] == pytest.approx(total + 0.5 * row["equivariance"] + row["reconstruction"], rel=1e-5)
    assert [row["partitions"] for row in log] == [2, 2, 3, 3]  # the first before the training
    assert {"classification", "irm"} <= set(json.loads((out / "finetune" / "log.jsonl").read_text().splitlines()[0]))
    options = read(out / "finetune" / "options.json")
    for name, step in (("encoder", "pretrain"), ("environments", "environments")):
        assert options[name] == hashlib.sha256((out / step / f"{name}.pt").read_bytes()).hexdigest()
    assert read(out / "environments" / "results.json")["samples"] == 24
    found = read(out / "recipe.json")
    assert list(found) == ["pretrain", "environments", "finetune", "distill", "test"]
    assert found["test"]["models"]["fine-tuned"]["test plain"] == pytest.approx(found["finetune"]["test"])
    assert any(row.startswith("ensemble, ten crops, weighted") for row in found["test"]["merged"])


def test_submission_and_predictions_tell_the_same(whole, data):
    saved = torch.load(whole[0] / "test" / "predictions.pt", weights_only=True)
    rows = list(csv.reader((whole[0] / "test" / "submission.csv").read_text().splitlines()))
    assert rows[0] == ["image", "class"]
    assert [int(row[1]) for row in rows[1:]] == saved["test ten"].argmax(1).tolist()
    assert saved["test ten"].shape == (16, 4)
    torch.testing.assert_close(saved["test ten"].sum(1), torch.ones(16))
    truth = [label for label, folder in enumerate(sorted((data / "test").iterdir())) for _ in folder.iterdir()]
    assert saved["test"].tolist() == truth
    right = sum(int(row[1]) == label for row, label in zip(rows[1:], truth)) / 16
    assert read(whole[0] / "test" / "results.json")["merged"]["ten crops"] == pytest.approx(100 * right)


def test_nothing_saved_tells_of_the_machine(whole, data):
    """No paths, and nothing of the environment."""
    for path in filter(Path.is_file, whole[0].rglob("*")):
        for told in (str(whole[0]), str(data), str(Path.home()) + "/", sys.prefix):
            assert told.encode() not in path.read_bytes(), path
    for step in ("pretrain", "environments", "finetune", "distill", "test"):
        kept = read(whole[0] / step / "options.json")
        assert not kept.keys() & {"data", "out", "resume", "workers"}
        assert {"shots", "model", "seed"} <= kept.keys()


def test_alone_in_an_empty_place(data, tmp_path):
    """Only the folder is copied; the test images lie flat, without labels."""
    shutil.copytree(RECIPE, tmp_path / "vipriors", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("train", "val"):
        shutil.copytree(data / part, tmp_path / "images" / part)
    (tmp_path / "images" / "test").mkdir()
    for place, path in enumerate(sorted((data / "test").rglob("*.png"))):
        shutil.copy(path, tmp_path / "images" / "test" / f"img_{place}.png")
    call = [sys.executable, "vipriors", "all", "--data", "images", "--out", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "TQDM_DISABLE": "1"}
    call += flags(RESNET, mixed_precision="bf16", pretrain_epochs=1, finetune_epochs=1, pretrain_warmup_epochs=0)
    result = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment)  # noqa: S603
    assert result.returncode == 0, result.stderr
    assert re.search(r"^finetune: [\d.]+ s, val [\d.]+%$", result.stdout, re.M)
    assert re.search(r"^test: [\d.]+ s, val, ten crops [\d.]+%$", result.stdout, re.M)
    rows = (tmp_path / "out" / "test" / "submission.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == sorted(f"img_{place}.png" for place in range(16))
    assert {int(row.split(",")[1]) for row in rows[1:]} <= set(range(4))


# ------------------------------------------------------------------------------------------------------------ going on


def test_all_goes_on_where_it_was_killed(recipe, whole, again):
    """In Step 3: Steps 1 and 2 are not done again, and what comes out is that of a run that was not killed."""
    out, arguments = again
    step = out / "finetune"
    for path in (step / "results.json", step / "model.pt", max(step.glob("checkpoint-*.pt"))):
        path.unlink()
    earlier = [out / "pretrain" / "encoder.pt", out / "environments" / "environments.pt"]
    before = [path.stat().st_mtime_ns for path in earlier]
    recipe.main([*arguments, "--resume"])
    assert [path.stat().st_mtime_ns for path in earlier] == before
    for name in ("pretrain", "environments", "finetune", "distill", "test"):
        assert read(out / name / "results.json") == read(whole[0] / name / "results.json")
    states = [torch.load(root / "finetune" / "model.pt", weights_only=True) for root in (whole[0], out)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pretrain-ratio", "0.4"], r"pretrain was made with other settings: ratio 0.5 \(now 0.4\)"),
        (["--finetune-penalty", "off"], "finetune was made with other settings: "),
        (["--finetune-augment", "trivial"], r"finetune was made .*: augment 'rand' \(now 'trivial'\)"),
        (["--finetune-label-smoothing", "0.1"], r"finetune was made .*: label_smoothing 0.0 \(now 0.1\)"),
        (["--finetune-mixup", "0.2", "--finetune-sample-weights", "0"], r"finetune was made .*: mixup 0.0 \(now 0.2\)"),
        (["--seed", "1"], r"pretrain was made with other settings: seed 0 \(now 1\)"),
    ],
)
def test_other_settings_are_refused_by_name(change, message, recipe, again):
    with pytest.raises(recipe.TrainingError, match=message):
        recipe.main([*again[1], "--resume", *change])


def disturb(path):
    """Other weights than the ones that what came later was made with."""
    state = torch.load(path, weights_only=True)
    name = next(name for name, value in state.items() if value.is_floating_point())
    torch.save({**state, name: state[name] + 0.01}, path)


def test_a_stale_step_is_not_taken_for_done(recipe, again, capsys):
    """What comes of another encoder or model than the one that is there now is refused, or left out, and it is told."""
    out, arguments = again
    with pytest.raises(recipe.TrainingError, match=r"environments.pt was made of other training images; run Step 2"):
        recipe.main([*arguments, "--shots", "3", "--steps", "finetune"])
    disturb(out / "pretrain" / "encoder.pt")
    with pytest.raises(recipe.TrainingError, match=r"other settings: encoder '\w{64}' \(now '\w{64}'\)"):
        recipe.main([*arguments, "--resume", "--steps", "environments"])
    with pytest.raises(recipe.TrainingError, match=r"environments.pt was made with another encoder .* run Step 2"):
        recipe.main([*arguments, "--steps", "finetune"])
    disturb(out / "finetune" / "model.pt")
    with pytest.raises(recipe.TrainingError, match=r"other settings: files|other settings: model '\w{64}'"):
        recipe.main([*arguments, "--resume", "--steps", "test"])
    recipe.main([*arguments, "--steps", "test"])
    assert "distill is left out: its teacher was another" in capsys.readouterr().out
    assert not any(row.startswith("ensemble") for row in read(out / "test" / "results.json")["merged"])


def test_what_a_killed_step_would_have_replaced_is_not_taken(recipe, again, monkeypatch):
    """It is of other settings than those beside it; and it is still there."""
    out, arguments = again
    monkeypatch.setattr(recipe.STEPS["pretrain"], "fit", killed)
    with pytest.raises(OSError, match="killed"):
        recipe.main([*arguments, "--seed", "1", "--steps", "pretrain"])
    assert read(out / "pretrain" / "options.json")["seed"] == 1
    assert (out / "pretrain" / "encoder.pt").exists()
    for step in ("environments", "finetune"):
        with pytest.raises(recipe.TrainingError, match=r"pretrain is not finished; go on with --resume"):
            recipe.main([*arguments, "--steps", step])


def killed(*args, **kwargs):
    raise OSError("killed")


def test_other_images_than_the_student_was_measured_on(recipe, again, tmp_path):
    """Test images that came later are predicted by the student too."""
    out, arguments = again
    place = arguments.index("--data") + 1
    images = shutil.copytree(arguments[place], tmp_path / "images")
    shutil.rmtree(images / "test")
    arguments[place] = str(images)
    recipe.main([*arguments, "--steps", "distill"])
    shutil.copytree(images / "val", images / "test")
    recipe.main([*arguments, "--steps", "test"])
    merged = read(out / "test" / "results.json")["merged"]
    assert any(row.startswith("ensemble, ten crops, weighted") for row in merged)


def test_without_earlier_steps_it_is_trained_from_scratch(recipe, whole, tmp_path):
    recipe.main([*whole[1], "--out", str(tmp_path), "--steps", "finetune", "--finetune-sample-weights", "0"])
    options = read(tmp_path / "finetune" / "options.json")
    assert (options["encoder"], options["environments"]) == (None, None)


def test_what_mae_pretrained_is_fine_tuned(recipe, data, tmp_path, monkeypatch):
    """By Steps 2 and 3; a file beside it tells which model it is of, and a size that does not fit is one line."""
    from mae_pretrain import main as pretrain

    base = ["--data", str(data), "--model", "test_vit", "--image-size", "32", "--patch-size", "8"]
    training = ["--epochs", "1", "--images", "32", "--batch-size", "16", "--out", str(tmp_path / "mae")]
    monkeypatch.setattr(sys, "argv", ["mae_pretrain.py", *base, *training])
    pretrain()
    encoder = tmp_path / "mae" / "encoder.pt"
    base += ["--encoder", str(encoder), "--shots", "6", "--out", str(tmp_path / "out"), "--mixed-precision", "no"]
    recipe.main(["environments", *base])
    start = []
    monkeypatch.setattr(import_module("vipriors.finetune"), "fit", lambda *args, **how: start.append(args[3]))
    recipe.main(["finetune", *base, "--batch-size", "8"])
    found = read(tmp_path / "out" / "finetune" / "options.json")
    assert found["encoder"] == hashlib.sha256(encoder.read_bytes()).hexdigest()
    assert found["environments"] is not None
    begun, pretrained = start[0].model.state_dict(), torch.load(encoder, weights_only=True)
    assert all(torch.equal(begun[name], value) for name, value in pretrained.items())
    for change, message in (
        (["--patch-size", "16"], "mae/encoder.pt was made with other settings: patch_size 8 (now 16)"),
        (["--image-size", "48"], "mae/encoder.pt is of another model than --model test_vit --image-size 48"),
    ):
        with pytest.raises(SystemExit) as refusal:
            recipe.program(["environments", *base, *change])
        assert message in refusal.value.code
        assert "\n" not in refusal.value.code


def test_encoder_of_another_class_token_is_refused(recipe, data, tmp_path):
    """No shape of a weight tells where the class token enters."""
    backbone = import_module("vipriors.backbone")
    options = options_of(recipe, "environments", data, VIT)
    torch.save(backbone.create(options).state_dict(), tmp_path / "encoder.pt")
    (tmp_path / "options.json").write_text(json.dumps({"model": "test_vit", "patch_size": 8, "late_class_token": 0}))
    with pytest.raises(recipe.TrainingError, match=r"other settings: late_class_token 0 \(now 2\)"):
        backbone.create(options, tmp_path / "encoder.pt")


# ------------------------------------------------------------------------------------------------------------ the data


def test_no_test_images_and_no_validation_images(recipe, data, tmp_path):
    """Pretraining is measured on ``val``, which is the last fifth of each class where there is none."""
    shutil.copytree(data / "train", tmp_path / "data" / "train")
    arguments = flags(RESNET, data=tmp_path / "data", out=tmp_path / "out", pretrain_epochs=1, pretrain_weight=0)
    recipe.main(
        ["all", *arguments, "--pretrain-method", "simsiam", "--pretrain-warmup-epochs", "0", "--steps", "pretrain"]
    )
    found = read(tmp_path / "out" / "recipe.json")["pretrain"]
    assert found["partitions"] == []
    assert 0 <= found["k-NN, val"] <= 100
    row = json.loads((tmp_path / "out" / "pretrain" / "log.jsonl").read_text().splitlines()[0])
    assert row["loss"] == row["contrast"]
    images = import_module("vipriors.images")
    options = recipe.options_of("all", arguments)["finetune"]
    parts = [images.read(options, split) for split in ("train", "val")]
    assert [part.labels.bincount().tolist() for part in parts] == [[6] * 4, [2] * 4]
    assert not set(parts[0].paths) & set(parts[1].paths)


# ----------------------------------------------------------------------------------------------------------- the flags


def test_help_shows_every_flag_with_its_default(recipe, capsys):
    """Grouped by step; for ``all`` the flags of a step carry its name."""
    for command in ("all", *recipe.STEPS):
        with pytest.raises(SystemExit):
            recipe.main([command, "--help"])
        words = capsys.readouterr().out
        for step in recipe.STEPS if command == "all" else [command]:
            group = f"{words}\n\n".partition(f"\n{step}:\n")[2].split("\n\n")[0]
            own = (recipe.presets.TRAINING if step in ("pretrain", "finetune", "distill") else {}) | recipe.STEPS[
                step
            ].OPTIONS
            prefix = f"--{step}-" if command == "all" else "--"
            assert re.findall(r"^  (--[\w-]+)", group, re.M) == [f"{prefix}{name}".replace("_", "-") for name in own]
            assert " ".join(group.split()).count("(default: ") == len(own)
        assert "a folder with train/<class>/*" in " ".join(words.split())
    with pytest.raises(SystemExit):
        recipe.main([])
    assert "--finetune-epochs 10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all", "--shots", "6", "--distill-epoch", "5"], "unrecognized arguments: --distill-epoch 5"),
        (["pretrain", "--preset", "vipriors30"], "argument --preset: invalid choice: 'vipriors30'"),
        (["pretrain", "--method", "byol"], "argument --method: invalid choice: 'byol'"),
        (["pretrain", "--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["train"], "argument step: invalid choice: 'train'"),
        (["test", "--shots", "6"], "run Step 3 (finetune) first"),
        (["environments", "--shots", "6"], "no encoder.pt; run Step 1 (pretrain) first, or give --encoder"),
        (["pretrain", "--shots", "6", "--model", "test_vit", "--ser", "0.5"], "needs --late-class-token"),
        (["all", "--shots", "6", "--model", "test_vit", "--distill-method", "ofd"], "stages of a ResNet, got --model"),
        (["all", "--shots", "6", "--model", "test_wit"], "--model must be the name of a model in timm, got 'test_wit'"),
        (["all", "--shots", "9"], "shots must be at most 8"),
        (["all", "--shots", "6", "--finetune-lr", "-1"], "--finetune-lr must be in 0 .. inf, got -1.0"),
        (["all", "--shots", "6", "--pretrain-ratio", "7"], "--pretrain-ratio must be in 0 .. 1, got 7.0"),
        (["pretrain", "--crop-scale", "2"], "--crop-scale must be above 0, up to 1, got 2.0"),
        (["pretrain", "--ser-temperature", "0"], "--ser-temperature must be above 0, up to inf, got 0.0"),
        (["pretrain", "--lr", "inf"], "--lr must be in 0 .. inf, got inf"),
        (["pretrain", "--workers", "-1"], "--workers must be in 0 .. inf, got -1"),
        (["all", "--shots", "6", "--encoder", "no.pt"], "--encoder must be a file, got no.pt"),
        (
            ["all", "--shots", "6", "--pretrain-batch-size", "20", "--finetune-batch-size", "25"],
            "--finetune-batch-size must be a multiple of 1 and at most the 24 images, got 25",
        ),
        (
            ["pretrain", "--shots", "6", "--batch-size", "9", "--accumulate", "2"],
            "--batch-size must be a multiple of 2",
        ),
        (["finetune", "--warmup-epochs", "2"], "--warmup-epochs of fine-tuning goes with a vision transformer"),
        (["finetune", "--sample-weights", "-3"], "--sample-weights must be auto, or a number of at least 0, got '-3'"),
        (["finetune", "--penalty-from", "1.5"], "--penalty-from must be in 0 .. 1, got 1.5"),
        (["finetune", "--contrast-weight", "nan"], "--contrast-weight must be in 0 .. inf, got nan"),
        (["finetune", "--magnitude", "31"], "--magnitude must be in 0 .. 30, got 31"),
        (["finetune", "--augment", "cutmix"], "argument --augment: invalid choice: 'cutmix'"),
        (["finetune", "--label-smoothing", "1.5"], "--label-smoothing must be in 0 .. 1, got 1.5"),
        (["finetune", "--mixup", "-1"], "--mixup must be in 0 .. inf, got -1"),
        (["finetune", "--mixup", "0.2", "--sample-weights", "auto"], "--mixup goes without --sample-weights"),
        (["finetune", "--mixup", "0.2", "--selfreg", "1"], "--mixup goes without --selfreg"),
        (["finetune", "--decoupling", "-1"], "--decoupling must be in 0 .. inf, got -1.0"),
        (
            ["finetune", "--sample-weights", "high"],
            "--sample-weights must be auto, or a number of at least 0, got 'high'",
        ),
        (
            ["finetune", "--shots", "6", "--batch-size", "8", "--sample-weights", "1"],
            "run Step 2 (environments) first, or leave",
        ),
        (["all", "--data", "nowhere"], "nowhere"),
        (["all", "--data", "empty"], "empty"),
    ],
)
def test_mistakes_are_one_line_before_any_work(arguments, message, recipe, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    where = [] if "--data" in arguments else ["--data", str(data)]
    with pytest.raises(SystemExit) as refusal:
        recipe.program([*arguments, "--out", "out", *where])
    said = capsys.readouterr().err.strip() if refusal.value.code == 2 else refusal.value.code  # argparse prints its own
    assert message in said
    assert said.startswith("vipriors")
    assert "\n" not in said
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line(workers, recipe, data, tmp_path):
    """It is named, also by a process that loads images; what was learned before is kept."""
    shutil.copytree(data, tmp_path / "data")
    broken = tmp_path / "data" / "train" / "bee" / "1.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n none")
    call = ["finetune", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--penalty", "off"]
    call += ["--epochs", "1", "--model", "test_resnet", "--image-size", "32", "--batch-size", "4", "--shots", "6"]
    with pytest.raises(SystemExit) as refusal:
        recipe.program([*call, "--workers", str(workers), "--mixed-precision", "no"])
    assert str(broken) in refusal.value.code
    assert "\n" not in refusal.value.code


@pytest.mark.parametrize("shots", [10, 20, 50])
def test_presets_are_the_papers(shots, recipe, data, monkeypatch):
    """EqInv, Section 5.2; IP-IRM, Section 4.2; λ as in the commands of EqInv's authors with RandAugment."""
    monkeypatch.setattr(recipe.images, "read", lambda options, split: range(10_000))  # not so many of a class here
    options = recipe.options_of("all", ["--preset", f"vipriors{shots}", "--data", str(data)])
    assert {(o.model, o.image_size, o.shots) for o in options.values()} == {("resnet50", 224, shots)}
    one, three = options["pretrain"], options["finetune"]
    assert (one.epochs, one.queue_size, one.ratio) == (800, 16384, 0.01)
    assert (one.lr, one.output_dim, one.weight, one.update_every) == (1e-3, 128, 0.2, 50)
    assert (three.epochs, three.lr, three.batch_size, three.weight_decay) == (50, 0.05, 128, 1e-4)
    assert (three.objective, three.penalty, three.weight) == ("paper", "rex", 10)
    assert (three.augment, three.magnitude, three.mixup, three.label_smoothing) == ("rand", 9, 0, 0)
    assert (three.contrast_weight, three.scale, three.penalty_from, three.sample_weights) == (1, 10, 0.2, "0")
    rate = import_module("vipriors.finetune").steps_down(three)
    rates = [rate(10 * epoch, 500) for epoch in (0, 29, 30, 39, 40, 49)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
    assert (options["distill"].epochs, options["distill"].warmup_epochs) == (100, 10)
    assert options["distill"].lr / options["distill"].batch_size == pytest.approx(0.1 / 160)


# ---------------------------------------------------------------------------------------------------------- the pieces


@pytest.mark.parametrize("backbone", [RESNET, VIT], ids=["resnet", "vit"])
def test_what_each_regularizer_reaches(backbone, recipe, data):
    """SER trains the layers up to the tapped one, reconstruction all; the method has its part of the features."""
    pretrain = import_module("vipriors.pretrain")
    options = options_of(recipe, "pretrain", data, backbone, ser=0.5, reconstruction=1, ratio=0.5)
    images = pretrain.unlabelled(options)
    objective, views = pretrain.Objective(options, len(images)), pretrain.Views(options, images)
    first, _, places, (x1, x2, rest, g1, g2) = views(0, list(range(8)))
    assert (len(first), len(x1), places.tolist(), rest.tolist()) == (4, 4, [0, 1, 2, 3], [4, 5, 6, 7])
    early, late = ("layer2", "layer3") if backbone is RESNET else ("blocks.1", "blocks.2")
    net = objective.encoder.net

    def maps(images):
        objective.encoder(images)
        return objective.encoder.maps

    def reached(loss):
        objective.zero_grad()
        loss.backward()
        layers = {name: net.get_submodule(name).parameters() for name in (early, late)}
        return {name: any(p.grad is not None and bool(p.grad.any()) for p in layer) for name, layer in layers.items()}

    assert reached(objective.ser(maps(x1)[0], maps(x2)[0], g1, g2)) == {early: True, late: False}
    view, targets, _ = objective.views(torch.rand_like(first))
    equivariant = [objective.reconstruct.split(maps(images)[1])[1] for images in (first, view)]
    assert reached(objective.reconstruct(*equivariant, targets)) == {early: True, late: True}
    features = net.eval()(first)
    assert torch.equal(objective.encoder(first), objective.reconstruct.split(features)[0])
    assert objective.encoder(first).shape == features.shape  # the method keeps the width of the backbone


@pytest.mark.parametrize("method", ["simclr", "simsiam", "mocov2"])
@pytest.mark.parametrize("base_loss", ["joint", "separate"])
def test_the_base_loss_is_over_both_parts_or_over_each(method, base_loss, recipe, data):
    """A straightforward composition: views that differ in size are encoded apart, and their features contrasted."""
    pretrain = import_module("vipriors.pretrain")
    how = {"ser": 0.5, "ratio": 0.5, "ser_layers": "all", "base_loss": base_loss, "method": method}
    options = options_of(recipe, "pretrain", data, VIT, **how)
    objective = pretrain.Objective(options, 40).eval()
    objective.partitions.add(torch.arange(40) % 2)
    first, second, places, turned = pretrain.Views(options, pretrain.unlabelled(options))(0, list(range(8)))
    x1, x2, rest, g1, g2 = turned
    loss, parts = objective(first, second, places, turned)

    def base(views1, views2, indices):
        z1, z2 = (objective.head(torch.cat(list(map(objective.encoder, views)))) for views in (views1, views2))
        if method == "simsiam":
            return objective.criterion(objective.predictor(z1), objective.predictor(z2), z1, z2, indices)
        return objective.criterion(z1, z2, indices)  # MoCo's teacher begins as the student

    if base_loss == "joint":
        expected = base([first, x1], [second, x2], torch.cat([places, rest]))
    else:
        expected = base([first], [second], places) + base([x1], [x2], rest)
    maps = [(objective.encoder(x), objective.encoder.maps[0])[1] for x in (x1, x2)]
    layers = [ser(one, two, g1, g2) for ser, one, two in zip(objective.ser.layers, *maps, strict=True)]
    torch.testing.assert_close(loss, expected + 0.5 * sum(layers) / len(layers))
    assert len(layers) == len(objective.encoder.net.blocks)
    torch.testing.assert_close(parts["contrast"] + parts["group_contrast"] + 0.2 * parts["group_penalty"], expected)


def test_reconstruction_transforms_the_second_view_alone(recipe, data):
    """On top of its own crop and colours; the targets are of the first view."""
    pretrain = import_module("vipriors.pretrain")
    options = options_of(recipe, "pretrain", data, RESNET, reconstruction=1, num_images=3)
    objective = pretrain.Objective(options, 40)
    first, second, places, _ = pretrain.Views(options, pretrain.unlabelled(options))(0, list(range(8)))
    seen, targets = [], []
    objective.encoder.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    objective.reconstruct.register_forward_pre_hook(lambda _, args: targets.append(args[2]))
    torch.manual_seed(3)
    objective(first, second, places, None)
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (pretrain.MEAN, pretrain.STD))
    pixels = [(view * std + mean).clamp(0, 1) for view in (first, second)]
    torch.manual_seed(3)
    _, half_way, parameters = objective.views(pixels[0])
    assert torch.equal(seen[0], first)
    torch.testing.assert_close(seen[1], (objective.views.transform(pixels[1], parameters) - mean) / std)
    assert torch.equal(targets[0], half_way)
    assert len(half_way) == len(objective.reconstruct.decoders) == 3


def test_mixed_views_are_of_one_group(recipe, data):
    pretrain = import_module("vipriors.pretrain")
    options = options_of(recipe, "pretrain", data, RESNET, mix=1.0, dummy_scales="logits", keep=1, global_penalty=1)
    objective, found = pretrain.Objective(options, 40), []
    for partition in (torch.arange(40) // 20, torch.arange(40) % 2):
        objective.partitions.add(partition)
    assert objective.partitions.partitions.tolist() == [[0] * 40, [0, 1] * 20]
    plain = objective.criterion.parts
    objective.criterion.parts = lambda *args: (found.append(args), plain(*args))[1]
    objective(*torch.randn(2, 8, 3, 32, 32), torch.arange(8), None)
    partner, share = found[0][3]
    assert torch.equal(partner % 2, torch.arange(8) % 2)
    assert share.std() > 0
    assert objective.criterion.settings() == {
        "temperature": 0.5,
        "weight": 0.2,
        "global_penalty": True,
        "dummy_scales": "logits",
    }


def test_partitions_are_sought_from_an_epoch_on(recipe, data, monkeypatch):
    pretrain = import_module("vipriors.pretrain")
    options = options_of(recipe, "pretrain", data, RESNET, first_search=1, update_every=3)
    objective, searched = pretrain.Objective(options, 40), []
    monkeypatch.setattr(objective.partitions, "update", lambda *args, **how: searched.append(epoch))
    objective.partitions.reports = ["of groups"]
    for epoch in range(8):
        objective.find_partition(pretrain.Views(options, pretrain.unlabelled(options)), epoch)
    assert searched == [1, 4, 7]


def test_class_tokens_are_those_of_the_last_blocks(recipe, data):
    """After the final norm, the last one the model's own output; blocks before a late class token have none."""
    backbone = import_module("vipriors.backbone")
    net = backbone.create(options_of(recipe, "pretrain", data, VIT)).eval()
    images, outputs = torch.randn(2, 3, 32, 32), []
    for block in net.blocks:
        block.register_forward_hook(lambda _, args, output: outputs.append(net.norm(output)[:, 0]))
    features = net(images)
    tokens = backbone.class_tokens(net, 2, images)
    late = len(net.blocks) - 2
    assert torch.equal(tokens, torch.cat(outputs[2 : 2 + late][-4:], 1))
    assert torch.equal(tokens[:, -net.num_features :], features)


def risk(z, labels, anchors, negatives, own):
    """Mean of -log of the share of each positive among itself (``own``) or all positives, and the negatives."""
    z, losses = torch.nn.functional.normalize(z, dim=1), []
    for i in anchors:
        s = z @ z[i] / 0.1
        positives = [p for p in range(len(z)) if labels[p] == labels[i] and p != i]
        below = s[[a for a in negatives if labels[a] != labels[i]]].exp().sum()
        shares = [s[p].exp() / ((s[p] if own else s[positives]).exp().sum() + below) for p in positives]
        losses.append(-torch.stack(shares).log().mean())
    return torch.stack(losses).mean()


def risks(z, labels, indices, environments, own):
    """Of each class in its two environments, [K, 2]."""
    rows = []
    for k in labels.unique().tolist():
        anchors = (labels == k).nonzero().flatten().tolist()
        parts = [torch.isin(indices, part).nonzero().flatten().tolist() for part in environments.members(k)]
        rows.append(torch.stack([risk(z, labels, anchors, negatives, own) for negatives in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("backbone", [RESNET, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize(
    ("objective", "penalty", "scale", "sharpness"),
    [
        ("paper", "rex", 10, 0),
        ("paper", "rex", 0, 1.5),
        ("paper", "off", 10, 1.5),
        ("paper", "off", 0, 0),
        ("released", "rex", 10, 1.5),
        ("released", "off", 10, 0),
    ],
)
def test_fine_tuning_is_the_published_loss(objective, penalty, scale, sharpness, backbone, recipe, data, tmp_path):
    """Loss and gradients against loops: cross entropy of one pair of views, EqInv of the other, λ from 20% on."""
    finetune, images = import_module("vipriors.finetune"), import_module("vipriors.images")
    how = {"objective": objective, "penalty": penalty, "scale": scale, "sample_weights": sharpness}
    options = options_of(recipe, "finetune", data, backbone, weight=3, contrast_weight=0.1, augment="rand", **how)
    features = torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
    environments = Environments.split(features, torch.arange(4).repeat_interleave(6))
    torch.save(environments.state_dict(), tmp_path / "environments.pt")
    whole = finetune.Objective(options, 4, environments=tmp_path / "environments.pt").eval()
    batch = finetune.Views(options, images.read(options, "train"))(0, places := [0, 1, 6, 7, 12, 13, 18, 20])
    classified, compared, labels, indices, _ = batch
    assert indices.tolist() == places * 2
    assert torch.equal(labels, indices // 6)
    model, (before, linear) = whole.model, whole.model.get_classifier()
    assert hasattr(linear, "parametrizations") == (objective == "paper")

    def features_of(views):
        return model.forward_head(model.forward_features(views), pre_logits=True)

    def seen(features):
        features = features * before.weight.sigmoid() if penalty == "rex" else features
        return scale * features / features.norm(dim=1, keepdim=True) if scale else features

    logits = seen(features_of(classified)) @ linear.weight.T + linear.bias
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    classification = (environments.weights(indices, sharpness=float(sharpness)) * losses).mean()
    contrast = variance = torch.zeros(())
    if penalty == "rex":
        f, g = features_of(compared), whole.irm.projection
        if objective == "paper":
            contrast = risks(g(seen(f)), labels, indices, environments, own=True).sum(1).mean()
            variance = risks(g(seen(f.detach())), labels, indices, environments, own=True).var(1).mean()
        else:
            contrast = 0.1 / 0.07 * risk(g(seen(f)), labels, range(16), range(16), own=False)
            variance = risks(seen(f.detach()), labels, indices, environments, own=False).var(1).mean()
        assert 3 * variance > 1e-4 * contrast > 0
    for progress, weight in ((0.19, 0), (0.2, 3)):
        expected = classification + 0.1 * contrast + weight * variance
        loss, parts = whole(*batch[:4], progress)
        torch.testing.assert_close(parts["classification"], classification)
        torch.testing.assert_close(loss, expected)
        parameters = [p for p in whole.parameters() if p.requires_grad]
        for found, right in zip(
            *(torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True) for v in (loss, expected))
        ):
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)
    outputs = import_module("vipriors.distillation").outputs(model, classified)
    torch.testing.assert_close(outputs[0], model(classified))
    torch.testing.assert_close(outputs[1], features_of(classified))


@pytest.mark.parametrize(
    ("augment", "strong"),
    [("crop", None), ("strong", "RandomGrayscale"), ("rand", "RandAugment"), ("trivial", "TrivialAugmentWide")],
)
def test_augmentation_is_for_cross_entropy_alone(augment, strong, recipe, data, monkeypatch):
    """Told by one that leaves nothing of an image."""
    finetune, images, magnitudes = import_module("vipriors.finetune"), import_module("vipriors.images"), set()

    def blank(*args, magnitude=None, **how):
        magnitudes.add(magnitude)
        return finetune.v2.Lambda(lambda image: image.point(lambda pixel: 0))

    if strong:
        monkeypatch.setattr(finetune.v2, strong, blank)
    for mixup, penalty in ((0, "off"), (0, "rex"), (0.2, "off"), (0.2, "rex")):
        how = {"penalty": penalty, "augment": augment, "magnitude": 5, "mixup": mixup, "epochs": 5}
        options = options_of(recipe, "finetune", data, RESNET, **how)
        views = finetune.Views(options, images.read(options, "train"))
        classified, compared, *_, progress = views(3, [0, 7])  # the 4th of 15 steps
        assert classified.shape == (4, 3, 32, 32)
        assert bool((classified.std((2, 3)) < 1e-5).all()) == bool(strong)
        assert (compared is None) == (penalty == "off" or not (strong or mixup))
        assert compared is None or bool((compared.std((2, 3)) > 0.01).all())
        assert progress == options.penalty_from == 0.2
    assert magnitudes == {"crop": set(), "rand": {5}}.get(augment, {None})


@pytest.mark.parametrize(("mixup", "smoothing"), [(0, 0.2), (0.4, 0), (0.4, 0.2)])
@pytest.mark.parametrize("penalty", ["off", "rex"])
def test_mixed_and_smoothed_labels(mixup, smoothing, penalty, recipe, data, monkeypatch):
    """Cross entropy by its definition, of mixed views in training alone; EqInv sees plain views and whole labels."""
    finetune, images = import_module("vipriors.finetune"), import_module("vipriors.images")
    how = {"penalty": penalty, "mixup": mixup, "label_smoothing": smoothing, "penalty_from": 0, "drop_path": 0}
    options = options_of(recipe, "finetune", data, {**VIT, "late-class-token": 0}, **how)
    batch = finetune.Views(options, images.read(options, "train"))(0, [0, 1, 6, 7, 12, 13])
    classified, compared, labels, *_ = batch
    objective, seen = finetune.Objective(options, 4).train(), []
    objective.features, features = lambda views: (seen.append(views), features(views))[1], objective.features
    torch.manual_seed(1)
    loss, parts = objective(*batch)
    shares = torch.eye(4)[labels]
    if mixup:
        torch.manual_seed(1)
        share = torch.distributions.Beta(mixup, mixup).sample()
        partners = [11, *range(11)]
        assert 0.01 < share < 0.99
        torch.testing.assert_close(seen[0], share * classified + (1 - share) * classified[partners])
        shares = share * shares + (1 - share) * shares[partners]
    shares = (1 - smoothing) * shares + smoothing / 4
    logs = objective.model.get_classifier()(features(seen[0])).log_softmax(1)
    torch.testing.assert_close(parts["classification"], -(shares * logs).sum(1).mean())
    if penalty == "rex":
        plain = classified if compared is None else compared
        assert seen[-1] is plain or not mixup
        torch.testing.assert_close(parts["irm"], objective.irm(features(plain), labels))
    loss.backward()
    seen.clear()
    objective.eval()(*batch)
    assert torch.equal(seen[0], classified)


@pytest.mark.parametrize("scale", [0, 10])
def test_what_eqinv_is_compared_with(scale, recipe, data):
    """Each adds its published term to cross entropy, of the features that the classifier gets, and is learned from."""
    finetune, images = import_module("vipriors.finetune"), import_module("vipriors.images")
    how = {"penalty": "off", "scale": scale, "decoupling": 0.2, "selfreg": 0.5, "drop_path": 0}
    options = options_of(recipe, "finetune", data, {**VIT, "late-class-token": 0}, **how)
    batch = finetune.Views(options, images.read(options, "train"))(0, [0, 1, 6, 7, 12, 13])
    objective = finetune.Objective(options, 4).train()
    torch.manual_seed(1)
    loss, parts = objective(*batch)
    f = objective.features(batch[0])
    f = scale * f / f.norm(dim=1, keepdim=True) if scale else f
    logits = objective.model.get_classifier()[1](f)
    entropy = torch.nn.functional.cross_entropy(logits, batch[2])
    torch.manual_seed(1)
    pull = 0.5 * min(1.0, entropy.item()) * objective.selfreg(f, logits, batch[2])
    torch.testing.assert_close(parts["decoupling"], 0.2 / 2 * logits.square().mean())
    torch.testing.assert_close(parts["selfreg"], pull)
    torch.testing.assert_close(loss, entropy + parts["decoupling"] + pull)
    loss.backward()
    assert all(p.grad is not None for p in objective.selfreg.parameters())
    trained = [p for group in finetune.by_layers(objective, options).param_groups for p in group["params"]]
    assert {id(p) for p in objective.selfreg.parameters()} <= {id(p) for p in trained}


def test_both_arms_begin_with_one_classifier(recipe, data):
    """So that only EqInv is between them."""
    finetune, weights = import_module("vipriors.finetune"), []
    for penalty in ("off", "rex"):
        torch.manual_seed(0)
        objective = finetune.Objective(options_of(recipe, "finetune", data, RESNET, penalty=penalty), 4)
        weights.append(objective.model.get_classifier()[1].weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("objective", "penalty", "scale"), [("paper", "off", 10), ("paper", "rex", 0), ("released", "rex", 7)]
)
def test_a_fine_tuned_model_comes_back(objective, penalty, scale, recipe, data, tmp_path):
    """As its folder tells, whatever the flags of the step that takes it."""
    finetune, folder = import_module("vipriors.finetune"), tmp_path / "finetune"
    how = {"objective": objective, "penalty": penalty, "scale": scale}
    model = finetune.Objective(options_of(recipe, "finetune", data, RESNET, **how), 4).model.eval()
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "options.json").write_text(json.dumps(how))
    (folder / "results.json").write_text("{}")
    options = options_of(recipe, "test", data, {**RESNET, "out": tmp_path})
    views = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(finetune.fine_tuned(options, 4)(views), model(views))
    (folder / "options.json").write_text(json.dumps(how | {"scale": None}))
    with pytest.raises(recipe.TrainingError, match="does not tell how its classifier was made"):
        finetune.fine_tuned(options, 4)


@pytest.mark.parametrize("method", ["features", "ofd", "crd"])
def test_each_distillation_adds_its_loss(method, recipe, data):
    distillation, images = import_module("vipriors.distillation"), import_module("vipriors.images")
    create = import_module("vipriors.backbone").create
    options = options_of(recipe, "distill", data, RESNET, method=method)
    train = images.read(options, "train")
    models = [create(options, num_classes=4).eval() for _ in range(2)]
    student = distillation.Student(method, models[0], models[1].requires_grad_(False), train, images.whole(options))
    views, labels, indices = images.Augmented(options, train)(0, list(range(6)))
    loss, parts = student(views, labels, indices)
    expected = torch.nn.functional.cross_entropy(models[0](views), labels, label_smoothing=0.1)
    torch.testing.assert_close(parts["classification"], expected)
    weight = distillation.WEIGHTS[method]
    torch.testing.assert_close(loss, parts["classification"] + weight * parts["distillation"])
    loss.backward()
    assert any(bool(p.grad.any()) for p in models[0].parameters() if p.grad is not None)
    assert not any(name.startswith("of_teacher") for name in student.state_dict())
