"""What the trainers refuse, skip and register, and how they tell it."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests import trainers

for extra in ("timm", "lightly", "matplotlib", "PIL.Image"):
    pytest.importorskip(extra, reason="needs the examples extra")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return trainers.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def train(tmp_path):
    """Exit code and words of a small training."""

    def run(data, job="small_training", **changes):
        return trainers.run(job, data, tmp_path, output=tmp_path / "words", **changes)

    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------- steps that are not finite


@pytest.mark.parametrize("amp", ["none", "fp16"])
@pytest.mark.parametrize("kind", ["PoisonedLoss", "PoisonedGradient"])
def test_a_step_that_is_not_finite_is_skipped(kind, amp, data, train, tmp_path):  # T9
    """It leaves no trace: neither in the optimizer nor in the statistics of batch norm."""
    code, words = train(data, objective=getattr(trainers, kind), amp=amp, epochs=3)
    assert code == 0, words
    folder = tmp_path / "small"
    assert [row["step"] for row in rows(folder / "log.jsonl")] == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    skipped = rows(folder / "skipped.jsonl")
    assert [row["step"] for row in skipped] == [5, 6]
    assert all(len(set(row["images"])) == 8 for row in skipped)
    assert not any(float(row["norm"]) < float("inf") for row in skipped)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["objective"].values())
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {10.0}


@pytest.mark.parametrize("kind", ["PoisonedLoss", "PoisonedGradient"])
def test_nothing_has_changed_after_it(kind, data, train, tmp_path):  # T9
    """All that is saved after steps 5 and 6 is what was saved after step 4: weights, buffers, teacher, moments."""
    code, words = train(data, objective=getattr(trainers, kind), max_skipped=2)
    assert code == 1, words
    after, before = (
        torch.load(tmp_path / "small" / f"checkpoint{name}.pt", weights_only=True) for name in ("", ".previous")
    )
    assert (before["step"], after["step"]) == (4, 6)
    for state in (before, after):
        for group in state["optimizer"]["param_groups"]:
            del group["lr"]  # set anew in each step
    for part in ("objective", "optimizer", "scaler"):
        assert trainers.plain(after[part]) == trainers.plain(before[part]), part


def test_too_many_in_a_row(data, train, tmp_path):  # T9
    """It ends with the last good state, from which it can go on."""
    code, words = train(data, objective=trainers.PoisonedLoss, max_skipped=2)
    assert code == 1
    folder = tmp_path / "small"
    assert "loss or gradient were not finite in 2 steps in a row, up to step 6" in words
    assert f"{folder}/skipped.jsonl lists their images; {folder}/checkpoint.pt holds the last good state" in words
    assert "Traceback" not in words
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {4.0}
    assert train(data, max_skipped=2, resume=True)[0] == 0
    assert [row["step"] for row in rows(folder / "skipped.jsonl")] == [5, 6]


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, "was trained with other options: lr 0.01 (now 0.02)"),
        ({"seed": 4, "epochs": 7}, "was trained with other options: epochs 6 (now 7), seed 3 (now 4)"),
    ],
)
def test_other_options(changes, message, data, train):  # T7
    assert train(data)[0] == 0
    code, words = train(data, resume=True, **changes)
    assert code == 2
    assert message in words
    assert "Traceback" not in words


def test_another_number_of_processes_or_classes(data, train, tmp_path):  # T7
    other = trainers.make_images(tmp_path / "other", classes=("cat", "dog"), count=16)
    assert train(data, save_every=1)[0] == 0
    code, words = train(other, resume=True, allow_data_change=True)
    assert (code, "classes 4 (now 2)" in words) == (2, True)
    checkpoint = tmp_path / "small" / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["options"]["world"] == 1


def test_other_files(train, tmp_path):  # T17
    data = trainers.make_images(tmp_path / "images")
    assert train(data)[0] == 0
    moved = data.rename(tmp_path / "moved")  # the same names elsewhere are the same
    (tmp_path / "small" / "results.json").unlink()
    assert train(moved, resume=True)[0] == 0
    (moved / "train" / "cat" / "0.png").rename(moved / "train" / "cat" / "new.png")
    code, words = train(moved, resume=True)
    assert code == 2
    assert re.search(r"was trained on other files \(SHA-256 of their names \w{12}, now \w{12}\); --allow-data", words)
    assert train(moved, resume=True, allow_data_change=True)[0] == 0


def broken(kind, folder):
    data = trainers.make_images(folder / "images")
    if kind == "no train":
        (data / "train").rename(data / "other")
    elif kind == "one class":
        for name in ("dog", "eel", "fox"):
            (data / "train" / name).rename(folder / name)
    elif kind == "no class":
        for path in (data / "train").iterdir():
            path.rename(folder / path.name)
    elif kind == "empty class":
        for path in (data / "train" / "eel").iterdir():
            path.unlink()
    elif kind == "other classes":
        (data / "test" / "eel").rename(data / "test" / "\x1b[31meel")
    return data


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no train", "must hold the folders train and test (or val), got none in {data}"),
        ("one class", "{data}/train must hold a folder for each of two or more classes, got 1"),
        ("no class", "{data}/train must hold a folder for each of two or more classes, got 0"),
        ("empty class", "{data}/train must hold images of every class, got none of eel"),
        ("other classes", r"{data}/train and {data}/test must hold the same classes, got \x1b[31meel, eel in one"),
        ("no permission", "--data: {data}/train cannot be read: Permission denied"),
    ],
)
def test_folders_of_images(kind, message, train, tmp_path):  # T11, S9
    """Before a model is built, and without a traceback."""
    data = broken(kind, tmp_path)
    code, words = train(data, job="options", arguments=["--data", str(data)], forbidden=kind == "no permission")
    assert code == 2
    assert message.format(data=data) in words
    assert "Traceback" not in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "nan"], "--lr must be finite, got nan"),
        (["--lr", "inf"], "--lr must be finite, got inf"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--save-every", "0"], "--save-every must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--recipe", "os.system"], "invalid choice: 'os.system'"),
        (["--eopchs", "3"], "unknown: --eopchs 3; did you mean --epochs?"),
        (["--epochs", "__import__('os')"], "invalid int value"),
        (["--method", "\x1b[31m"], "invalid choice"),
    ],
)
def test_options(arguments, message, data, train):  # S10, S11
    code, words = train(data, job="options", arguments=["--data", str(data), *arguments])
    assert code == 2
    assert message in words
    assert "Traceback" not in words
    assert "\x1b" not in words


def test_help(data, train):
    code, words = train(data, job="options", arguments=["--help"])
    assert code == 0
    assert "--allow-data-change" in words


@pytest.mark.parametrize(("batch_size", "message"), [(64, "at most the 32 training images, got 64")])
def test_more_in_a_batch_than_there_is(batch_size, message, data, train):  # T16
    code, words = train(data, batch_size=batch_size)
    assert (code, f"--batch-size must be {message}" in words) == (2, True)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_told_in_a_line(workers, data, train):
    """Also that of a process that loads images, with its reason alone; ``--traceback`` tells where it comes from."""
    code, words = train(data, collate=trainers.Unreadable, workers=workers)
    assert code == 2
    assert words.splitlines()[-1].endswith(r"cat\x1b[2J.png cannot be read")
    assert "Traceback" not in words
    code, words = train(data, collate=trainers.Unreadable, workers=workers, shown=True)
    assert code == 2
    assert "in __call__" in words


# ---------------------------------------------------------------------------------------------- names, state, network


def test_names_that_are_not_utf8(train, tmp_path):  # S12
    """Training with them, and telling of them."""
    data = trainers.make_images(tmp_path / "images", classes=("caf\udce9", "dog", "a\nb", "$x$"))
    code, words = train(data)
    assert code == 0, words
    code, words = train(data, job="say_names")
    assert code == 0
    assert words == "caf\\udce9\na b\n"


def test_nothing_saved_tells_of_the_machine(data, train, tmp_path, monkeypatch):  # S14
    """No paths, no names of people or machines, nothing of the environment; the options by an allow-list of types."""
    monkeypatch.setenv("SECRET_TOKEN", "xyzzy-secret")
    assert train(data)[0] == 0
    folder = tmp_path / "small"
    for path in folder.iterdir():
        content = path.read_bytes()
        for told in (str(tmp_path), str(data), "xyzzy-secret", str(Path.home()) + "/", sys.prefix):
            assert told.encode() not in content, path
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    known = {"format", "torch", "step", "options", "files", "objective", "optimizer", "scaler", "skipped"}
    assert checkpoint.keys() == known
    assert not checkpoint["options"].keys() & {"data", "out", "resume", "workers"}


EXAMPLES = {
    "ser_pretrain": ["mocov3", "dino", "barlowtwins"],
    "reconstruction_pretrain": ["vicreg", "ibot", "dinov2"],
    "ipirm_pretrain": ["simclr", "simsiam", "mocov2"],
    "distill": ["features", "ofd", "crd"],
    "vipriors pretrain": ["mocov2", "simclr"],
    "vipriors finetune": ["rex"],
}
KEPT = (
    "['partitions'].reports",  # as plain numbers, in the extra state
    "['last_layer'].weight",  # of a weight norm, which forms it anew from what is saved at each use
)
CASES = [(example, method) for example, methods in EXAMPLES.items() for method in methods]


@pytest.mark.parametrize(("example", "method"), CASES)
def test_all_that_lasts_is_registered(example, method, data, train):  # T10
    """Walk all that a training can reach: what changes from step to step must be in what is saved."""
    code, words = train(data, job="walk", example=example, method=method)
    assert code == 0, words
    assert [name for name in json.loads(words.splitlines()[-1]) if not any(kept in name for kept in KEPT)] == []


def test_what_is_not_registered_is_found(data, train):  # T10
    code, words = train(data, job="walk", example="unregistered", method="")
    assert code == 0, words
    assert json.loads(words.splitlines()[-1]) == [".average", ".count", ".generator"]


def test_no_network(data, train):  # S15
    """All of an example with sockets that reach this machine alone; and these sockets do refuse others."""
    code, words = train(data, job="example", name="ser_pretrain")
    assert code == 0, words
    assert "linear accuracy" in words
    code, words = train(data, job="connect")
    assert code == 1
    assert "a connection to ('192.0.2.1', 80)" in words
