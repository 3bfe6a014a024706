"""examples/vipriors/training.py: what it learns is plain training, and nothing that happens to a machine changes it."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the examples extra")

from accelerate import Accelerator

from tests.processes import in_processes
from tests.training_runs import (
    BATCH,
    EPOCHS,
    EXAMPLES,
    IMAGES,
    SAMPLES,
    Plain,
    Small,
    exact,
    noisy,
    outcome,
    run,
    training,
)

STEPS = EPOCHS * SAMPLES // BATCH
ROOT = EXAMPLES.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run leaves to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return outcome(folder)


# ----------------------------------------------------------------------------------------------------- plain training


def test_it_is_plain_training(tmp_path):
    """The same weights as a loop in float64 over the same batches, the rate and its share for a group included."""
    seen, epochs, after = [], [], []

    def recorded(step, indices):
        seen.append((step, indices))
        return exact(step, indices)

    objective = Plain()
    start = [p.detach().double().clone() for p in objective.parameters()]
    groups = [{"params": [objective.linear.weight]}, {"params": [objective.linear.bias], "lr_scale": 0.5}]
    hooks = {"before_epoch": epochs.append, "after_step": after.append}
    rate = lambda step, steps: 0.1 * (1 - step / steps)  # noqa: E731
    run(tmp_path, objective, recorded, optimizer=torch.optim.SGD(groups, lr=9.0), learning_rate=rate, **hooks)

    weight, bias = start
    for step, indices in seen:
        x = IMAGES[indices].double()
        residual = x @ weight[0] + bias - 1
        weight = weight - rate(step, STEPS) * 2 * (residual[:, None] * x).mean(0)
        bias = bias - 0.5 * rate(step, STEPS) * 2 * residual.mean()
    torch.testing.assert_close(objective.linear.weight.double(), weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(objective.linear.bias.double(), bias, atol=1e-6, rtol=1e-5)
    assert [step for step, _ in seen] == after == list(range(STEPS))
    assert epochs == list(range(EPOCHS))
    per_epoch = SAMPLES // BATCH
    orders = [[i for _, part in seen[e * per_epoch :][:per_epoch] for i in part] for e in range(EPOCHS)]
    assert all(sorted(order) == list(range(SAMPLES)) for order in orders)
    assert len({tuple(order) for order in orders}) == EPOCHS  # each in an order of its own
    log = training.read_log(tmp_path)
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))
    assert [row["lr"] for row in log] == pytest.approx([rate(step, STEPS) for step in range(STEPS)])
    assert log[-1]["loss"] < log[0]["loss"]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    states = []
    for parts in (1, 2, 4):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        training.seed_everything(0)
        objective = Plain()
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
        run(tmp_path / str(parts), objective, exact, accelerator=accelerator, optimizer=optimizer)
        losses = torch.tensor([row["loss"] for row in training.read_log(tmp_path / str(parts))])
        states.append([*objective.parameters(), losses])
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])


def test_the_gradient_is_clipped(tmp_path):
    objective = Plain()
    before = objective.linear.weight.detach().clone(), objective.linear.bias.detach().clone()
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    one = {"learning_rate": lambda step, steps: 1.0, "batch_size": SAMPLES, "epochs": 1}
    run(tmp_path, objective, exact, optimizer=optimizer, max_norm=0.25, **one)
    moved = [(old - new).flatten() for old, new in zip(before, objective.parameters())]
    assert float(torch.cat(moved).detach().norm()) == pytest.approx(0.25, rel=1e-4)


def test_cosine():
    rates = [training.cosine(step, 12, 1.0, 0.2, warmup=2) for step in range(13)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[7] == pytest.approx(0.6)  # half way
    assert rates[12] == pytest.approx(0.2)


def test_batches_made_by_workers_are_the_same(whole, tmp_path):
    run(tmp_path, workers=1)
    assert outcome(tmp_path) == whole


def in_one_of_two(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    training.seed_everything(0)
    objective = Plain()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    run(Path(folder), objective, exact, optimizer=optimizer, epochs=1)
    middle = [p.tolist() for p in objective.parameters()]
    training.seed_everything(0)
    objective, broken = Plain(), [3]

    def breaking(step, indices):  # in one of the processes alone
        return ((IMAGES[indices] * (math.nan if rank == 1 and step in broken else 1)),)

    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    run(Path(folder) / "nan", objective, breaking, optimizer=optimizer)
    return Accelerator().num_processes, middle, [p.tolist() for p in objective.parameters()]


def test_two_processes_are_one(tmp_path):
    """They learn what one learns from both halves, and skip together what is broken in one of them."""
    found = in_processes(2, in_one_of_two, tmp_path, str(tmp_path / "two"))
    assert found[0] == found[1]
    assert found[0][0] == 2
    training.seed_everything(0)
    objective = Plain()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    run(tmp_path / "one", objective, exact, optimizer=optimizer, epochs=1)
    for ours, theirs in zip(objective.parameters(), found[0][1]):
        torch.testing.assert_close(ours, torch.tensor(theirs))
    log = training.read_log(tmp_path / "two" / "nan")
    assert [row["step"] for row in log if "skipped" in row] == [4]
    assert torch.tensor(found[0][2][0]).isfinite().all()


# ------------------------------------------------------------------------------------------------------- what happens


def test_killed_at_twenty_moments(tmp_path):
    """By SIGKILL: ``resume`` ends in the same bits, of weights, buffers, optimizer and log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    call = [sys.executable, str(Path(__file__).with_name("training_runs.py")), str(tmp_path)]
    result = subprocess.run(call, capture_output=True, text=True, env=environment)  # noqa: S603
    assert result.returncode == 0, result.stderr
    assert result.stdout == "killed 20 times\n"


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_a_full_disk(call, whole, tmp_path, monkeypatch):
    """At the first, second ... file that is written: the error names it, and the checkpoint before it is good."""
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(0)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*(log.jsonl|checkpoint-0000000\d-\w+.pt)'"):
        run(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    assert not list(tmp_path.glob(".*"))  # nothing half written is left
    run(tmp_path)
    assert outcome(tmp_path) == whole


def test_a_torn_log(whole, tmp_path):
    """A row that a kill or a full disk tore in two comes again."""
    run(tmp_path)
    max(tmp_path.glob("checkpoint-*.pt")).unlink()
    log = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(log[:-20])
    assert len(training.read_log(tmp_path)) == STEPS - 1
    run(tmp_path)
    assert outcome(tmp_path) == whole


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint(damage, whole, tmp_path, capsys):
    """The one before it is taken, and the damaged one kept under another name."""
    run(tmp_path)
    last = max(tmp_path.glob("checkpoint-*.pt"))
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 4
    last.write_bytes({"flip": data, "cut": data[:100], "empty": b""}[damage])
    run(tmp_path)
    assert outcome(tmp_path) == whole
    assert (tmp_path / f"damaged-{last.name}").exists()
    assert f"{last} is damaged" in capsys.readouterr().out.replace("\n", " ")


def test_no_sound_checkpoint(tmp_path):
    run(tmp_path)
    for path in tmp_path.glob("checkpoint-*.pt"):
        path.write_bytes(b"\0" * 100)
    for _ in range(2):  # nor is it begun anew in silence the next time
        with pytest.raises(training.TrainingError, match="holds no sound checkpoint; train anew without --resume"):
            run(tmp_path)
    run(tmp_path, resume=False)
    assert not list(tmp_path.glob("damaged-*"))


def test_a_checkpoint_of_other_settings(tmp_path):
    run(tmp_path, settings={"model": "a", "sizes": (1, 2)})
    run(tmp_path, settings={"model": "a", "sizes": (1, 2)})
    before = outcome(tmp_path)
    with pytest.raises(training.TrainingError, match=r"other settings: model 'a' \(now 'b'\), seed 0 \(now 1\)$"):
        run(tmp_path, settings={"model": "b", "sizes": (1, 2)}, seed=1)
    assert outcome(tmp_path) == before


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("kind", ["pickle", "list"])
def test_a_foreign_checkpoint(kind, tmp_path):
    """Of a name that fits its bytes; no code of it is run."""
    target, path = tmp_path / "made", tmp_path / "foreign.pt"
    torch.save({"settings": Hostile(str(target))} if kind == "pickle" else [1], path)
    digest = training.hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    path.rename(tmp_path / f"checkpoint-00000009-{digest}.pt")
    with pytest.raises(training.TrainingError, match="is no checkpoint of tensors and plain values"):
        run(tmp_path)
    assert not target.exists()


def test_a_new_training_forgets_the_one_before_it(whole, tmp_path):
    run(tmp_path, seed=1)
    run(tmp_path, resume=False)
    assert outcome(tmp_path) == whole
    assert len(list(tmp_path.glob("checkpoint-*.pt"))) == 2


class Breaking(Small):
    """Not finite in some steps: the loss, or the gradient alone."""

    def __init__(self, steps, kind):
        super().__init__()
        self.steps, self.kind, self.calls = steps, kind, -1

    def forward(self, images):
        self.calls += 1
        broken = self.calls in self.steps and self.kind == "loss"
        loss, parts = super().forward(images * math.nan if broken else images)
        if self.calls in self.steps and self.kind == "gradient":
            loss = loss + (self.net[0].weight * 0).sum().sqrt()  # 0, and its slope is not finite
        return loss, parts


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(kind, tmp_path):
    """Neither weights nor the statistics of the batch norm; it is in the log, and the teacher does not follow."""
    states, after = {}, []
    objective = Breaking([4], kind)

    def remember(step, indices):
        states[step] = {name: value.clone() for name, value in objective.state_dict().items()}
        return noisy(step, indices)

    run(tmp_path, objective, remember, after_step=lambda step: (after.append(step), objective.follow(step)))
    assert 4 not in after
    assert len(after) == STEPS - 1
    assert all(torch.equal(states[4][name], states[5][name]) for name in states[4])
    assert not all(torch.equal(states[5][name], states[6][name]) for name in states[5])
    log = training.read_log(tmp_path)
    assert re.fullmatch(r"loss .*, norm of the gradient (nan|inf)", log[4]["skipped"])
    assert len(log) == STEPS
    json.loads((tmp_path / "log.jsonl").read_text().splitlines()[4], parse_constant=pytest.fail)


def test_too_many_in_a_row(tmp_path):
    message = "no finite loss and gradient in 3 steps in a row, up to step 8: loss nan"
    with pytest.raises(training.TrainingError, match=message):
        run(tmp_path, Breaking([1, 3, 5, 6, 7], "loss"), max_skipped=3)
    kept = outcome(tmp_path)[0]
    assert kept["step"] == 6
    assert torch.tensor(kept["objective"]["net.0.weight"]).isfinite().all()
    with pytest.raises(training.TrainingError, match="in 3 steps in a row, up to step 8"):  # in a resumed run, too
        run(tmp_path, Breaking([0, 1], "loss"), max_skipped=3)


@pytest.mark.parametrize("size", [25, 7])
def test_sizes_of_batches(size, tmp_path):
    with pytest.raises(ValueError, match=rf"batch_size must be a multiple of 2 and at most the 24 samples, got {size}"):
        run(tmp_path, batch_size=size, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2))


