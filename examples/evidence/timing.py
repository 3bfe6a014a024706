"""What a training step costs with a regularizer, over the same step without it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from evidence.plan import SCALES
from evidence.trainings import PRETRAININGS, environments, finetuning_options, options_of
from torch import nn
from training import start_processes, to_device, training_images
from vipriors import finetune
from vipriors import images as recipe_images

VARIANTS = {
    "ser": {"off": False, "on": True},
    "reconstruction": {"off": 0, "one": 1, "two": 2},
    "ipirm": {"off": False, "on": True},
}


def step_times(
    scale: str, data: Path, folder: Path, groups: set[str], repeats: int = 15
) -> dict[str, dict[str, float]]:
    """Median seconds of a step: group, arm. The arms take turns, so that a busy machine is busy for all of them."""
    torch.set_num_threads(1)
    found = {}
    for trainer in sorted(VARIANTS.keys() & groups):
        own = {**getattr(SCALES[scale], trainer), "data": data / "cifar10", "amp": "none"}
        options = options_of(trainer, own, 0, folder)
        kind, images = PRETRAININGS[trainer], training_images(options)
        steps, extra = {}, {}
        for arm, variant in VARIANTS[trainer].items():
            objective = kind.make_objective(options, variant).to(start_processes()[2])
            if trainer == "ipirm" and variant:
                extra[arm] = search_share(objective.method, options, len(images))
            collate = kind.make_collate(options, variant)(0)
            if trainer == "reconstruction" and not variant:
                objective = WithoutDecoders(objective)
            steps[arm] = step_of(objective, collate, images, options)
        found[trainer] = by_turns(steps, repeats)
        for arm, seconds in extra.items():
            found[trainer][arm] += seconds
    if "vipriors-20" in groups:
        found["vipriors-20"] = by_turns(finetuning_steps(scale, data), repeats)
    return found


class WithoutDecoders(nn.Module):
    """VICReg alone: what the base of the comparison is but for the decoders that look on."""

    def __init__(self, objective: nn.Module):
        super().__init__()
        self.method, self.views = objective.method, objective.views

    def forward(self, first: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.method([first, self.views(first)[0]])[0], {}


def search_share(method: nn.Module, options: argparse.Namespace, samples: int) -> float:
    """Seconds of one search for a partition, which joins the loss, spread over the steps between two searches."""
    start = time.perf_counter()
    method.find_partition(0)
    return (time.perf_counter() - start) / (options.update_every * (samples // options.batch_size))


def finetuning_steps(scale: str, data: Path) -> dict[str, Callable[[], None]]:
    steps = {}
    for arm, penalty in (("off", "off"), ("on", "rex")):
        shots = min(20, max(SCALES[scale].shots["VIPriors"]))
        where = {"data": data / "tiny-vipriors64", "shots": shots, "amp": "none", "penalty": penalty}
        options = finetuning_options({**SCALES[scale].finetuning, **where}, 0)
        images = recipe_images.read(options, "train")
        objective = finetune.Objective(options, len(images.classes)).to(start_processes()[2])
        if penalty != "off":
            objective.irm.environments = environments(options, "adjusted")
        steps[arm] = step_of(objective, finetune.TwoViews(options, 0), images, options)
    return steps


def step_of(objective: nn.Module, collate: Any, images: Any, options: argparse.Namespace) -> Callable[[], None]:
    """Forward, backward and the optimizer on one batch; loading it does not count."""
    count = min(options.batch_size, len(images))
    batch = collate([(0, *images[i], i) for i in torch.linspace(0, len(images) - 1, count).round().long().tolist()])
    device = start_processes()[2]
    batch = to_device(batch, device)
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        loss, _ = objective(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def by_turns(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat > 1:  # the first ones are slower
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
