"""Trains what is planned, several runs at once, and goes on where it was stopped: a finished run is a file."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from evidence.plan import SCALES, TUNING_SEED, Group, plan, settings_of
from tqdm.auto import tqdm
from training import safe_name, write_atomically

FOUND = "found.json"


class Job(NamedTuple):
    scale: str
    data: Path
    runs: Path
    group: str
    arm: str
    seed: int
    split: str
    chosen: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Of one run, ``group / arm / seed``; with the value that is tried where it is for validation."""
        tried = "".join(f", {flag} {value}" for flag, value in self.chosen.items()) if self.split == "val" else ""
        return self.runs / safe_name(self.group) / safe_name(f"{self.arm}{tried}") / str(self.seed)


def execute(job: Job) -> Path:
    """Train, unless that is done.

    Raises:
        ValueError: it was done with other settings.
    """
    done = job.folder / FOUND
    if done.exists():
        read_found(job)
        return done
    torch.set_num_threads(1)
    start = time.monotonic()
    arm = plan(SCALES[job.scale], job.data, job.runs)[job.group].arms[job.arm]
    results = arm.train(job.seed, job.folder, split=job.split, **job.chosen)
    content = {**results, "settings": settings_of(SCALES[job.scale], job.group), "chosen": job.chosen}
    content["seconds"] = time.monotonic() - start
    job.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(done, (json.dumps(content, indent=1) + "\n").encode())
    return done


def read_found(job: Job) -> dict[str, Any]:
    """The results of a finished run of this plan."""
    found = json.loads((job.folder / FOUND).read_text())
    expected = json.loads(json.dumps([settings_of(SCALES[job.scale], job.group), job.chosen]))
    if [found["settings"], found["chosen"]] != expected:
        raise ValueError(f"{job.folder} was run with other settings; remove it, or give another --runs")
    return found


def run_all(scale: str, data: Path, runs: Path, only: list[str], processes: int) -> None:
    """First the settings are chosen on validation images, then every arm is trained with every seed."""
    groups = {name: group for name, group in plan(SCALES[scale], data, runs).items() if not only or name in only}
    first = {name: group for name, group in groups.items() if not group.needs}
    later = {name: group for name, group in groups.items() if group.needs}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for part in (first, later):
            tuned = [job for name, group in part.items() for job in tuning(scale, data, runs, name, group)]
            finish(pool, tuned, "on validation images")
            jobs = [job for name, group in part.items() for job in final(scale, data, runs, name, group)]
            finish(pool, jobs, "on test images")


def tuning(scale: str, data: Path, runs: Path, name: str, group: Group) -> list[Job]:
    """One run for each value of a setting; and the base, from which others start."""
    jobs = []
    for arm, kind in group.arms.items():
        tried = [{kind.flag: value} for value in kind.choices] or [{}]
        if kind.choices or (name == "ipirm" and arm == "off"):
            jobs += [Job(scale, data, runs, name, arm, TUNING_SEED, "val", chosen) for chosen in tried]
    return jobs


def choose(scale: str, data: Path, runs: Path, name: str, group: Group) -> dict[str, dict[str, Any]]:
    """The values with the highest mean accuracy on validation images, for each arm."""
    chosen: dict[str, dict[str, Any]] = {arm: {} for arm in group.arms}
    best: dict[str, float] = {}
    for job in tuning(scale, data, runs, name, group):
        accuracy = read_found(job)["accuracy"]
        value = accuracy.get("val", mean(accuracy.values()))
        if value > best.get(job.arm, -1.0):
            best[job.arm], chosen[job.arm] = value, job.chosen
    return chosen | {arm: chosen[kind.like] for arm, kind in group.arms.items() if kind.like}


def final(scale: str, data: Path, runs: Path, name: str, group: Group) -> list[Job]:
    """Every arm with every seed, with the settings that were chosen for it."""
    chosen = choose(scale, data, runs, name, group)
    seeds = range(SCALES[scale].seeds)
    return [Job(scale, data, runs, name, arm, seed, "test", chosen[arm]) for seed in seeds for arm in group.arms]


def finish(pool: ProcessPoolExecutor, jobs: list[Job], title: str) -> None:
    """All of them, under a bar; a run that fails is told, and the others go on."""
    waiting = [job for job in jobs if not (job.folder / FOUND).exists()]
    futures = {pool.submit(execute, job): job for job in waiting}
    failed = []
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc=title, unit="run") as bar:
        for future in as_completed(futures):
            bar.update()
            if error := future.exception():
                failed.append(f"{futures[future].folder}: {type(error).__name__}: {error}")
                tqdm.write(failed[-1])
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(jobs)} runs failed; the others are kept, and a new start repeats these"
        )


def collect(scale: str, data: Path, runs: Path) -> dict[str, Any]:
    """The results of every group that is finished: group, arm, seed."""
    found: dict[str, Any] = {}
    for name, group in plan(SCALES[scale], data, runs).items():
        tuned = tuning(scale, data, runs, name, group)
        if not all((job.folder / FOUND).exists() for job in tuned):
            continue
        jobs = final(scale, data, runs, name, group)
        if all((job.folder / FOUND).exists() for job in jobs):
            for job in jobs:
                found.setdefault(name, {}).setdefault(job.arm, {})[str(job.seed)] = read_found(job)
    return found


def hours_of(runs: Path) -> float:
    """Of training and measuring, on validation images too; a run that was stopped counts from where it went on."""
    return sum(json.loads(path.read_text())["seconds"] for path in runs.rglob(FOUND)) / 3600
