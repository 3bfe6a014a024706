"""What the example trainers share, to be copied beside them: a training that survives being killed.

All randomness of a step follows from the seed, the step and the process, never from what ran before. So a run that was
killed goes on bit for bit from its last checkpoint, on the same machine with the same number of processes and threads.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm.auto import tqdm

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


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
    epoch, options)`` say otherwise. ``images`` are the training images where they are not those of ``--data``.
    """
    rank, world, device = start_processes()
    if device.type == "cpu":  # at these sizes its backward pass takes as long as all the rest of a step
        timm.layers.set_fused_attn(False)
    unknown = ("resume", "out", "workers", "variants")
    known = {key: value for key, value in vars(options).items() if key not in unknown}
    run = Run(folder, {**known, **variant, "world": world}, resume=options.resume, main=rank == 0)
    done = folder / "results.json"
    if options.resume and done.exists():
        return json.loads(done.read_text())

    seed_everything(options.seed, -1)  # the same weights in all processes
    with warnings.catch_warnings():  # DINO's head uses a form of weight norm that PyTorch is about to replace
        warnings.simplefilter("ignore", FutureWarning)
        objective = make_objective().to(device)
    optimizer = (make_optimizer or adamw)(objective, options)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    learning_rate = learning_rate or warm_cosine
    start = 0
    if run.checkpoint is not None:
        objective.load_state_dict(run.checkpoint["objective"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        scaler.load_state_dict(run.checkpoint["scaler"])
        start = run.checkpoint["step"]
    model = nn.parallel.DistributedDataParallel(objective) if world > 1 else objective

    images = training_images(options) if images is None else images
    batches = StepBatches(
        len(images), options.batch_size, options.epochs, seed=options.seed, rank=rank, world=world, start=start
    )
    loader = DataLoader(
        WithStep(images), batch_sampler=batches, collate_fn=make_collate(rank), num_workers=options.workers
    )
    bar = tqdm(loader, desc=f"{options.method} {name}", total=batches.steps, initial=start, disable=rank > 0)
    for step, batch in enumerate(bar, start):
        seed_everything(options.seed, step, rank)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, batches.steps_per_epoch, options)
        loss, parts = model(*to_device(batch, device))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; {folder} holds the last checkpoint")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if objective.method.clip:
            nn.utils.clip_grad_norm_([p for p in objective.parameters() if p.requires_grad], objective.method.clip)
        objective.method.before_step(step // batches.steps_per_epoch)
        scaler.step(optimizer)
        scaler.update()
        objective.method.update(step, batches.steps)

        row = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
        run.log({"step": step + 1, **row, "lr": group["lr"]})
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
        if (step + 1) % batches.steps_per_epoch == 0 or (step + 1) % options.save_every == 0:
            states = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
            run.save(step + 1, **states, scaler=scaler.state_dict())

    results: dict[str, Any] = {}
    if rank == 0:
        results = evaluate(objective.eval(), device)
        write_atomically(done, (json.dumps(results, indent=2) + "\n").encode())
    if world > 1:
        torch.distributed.barrier()
    return results


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


def training_images(options: argparse.Namespace) -> Dataset:
    """Those of ``train``, or as many of them as asked for, evenly over the classes."""
    folder = ImageFolder(Path(options.data) / "train")
    return evenly(folder, options.images or len(folder))


def evenly(dataset: Any, count: int) -> Subset:
    """At most so many of its samples, at even distances."""
    return Subset(dataset, torch.linspace(0, len(dataset) - 1, min(len(dataset), count)).round().long().tolist())


def into_range(image: Tensor) -> Tensor:
    """Bicubic resizing overshoots, and the jittered hue of a colour outside of 0 .. 1 can be NaN."""
    return image.clamp(0, 1)


def plain_transform(options: argparse.Namespace) -> v2.Compose:
    """An image as a tensor in 0 .. 1, of the size of the training."""
    resize = v2.Resize((options.image_size,) * 2, interpolation=3, antialias=True)
    return v2.Compose([resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), into_range])


def normalized_transform(options: argparse.Namespace) -> v2.Compose:
    """The same, less the mean of ImageNet's pixels and over their deviation."""
    return v2.Compose([plain_transform(options), v2.Normalize(MEAN, STD)])


def test_folder(options: argparse.Namespace) -> Path:
    """The images that results are about: ``--evaluate-on``, and ``val`` where there is no ``test``."""
    root = Path(options.data)
    return root / "test" if options.evaluate_on == "test" and (root / "test").is_dir() else root / "val"


def parse(
    description: str,
    recipes: dict[str, dict[str, Any]],
    add_options: Callable[[argparse.ArgumentParser], None],
    arguments: list[str] | None = None,
) -> argparse.Namespace:
    """The options of an example, from the command line or a list; ``--recipe`` chooses the defaults of those that the
    recipes name.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument(
        "--recipe", choices=recipes, default=next(iter(recipes)), help="a setting; flags change its parts"
    )
    recipe = recipes[first.parse_known_args(arguments)[0].recipe]
    parser = argparse.ArgumentParser(description=description, parents=[first])
    data = os.environ.get("EQUIREG_DATA")
    parser.add_argument(
        "--data",
        default=f"{data}/cifar10" if data else None,
        required=data is None,
        help="a folder with train/<class>/* and test/<class>/* or val/<class>/*",
    )
    add_options(parser)
    parser.add_argument("--evaluate-on", choices=("test", "val"), default="test", help="choose settings on val")
    parser.add_argument("--amp", choices=("auto", "none", "bf16", "fp16"), default="auto")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, bit for bit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that load and augment images")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints, besides every epoch")
    parser.add_argument("--probe-images", type=int, default=50_000, help="at most so many of train and of test")
    for name, value in recipe.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    by_split = getattr(options, "layout", "folders") == "folders"
    if by_split and not ((Path(options.data) / "train").is_dir() and test_folder(options).is_dir()):
        parser.error(f"--data {options.data} must hold the folders train and {options.evaluate_on} (or val)")
    if options.amp == "auto":  # where the device multiplies bf16 in hardware
        cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        options.amp = "bf16" if torch.cuda.is_available() or cpu else "none"
    return options


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
    """A dataset read by (step, index), which gives (step, image, label, index)."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any, int, int]:
        step, index = key
        image, label = self.dataset[index]
        return step, image, label, index


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
            save_atomically(self.folder / CHECKPOINT, {"step": step, "options": self.options, **states})

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


def save_atomically(path: Path, content: Any) -> None:
    """As ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


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
