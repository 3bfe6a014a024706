"""The examples run as a user runs them, and do what they claim."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def command(name, *arguments, folder, beside=(), launcher=()):
    """How to run an example as a file copied out of the repository, with the files that belong ``beside`` it."""
    for file in (name, *beside):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text((EXAMPLES / file).read_text())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(folder)}
    call = [sys.executable, *launcher, str(folder / name), *map(str, arguments)]
    return call, {"text": True, "cwd": folder, "env": environment}


def run(name, *arguments, **where):
    """The output of an example."""
    call, options = command(name, *arguments, **where)
    result = subprocess.run(call, capture_output=True, **options)  # noqa: S603
    assert result.returncode == 0, result.stderr
    return result.stdout


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000


def test_quickstart_beats_cross_entropy(tmp_path):
    """On validation images of two seeds, by half of what it gains on average."""
    pytest.importorskip("sklearn", reason="needs the examples extra")
    output = run("quickstart.py", "--seeds", "2", "--split", "validation", folder=tmp_path)
    rows = {line[:32].strip(): re.findall(r"([\d.]+) ± [\d.]+", line) for line in output.splitlines()}
    conflicting = {name: float(cells[1]) for name, cells in rows.items() if cells}
    assert conflicting["+ ClassWiseIRM"] > conflicting["cross entropy"] + 6
    assert float(rows["+ ClassWiseIRM"][0]) > 97  # and nothing is lost where the bias holds
    assert is_picture(tmp_path / "runs" / "quickstart.png")


def test_quickstart_controls(tmp_path):
    pytest.importorskip("sklearn", reason="needs the examples extra")
    output = run("quickstart.py", "--seeds", "1", "--epochs", "1", "--controls", folder=tmp_path)
    assert "without the penalty (weight 0)" in output
    assert "random environments" in output


def test_colored_mnist_shows_the_papers_figure(tmp_path):
    """Plain similarity splits by digit, adjusted similarity by the class's colour alone (EqInv, Fig. 5)."""
    pytest.importorskip("sklearn", reason="needs the examples extra")
    output = run("colored_mnist.py", "--source", "digits", "--unbiased", "0.05", folder=tmp_path)
    pattern = r"^(\w+) +similarity.*: (\d+) to (\d+)% of each other digit, (\d+)% of colour 0"
    found = {name: [int(n) for n in shares] for name, *shares in re.findall(pattern, output, re.M)}
    low, high, _ = found["plain"]
    assert high - low > 80
    low, high, own_color = found["adjusted"]
    assert low > 30
    assert high < 70
    assert own_color > 90
    assert is_picture(tmp_path / "runs" / "colored_mnist.png")


# ------------------------------------------------------------------------------------------------- SER pretraining

SMALL = {
    "model": "test_vit",
    "depth": 0,
    "image-size": 16,
    "patch-size": 4,
    "local-size": 8,
    "images": 40,
    "batch-size": 8,
    "epochs": 2,
    "warmup-epochs": 1,
    "hidden-dim": 32,
    "output-dim": 64,
    "layer": 2,
    "probe-images": 40,
    "amp": "none",
}
RECONSTRUCTION = {**{key: value for key, value in SMALL.items() if key not in ("layer", "local-size")}, "r2-images": 72}
SHARED = tuple(f"training/{path.name}" for path in sorted((EXAMPLES / "training").glob("*.py")))
BESIDE = (*SHARED, "ssl_methods.py")
IPIRM = {
    "model": "test_resnet",
    "image-size": 32,
    "images": 40,
    "batch-size": 8,
    "epochs": 4,
    "update-every": 2,
    "warmup-epochs": 1,
    "hidden-dim": 32,
    "output-dim": 16,
    "queue-size": 16,
    "probe-images": 40,
    "amp": "none",
}


def flags(defaults=SMALL, **changes):
    chosen = {**defaults, **{key.replace("_", "-"): value for key, value in changes.items()}}
    return [part for key, value in chosen.items() for part in (f"--{key}", value)]