# ------------------------------------------------------------------------------------------------- what no code does

FORBIDDEN = r"^ *(import|from) (pickle|dill|joblib|marshal|shelve|yaml|runpy|subprocess|socket|urllib)\b"
FORBIDDEN += r"|(?<![\w.])(eval|exec|__import__)\(|os\.system\("


def test_no_code_is_read_from_data():
    """And ``weights_only=True`` wherever tensors are read."""
    paths, loads = [*(EXAMPLES / "vipriors").rglob("*.py"), *(ROOT / "equireg").rglob("*.py")], 0
    assert len(paths) > 40
    for path in paths:
        assert not re.search(FORBIDDEN, path.read_text(), re.M), path
        for call in re.findall(r"torch\.load\((.*)\n", path.read_text()):
            loads += 1
            assert "weights_only=True" in call, path
    assert loads == 2


def test_the_recipe_imports_packages_equireg_and_itself():
    """And of equireg the public names."""
    for path in (EXAMPLES / "vipriors").glob("*.py"):
        for module in re.findall(r"^ *(?:from|import) ([\w.]+)", path.read_text(), re.M):
            first, _, rest = module.partition(".")
            assert not (EXAMPLES / f"{first}.py").exists(), module
            assert first != "equireg" or not rest, module
            assert first != "vipriors" or (path.parent / f"{rest or '__init__'}.py").exists(), module
