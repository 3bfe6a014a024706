"""Each example runs alone, as a person copies it, and does what it claims."""

import ast
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import equireg

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGES = {"equireg", "lightly", "matplotlib", "sklearn", "timm", "torch", "torchvision", "tqdm"}

# What makes each of them small: about a step of each of its trainings.
TINY_RESNET = "--data images --epochs 1 --model test_resnet --image-size 32 --shots 4"
PRETRAINING = "--data images --epochs 1 --images 40 --batch-size 20"
FLAGS = {
    "colored_mnist.py": "--source digits --epochs 1 --samples 300",
    "distill.py": TINY_RESNET,
    "eqinv_finetune.py": f"{TINY_RESNET} --runs 1 --checkpoint images/encoder.pt",
    "ipirm_pretrain.py": f"{PRETRAINING} --update-every 1",
    "late_class_token.py": "--data images --epochs 1 --image-size 16 --shots 4",
    "planted_partition.py": "--source photographs --data images --rounds 2 --epochs 1",
    "quickstart.py": "--epochs 1",
    "reconstruction_pretrain.py": PRETRAINING,
    "ser_pretrain.py": PRETRAINING,
}


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


@pytest.fixture
def run_alone(tmp_path, monkeypatch, capsys):
    """Runs an example that was copied into an empty folder, and gives what it printed."""
    for package in PACKAGES:
        pytest.importorskip(package, reason="needs the examples extra")

    def run(name, flags):
        (tmp_path / name).write_text((EXAMPLES / name).read_text())
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("EQUIREG_DATA", raising=False)
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        monkeypatch.setattr(sys, "path", [part for part in sys.path if Path(part) != EXAMPLES])
        runpy.run_path(name, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def made_images(tmp_path):
    """``images/{train,test}/<class>/*``: four classes of noise, each with a colour of its own; and ``encoder.pt``."""
    image, timm = pytest.importorskip("PIL.Image"), pytest.importorskip("timm", reason="needs the examples extra")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 10), ("test", 8)):
        for label in range(4):
            folder = tmp_path / "images" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(160, (20, 18, 3), generator=generator)
                pixels[..., label % 3] += 40 * (1 + label // 3)
                image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "images" / "encoder.pt")


EVERY = pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))


@EVERY
def test_an_example_runs_alone(name, run_alone, made_images, tmp_path):
    """In a folder with images and nothing else, for a step: it prints a table and writes a picture below ``runs``."""
    output = run_alone(name, FLAGS[name])
    number = r"[+-]?\d+(?:\.\d+)?%?"
    rows = re.findall(rf"^\S.*?  +{number}(?: ± {number})?(?:  .*)?$", output, re.M)
    assert len(rows) >= 2, output
    assert {path.name for path in tmp_path.iterdir()} == {name, "images", "runs"}
    pictures = list((tmp_path / "runs").rglob("*.png"))
    assert pictures
    assert all(map(is_picture, pictures))


@EVERY
def test_an_example_is_one_short_file(name):
    """At most 150 lines; it imports packages, and of equireg the public names."""
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= 150
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
            if node.module.startswith("equireg"):
                assert node.module == "equireg"
                assert {alias.name for alias in node.names} <= set(equireg.__all__)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "equireg":
            assert node.attr in equireg.__all__
        assert {module.split(".")[0] for module in modules} <= PACKAGES | sys.stdlib_module_names


# ---------------------------------------------------------------------------------------------- what some of them claim


def test_quickstart_beats_cross_entropy(run_alone, tmp_path):
    """On validation images of two seeds, by half of what it gains on average."""
    output = run_alone("quickstart.py", "--seeds 2 --split validation")
    rows = {line[:32].strip(): re.findall(r"([\d.]+) ± [\d.]+", line) for line in output.splitlines()}
    conflicting = {name: float(cells[1]) for name, cells in rows.items() if cells}
    assert conflicting["+ ClassWiseIRM"] > conflicting["cross entropy"] + 6
    assert float(rows["+ ClassWiseIRM"][0]) > 97  # and nothing is lost where the bias holds
    assert is_picture(tmp_path / "runs" / "quickstart.png")


def test_quickstart_controls(run_alone):
    output = run_alone("quickstart.py", "--seeds 1 --epochs 1 --controls")
    assert "without the penalty (weight 0)" in output
    assert "random environments" in output


def test_colored_mnist_shows_the_papers_figure(run_alone):
    """Plain similarity splits by digit, adjusted similarity by the class's colour alone (EqInv, Fig. 5)."""
    output = run_alone("colored_mnist.py", "--source digits --unbiased 0.05")
    pattern = r"^(\w+) similarity +(\d+) to (\d+) +(\d+) +\d+ to \d+$"
    found = {name: [int(n) for n in shares] for name, *shares in re.findall(pattern, output, re.M)}
    low, high, _ = found["plain"]
    assert high - low > 80
    low, high, own_color = found["adjusted"]
    assert low > 30
    assert high < 70
    assert own_color > 90


def test_planted_partition_is_found(run_alone):
    """The first partition follows the tint of digits; the second one another thing."""
    output = run_alone("planted_partition.py", "--images 600 --rounds 2 --epochs 12")
    first, second = (float(tint) for tint in re.findall(r"^partition \d +(-?[\d.]+)", output, re.M))
    assert first > 0.8
    assert second < 0.5


def test_late_class_token_is_exact_without_positions(run_alone, made_images):
    """Early or late, every layer turns with the image; and the wrapped model keeps its state_dict."""
    output = run_alone("late_class_token.py", "--data images --epochs 0 --image-size 16 --shots 4")
    assert re.findall(r"^(\w+), no positions.* at least 1\.000000 in every layer$", output, re.M) == ["early", "late"]
    assert "the wrapped ViT: the same" in output
    with_positions = [float(score) for score in re.findall(r"^layer 6 +(\S+) +\S+ +(?=\S)", output, re.M)]
    assert with_positions[0] < 0.99


# ------------------------------------------------------------------------------------------------- SER pretraining


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
