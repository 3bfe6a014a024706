"""Trains what is planned, several runs at once, and goes on where it was stopped: a finished run is a file."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from evidence import classification, pretraining
from evidence.experiments import GROUPS, PRETRAINED, TUNING_SEED, Settings, seeds_of, settings_of, tried
from evidence.networks import fit
from tqdm.auto import tqdm
from vipriors.training import write_file

FOUND = "found.json"
KINDS = {"pretraining": pretraining, "classification": classification}


class Plan(NamedTuple):
    scale: str
    data: Path
    runs: Path
    groups: tuple[str, ...]


class Job(NamedTuple):
    plan: Plan
    group: str
    arm: str
    seed: int
    split: str
    chosen: Settings

    @property
    def folder(self) -> Path:
        """``group / arm / seed``; with the value that is tried where it is for validation."""
        value = "".join(f", {name} {value}" for name, value in self.chosen.items()) if self.split == "val" else ""
        return self.plan.runs / self.group / f"{self.arm}{value}" / str(self.seed)

    @property
    def settings(self) -> Settings:
        return json.loads(json.dumps(settings_of(self.plan.scale, self.group, self.arm, self.chosen)))

    def found(self) -> dict[str, Any] | None:
        """The results, if it is finished.

        Raises:
            ValueError: it was run with other settings.
        """
        path = self.folder / FOUND
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        if found["settings"] != self.settings:
            raise ValueError(f"{self.folder} was run with other settings; remove it, or give another --runs")
        return found


def execute(job: Job) -> None:
    """Train and measure on one thread, unless that is done; what it prints goes to ``output.txt``."""
    if job.found() is not None:
        return
    torch.set_num_threads(1)
    start, settings = time.monotonic(), job.settings
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "output.txt", "a") as output, contextlib.redirect_stderr(output):
        kind, (_, data, runs, _) = KINDS[settings["kind"]], job.plan
        objective, images = kind.prepare(settings, data, runs, job.folder, job.seed)
        fit(objective, images, settings, job.folder, job.seed)
        results = kind.results(objective, settings, data, job.folder, job.split, job.seed)
    results |= {"settings": settings, "chosen": job.chosen, "seconds": time.monotonic() - start}
    write_file(job.folder / FOUND, (json.dumps(results, indent=1) + "\n").encode())
    for checkpoint in job.folder.rglob("checkpoint-*.pt"):
        checkpoint.unlink()


def run_all(plan: Plan, processes: int) -> None:
    """First settings are chosen on validation images, then every arm is trained with every seed."""
    first = [group for group in plan.groups if not GROUPS[group]["settings"].get("encoder")]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for groups in (first, [group for group in plan.groups if group not in first]):
            finish(pool, [job for group in groups for job in tuning(plan, group)], "on validation images")
            finish(pool, [job for group in groups for job in final(plan, group)], "on test images")


def tuning(plan: Plan, group: str) -> list[Job]:
    """One run for each value of a setting; and the encoder that others start from."""
    jobs = []
    for arm in GROUPS[group]["arms"]:
        values = tried(group, arm) or ([{}] if (group, arm) == PRETRAINED else [])
        jobs += [Job(plan, group, arm, TUNING_SEED, "val", chosen) for chosen in values]
    return jobs


def choose(plan: Plan, group: str) -> dict[str, Settings]:
    """The values with the highest mean accuracy on validation images, for each arm."""
    best: dict[str, tuple[float, Settings]] = {}
    for job in tuning(plan, group):
        accuracy = job.found()["accuracy"]
        value = accuracy.get("val", mean(accuracy.values()))
        if job.arm not in best or value > best[job.arm][0]:
            best[job.arm] = value, job.chosen
    arms = GROUPS[group]["arms"]
    return {arm: best.get(own.get("like", arm), (0.0, {}))[1] for arm, own in arms.items()}


def final(plan: Plan, group: str) -> list[Job]:
    """Every arm with every seed, with the settings that were chosen for it."""
    chosen, seeds = choose(plan, group), range(seeds_of(plan.scale))
    return [Job(plan, group, arm, seed, "test", chosen[arm]) for seed in seeds for arm in GROUPS[group]["arms"]]


def finish(pool: ProcessPoolExecutor, jobs: list[Job], title: str) -> None:
    """All of them, under a bar; a run that fails is told, and the others go on."""
    waiting = [job for job in jobs if job.found() is None]
    futures = {pool.submit(execute, job): job for job in waiting}
    failed = 0
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc=title, unit="run") as bar:
        for future in as_completed(futures):
            bar.update()
            if error := future.exception():
                failed += 1
                tqdm.write(f"{futures[future].folder}: {type(error).__name__}: {error}")
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} runs failed; the others are kept, and a new start repeats these")


def collect(plan: Plan) -> dict[str, Any]:
    """The results of every group that is finished: group, arm, seed."""
    found: dict[str, Any] = {}
    for group in GROUPS:
        if all(job.found() for job in tuning(plan, group)):
            results = {job: job.found() for job in final(plan, group)}
            if all(results.values()):
                for job, result in results.items():
                    found.setdefault(group, {}).setdefault(job.arm, {})[str(job.seed)] = result
    return found


def hours_of(plan: Plan) -> float:
    """Of training and measuring, on validation images too; a run that was stopped counts from where it went on."""
    return sum(json.loads(path.read_text())["seconds"] for path in plan.runs.rglob(FOUND)) / 3600
