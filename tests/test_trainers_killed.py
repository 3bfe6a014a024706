"""The trainers killed, stopped, and out of disk: they go on bit for bit, and never lose their last checkpoint."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from tests import trainers

for extra in ("timm", "lightly", "matplotlib", "PIL.Image"):
    pytest.importorskip(extra, reason="needs the examples extra")

# The calls of one save, in their order: the bytes are on the disk before the name is, and the name before it goes on.
SAVE = [
    "open .checkpoint.pt",
    "write .checkpoint.pt",
    "fchmod .checkpoint.pt",
    "fsync .checkpoint.pt",
    "replace checkpoint.pt checkpoint.previous.pt",
    "replace .checkpoint.pt checkpoint.pt",
    "open folder",
    "fsync folder",
    "close folder",
]
SECOND = {label: 5 if "folder" in label else 2 for label in SAVE}  # three other files are written before
LINE = ["open log.jsonl", "write log.jsonl", "close log.jsonl"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return trainers.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A training that nothing disturbs, and the calls that it made."""
    out = tmp_path_factory.mktemp("whole")
    code, words = trainers.run("small_training", data, out, fault=(None,), output=out / "words")
    assert code == 0, words
    return trainers.outcome(out / "small"), json.loads((out / "calls.json").read_text())


def goes_on(data, out, whole, **changes):
    """With ``--resume`` to the end, where all is as if nothing had happened."""
    code, words = trainers.run("small_training", data, out, resume=True, output=out / "words", **changes)
    assert code == 0, words
    assert trainers.outcome(out / "small") == whole[0]
    assert not list((out / "small").glob(".*"))  # nothing half-written is left
    return words


def sound(folder):
    """The checkpoints that load, or whether there was none yet."""
    found = [path for path in folder.glob("checkpoint*.pt") if torch.load(path, weights_only=True)["step"]]
    return found or "checkpoint" not in (folder / "log.jsonl").read_text()


def test_a_save_puts_the_bytes_before_the_name(whole):  # T2
    calls = [call for call in whole[1] if "log.jsonl" not in call]
    second = [i for i, call in enumerate(calls) if call == SAVE[0]][1]
    assert calls[second : second + len(SAVE)] == SAVE


POINTS = [("die", when, label, SECOND[label]) for label in SAVE for when in ("before", "after")]
POINTS += [("die", when, label, 8) for label in LINE for when in ("before", "after")]
POINTS += [("die", "half", "write .checkpoint.pt", 2), ("die", "half", "write log.jsonl", 8)]
POINTS += [("die", "before", "replace .results.json results.json", 1)]


@pytest.mark.parametrize("fault", POINTS, ids=lambda fault: " ".join(map(str, fault[1:])))
def test_killed_at_each_point_of_a_save(fault, data, whole, tmp_path):  # T1
    code, words = trainers.run("small_training", data, tmp_path, fault=fault, output=tmp_path / "words")
    assert code == -signal.SIGKILL, words
    assert sound(tmp_path / "small")
    goes_on(data, tmp_path, whole)


@pytest.mark.parametrize("moment", range(20))
def test_killed_at_a_random_moment(moment, data, whole, tmp_path):  # T1
    draw = random.Random(moment)  # noqa: S311
    process = trainers.start("small_training", data, tmp_path, output=tmp_path / "words")
    wait_for(tmp_path, draw.randrange(trainers.STEPS - 1), process)
    time.sleep(draw.uniform(0, 0.01))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sound(tmp_path / "small")
    goes_on(data, tmp_path, whole)


def wait_for(out, lines, process):
    """Until the log has so many."""
    log = out / "small" / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert process.is_alive(), (out / "words").read_text()
        time.sleep(0.001)


@pytest.mark.parametrize(("when", "label"), [*(("before", label) for label in SAVE), ("half", "write .checkpoint.pt")])
def test_the_disk_is_full_at_each_call_of_a_save(when, label, data, whole, tmp_path):  # T3
    fault = ("full", when, label, SECOND[label])
    code, words = trainers.run("small_training", data, tmp_path, fault=fault, output=tmp_path / "words")
    assert code == 1
    assert re.search(rf"No space left on device: the \d+ bytes of {tmp_path}/small/checkpoint.pt cannot be", words)
    assert "Traceback" not in words
    assert sound(tmp_path / "small")
    assert not list((tmp_path / "small").glob(".*"))
    goes_on(data, tmp_path, whole)


def test_files_may_not_grow(data, whole, tmp_path):  # T3
    """The first checkpoint does not fit: what was written of it is removed, and nothing else is lost."""
    code, words = trainers.run("limited", data, tmp_path, 5000, output=tmp_path / "words")
    assert code == 1
    assert re.search(r"File too large: the \d{5} bytes of .*/small/checkpoint.pt cannot be written", words)
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == FIRST
    goes_on(data, tmp_path, whole)


FIRST = ["lock", "log.jsonl", "options.json", "skipped.jsonl"]  # before any checkpoint


