"""What the pretraining examples share, to be copied beside them: batches that know their step, and a run that survives.

All randomness of a step follows from the seed, the step and the process, never from what ran before. So a run that was
killed goes on bit for bit from its last checkpoint, on the same machine with the same number of processes and threads.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"


def start_processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device; the processes are those that ``torchrun`` started, or this one alone."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """The random numbers of one step in one process."""
    mixed = random.Random(f"{seed} {step} {rank}").getrandbits(62)  # noqa: S311
    torch.manual_seed(mixed)


class StepBatches(Sampler):
    """Batches of (step, index) for one process, shuffled anew in each epoch, from step ``start`` to the last."""

    def __init__(
        self, samples: int, batch_size: int, epochs: int, *, seed: int, rank: int = 0, world: int = 1, start: int = 0
    ):
        if batch_size % world:
            raise ValueError(f"--batch-size must be a multiple of the {world} processes, got {batch_size}")
        if batch_size > samples:
            raise ValueError(f"--batch-size must be at most the {samples} training images, got {batch_size}")
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.world, self.start = rank, world, start
        self.steps_per_epoch = samples // batch_size
        self.steps = epochs * self.steps_per_epoch

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if step == self.start or within == 0:
                shuffle = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
                order = torch.randperm(self.samples, generator=shuffle).tolist()
            batch = order[within * self.batch_size : (within + 1) * self.batch_size]
            yield [(step, index) for index in batch[self.rank :: self.world]]


class WithStep(Dataset):
    """A dataset read by (step, index), which gives (step, image, label)."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any, int]:
        step, index = key
        image, label = self.dataset[index]
        return step, image, label


def cosine(step: int, steps: int, first: float, last: float, warmup: int = 0) -> float:
    """From ``first`` to ``last`` along half a cosine, after a linear rise from nothing."""
    if step < warmup:
        return first * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


class Run:
    """A folder with the options, the log and the last checkpoint of one training."""

    def __init__(self, folder: Path, options: dict[str, Any], *, resume: bool, main: bool):
        self.folder, self.options, self.main = folder, options, main
        self.checkpoint = self._load(resume)
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "options.json", (json.dumps(options, indent=2) + "\n").encode())
            # What was logged after the checkpoint will be logged again.
            lines = [row for row in self.log_rows() if self.checkpoint and row["step"] <= self.checkpoint["step"]]
            write_atomically(folder / LOG, "".join(json.dumps(row) + "\n" for row in lines).encode())

    def log(self, row: dict[str, float]) -> None:
        if self.main:
            with open(self.folder / LOG, "a") as log:
                log.write(json.dumps(row) + "\n")

    def log_rows(self) -> list[dict[str, float]]:
        path = self.folder / LOG
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line

    def save(self, step: int, **states: Any) -> None:
        """A checkpoint after ``step`` steps; the one before stays until this one is on the disk."""
        if self.main:
            buffer = io.BytesIO()
            torch.save({"step": step, "options": self.options, **states}, buffer)
            write_atomically(self.folder / CHECKPOINT, buffer.getvalue())

    def _load(self, resume: bool) -> dict[str, Any] | None:
        path = self.folder / CHECKPOINT
        if not resume or not path.exists():
            return None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        old = checkpoint["options"]
        changed = sorted(name for name in old.keys() | self.options.keys() if old.get(name) != self.options.get(name))
        if changed:
            was = ", ".join(f"{name} {old.get(name)!r} (now {self.options.get(name)!r})" for name in changed)
            raise SystemExit(f"--resume: {path} was trained with other options: {was}")
        return checkpoint


def write_atomically(path: Path, data: bytes) -> None:
    """All of it or nothing: a crash at any moment leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)
