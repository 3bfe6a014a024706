"""The folder of one training: its options, its log and its checkpoints, which survive what happens to a machine.

A checkpoint is on the disk in full before it takes the place of the one before, which is kept besides; a seal at its
end tells whether a byte of it has changed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any

import torch
from tqdm.auto import tqdm

from training.sealed_files import Damaged, load_safely, save_atomically, write_atomically
from training.shown_names import visible

CHECKPOINT, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
OPTIONS, LOG, SKIPPED, LOCK, RESULTS = "options.json", "log.jsonl", "skipped.jsonl", "lock", "results.json"
FORMAT = 1  # of what a checkpoint holds


def say(text: str) -> None:
    """A line for the person at the terminal, past the bar."""
    tqdm.write(visible(text), file=sys.stderr)


class Run:
    """A folder with the options, the log and the last two checkpoints of one training; ``main`` is its first process.

    ``options`` are what the result depends on, ``files`` a hash of the names of the images. With ``resume`` it goes on
    where the last sound checkpoint stands, if there is one: ``checkpoint``.

    Raises:
        ValueError: another process trains into the folder; or what its checkpoint was trained with, or the format of
            the checkpoint, is another one; or all checkpoints are damaged.
    """

    def __init__(
        self,
        folder: Path,
        options: dict[str, Any],
        *,
        resume: bool,
        main: bool,
        files: str = "",
        allow_data_change: bool = False,
    ):
        self.folder, self.options, self.main, self.files = folder, options, main, files
        self.checkpoint: dict[str, Any] | None = None
        self.unwritten: dict[str, bytes] = {}
        self.told: set[str] = set()
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            self.locked = lock(folder / LOCK)
            for left in folder.glob(".*.tmp"):  # by a run that was killed
                left.unlink()
        if resume:
            self.checkpoint = self._load(allow_data_change)
        self.has_own = self.checkpoint is not None
        if main:
            if not resume:
                (folder / RESULTS).unlink(missing_ok=True)
            write_atomically(folder / OPTIONS, (json.dumps(options, indent=2) + "\n").encode())
            # What was logged after the checkpoint will be logged again.
            for name in (LOG, SKIPPED):
                step = self.checkpoint["step"] if self.checkpoint else 0
                lines = [row for row in self.log_rows(name) if row["step"] <= step]
                write_atomically(folder / name, "".join(json.dumps(row) + "\n" for row in lines).encode())

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.main:
            os.close(self.locked)

    def log(self, row: dict[str, Any], name: str = LOG) -> None:
        """A line more. A log that cannot be written stops no training; what it lacks is tried again with the next."""
        if not self.main:
            return
        line = (json.dumps(row) + "\n").encode()
        waiting = self.unwritten.pop(name, b"") + line
        try:
            append(self.folder / name, waiting)
        except OSError as error:
            self.unwritten[name] = waiting
            if name not in self.told:
                self.told.add(name)
                say(f"the log cannot be written, and training goes on: {self.folder / name}: {error.strerror}")

    def log_rows(self, name: str = LOG) -> list[dict[str, Any]]:
        return read_log(self.folder, name) if (self.folder / name).exists() else []

    def save(self, step: int, **states: Any) -> None:
        """A checkpoint after ``step`` steps; the one before stays, and nothing else than these is saved."""
        if not self.main:
            return
        content = {
            "format": FORMAT,
            "torch": str(torch.__version__),
            "step": step,
            "options": self.options,
            "files": self.files,
            **states,
        }
        # The one that lies there is of a training before, if this one did not begin with it.
        save_atomically(self.folder / CHECKPOINT, content, keep_as=self.folder / PREVIOUS if self.has_own else None)
        if not self.has_own:
            (self.folder / PREVIOUS).unlink(missing_ok=True)
        self.has_own = True

    def _load(self, allow_data_change: bool) -> dict[str, Any] | None:
        problems = []
        for name in (CHECKPOINT, PREVIOUS):
            path = self.folder / name
            if path.is_symlink():
                raise ValueError(f"--resume: {path} must be a file of this folder, got a link to {os.readlink(path)}")
            try:
                checkpoint = load_safely(path)
            except FileNotFoundError:
                continue
            except Damaged as damage:
                problems.append((path, damage))
                continue
            self._check(path, checkpoint, allow_data_change)
            if self.main:
                for damaged, damage in problems:
                    os.replace(damaged, self.folder / DAMAGED)  # or the next save would keep it for the sound one
                    say(f"{damage}; it is now {DAMAGED}")
                if name == PREVIOUS:
                    say(f"going on from the checkpoint before: {path}, after step {checkpoint['step']}")
            return checkpoint
        if problems:
            raise Damaged(f"--resume: {problems[-1][1]}; there is no sound checkpoint; begin anew without --resume")
        return None

    def _check(self, path: Path, checkpoint: dict[str, Any], allow_data_change: bool) -> None:
        """Whether it is of this training."""
        form = checkpoint.get("format") if isinstance(checkpoint, dict) else None
        if form != FORMAT:
            raise ValueError(
                f"--resume: {path} must be a checkpoint of format {FORMAT}, got {form}; by another version?"
            )
        old = checkpoint["options"]
        changed = sorted(name for name in old.keys() | self.options.keys() if old.get(name) != self.options.get(name))
        if changed:
            was = ", ".join(f"{name} {old.get(name)!r} (now {self.options.get(name)!r})" for name in changed)
            raise ValueError(f"--resume: {path} was trained with other options: {was}")
        if checkpoint["files"] != self.files and not allow_data_change:
            raise ValueError(
                f"--resume: {path} was trained on other files (SHA-256 of their names {checkpoint['files'][:12]}, now "
                f"{self.files[:12]}); --allow-data-change goes on with these"
            )
        if self.main and checkpoint["torch"] != torch.__version__:
            say(f"trained so far by torch {checkpoint['torch']}; torch {torch.__version__} may differ in the last bits")


def read_log(folder: Path, name: str = LOG) -> list[dict[str, Any]]:
    """A row for each step."""
    lines = (folder / name).read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line


def averaged(values: list[float], span: int = 10) -> list[float]:
    """The mean of the last few steps."""
    return [mean(values[max(0, i - span + 1) : i + 1]) for i in range(len(values))]


def append(path: Path, data: bytes) -> None:
    """All of it or nothing; through no link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def lock(path: Path) -> int:
    """Held until it is closed or the process ends, however that may be; what a dead one left is simply taken over."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as held:
        owner = os.read(descriptor, 100).decode(errors="replace").strip()
        os.close(descriptor)
        raise ValueError(f"{path.parent} must be of one training at a time, got one more: process {owner}") from held
    except OSError as error:  # some network drives know no locks
        say(f"no lock, and training goes on: {path}: {error.strerror}")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
