"""Train any objective on accelerate, and survive what happens to a machine: kills, full disks, damaged files, NaN.

accelerate brings devices, several processes (``accelerate launch``), mixed precision and gradient accumulation. This
file adds four things. A checkpoint is written beside the last one and renamed; its name holds its SHA-256, so a damaged
one is noticed and the one before it is taken. A step whose loss or gradient is not finite is skipped. Random numbers
follow from the seed, the step and the process: a killed run ends in the same bits. Other settings are refused by name.
"""

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


class TrainingError(Exception):
    """What ends a training and is no fault of the program."""


def seed_everything(seed: int, *what: object) -> None:
    """Seed torch, numpy and random from the seed and what the numbers are for, such as a step."""
    set_seed(int(hashlib.sha256(repr((seed, *what)).encode()).hexdigest()[:8], 16))


def cosine(step: int, steps: int, first: float, last: float = 0.0, warmup: int = 0) -> float:
    """From ``first`` to ``last`` along half a cosine, after a linear rise from nothing."""
    if step < warmup:
        return first * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def train(
    objective: nn.Module,
    make_batch: Callable[[int, list[int]], tuple[Any, ...]],
    optimizer: torch.optim.Optimizer,
    *,
    folder: Path,
    samples: int,
    batch_size: int,
    learning_rate: Callable[[int, int], float],
    epochs: int,
    accelerator: Accelerator | None = None,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    resume: bool = False,
    before_epoch: Callable[[int], object] = lambda epoch: None,
    after_step: Callable[[int], object] = lambda step: None,
    max_norm: float = math.inf,
    max_skipped: int = 10,
    save_every: int = 500,
    workers: int = 0,
    title: str = "training",
) -> list[dict[str, Any]]:
    """Train ``objective``, or go on from its last checkpoint; return the log, a row for each step.

    Args:
        objective: its ``forward(*batch)`` returns the loss and a dict of its parts for the log, 0-d tensors; all that
            it carries from step to step is in its ``state_dict``.
        make_batch: from the step and the indices of its samples in this process to the arguments of ``forward``; may
            draw random numbers from torch, numpy and random.
        folder: gets ``log.jsonl`` and the last two checkpoints; without ``resume`` those there are removed.
        samples, batch_size: an epoch is all whole batches, of all processes together, in an order of its own.
        learning_rate: from the step and their number; times ``lr_scale`` in a parameter group that has one.
        accelerator: made for this training alone.
        settings: plain values, alike in all runs that go on from each other.
        before_epoch, after_step: called with their number, from 0; after a skipped step there is no call.
        max_norm: the gradient is clipped to it.
        max_skipped: so many steps in a row without a finite loss and gradient raise a TrainingError.
        save_every: steps between checkpoints, besides the end of every epoch.
        workers: processes that make batches.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    accumulate, per_epoch = accelerator.gradient_accumulation_steps, samples // batch_size
    batches = _Batches(make_batch, samples, batch_size, seed, rank, world, accumulate)
    steps = per_epoch * epochs
    how = {"samples": samples, "batch_size": batch_size, "steps": steps, "seed": seed, "processes": world}
    how |= {"accumulate": accumulate, "mixed_precision": accelerator.mixed_precision, **(settings or {})}
    settings = json.loads(json.dumps(how))  # plain values: tuples are lists
    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        found = _last_checkpoint(folder, settings) if resume else None
    start, skipped = (found["step"], found["skipped"]) if found else (0, 0)
    if main:
        rows = [row for row in read_log(folder) if row["step"] <= start]
        write_file(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        for old in folder.glob("*checkpoint-*.pt") if not resume else ():
            old.unlink()
    model, optimizer = accelerator.prepare(objective, optimizer)
    scaler = {"scaler": accelerator.scaler} if accelerator.scaler else {}  # of fp16
    lasting = {"objective": objective, "optimizer": optimizer, **scaler}
    for name, part in lasting.items() if found else ():
        part.load_state_dict(found[name])
    loader = iter(DataLoader(batches, None, sampler=range(start * accumulate, steps * accumulate), num_workers=workers))
    for step in (bar := tqdm(range(start, steps), title, steps, initial=start, disable=not main)):
        epoch, within = divmod(step, per_epoch)
        if within == 0:
            seed_everything(seed, "epoch", epoch, rank)
            before_epoch(epoch)
        model.train()
        rate = learning_rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        buffers = [buffer.clone() for buffer in objective.buffers()]
        optimizer.zero_grad()
        logged: list[dict[str, Tensor]] = []
        for part in range(accumulate):
            batch = send_to_device(next(loader), accelerator.device)
            seed_everything(seed, "step", step, part, rank)
            with accelerator.accumulate(model):
                loss, parts = model(*batch)
                accelerator.backward(loss)
            logged.append({name: value.detach() for name, value in {"loss": loss, **parts}.items()})
        norm = float(accelerator.clip_grad_norm_(objective.parameters(), max_norm))
        row: dict[str, Any] = {name: sum(float(part[name]) for part in logged) / accumulate for name in logged[0]}
        broken = torch.tensor(float(not math.isfinite(row["loss"] + norm)), device=accelerator.device)
        if accelerator.reduce(broken).item():  # in any process
            for buffer, value in zip(objective.buffers(), buffers):  # statistics of a batch norm would stay NaN
                buffer.copy_(value)
            if accelerator.scaler:
                accelerator.scaler.update()
            skipped, row = skipped + 1, {"skipped": f"loss {row['loss']}, norm of the gradient {norm}"}
        else:
            optimizer.step()
            after_step(step)
            bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
            skipped, row["lr"] = 0, rate
        if main:
            with _named(folder / "log.jsonl") as path, open(path, "a") as file:
                file.write(json.dumps({"step": step + 1, **row}) + "\n")
        if skipped >= max_skipped:
            why = f"no finite loss and gradient in {skipped} steps in a row, up to step {step + 1}: {row['skipped']}"
            raise TrainingError(f"{why}; {folder} holds the last good checkpoint")
        if main and (within + 1 == per_epoch or (step + 1) % save_every == 0 or step + 1 == steps):
            state = {"settings": settings, "step": step + 1, "skipped": skipped}
            _save_checkpoint(folder, state | {name: part.state_dict() for name, part in lasting.items()})
    accelerator.wait_for_everyone()
    return read_log(folder)


class _Batches(Dataset):
    """The batch of each part of each step in this process: always the same one."""

    def __init__(self, *how: Any):
        self.make_batch, self.samples, self.batch_size, self.seed, self.rank, self.world, self.parts = how
        if self.batch_size % (self.world * self.parts) or not 0 < self.batch_size <= self.samples:
            fits = f"a multiple of {self.world * self.parts} and at most the {self.samples} samples"
            raise ValueError(f"batch_size must be {fits}, got {self.batch_size}")

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        step, part = divmod(place, self.parts)
        epoch, within = divmod(step, self.samples // self.batch_size)
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch))
        first = within * self.batch_size + part * self.batch_size // self.parts
        indices = order[first : first + self.batch_size // self.parts].tolist()
        seed_everything(self.seed, "batch", step, part, self.rank)
        return self.make_batch(step, indices[self.rank :: self.world])


def _save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """``checkpoint-<step>-<hash>.pt``; the one before it is kept, and older ones go."""
    torch.save(state, buffer := io.BytesIO())
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()[:16]
    write_file(folder / f"checkpoint-{state['step']:08}-{digest}.pt", buffer.getbuffer())
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()


def _last_checkpoint(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The last one whose bytes are those that were written; None where there never was one."""
    for path in sorted(folder.glob("checkpoint-*.pt"), reverse=True):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != path.stem.split("-")[-1]:
            path.rename(path.with_name(f"damaged-{path.name}"))
            tqdm.write(f"{path} is damaged; looking for the one before it")
            continue
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            old = state["settings"]
        except Exception as error:  # of nearly any type
            raise TrainingError(f"{path} is no checkpoint of tensors and plain values") from error
        if changed := differences(old, settings):
            raise TrainingError(f"{path} was made with other settings: {changed}")
        return state
    if any(folder.glob("damaged-*")):
        raise TrainingError(f"{folder} holds no sound checkpoint; train anew without --resume")
    return None


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The names of the settings that differ, with both values."""
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)!r} (now {new.get(name)!r})" for name in names)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``log.jsonl``; a line that a killed run left unfinished is left out."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Whatever happens, the file is the old one or the new one, as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # processes may write one file at once
    try:
        with _named(path), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[Path]:
    """An error of the disk says which file it is about."""
    try:
        yield path
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
