"""A small training, to be killed, filled disks under, and spread over processes: ``python training_runs.py FOLDER``
kills it at 20 random moments.
"""

import contextlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from vipriors import training  # noqa: E402

SAMPLES, BATCH, EPOCHS = 24, 8, 4
IMAGES = torch.rand(SAMPLES, 6, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    """With all that lasts: a batch norm, dropout, noise, and a teacher that follows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
        self.teacher = nn.Linear(6, 8).requires_grad_(False)

    def forward(self, images):
        difference = self.net(images + 0.1 * torch.rand_like(images)) - self.teacher(images)[:, :2]
        loss = difference.square().mean()
        return loss, {"half": loss.detach() / 2}

    def follow(self, step):
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net[0].weight, 0.1)


class Plain(nn.Module):
    """A linear regression without anything random."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, images):
        return (self.linear(images) - 1).square().mean(), {}


def noisy(step, indices):
    return (IMAGES[indices] + 0.1 * torch.randn(len(indices), 6) * random.random(),)  # noqa: S311


def exact(step, indices):
    return (IMAGES[indices],)


def run(folder, objective=None, make_batch=noisy, *, accelerator=None, optimizer=None, **changes):
    """The training; its objective."""
    training.seed_everything(0)
    objective = objective or Small()
    optimizer = optimizer or torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=0.01)
    how = {"samples": SAMPLES, "batch_size": BATCH, "epochs": EPOCHS, "save_every": 2, "resume": True, **changes}
    how.setdefault("learning_rate", lambda step, steps: training.cosine(step, steps, 0.01, warmup=2))
    how.setdefault("after_step", getattr(objective, "follow", lambda step: None))
    training.train(objective, make_batch, optimizer, folder=folder, accelerator=accelerator, **how)
    return objective


def outcome(folder):
    """All that a training left, for comparison bit for bit."""
    last = max(folder.glob("checkpoint-*.pt"))
    return plain(torch.load(last, weights_only=True)), (folder / "log.jsonl").read_text()


def plain(state):
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


def slowly(step, indices):
    time.sleep(0.004)  # so that there is something to be killed
    return noisy(step, indices)


def killed(root, times=20):
    """Kill a training at random moments until it is through; moments while it starts, writes and learns."""
    # Forked processes share tqdm's own, and one may be killed while it holds that.
    tqdm.set_lock(threading.RLock())
    draw = random.Random(0)  # noqa: S311
    run(root / "whole", make_batch=slowly)
    started = time.monotonic()
    run(root / "timed", make_batch=slowly)
    whole, kills, folder = time.monotonic() - started, 0, root / "killed"
    while kills < times:
        child = os.fork()
        if child == 0:
            with contextlib.redirect_stderr(open(os.devnull, "w")):
                run(folder, make_batch=slowly)
            os._exit(0)
        time.sleep(draw.uniform(0, whole / 3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        if status == 0:  # through: begin anew, and be killed again
            assert outcome(folder) == outcome(root / "whole")
            for path in folder.iterdir():
                path.unlink()
        else:
            kills += 1
    run(folder, make_batch=slowly)
    assert outcome(folder) == outcome(root / "whole")
    print(f"killed {kills} times")


if __name__ == "__main__":
    torch.set_num_threads(1)
    killed(Path(sys.argv[1]))
