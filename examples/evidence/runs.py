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
from evidence.plan import SCALES, TUNING_SEED, Group, plan
from tqdm.auto import tqdm
from training import safe_name, write_atomically

FOUND, CHOSEN = "found.json", "chosen.json"


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
    """Train, unless that is done."""
    done = job.folder / FOUND
    if not done.exists():
        torch.set_num_threads(1)
        start = time.monotonic()
        arm = plan(SCALES[job.scale], job.data, job.runs)[job.group].arms[job.arm]
        results = arm.train(job.seed, job.folder, split=job.split, **job.chosen)
        content = {**results, "chosen": job.chosen, "seconds": time.monotonic() - start}
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(done, (json.dumps(content, indent=1) + "\n").encode())
    return done


def run_all(scale: str, data: Path, runs: Path, only: list[str], processes: int) -> None:
    """First the settings are chosen on validation images, then every arm is trained with every seed."""
    groups = {name: group for name, group in plan(SCALES[scale], data, runs).items() if not only or name in only}
    first = {name: group for name, group in groups.items() if not group.needs}
    later = {name: group for name, group in groups.items() if group.needs}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for part in (first, later):
            tuned = [job for name, group in part.items() for job in tuning(scale, data, runs, name, group)]
            finish(pool, tuned, "on validation images")
            final = []
            for name, group in part.items():
                chosen = choose(scale, data, runs, name, group)
                for seed in range(SCALES[scale].seeds):
                    final += [Job(scale, data, runs, name, arm, seed, "test", chosen[arm]) for arm in group.arms]
            finish(pool, final, "on test images")


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
        accuracy = json.loads((job.folder / FOUND).read_text())["accuracy"]
        value = accuracy.get("val", mean(accuracy.values()))
        if value > best.get(job.arm, -1.0):
            best[job.arm], chosen[job.arm] = value, job.chosen
    chosen |= {arm: chosen[kind.like] for arm, kind in group.arms.items() if kind.like}
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CHOSEN, (json.dumps(chosen, indent=1) + "\n").encode())
    return chosen


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
    """The results of every finished run: group, arm, seed."""
    found: dict[str, Any] = {}
    for name, group in plan(SCALES[scale], data, runs).items():
        for arm in group.arms:
            for seed in range(SCALES[scale].seeds):
                path = runs / name / arm / str(seed) / FOUND
                if path.exists():
                    found.setdefault(name, {}).setdefault(arm, {})[str(seed)] = json.loads(path.read_text())
    return found
