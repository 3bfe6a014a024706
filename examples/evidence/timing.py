"""What a training step costs with a regularizer, beside the same step without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from evidence.datasets import Images
from evidence.experiments import Settings, settings_of
from evidence.networks import batch_of, optimizer_of
from evidence.runs import KINDS, Plan
from torch import nn

ON = ("off", "on")
TIMED = {"ser": ON, "reconstruction": ("off", "one", "two"), "ipirm": ON, "vipriors-20": ON}


def step_times(plan: Plan, found: dict[str, Any], repeats: int = 15) -> dict[str, dict[str, float]]:
    """Median seconds of a step: group, arm. The arms take turns, so that a busy machine is busy for all of them."""
    torch.set_num_threads(1)
    return {group: by_turns(plan, group, found[group], repeats) for group in TIMED if group in found}


def by_turns(plan: Plan, group: str, found: dict[str, Any], repeats: int) -> dict[str, float]:
    steps: dict[str, Callable[[], None]] = {}
    searches = dict.fromkeys(TIMED[group], 0.0)
    for arm in TIMED[group]:
        s = settings_of(plan.scale, group, arm, found[arm]["0"]["chosen"])
        objective, images = KINDS[s["kind"]].prepare(s, plan.data, plan.runs, plan.runs, seed=0)
        objective.to("cuda" if torch.cuda.is_available() else "cpu")
        if s.get("partitions"):  # the search's share of each step until the next one
            start = time.perf_counter()
            objective.before_epoch(s["update_every"], images)
            searches[arm] = (time.perf_counter() - start) / (
                s["update_every"] * (len(images.labels) // s["batch_size"])
            )
        steps[arm] = step_of(objective.train(), images, s)
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    for _ in range(repeats + 2):
        for arm, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[arm].append(time.perf_counter() - start)
    return {arm: median(values[2:]) + searches[arm] for arm, values in seconds.items()}  # the first ones are slower


def step_of(objective: nn.Module, images: Images, s: Settings) -> Callable[[], None]:
    """Views, forward, backward and the optimizer on one batch."""
    device, optimizer = next(objective.parameters()).device, optimizer_of(objective, s)
    places = torch.linspace(0, len(images.labels) - 1, min(s["batch_size"], len(images.labels))).round().long()
    *batch, progress = batch_of(images, places, 1.0)
    batch = [part.to(device) for part in batch]

    def step() -> None:
        loss, _ = objective(*batch, progress)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
