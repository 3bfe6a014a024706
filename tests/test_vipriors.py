"""The VIPriors recipe and the example with all four: each step on small images, as a user runs it."""

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

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPE = EXAMPLES / "vipriors"
for name in ("timm", "lightly", "matplotlib"):
    pytest.importorskip(name, reason="needs the examples extra")

RESNET = {"model": "test_resnet", "image-size": 32, "late-class-token": 0}
VIT = {"model": "test_vit", "image-size": 32, "patch-size": 8, "late-class-token": 2}
SMALL = {
    "shots": 6,
    "amp": "none",
    "probe-images": 40,
    "save-every": 2,
    "pretrain-hidden-dim": 32,
    "pretrain-output-dim": 16,
    "pretrain-queue-size": 16,
    "pretrain-epochs": 2,
    "pretrain-warmup-epochs": 1,
    "pretrain-update-every": 1,
    "pretrain-batch-size": 16,
    "finetune-epochs": 2,
    "finetune-batch-size": 8,
    "distill-epochs": 2,
    "distill-warmup-epochs": 1,
    "distill-batch-size": 8,
}


@pytest.fixture(scope="module")
def recipe():
    """The module behind ``python examples/vipriors``; its own are found as there."""
    before = list(sys.path)
    sys.path[:0] = ["", str(EXAMPLES)]  # the first is what `__main__` replaces
    spec = util.spec_from_file_location("vipriors_main", RECIPE / "__main__.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four classes of noise, each with a colour of its own; one has a name that must not be taken for markup."""
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
    chosen.update({key.replace("_", "-"): value for key, value in changes.items()})
    return [str(part) for key, value in chosen.items() for part in (f"--{key}", value)]


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def read(path):
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------------- the whole recipe


@pytest.mark.parametrize(
    ("backbone", "method", "parts"),
    [
        (RESNET, "mocov2", {"loss", "ssl", "ssl_b2", "equivariance", "reconstruction", "partitions"}),
        (VIT, "simclr", {"loss", "ssl", "ssl_b2", "equivariance", "reconstruction", "partitions"}),
    ],
    ids=["resnet", "vit"],
)
def test_all_leaves_a_folder_for_each_step(backbone, method, parts, recipe, data, tmp_path, capsys):
    arguments = flags(backbone, data=data, out=tmp_path, pretrain_method=method)
    recipe.main(["all", *arguments, "--pretrain-ser", "0.5", "--pretrain-reconstruction", "1"])
    for step, names in {
        "pretrain": ("options.json", "log.jsonl", "checkpoint.pt", "encoder.pt", "curves.png"),
        "environments": ("options.json", "environments.pt", "contact-sheet.png"),
        "finetune": ("options.json", "log.jsonl", "checkpoint.pt", "model.pt", "curves.png"),
        "distill": ("options.json", "log.jsonl", "checkpoint.pt", "model.pt", "curves.png", "predictions.pt"),
        "test": ("options.json", "test.png", "predictions.pt"),
    }.items():
        assert {*names, "results.json"} <= {path.name for path in (tmp_path / step).iterdir()}, step
        assert all(is_picture(path) for path in (tmp_path / step).glob("*.png"))
    # 6 of the 8 training images of each class and all of val, 16 of the 40 a step.
    log = [json.loads(line) for line in (tmp_path / "pretrain" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert parts <= set(log[0])
    assert [row["partitions"] for row in log] == [1, 1, 2, 2]
    log = [json.loads(line) for line in (tmp_path / "finetune" / "log.jsonl").read_text().splitlines()]
    assert {"classification", "irm"} <= set(log[0])
    options = read(tmp_path / "finetune" / "options.json")
    for name, step in (("encoder", "pretrain"), ("environments", "environments")):
        content = (tmp_path / step / f"{name}.pt").read_bytes()
        assert options[name] == hashlib.sha256(content).hexdigest()
    assert read(tmp_path / "environments" / "results.json")["samples"] == 24
    found = read(tmp_path / "recipe.json")
    assert list(found) == ["pretrain", "environments", "finetune", "distill", "test"]
    assert found["test"]["models"]["fine-tuned"]["test plain"] == pytest.approx(found["finetune"]["test"])
    assert any(row.startswith("ensemble") for row in found["test"]["merged"])
    assert re.search(r"^finetune: [\d.]+ s, val [\d.]+%, test [\d.]+%$", capsys.readouterr().out, re.M)


class Killed(BaseException):
    pass


def test_all_goes_on_where_it_was_killed(recipe, data, tmp_path, monkeypatch):  # T1
    """Killed in Step 3: Steps 1 and 2 are not done again, and what comes out is that of a run that was not killed."""
    arguments = ["all", *flags(RESNET, data=data), "--steps", "pretrain", "environments", "finetune"]
    recipe.main([*arguments, "--out", str(tmp_path / "whole")])
    out = tmp_path / "killed"
    finetune = import_module("vipriors.finetune")
    forward, calls = finetune.Objective.forward, []

    def killed(*given):
        calls.append(0)
        if len(calls) == 4:
            raise Killed
        return forward(*given)

    monkeypatch.setattr(finetune.Objective, "forward", killed)
    with pytest.raises(Killed):
        recipe.main([*arguments, "--out", str(out)])
    monkeypatch.setattr(finetune.Objective, "forward", forward)
    assert not (out / "finetune" / "results.json").exists()
    files = [out / "pretrain" / "encoder.pt", out / "environments" / "environments.pt"]
    before = [path.stat().st_mtime_ns for path in files]
    recipe.main([*arguments, "--out", str(out), "--resume"])
    assert [path.stat().st_mtime_ns for path in files] == before
    for step, change in (("environments", "plain"), ("pretrain", "groups")):  # T7
        value = ["3"] if change == "groups" else []
        with pytest.raises(ValueError, match=f"other options: {change}"):
            recipe.main([*arguments, "--out", str(out), "--resume", f"--{step}-{change}", *value])
    for step in ("pretrain", "environments", "finetune"):
        assert read(out / step / "results.json") == read(tmp_path / "whole" / step / "results.json")
    states = [torch.load(root / "finetune" / "model.pt", weights_only=True) for root in (tmp_path / "whole", out)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_stale_step_is_not_taken_for_done(recipe, data, tmp_path):  # T7
    """What comes of another encoder or model than the one that is there now is refused, or left out, and it is told."""
    arguments = flags(RESNET, data=data, out=tmp_path)
    recipe.main(["all", *arguments])
    predicted = (tmp_path / "test" / "predictions.pt").stat().st_mtime_ns
    recipe.main(["all", *arguments, "--resume", "--steps", "environments", "test"])  # nothing to do
    assert (tmp_path / "test" / "predictions.pt").stat().st_mtime_ns == predicted

    recipe.main(["all", *arguments, "--seed", "2", "--steps", "pretrain"])
    with pytest.raises(ValueError, match=r"other options: encoder '\w{64}' \(now '\w{64}'\)"):
        recipe.main(["all", *arguments, "--resume", "--steps", "environments"])
    with pytest.raises(ValueError, match=r"environments.pt was made with another encoder .* run Step 2"):
        recipe.main(["all", *arguments, "--steps", "finetune"])
    recipe.main(["all", *arguments, "--steps", "environments", "finetune"])
    with pytest.raises(ValueError, match=r"other options: model '\w{64}' \(now '\w{64}'\)"):
        recipe.main(["all", *arguments, "--resume", "--steps", "test"])


def test_an_old_student_is_left_out(recipe, data, tmp_path, capsys):  # T7
    arguments = flags(RESNET, data=data, out=tmp_path)
    recipe.main(["all", *arguments, "--steps", "finetune", "distill"])
    recipe.main(["all", *arguments, "--steps", "finetune", "test", "--seed", "2"])
    assert "distill is left out: another model than that of" in capsys.readouterr().out
    merged = read(tmp_path / "test" / "results.json")["merged"]
    assert not any(row.startswith("ensemble") for row in merged)


def test_nothing_saved_tells_of_the_machine(recipe, data, tmp_path, monkeypatch):  # S14
    """Of all steps: no paths, and nothing of the environment."""
    monkeypatch.setenv("SECRET_TOKEN", "xyzzy-secret")
    recipe.main(["all", *flags(RESNET, data=data, out=tmp_path / "out")])
    model = ["--model-folder", str(tmp_path / "out" / "finetune"), "--shots", "6", "--image-size", "32"]
    recipe.main(["test", *model, "--model", "test_resnet", "--data", str(data), "--out", str(tmp_path / "out")])
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 25
    for path in files:
        for told in (str(tmp_path), str(data), "xyzzy-secret", str(Path.home()) + "/", sys.prefix):
            assert told.encode() not in path.read_bytes(), path
    for step in recipe.STEPS:
        kept = read(tmp_path / "out" / step / "options.json")
        assert not kept.keys() & {"data", "out", "resume", "workers"}
        assert {"shots", "layout", "seed"} <= kept.keys()


# ------------------------------------------------------------------------------------------------------------ the data


@pytest.mark.parametrize("below", ["", "imagenet_50"])
@pytest.mark.parametrize("step", ["finetune", "all"])
def test_the_challenges_own_layout(step, below, recipe, data, tmp_path, capsys):
    """Its test images have no labels: no accuracy is told of them, and their predictions are there."""
    root, out = tmp_path / "data" / below, tmp_path / "out"
    for part in ("train", "val"):
        shutil.copytree(data / part, root / part)
    (root / "test" / "imgs").mkdir(parents=True)
    for place, path in enumerate(sorted((data / "test").rglob("*.png"))):
        shutil.copy(path, root / "test" / "imgs" / f"img_{place}.png")
    steps = [] if step == "all" else ["--steps", "finetune"]
    recipe.main(["all", *flags(RESNET, data=tmp_path / "data", out=out), *steps])
    words = capsys.readouterr().out
    assert re.search(r"^finetune: [\d.]+ s, val [\d.]+%, test no labels$", words, re.M)
    assert read(out / "finetune" / "results.json")["test"] == "no labels"
    if step == "all":
        assert re.search(r"^pretrain: [\d.]+ s, k-NN no labels, linear no labels$", words, re.M)
        assert re.search(r"^test: [\d.]+ s, val: fine-tuned, ten, gmean [\d.]+%$", words, re.M)
        saved = torch.load(out / "test" / "predictions.pt", weights_only=True)
        assert saved["test ten"].shape == (16, 4)


def test_evaluation_on_val_leaves_test_alone(recipe, data, tmp_path):
    """There need not even be any."""
    root = tmp_path / "data"
    for part in ("train", "val"):
        shutil.copytree(data / part, root / part)
    recipe.main(["all", *flags(RESNET, data=root, out=tmp_path / "out"), "--evaluate-on", "val"])
    found = read(tmp_path / "out" / "recipe.json")
    assert "test" not in found["finetune"]
    assert not any("test" in row for row in found["distill"])
    assert found["test"]["on"] == "val"
    assert not any("weighted" in row for row in found["test"]["merged"])  # by weights of the same images
    with pytest.raises(SystemExit):
        recipe.main(["finetune", "--shots", "6", "--data", str(root), "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("layout", ["folders", "nico", "domains"])
def test_broken_images(layout, recipe, data, tmp_path, capsys):
    """``--broken skip`` leaves out as many as ``--max-bad`` allows, in every layout, and looks for them once."""
    root = tmp_path / "data"
    if layout == "folders":
        shutil.copytree(data, root)
        broken = root / "train" / "ant" / "0.png"
    else:
        for part in ("train", "val", "test"):
            for path in (data / part).rglob("*.png"):
                name, other = path.parent.name, ("day", "dim", "night")[int(path.stem) % 3]
                folder = root / (Path(name) / other if layout == "nico" else Path(other) / name)
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / f"{part}{path.name}")
        broken = next(root.rglob("train0.png"))
    broken.write_bytes(b"\x89PNG\r\n\x1a\n none")
    images = import_module("vipriors.images")
    call = ["--layout", layout, "--shots", "2", "--bias", "0.5"]
    options = recipe.options_of("finetune", ["--data", str(root), *call, "--broken", "skip", "--max-bad", "0.5"])
    parts = [images.read(options, split) for split in ("train", "val", "test")]
    assert all(str(broken) not in part.paths for part in parts)
    assert "left out: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        recipe.options_of("finetune", ["--data", str(root), *call, "--broken", "skip", "--max-bad", "0"])
    assert "broken" in capsys.readouterr().err
    for path in root.rglob("*.png"):  # all have been read
        path.unlink()
    assert [images.read(options, split).paths for split in ("train", "val", "test")] == [p.paths for p in parts]


def test_from_scratch_by_a_word(recipe, data, tmp_path):
    """Though Steps 1 and 2 are there."""
    arguments = flags(RESNET, data=data, out=tmp_path)
    recipe.main(["all", *arguments, "--steps", "pretrain", "environments"])
    scratch = ["--finetune-encoder", "none", "--finetune-environments", "none", "--distill-encoder", "none"]
    recipe.main(["all", *arguments, "--steps", "finetune", "distill", *scratch])
    options = read(tmp_path / "finetune" / "options.json")
    assert (options["encoder"], options["environments"]) == (None, None)
    assert read(tmp_path / "distill" / "options.json")["encoder"] is None


def test_the_result_is_a_row_chosen_before(recipe):
    """Not the largest of many on test images."""
    merged = {"fine-tuned, one view": 50.0, "fine-tuned, ten, mean": 40.0, "ensemble, one view, weighted": 60.0}
    results = {"models": {}, "on": "test", "result": "fine-tuned, ten, mean", "merged": merged}
    assert recipe.summary(results) == "test: fine-tuned, ten, mean 40.0%"


def test_a_partition_is_found_though_the_epochs_last_step_failed(recipe, data):  # T9
    """A step that fails has no ``update`` behind it; the next one makes up for it, once."""
    pretrain = import_module("vipriors.pretrain")
    options = options_of(recipe, "pretrain", data, RESNET, "--epochs", "4", "--update-every", "2")
    method = pretrain.Objective(options, pretrain.unlabelled(options)).method
    counts = []
    for step in range(8):  # two in an epoch
        if step != 3:  # the last one of the second epoch
            method.update(step, 8)
        counts.append(len(method.partitions.partitions) - 1)
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1]


def test_it_runs_where_it_was_copied(tmp_path, data):
    """The folder and the files that its help names; the step before is asked for, without a traceback."""
    shutil.copytree(RECIPE, tmp_path / "vipriors")
    for name in BESIDE:
        source = EXAMPLES / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    call = [sys.executable, str(tmp_path / "vipriors"), "environments", "--shots", "6", "--data", str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment)  # noqa: S603
    assert result.returncode != 0
    assert result.stderr.endswith("encoder.pt: no such file; run Step 1 (pretrain) first, or give --encoder\n")
    assert "Traceback" not in result.stderr


def test_help_tells_the_defaults(recipe, capsys):
    """What an earlier step left is taken, and how not to; nothing that has no effect here is offered."""
    for step in recipe.STEPS:
        with pytest.raises(SystemExit):
            recipe.main([step, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert "a folder as --layout says" in words
        assert "--recipe" not in words
        if step in ("finetune", "distill"):
            assert "in --out, if there; the word none: from scratch" in words
    recipe.main(["--help"])
    assert "--pretrain-method mocov2" in capsys.readouterr().out


BESIDE = {"ipirm_pretrain.py", "distill.py", "merged_predictions.py", "training"}


def test_help_names_the_files_to_copy(recipe):
    named = recipe.__doc__.split("copy this folder, and beside it ")[1]
    assert {word.strip(".,") for word in named.split()} - {"and", "the", "folder"} == BESIDE


# ------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(("shots", "penalty"), [(10, 2), (20, 10), (50, 100)])
def test_presets_are_the_papers(shots, penalty, recipe, data, monkeypatch):
    """EqInv, Section 5.2 and supplementary B; IP-IRM, Section 4.2."""
    monkeypatch.setattr(import_module("vipriors.images"), "check", lambda options: None)  # not so many of a class here
    options = {
        step: recipe.options_of(step, ["--preset", f"vipriors{shots}", "--data", str(data)]) for step in recipe.STEPS
    }
    assert {(o.model, o.image_size, o.shots) for o in options.values()} == {("resnet50", 224, shots)}
    one = options["pretrain"]
    assert (one.epochs, one.queue_size, one.unlabelled) == (800, 16384, "train+val")
    assert (one.lr, one.output_dim, one.weight, one.update_every) == (1e-3, 128, 0.2, 50)
    three = options["finetune"]
    assert (three.epochs, three.lr, three.batch_size, three.weight_decay) == (50, 0.05, 128, 1e-4)
    assert (three.weight, three.penalty, three.open) == (penalty, "rex", False)
    rates = [import_module("vipriors.finetune").steps_down(10 * epoch, 10, three) for epoch in (0, 29, 30, 39, 40, 49)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
    assert (options["distill"].epochs, options["distill"].warmup_epochs) == (100, 10)
    assert options["distill"].lr / options["distill"].batch_size == pytest.approx(0.1 / 160)


def test_a_vision_transformer_has_settings_of_its_own(recipe, data, monkeypatch):
    """EqInv, supplementary B, in fine-tuning; and a student by a loss that it can be trained with."""
    monkeypatch.setattr(import_module("vipriors.images"), "check", lambda options: None)
    chosen = ["--preset", "vipriors10", "--model", "vit_base_patch16_224", "--data", str(data)]
    options = {step: recipe.options_of(step, chosen) for step in recipe.STEPS}
    three = options["finetune"]
    assert (three.lr, three.weight_decay, three.batch_size, three.warmup_epochs) == (5e-4, 0.05, 256, 5)
    assert (three.layer_decay, three.drop_path, three.weight) == (0.65, 0.1, 2)
    assert options["distill"].method == "logits"
    assert not hasattr(recipe.options_of("finetune", [*chosen, "--model", "resnet50"]), "layer_decay")


def test_rates_fall_towards_the_first_block(recipe, data):
    """0.65 times the rate of the block behind it, of the head all of it; each parameter once."""
    finetune = import_module("vipriors.finetune")
    options = options_of(recipe, "finetune", data, VIT)
    options.encoder = options.environments = None
    objective = finetune.Objective(options, 4)
    optimizer = finetune.adamw_by_layers(objective, options)
    scales = {id(p): group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    assert len(scales) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert scales.keys() == {id(p) for p in objective.parameters()}
    depth = len(objective.model.backbone.blocks)
    for name, p in objective.named_parameters():
        block = re.match(r"model\.backbone\.blocks\.(\d+)", name)
        early = name.startswith(
            ("model.backbone.patch_embed", "model.backbone.cls", "model.backbone.pos", "model.backbone.reg")
        )
        last = name.startswith("model.backbone.norm")  # with the last block, in timm
        behind = depth - int(block[1]) if block else depth + 1 if early else int(last)
        assert scales[id(p)] == pytest.approx(0.65**behind), name
    drops = [m.drop_prob for m in objective.modules() if type(m).__name__ == "DropPath"]
    assert max(drops) == pytest.approx(0.1)


@pytest.mark.parametrize(("method", "rate"), [("mocov2", 0.03), ("simsiam", 0.05)])
def test_published_settings_of_the_other_methods(method, rate, recipe, data, monkeypatch):
    monkeypatch.setattr(import_module("vipriors.images"), "check", lambda options: None)
    chosen = ["--preset", "vipriors20", "--method", method, "--data", str(data)]
    options = recipe.options_of("pretrain", chosen)
    assert (options.optimizer, options.lr, options.batch_size) == ("sgd", rate, 256)
    assert recipe.options_of("pretrain", [*chosen, "--lr", "0.5"]).lr == 0.5  # flags change the parts


def test_flags_of_a_step_carry_its_name(recipe):
    shared, own = recipe.sort_flags(["--seed", "3", "--finetune-epochs", "5", "--finetune-open", "--draw", "-1"])
    assert shared == ["--seed", "3", "--draw", "-1"]
    assert own["finetune"] == ["--epochs", "5", "--open"]
    assert not own["pretrain"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all", "--shots", "6", "--distill-epoch-count", "5"], "unknown: --epoch-count 5"),
        (["pretrain", "--preset", "vipriors30"], "invalid choice: 'vipriors30'"),
        (["train"], "no step 'train'; choose from pretrain, environments, finetune, distill, test, all"),
        (["test", "--shots", "6"], "run Step 3 (finetune) first"),
        (["pretrain", "--shots", "6", "--model", "test_vit", "--ser", "0.5"], "needs --late-class-token"),
        (["all", "--shots", "6", "--model", "test_vit", "--distill-method", "ofd"], "stages of a ResNet, got --model"),
        (["all", "--shots", "6", "--model", "test_wit"], "--model must be the name of a model in timm, got 'test_wit'"),
        (["all", "--shots", "9"], "shots must be at most 8"),
        (["finetune", "--recipe", "tiny10"], "unknown: --recipe"),
    ],
)
def test_mistakes_show_before_any_work(arguments, message, recipe, data, tmp_path, capsys):  # T11, T16
    where = ["--data", str(data), "--out", str(tmp_path / "out"), "--image-size", "32", "--batch-size", "8"]
    where = where[:4] if arguments[0] in ("all", "test") else where
    with pytest.raises((SystemExit, ValueError)) as refusal:  # argparse's, or ours
        recipe.main([*arguments, *where])
    assert message in f"{refusal.value} {capsys.readouterr().err}"
    assert not list(tmp_path.rglob("*.pt"))


# ---------------------------------------------------------------------------------------------------------- the pieces


def options_of(recipe, step, data, table, *more):
    chosen = {key.removeprefix(f"{step}-"): value for key, value in {**SMALL, **table}.items()}
    others = tuple(f"{other}-" for other in recipe.STEPS if other != step)
    pairs = [(f"--{key}", str(value)) for key, value in chosen.items() if not key.startswith(others)]
    return recipe.options_of(step, ["--data", str(data), *(part for pair in pairs for part in pair), *more])


@pytest.mark.parametrize("backbone", [RESNET, VIT], ids=["resnet", "vit"])
def test_what_each_regularizer_reaches(backbone, recipe, data):
    """SER trains the layers up to the tapped one, reconstruction all; the method has its part of the features."""
    pretrain = import_module("vipriors.pretrain")
    options = options_of(recipe, "pretrain", data, backbone, "--ser", "0.5", "--reconstruction", "1", "--ratio", "0.5")
    images = pretrain.unlabelled(options)
    objective = pretrain.Objective(options, images)
    first, _, _, turned = pretrain.Views(options, 0)([(0, *images[i], i) for i in range(8)])
    assert (len(first), len(turned[0]), turned[2].tolist()) == (4, 4, [4, 5, 6, 7])
    net, encoder = objective.method.backbone.net, objective.method.backbone
    early, late = ("layer2", "layer3") if backbone is RESNET else ("blocks.1", "blocks.2")

    def reached(loss):
        objective.zero_grad()
        loss.backward()
        grads = {name: [p.grad for p in net.get_submodule(name).parameters()] for name in (early, late)}
        return {name: any(g is not None and g.abs().sum() > 0 for g in parts) for name, parts in grads.items()}

    assert reached(objective.equivariance(*turned)[1]) == {early: True, late: False}
    with encoder.recording() as maps:
        encoder(first)
    assert reached(objective.reconstruction(first, maps[0][1])) == {early: True, late: True}
    assert encoder.maps is None
    features = net.eval()(first)
    assert torch.equal(encoder(first), features[:, : features.shape[1] // 2])


@pytest.mark.parametrize("method", ["simsiam", "simclr"])
def test_pretraining_without_any_regularizer(method, recipe, data, tmp_path):
    options = options_of(recipe, "pretrain", data, RESNET, "--method", method, "--weight", "0", "--epochs", "1")
    options.out = tmp_path
    results = recipe.run_step("pretrain", options)
    assert results["partitions"] == []
    log = json.loads((tmp_path / "pretrain" / "log.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "ssl", "lr"} == set(log) - {"skipped"}
    assert log["loss"] == log["ssl"]


def test_encoder_of_another_class_token_is_refused(recipe, data, tmp_path):  # T7
    """No shape of a weight tells where the class token enters."""
    backbone = import_module("vipriors.backbone")
    options = options_of(recipe, "environments", data, VIT)
    torch.save(backbone.create(options).state_dict(), tmp_path / "encoder.pt")
    (tmp_path / "options.json").write_text(json.dumps({"model": "test_vit", "patch_size": 8, "late_class_token": 0}))
    with pytest.raises(ValueError, match=r"other options: late_class_token 0 \(now 2\)"):
        backbone.create(options, tmp_path / "encoder.pt")


@pytest.mark.parametrize("backbone", [RESNET, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize("scale", [0.0, 10.0])
def test_teacher_is_the_fine_tuned_model(backbone, scale, recipe, data):
    finetune, distillation = import_module("vipriors.finetune"), import_module("vipriors.distillation")
    options = options_of(recipe, "finetune", data, backbone, "--mask-scale", str(scale))
    classifier = finetune.Classifier(options, 4).eval()
    images = torch.rand(3, 3, 32, 32)
    expected = classifier(images)
    teacher = distillation.in_one(classifier)
    logits, features, _ = import_module("distill").run(teacher, images)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(teacher(images), expected)
    assert features.shape[1] == classifier.head.in_features


def test_shares_of_the_environments(recipe):
    """By a loop over classes and images."""
    environments, Environments = import_module("vipriors.environments"), import_module("equireg").Environments
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(5)[torch.randperm(20, generator=generator)]
    split = Environments.split(torch.randn(20, 6, generator=generator), labels, 4)
    expected = []
    for k in range(4):
        first = set(split.members(k)[0].tolist())
        for other in range(4):
            if other != k:
                own = [i for i in range(20) if labels[i] == other]
                expected.append(sum(i in first for i in own) / len(own))
    assert environments.shares_in_first(split, labels).tolist() == pytest.approx(expected)


def test_names_on_the_sheet(recipe, data, tmp_path):  # S9, S12
    """Control characters and broken names are written out, long ones cut; a formula is drawn as it stands."""
    environments = import_module("vipriors.environments")
    assert environments.short("a\x1b[31m\nb", 18) == r"a\x1b[31m\nb"
    assert environments.short("caf\udce9", 18) == r"caf\udce9"
    assert environments.short("x" * 40, 18) == "x" * 17 + "…"
    (tmp_path / "classes.txt").write_text("n01\t$\\frac{$\nn02\ttench\n")
    options = options_of(recipe, "environments", data, RESNET)
    options.data = str(tmp_path)
    assert environments.names_of(options, ["n02", "n01", "n03"]) == ["tench", "$\\frac{$", "n03"]


@pytest.mark.parametrize("without", [["ipirm"], []], ids=["three", "four"])
def test_all_four(without, recipe, data, tmp_path, monkeypatch, capsys):
    """A table of two trainings, and a picture; each line can be left out."""
    call = ["all_four.py", "--data", str(data), "--epochs", "3", "--warmup", "1", "--batch-size", "16"]
    call += ["--image-size", "16", "--out", str(tmp_path / "a.png"), *(["--without", *without] if without else [])]
    monkeypatch.setattr(sys, "argv", call)
    all_four = import_module("all_four")
    report, losses = all_four.report, []
    monkeypatch.setattr(all_four, "report", lambda *given: (losses.append(given[1]), report(*given)))
    all_four.main()
    names = ["eqinv", "ser", "reconstruction", *([] if without else ["ipirm"])]
    name = re.escape(" + ".join(["cross entropy", *names]))
    assert re.search(rf"^cross entropy +[\d.]+\n{name} +[\d.]+$", capsys.readouterr().out, re.M)
    assert is_picture(tmp_path / "a.png")
    last = list(losses[0].values())[-1][-1]
    assert last.keys() == {"cross entropy", *names}
    assert all(0 < abs(value) < float("inf") for value in last.values())


def test_all_four_on_validation_images(recipe, data, tmp_path, monkeypatch, capsys):
    """Those of ``val``, or training images that it does not train on; the test images are not looked at."""
    all_four = import_module("all_four")
    assert {Path(p).parts[-3] for p in all_four.find(data, "val", 5)[1].paths} == {"val"}
    shutil.copytree(data / "train", tmp_path / "train")
    train, val = all_four.find(tmp_path, "val", 100)
    assert not set(train.paths) & set(val.paths)
    assert (train.labels.bincount().tolist(), val.labels.bincount().tolist()) == ([6] * 4, [2] * 4)
    assert train.labels.shape == all_four.pixels(train, 8).shape[:1]
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n none")
    call = ["all_four.py", "--data", str(tmp_path), "--batch-size", "8", "--evaluate-on", "val"]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit):
        all_four.main()
    assert re.search(r"train/ant/0.png", capsys.readouterr().err)


def test_views_that_are_never_seen_in_use_leave_the_statistics(recipe):
    """Normalised by the batch as ever, with gradient; and outside of it they follow again."""
    all_four = import_module("all_four")
    torch.manual_seed(0)
    network, images = all_four.Network(), torch.rand(4, 3, 16, 16)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with all_four.statistics_kept(network):
        inside = network(images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert torch.equal(inside, network(images))
    assert not any(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
