"""The loop: from a checkpoint, if there is one, to the measures at the end."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from training.options import (
    names_hash,
    training_images,
    what_counts,
)
from training.run_folder import CHECKPOINT, RESULTS, SKIPPED, Run, say
from training.sealed_files import write_atomically
from training.shown_names import visible
from training.surviving import Stop, Trouble, Unbreakable, leave_signals_to_the_first, workers_may_die


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
    random.seed(mixed)  # lightly's masks


def run_training(
    options: argparse.Namespace,
    variant: dict[str, Any],
    folder: Path,
    name: str,
    make_objective: Callable[[], nn.Module],
    make_collate: Callable[[int], Callable[[list[Any]], Any]],
    evaluate: Callable[[nn.Module, torch.device], dict[str, Any]],
    *,
    make_optimizer: Callable[[nn.Module, argparse.Namespace], torch.optim.Optimizer] | None = None,
    learning_rate: Callable[[int, int, argparse.Namespace], float] | None = None,
    images: Dataset | None = None,
) -> dict[str, Any]:
    """Train once, or go on where a checkpoint stands; the measures at the end (in the first process).

    The objective takes what ``make_collate(rank)`` makes of a list of (step, image, label, index), and returns the loss
    and its parts for the log. Its ``method`` is one of ssl_methods.py, or has their ``clip``, ``before_step`` and
    ``update``. ``variant`` tells one training from others with the same options. The optimizer is AdamW and its rate
    half a cosine after a warm-up, unless ``make_optimizer(objective, options)`` and ``learning_rate(step, steps per
    epoch, options)`` say otherwise. ``images`` are the training images where they are not those of ``--data``. All that
    lasts from step to step is in the objective's ``state_dict`` and the optimizer's.

    Raises:
        ValueError: the options, the images and the checkpoint do not go together.
        OSError: a checkpoint cannot be written.
        Trouble: ``--max-skipped`` steps in a row had no finite loss or gradient; a process that loads images is gone.
        SystemExit: after SIGTERM (143) or SIGINT (130), with a checkpoint.
    """
    rank, world, device = start_processes()
    if device.type == "cpu":  # at these sizes its backward pass takes as long as all the rest of a step
        timm.layers.set_fused_attn(False)
    images = training_images(options) if images is None else images
    run = Run(
        folder,
        {**what_counts(options), **variant, "world": world, "classes": len(images.classes)},
        resume=options.resume,
        main=rank == 0,
        files=names_hash(images),
        allow_data_change=options.allow_data_change,
    )
    with run:
        done = folder / RESULTS
        if options.resume and done.exists():
            return json.loads(done.read_text())
        start = run.checkpoint["step"] if run.checkpoint else 0
        batches = StepBatches(
            len(images), options.batch_size, options.epochs, seed=options.seed, rank=rank, world=world, start=start
        )
        loader = DataLoader(
            WithStep(images, options.seed),
            batch_sampler=batches,
            collate_fn=make_collate(rank),
            num_workers=options.workers,
            worker_init_fn=leave_signals_to_the_first,
            timeout=options.worker_timeout if options.workers else 0,
        )
        seed_everything(options.seed, -1)  # the same weights in all processes
        with warnings.catch_warnings():  # DINO's head uses a form of weight norm that PyTorch is about to replace
            warnings.simplefilter("ignore", FutureWarning)
            objective = make_objective().to(device)
        optimizer = (make_optimizer or adamw)(objective, options)
        scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        state = State(objective, optimizer, scaler)
        if run.checkpoint is not None:
            state.load(run.checkpoint)
        bar = tqdm(
            loader,
            desc=f"{visible(options.method)} {visible(name)}",
            total=batches.steps,
            initial=start,
            disable=rank > 0,
            file=Unbreakable(sys.stderr),
        )
        train(options, run, state, bar, batches, device, learning_rate or warm_cosine)
        results: dict[str, Any] = {}
        if rank == 0:
            results = evaluate(objective.eval(), device)
            write_atomically(done, (json.dumps(results, indent=2) + "\n").encode())
        if world > 1:
            torch.distributed.barrier()
        return results


class State:
    """All that lasts from one step to the next, and so belongs in a checkpoint."""

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self.objective, self.optimizer, self.scaler = objective, optimizer, scaler
        self.skipped = 0  # steps in a row, up to now

    def saved(self) -> dict[str, Any]:
        parts = {"objective": self.objective, "optimizer": self.optimizer, "scaler": self.scaler}
        return {**{name: part.state_dict() for name, part in parts.items()}, "skipped": self.skipped}

    def load(self, checkpoint: dict[str, Any]) -> None:
        self.objective.load_state_dict(checkpoint["objective"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.skipped = checkpoint["skipped"]


def train(
    options: argparse.Namespace,
    run: Run,
    state: State,
    bar: tqdm,
    batches: StepBatches,
    device: torch.device,
    learning_rate: Callable[[int, int, argparse.Namespace], float],
) -> None:
    """The steps. One whose loss or gradient is not finite changes nothing but the scale of fp16: nothing learns from
    it, no teacher follows, and a partition that was due is looked for after the next step.
    """
    objective, optimizer, scaler = state.objective, state.optimizer, state.scaler
    method = objective.method
    model = nn.parallel.DistributedDataParallel(objective) if batches.world > 1 else objective
    with Stop() as stop, workers_may_die(run.folder):
        for step, batch in enumerate(bar, batches.start):
            seed_everything(options.seed, step, batches.rank)
            rate = learning_rate(step, batches.steps_per_epoch, options)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)  # of a layer
            before = [buffer.clone() for buffer in objective.buffers()]
            loss, parts = model(*to_device(batch, device))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            learned = [p for p in objective.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in learned])
            if method.clip:
                nn.utils.clip_grads_with_norm_(learned, method.clip, norm)
            failed, asked = agreed([not (loss.isfinite() and norm.isfinite()), stop.signal], device, batches.world)
            if failed:
                for buffer, value in zip(objective.buffers(), before):  # statistics of a batch norm would stay NaN
                    buffer.copy_(value)
            else:
                method.before_step(step // batches.steps_per_epoch)
                scaler.step(optimizer)
            scaler.update()
            if not failed:
                method.update(step, batches.steps)

            state.skipped = state.skipped + 1 if failed else 0
            row = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
            if failed:
                found = {"loss": str(row["loss"]), "norm": str(norm.item()), "images": batches.indices(step)}
                run.log({"step": step + 1, **found}, SKIPPED)
            else:
                run.log({"step": step + 1, **row, "lr": rate})
            bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
            hopeless = state.skipped >= options.max_skipped
            due = (step + 1) % batches.steps_per_epoch == 0 or (step + 1) % options.save_every == 0
            if hopeless:
                state.skipped = 0
            if due or asked or hopeless:
                run.save(step + 1, **state.saved())
            if hopeless:
                raise Trouble(
                    f"loss or gradient were not finite in {options.max_skipped} steps in a row, up to step {step + 1}: "
                    f"{run.folder / SKIPPED} lists their images; {run.folder / CHECKPOINT} holds the last good state"
                )
            if asked:
                say(f"stopped after step {step + 1}; --resume goes on from {run.folder / CHECKPOINT}")
                raise SystemExit(128 + asked)


def agreed(flags: list[Any], device: torch.device, world: int) -> list[int]:
    """The largest of all processes, so that they go on or stop together."""
    shared = torch.tensor([int(flag) for flag in flags], device=device)
    if world > 1:
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def adamw(objective: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """Weight decay on matrices alone."""
    decayed = [p for p in objective.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in objective.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr)


def warm_cosine(step: int, steps_per_epoch: int, options: argparse.Namespace) -> float:
    """To the full rate in ``--warmup-epochs``, and from there to nothing along half a cosine."""
    warmup = options.warmup_epochs * steps_per_epoch
    return cosine(step, options.epochs * steps_per_epoch, options.lr, 0.0, warmup)


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors in lists and tuples; anything else as it is."""
    if isinstance(batch, (list, tuple)):
        return [to_device(part, device) for part in batch]
    return batch.to(device) if isinstance(batch, Tensor) else batch


def precision(options: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Mixed precision as ``--amp`` says."""
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.amp]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


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
        self.epoch = -1
        self.order: list[int] = []

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            yield [(step, index) for index in self.indices(step)[self.rank :: self.world]]

    def indices(self, step: int) -> list[int]:
        """Of the images of the step, of all processes."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            shuffle = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.samples, generator=shuffle).tolist()
        return self.order[within * self.batch_size : (within + 1) * self.batch_size]


class WithStep(Dataset):
    """A dataset read by (step, index), which gives (step, image, label, index).

    What is random in it follows from the seed, the step and the image, in whichever process it is read.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any, int, int]:
        step, index = key
        seed_everything(self.seed, step, -1 - index)  # no rank is negative
        image, label = self.dataset[index]
        return step, image, label, index


def cosine(step: int, steps: int, first: float, last: float, warmup: int = 0) -> float:
    """From ``first`` to ``last`` along half a cosine, after a linear rise from nothing."""
    if step < warmup:
        return first * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
