"""The folder of a step: made once, with its options, results, tensors and curves; and its training."""

import hashlib
import io
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from matplotlib.figure import Figure
from timm.optim import create_optimizer_v2
from torch import nn

from vipriors.training import TrainingError, cosine, differences, read_log, train, write_file

OPTIONS, RESULTS = "options.json", "results.json"
NOT_IN_THE_RESULT = ("resume", "workers", "data", "out", "encoder")  # how a step is run; these may change on the way
Results = dict[str, Any]


def once(options: Namespace, step: str, made_of: Results, work: Callable[[Path, Results], Results]) -> Results:
    """The results of ``work(folder, settings)``, or those on the disk where it was done with the same settings."""
    folder, main = options.out / step, PartialState().is_main_process
    settings = {name: value for name, value in vars(options).items() if name not in NOT_IN_THE_RESULT} | made_of
    if options.resume and (folder / OPTIONS).exists():
        if changed := differences(json.loads((folder / OPTIONS).read_text()), settings):
            raise TrainingError(f"{folder} was made with other settings: {changed}; without --resume it is made anew")
        if (folder / RESULTS).exists():
            return json.loads((folder / RESULTS).read_text())
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).unlink(missing_ok=True)
        save_json(folder / OPTIONS, settings)
    results = work(folder, settings)
    if main:
        draw_curves(folder)
        save_json(folder / RESULTS, results)
    return results


def fit(
    options: Namespace, folder: Path, settings: Results, objective: nn.Module, batches: Any, rate: Any, **more: Any
) -> bool:
    """Train as the options say; True in the process that measures. ``batches.images`` are the samples."""
    if more.get("optimizer") is None:
        adamw = getattr(options, "optimizer", "sgd") == "adamw"
        how = {"lr": options.lr, "weight_decay": options.weight_decay, "filter_bias_and_bn": adamw}
        more["optimizer"] = create_optimizer_v2(objective, "adamw" if adamw else "momentum", **how)
    accelerator = Accelerator(mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.accumulate)
    for name in ("batch_size", "epochs", "seed", "resume", "workers"):
        more[name] = getattr(options, name)
    more |= {"samples": len(batches.images), "learning_rate": rate, "accelerator": accelerator, "settings": settings}
    train(objective, batches, folder=folder, title=folder.name, **more)
    objective.eval()
    return accelerator.is_main_process


def warm_cosine(options: Namespace) -> Callable[[int, int], float]:
    """To the full rate in ``--warmup-epochs``, and from there to nothing along half a cosine."""
    share = options.warmup_epochs / options.epochs
    return lambda step, steps: cosine(step, steps, options.lr, warmup=round(share * steps))


def save(path: Path, state: Any) -> None:
    torch.save(state, buffer := io.BytesIO())
    write_file(path, buffer.getbuffer())


def load(path: Path) -> Any:
    """Tensors and plain values, and never code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of nearly any type
        raise TrainingError(f"{path} is damaged, or no file of tensors and plain values") from error


def save_json(path: Path, content: Any) -> None:
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def hash_of(path: Path | None) -> str | None:
    return path and hashlib.sha256(path.read_bytes()).hexdigest()


def finished(path: Path) -> Path | None:
    """The file that a step left, or None; an error where the step was begun anew since, and not ended."""
    if path.exists() and not (path.parent / RESULTS).exists():
        raise TrainingError(f"{path.parent} is not finished; go on with --resume, or run its step again")
    return path if path.exists() else None


def made_with(folder: Path, name: str) -> Any:
    """An option of the step that filled the folder, or the hash of what it took; None where that is not known."""
    path = folder / OPTIONS
    return json.loads(path.read_text()).get(name) if path.exists() else None


def draw_curves(folder: Path) -> None:
    """``curves.png``: every part of the loss, and the learning rate."""
    if not (log := [row for row in read_log(folder) if "loss" in row]):
        return
    curves = [name for name in log[0] if name != "step"]
    figure = Figure(figsize=(3 * len(curves), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(curves), squeeze=False).flat, curves):
        axes.plot([row["step"] for row in log], [row[name] for row in log], linewidth=0.7)
        axes.set_title("learning rate" if name == "lr" else name)
    figure.savefig(folder / "curves.png", dpi=120)
