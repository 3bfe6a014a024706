"""What a training step costs with a regularizer, over the same step without it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import finetune
import images as recipe_images
import torch
from evidence.plan import SCALES
from evidence.trainings import PRETRAININGS, environments, finetuning_options, options_of
from torch import nn
from training import training_images

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
    sizes, found = SCALES[scale], {}
    for trainer in sorted(VARIANTS.keys() & groups):
        variants = VARIANTS[trainer]
        own = {**getattr(sizes, trainer), "data": data / "cifar10", "amp": "none"}
        options = options_of(trainer, own, 0, folder)
        kind = PRETRAININGS[trainer]
        steps = {}
        for arm, variant in variants.items():
            objective = kind.make_objective(options, variant)
            if trainer == "ipirm" and variant:  # as after the first update
                partitions = objective.method.partitions
                partitions.partitions = torch.cat(
                    [partitions.partitions, torch.arange(partitions.num_samples)[None] % 2]
                )
            collate = kind.make_collate(options, variant)(0)
            steps[arm] = step_of(objective, collate, training_images(options), options)
        found[trainer] = by_turns(steps, repeats)
    if "vipriors-20" in groups:
        found["vipriors-20"] = by_turns(finetuning_steps(scale, data), repeats)
    return found


def finetuning_steps(scale: str, data: Path) -> dict[str, Callable[[], None]]:
    steps = {}
    for arm, penalty in (("off", "off"), ("on", "rex")):
        where = {"data": data / "tiny-vipriors64", "shots": 20, "amp": "none", "penalty": penalty}
        options = finetuning_options({**SCALES[scale].finetuning, **where}, 0)
        images = recipe_images.read(options, "train")
        objective = finetune.Objective(options, len(images.classes))
        if penalty != "off":
            objective.irm.environments = environments(options, "adjusted")
        steps[arm] = step_of(objective, finetune.TwoViews(options, 0), images, options)
    return steps


def step_of(objective: nn.Module, collate: Any, images: Any, options: argparse.Namespace) -> Callable[[], None]:
    """Forward, backward and the optimizer on one batch; loading it does not count."""
    count = min(options.batch_size, len(images))
    batch = collate([(0, *images[i], i) for i in torch.linspace(0, len(images) - 1, count).round().long().tolist()])
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        loss, _ = objective(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

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
