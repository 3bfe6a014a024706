"""The command ``equireg environments``: by itself in a process of its own, and each of its errors in one line."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equireg import Environments
from equireg.eqinv import _command
from tests.eqinv.test_context_weights import biased

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arrays():
    features, labels, _ = biased(per_class=20)
    return {"features": features.numpy(), "labels": labels.numpy(), "images": np.random.rand(80, 3, 8, 8)}  # noqa: NPY002


@pytest.fixture
def archive(arrays, tmp_path):
    np.savez(tmp_path / "features.npz", **arrays)
    return tmp_path / "features.npz"


def report_of(arrays, **how):
    return Environments.split(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["labels"]), **how)


def table(folder):
    with (folder / "weights.csv").open() as file:
        return list(csv.DictReader(file))


def test_in_a_process_of_its_own(arrays, archive, tmp_path):
    call = [sys.executable, "-m", "equireg.eqinv._command", "environments", str(archive)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=tmp_path)  # noqa: S603
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{report_of(arrays).report()}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]  # nothing is written without --out


@pytest.mark.parametrize(("name", "adjust"), [("mean", True), ("median", "median"), ("none", False)])
@pytest.mark.parametrize("score", ["similarity", "margin"])
def test_each_way_to_score(score, name, adjust, arrays, archive, capsys):
    others = {"similarity": "margin", "margin": "similarity"}
    assert _command.main(["environments", str(archive), "--score", score, "--adjust", name]) == 0
    said = capsys.readouterr().out
    assert said == f"{report_of(arrays, score=score, adjust=adjust).report()}\n"
    assert said != f"{report_of(arrays, score=others[score], adjust=adjust).report()}\n"


def test_writes_weights_and_pictures(arrays, archive, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the examples extra")
    flags = [
        "--whiten",
        "6",
        "--sharpness",
        "0.5",
        "--cap",
        "1.5",
        "--adjust",
        "median",
        "--out",
        str(tmp_path / "a/b"),
    ]
    assert _command.main(["environments", str(archive), *flags]) == 0
    environments = report_of(arrays, whiten=6, adjust="median")
    assert capsys.readouterr().out.startswith(str(environments.report()))
    rows = table(tmp_path / "a/b")
    assert [int(row["index"]) for row in rows] == list(range(80))
    assert [int(row["label"]) for row in rows] == arrays["labels"].tolist()
    assert [int(row["context"]) for row in rows] == environments.context().tolist()
    weights = torch.tensor([float(row["weight"]) for row in rows])
    torch.testing.assert_close(weights, environments.weights(sharpness=0.5, cap=1.5), rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["report.png", "sheet.png", "weights.csv"]
    for name in ("report.png", "sheet.png"):
        with Image.open(tmp_path / "a/b" / name) as picture:
            assert min(picture.size) > 200


@pytest.mark.parametrize("inside", [True, False], ids=["paths in the archive", "paths in a file"])
def test_images_by_their_paths(inside, arrays, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the examples extra")
    monkeypatch.chdir(tmp_path)
    paths = [f"{index}.png" for index in range(80)]
    for index, path in enumerate(paths):
        Image.new("RGB", (400, 300), (index, 0, 0)).save(path)
    Path("images.txt").write_text("\n".join(paths))
    np.savez("features.npz", **arrays | {"images": paths})
    shown = []
    monkeypatch.setattr(_command, "weight_sheet", lambda _, images, **shape: shown.extend([images[7], len(images)]))
    monkeypatch.setattr(_command, "png", lambda figure: b"")
    flags = [] if inside else ["--images", "images.txt"]
    assert _command.main(["environments", "features.npz", "--sharpness", "auto", "--out", "out", *flags]) == 0
    assert shown[1] == 80
    assert shown[0].getpixel((0, 0)) == (7, 0, 0)
    assert shown[0].size == (256, 192)
    assert len(table(Path("out"))) == 80


WRONG = {  # what is wrong with the arrays, and what the line says of it
    "no labels": ({"labels": None}, "must have an array 'labels', got features, images"),
    "labels of another type": ({"labels": np.zeros(80)}, "array 'labels' must hold whole numbers, got float64"),
    "too few labels": ({"labels": np.arange(79) % 4}, "labels must be [N] = [80], got [79]"),
    "a huge label": ({"labels": np.r_[np.arange(79) % 4, 10**9]}, "below the number of samples, 80, got 1000000000"),
    "a negative label": ({"labels": np.arange(80) % 4 - 1}, "in 0 .. 2 (num_classes), got -1 at position 0"),
    "one class": ({"labels": np.zeros(80, int)}, "two classes or more"),
    "whole features": (
        {"features": np.ones((80, 4), int)},
        "array 'features' must hold floating point numbers, got int",
    ),
    "features of objects": ({"features": np.full((80, 4), None)}, "array 'features' cannot be read: Object arrays"),
    "flat features": ({"features": np.ones(80)}, "features must be [N, D], got [80]"),
    "features that are not finite": (
        {"features": np.full((80, 4), np.nan)},
        "features must be finite, got nan in row 0",
    ),
    "features beyond float32": ({"features": np.full((80, 4), 1e300)}, "features must be finite, got inf in row 0"),
    "images with channels last": (
        {"images": np.ones((80, 8, 8, 3))},
        "array 'images' must be [N, C, H, W] with 1 or 3",
    ),
    "too few images": ({"images": np.ones((79, 3, 8, 8))}, "an image for each of 80 samples, got 79"),
    "images that are not there": ({"images": ["no/such.png"] * 80}, "no/such.png: cannot be read as an image"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_is_one_line_that_says_what_came(what, arrays, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the examples extra")
    change, expected = WRONG[what]
    changed = {name: array for name, array in (arrays | change).items() if array is not None}
    np.savez(tmp_path / "features.npz", **changed)
    assert _command.main(["environments", str(tmp_path / "features.npz"), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert "features.npz" in line or "no/such.png" in line
    assert not list(tmp_path.rglob(".*")), "a file half written"


@pytest.mark.parametrize("content", [b"", b"features", b"\x93NUMPY\x01\x00"])
def test_a_file_of_another_kind(content, tmp_path, capsys):
    path = tmp_path / "features.npz"
    path.write_bytes(content)
    assert _command.main(["environments", str(path)]) == 1
    assert (
        capsys.readouterr().err == f"equireg environments: {path}: must be an .npz archive, as numpy.savez writes it\n"
    )


def test_no_file(tmp_path, capsys):
    assert _command.main(["environments", str(tmp_path / "nowhere.npz")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"No such file or directory: '{tmp_path / 'nowhere.npz'}'")


def test_a_damaged_file_is_an_error_of_one_line(archive, capsys):
    """Whatever byte is damaged; where the check sum does not cover it, the file may be read."""
    whole = archive.read_bytes()
    failed = 0
    for place in (*range(0, 400, 7), len(whole) // 3, *range(len(whole) - 300, len(whole), 7)):
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        status = _command.main(["environments", str(archive)])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == status <= 1, place
        failed += status
    assert failed > 30


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--sharpness", "soft"], "argument --sharpness: invalid"),
        (["--cap", "much"], "argument --cap: invalid"),
        (["--whiten", "1.5"], "argument --whiten: invalid"),
        (["--adjust", "mode"], "argument --adjust: invalid choice"),
        (["--images", "images.txt"], "--images needs --out"),
    ],
)
def test_a_wrong_argument_is_status_two(flags, expected, archive, capsys):
    with pytest.raises(SystemExit) as ended:
        _command.main(["environments", str(archive), *flags])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
