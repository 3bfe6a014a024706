"""The examples run as a user runs them, and do what they claim."""

import os
import re
import subprocess
import sys
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


SHARED = tuple(f"training/{path.name}" for path in sorted((EXAMPLES / "training").glob("*.py")))
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


def flags(defaults, **changes):
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


def test_planted_partition_is_found(tmp_path):
    """The first partition follows the tint of digits; the second one another thing."""
    pytest.importorskip("sklearn", reason="needs the examples extra")
    output = run("planted_partition.py", "--rounds", "2", "--epochs", "8", folder=tmp_path)
    found = [tuple(map(float, pair)) for pair in re.findall(r"tint (-?[\d.]+), with classes (-?[\d.]+)", output)]
    assert found[0][0] > 0.8
    assert found[1][0] < 0.5
    assert is_picture(tmp_path / "runs" / "planted_partition.png")


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