@pytest.mark.parametrize("label", ["open log.jsonl", "write log.jsonl"])
def test_a_log_that_cannot_be_written_once(label, data, whole, tmp_path):  # T15
    """It is told, training goes on, and what is missing is written with the next line."""
    fault = ("full", "before", label, 8)
    code, words = trainers.run("small_training", data, tmp_path, fault=fault, output=tmp_path / "words")
    assert code == 0
    assert words.count("the log cannot be written, and training goes on") == 1
    assert trainers.outcome(tmp_path / "small") == whole[0]


def test_a_log_that_can_never_be_written(data, whole, tmp_path):  # T15, S6
    """A link to a full device, which is not followed besides."""
    code, words = trainers.run("small_training", data, tmp_path, breaks="log", output=tmp_path / "words")
    assert code == 0
    assert words.count("the log cannot be written, and training goes on") == 1
    assert (tmp_path / "small" / "results.json").read_text() == whole[0][2]


@pytest.mark.parametrize("lost", ["reader", "terminal"])
def test_nobody_reads_what_it_says(lost, data, whole, tmp_path):  # T15
    code, _ = trainers.run("small_training", data, tmp_path, breaks=lost, output=tmp_path / "words")
    assert code == 0
    assert trainers.outcome(tmp_path / "small") == whole[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_it_after_its_step(number, code, workers, data, whole, tmp_path):  # T6, T8
    """The processes that load images get the signal, too, as from a terminal."""
    process = trainers.start("small_training", data, tmp_path, workers=workers, group=True, output=tmp_path / "words")
    wait_for(tmp_path, 7, process)
    os.killpg(process.pid, number)
    process.join(60)
    words = (tmp_path / "words").read_text()
    assert process.exitcode == code, words
    step = int(re.search(r"stopped after step (\d+); --resume goes on", words)[1])
    assert torch.load(tmp_path / "small" / "checkpoint.pt", weights_only=True)["step"] == step
    assert (tmp_path / "small" / "log.jsonl").read_text().count("\n") == step
    goes_on(data, tmp_path, whole, workers=2 - workers)


def test_a_signal_during_a_save(data, whole, tmp_path):  # T6
    fault = ("SIGTERM", "before", "fsync .checkpoint.pt", 2)
    code, words = trainers.run("small_training", data, tmp_path, fault=fault, output=tmp_path / "words")
    assert code == 143
    assert "stopped after step 5" in words  # the save was that of step 4
    goes_on(data, tmp_path, whole)


def test_a_second_signal_ends_it_at_once(data, whole, tmp_path):  # T6
    process = trainers.start("small_training", data, tmp_path, collate=trainers.Slow, output=tmp_path / "words")
    wait_for(tmp_path, 4, process)
    process.terminate()
    process.join(1)
    assert process.is_alive()  # its step takes minutes
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM
    goes_on(data, tmp_path, whole)


def test_one_training_at_a_time(data, whole, tmp_path):  # T5
    first = trainers.start("small_training", data, tmp_path, collate=trainers.Slow, output=tmp_path / "words")
    wait_for(tmp_path, 4, first)
    code, words = trainers.run("small_training", data, tmp_path, resume=True, output=tmp_path / "other")
    assert code == 2
    assert f"{tmp_path}/small must be of one training at a time, got one more: process {first.pid}" in words
    first.kill()
    first.join()
    assert (tmp_path / "small" / "lock").read_text() == f"{first.pid}\n"  # stale
    goes_on(data, tmp_path, whole)


@pytest.mark.parametrize(
    "fate", ["is killed by signal: Killed|exited unexpectedly|is gone", "timed out after 1 seconds"]
)
def test_a_process_that_loads_images_is_lost(fate, data, whole, tmp_path):  # T14
    collate = trainers.Killed if "killed" in fate else trainers.Slow
    lost = {"collate": collate, "workers": 2, "worker_timeout": 1 if "timed" in fate else 60}
    process = trainers.start("small_training", data, tmp_path, group=True, output=tmp_path / "words", **lost)
    process.join(30)
    words = (tmp_path / "words").read_text()
    assert process.exitcode == 1, words
    assert re.search(rf"DataLoader .*({fate}).*; --resume goes on from the last checkpoint in {tmp_path}/small", words)
    assert not alive(process.pid)
    goes_on(data, tmp_path, whole)


def alive(group):
    """Processes of the group that have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, its_group = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(name)
    return found


def test_two_processes_stop_together_and_go_on(data, tmp_path):  # T1, T6, with two
    """One of them gets the signal; both end after the same step."""

    def pair(out, **changes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [
            trainers.start("two_processes", data, out, rank, port, output=out / f"words{rank}", **changes)
            for rank in range(2)
        ]

    def codes(processes):
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert codes(pair(first)) == [0, 0]
    processes = pair(second)
    wait_for(second, 5, processes[0])
    processes[1].terminate()
    assert codes(processes) == [143, 143]
    assert codes(pair(second, resume=True)) == [0, 0]
    assert trainers.outcome(first / "small") == trainers.outcome(second / "small")