@pytest.fixture
def small_images(tmp_path):
    """Four classes of noise, each with a colour of its own."""
    image = pytest.importorskip("PIL.Image")
    for name in ("timm", "lightly", "matplotlib"):
        pytest.importorskip(name, reason="needs the examples extra")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 6)):
        for label in range(4):
            folder = tmp_path / "data" / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(160, (20, 18, 3), generator=generator)
                pixels[..., label % 3] += 40 * (1 + label // 3)
                image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_ser_pretrain_compares(small_images, tmp_path):
    """Two global and four local views; a table, a picture, a log, and an encoder with timm's own keys."""
    import timm

    arguments = flags(data=small_images, views=6)
    output = run("ser_pretrain.py", *arguments, folder=tmp_path, beside=BESIDE)
    assert re.search(r"without SER +with SER", output)
    for row in ("k-NN accuracy", "linear accuracy", "cosine, layer 2, rotation", "cosine, layer 6, scale, other image"):
        assert re.search(rf"^{re.escape(row)}.*\d\.\d+ +\d*\.?\d+", output, re.M), row
    assert is_picture(tmp_path / "runs" / "ser" / "mocov3.png")
    rows = [json.loads(line) for line in (tmp_path / "runs/ser/mocov3-ser/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert set(rows[0]) == {"step", "loss", "ssl", "ssl_b2", "equivariance", "lr"}
    assert all(row["equivariance"] > 0 for row in rows)
    vit = timm.create_model("test_vit", img_size=16, patch_size=4, dynamic_img_size=True, num_classes=0)
    vit.load_state_dict(torch.load(tmp_path / "runs/ser/mocov3-ser/encoder.pt", weights_only=True))


@pytest.mark.parametrize("method", ["dino", "barlowtwins"])
def test_ser_pretrain_in_two_processes(method, small_images, tmp_path):
    """``torchrun``: the batch is shared out, every step is finite, and the first process measures and reports."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = flags(data=small_images, method=method, ser="on", batch_size=16)
    output = run("ser_pretrain.py", *arguments, folder=tmp_path, beside=BESIDE, launcher=launcher)
    assert output.count("linear accuracy") == 1
    rows = [json.loads(line) for line in (tmp_path / f"runs/ser/{method}-ser/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)


@pytest.mark.parametrize(
    ("name", "arguments", "folder", "other", "refusal"),
    [
        ("ser_pretrain.py", flags(ser="on"), "mocov3-ser", ("--layer", "1"), "layer 2 (now 1)"),
        (
            "reconstruction_pretrain.py",  # lightly's masks draw from Python's own random numbers
            [*flags(RECONSTRUCTION, head="2", method="ibot"), "--fraction", "0.5"],
            "ibot-2",
            ("--fraction", "0.25"),
            "fraction 0.5 (now 0.25)",
        ),
        (  # partitions after epochs 2 and 4, whose reports are among the results
            "ipirm_pretrain.py",
            [*flags(IPIRM, partition="on", method="mocov2"), "--weight", "0.5"],
            "mocov2-on",
            ("--weight", "0.1"),
            "weight 0.5 (now 0.1)",
        ),
    ],
)
def test_pretraining_resumes_bit_for_bit(name, arguments, folder, other, refusal, small_images, tmp_path):  # T1
    """Killed in the middle of an epoch, it ends with the same weights and the same log as a run that was not."""
    arguments = [*arguments, "--data", small_images, "--epochs", "6", "--save-every", "2", "--out", "whole"]
    call, options = command(name, *arguments, folder=tmp_path, beside=BESIDE)
    subprocess.run(call, check=True, capture_output=True, **options)  # noqa: S603
    call[call.index("whole")] = "killed"
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)  # noqa: S603
    log, deadline = tmp_path / "killed" / folder / "log.jsonl", time.time() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 7:  # checkpoints after 2, 4, 5 and 6
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / folder / "encoder.pt").exists()
    with open(log, "a") as file:
        file.write('{"step": 8, "los')  # half a line, as a kill can leave it

    result = subprocess.run([*call, "--resume"], check=True, capture_output=True, **options)  # noqa: S603
    assert re.search(r"[1-9]\d*/30", result.stderr)
    whole, killed = tmp_path / "whole" / folder, tmp_path / "killed" / folder
    assert killed.joinpath("log.jsonl").read_text() == whole.joinpath("log.jsonl").read_text()
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, killed)]
    for key, value in states[0]["objective"].items():
        resumed = states[1]["objective"][key]
        assert torch.equal(value, resumed) if isinstance(value, torch.Tensor) else value == resumed, key
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, killed)]
    assert results[0] == results[1]

    call[call.index(other[0]) + 1] = other[1]  # T7
    refused = subprocess.run([*call, "--resume"], capture_output=True, **options)  # noqa: S603
    assert refused.returncode != 0
    assert f"was trained with other options: {refusal}" in refused.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "--data nowhere must hold the folders train and test (or val)"),
        ({"batch_size": 64}, "--batch-size must be at most the 40 training images, got 64"),
        ({"layer": 6}, "layer must be in 0 .. 5 for 6 blocks, got 6"),
    ],
)
def test_ser_pretrain_refuses(changes, message, small_images, tmp_path):  # T11, T16
    arguments = flags(**{"data": small_images, "ser": "on", **changes})
    call, options = command("ser_pretrain.py", *arguments, folder=tmp_path, beside=BESIDE)
    result = subprocess.run(call, capture_output=True, **options)  # noqa: S603
    assert result.returncode != 0
    assert message in result.stderr


def test_ser_pretrain_has_the_papers_recipe(small_images, tmp_path):
    """One flag for all of it; here it gets as far as asking for more images."""
    arguments = ("--recipe", "imagenet-vits16", "--data", small_images, "--ser", "on", "--hidden-dim", 64)
    call, options = command("ser_pretrain.py", *arguments, folder=tmp_path, beside=BESIDE)
    result = subprocess.run(call, capture_output=True, **options)  # noqa: S603
    assert "--batch-size must be at most the 48 training images, got 2048" in result.stderr
    chosen = json.loads((tmp_path / "runs/ser/mocov3-ser/options.json").read_text())
    expected = {"model": "vit_small_patch16_224", "epochs": 100, "warmup_epochs": 10, "ratio": 0.01, "layer": 3}
    assert {key: chosen[key] for key in expected} == expected


# -------------------------------------------------------------------------------------- pretraining with reconstruction


def test_reconstruction_pretrain_compares(small_images, tmp_path):
    """A table of R² and accuracies, curves, a grid of pictures, a log, and an encoder with timm's own keys."""
    import timm

    arguments = flags(RECONSTRUCTION, data=small_images)
    output = run("reconstruction_pretrain.py", *arguments, folder=tmp_path, beside=BESIDE)
    assert re.search(r"without +1 image +2 images", output)
    number = r" +-?\d+\.\d+"
    rows = ("  rotation", "  translation", "    dx", "  color", "    hue", "  blur", "k-NN accuracy, %")
    assert re.search(r"R² from the means of quarters\n.*\nR² from the mean of all patches\n", output, re.S)
    for row in (*rows, "linear accuracy, %", "quarter turns told, layer 6, %", "flips told, layer 1, %"):
        assert re.search(rf"^{re.escape(row)}{3 * number}$", output, re.M), row
    assert re.search(r"backbone 0\.\d+ M parameters, decoders 0\.\d+ M", output)
    folder = tmp_path / "runs" / "reconstruction"
    assert is_picture(folder / "vicreg.png")
    assert is_picture(folder / "vicreg-pictures.png")
    for name, images in (("base", 2), ("1", 1), ("2", 2)):
        pictures = torch.load(folder / f"vicreg-{name}" / "pictures.pt", weights_only=True)
        assert pictures["found"].shape == (images, 6, 3, 16, 16)
        lines = (folder / f"vicreg-{name}" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))
        assert set(json.loads(lines[0])) == {"step", "loss", "ssl", "reconstruction", "lr"}
    vit = timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=0)
    vit.load_state_dict(torch.load(folder / "vicreg-2" / "encoder.pt", weights_only=True))


@pytest.mark.parametrize("method", ["vicreg", "dinov2"])
def test_reconstruction_pretrain_in_two_processes(method, small_images, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = flags(RECONSTRUCTION, data=small_images, method=method, head="2", batch_size=16, crops=2, views="all")
    output = run("reconstruction_pretrain.py", *arguments, folder=tmp_path, beside=BESIDE, launcher=launcher)
    assert output.count("linear accuracy") == 1
    log = tmp_path / f"runs/reconstruction/{method}-2/log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)


# --------------------------------------------------------------------------------------------------------- IP-IRM


def test_planted_partition_is_found(tmp_path):
    """The first partition follows the tint of digits; the second one another thing."""
    pytest.importorskip("sklearn", reason="needs the examples extra")
    output = run("planted_partition.py", "--rounds", "2", "--epochs", "8", folder=tmp_path)
    found = [tuple(map(float, pair)) for pair in re.findall(r"tint (-?[\d.]+), with classes (-?[\d.]+)", output)]
    assert found[0][0] > 0.8
    assert found[1][0] < 0.5
    assert is_picture(tmp_path / "runs" / "planted_partition.png")


def test_ipirm_pretrain_compares(small_images, tmp_path):
    import timm

    output = run("ipirm_pretrain.py", *flags(IPIRM, data=small_images, mixup=0.5), folder=tmp_path, beside=BESIDE)
    assert re.search(r"^ +without partitions +with partitions$", output, re.M)
    for row in ("k-NN accuracy, %", "linear accuracy, %"):
        assert re.search(rf"^{row} +\d+\.\d +\d+\.\d$", output, re.M)
    assert re.search(
        r"^with partitions, partition 1: groups of \d+ \+ \d+, agreement with those before: -$", output, re.M
    )
    folder = tmp_path / "runs" / "ipirm"
    assert is_picture(folder / "simclr.png")
    assert is_picture(folder / "simclr-groups.png")
    texts = [(folder / f"simclr-{name}" / "log.jsonl").read_text() for name in ("off", "on")]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [row["partitions"] for row in logs[0]] == [1] * 20
    assert [row["partitions"] for row in logs[1]] == [1] * 10 + [2] * 10
    assert [row["loss"] for row in logs[0][:10]] != [row["loss"] for row in logs[1][:10]]  # by the penalty
    model = timm.create_model("test_resnet", num_classes=0)
    model.load_state_dict(torch.load(folder / "simclr-on" / "encoder.pt", weights_only=True))


def test_ipirm_pretrain_in_two_processes(small_images, tmp_path):
    """Both processes train with the same partition, which they looked for on half of the images each."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = flags(IPIRM, data=small_images, method="simsiam", partition="on")
    output = run("ipirm_pretrain.py", *arguments, folder=tmp_path, beside=BESIDE, launcher=launcher)
    assert output.count("linear accuracy") == 1
    folder = tmp_path / "runs/ipirm/simsiam-on"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert torch.load(folder / "partitions.pt", weights_only=True).shape == (1, 40)


def test_the_whole_vipriors_recipe(small_images, tmp_path):
    """Pretraining, teacher, students, augmentation and ensemble from one command; again, there is nothing to do."""
    small = {
        **{key: IPIRM[key] for key in ("model", "image-size", "batch-size", "warmup-epochs", "probe-images", "amp")},
        "images": 24,
        "epochs": 2,
        "stage1-epochs": 2,
        "stage1-images": 24,
    }
    where = {"folder": tmp_path, "beside": (*SHARED, "ipirm_pretrain.py", "merged_predictions.py")}
    output = run("distill.py", *flags(small, data=small_images), **where)
    students = ("KL, logits", "KL, features", "OFD, several layers", "OFD, last layer", "CRD")
    for name in ("from scratch", "fine-tuned (the teacher)", "fine-tuned, another seed", *students):
        assert re.search(rf"^{re.escape(name)} +\d+\.\d +\d+\.\d$", output, re.M), name
    rows = ["one view", "flip, mean", "five, gmean", "ten, tsharpen"]
    for row in rows + [f"ensemble, {views}, weighted" for views in ("one view", "ten crops")]:
        assert re.search(rf"{row} +\d+\.\d$", output, re.M), row
    assert is_picture(tmp_path / "runs" / "distill" / "distill.png")
    again = run("distill.py", *flags(small, data=small_images), "--resume", **where)
    table = output[output.index("accuracy, %") :]
    assert again[again.index("accuracy, %") :] == table
