"""Trains what is planned, several runs at once, and goes on where it was stopped: a finished run is a file."""

import contextlib
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from evidence import classification, pretraining
from evidence.experiments import ENCODERS, GROUPS, TUNING_SEED, Settings, groups_of, seeds_of, settings_of, tried
from evidence.measures import JOINED, JOINED_ON_THE_WAY
from evidence.networks import fit
from torch import nn
from tqdm.auto import tqdm
from vipriors.training import differences, write_file

# Read by glibc at the start of a process: it keeps what is freed. Returning large blocks took a third of the measuring.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
KINDS = {"pretraining": pretraining, "classification": classification}


class Place(NamedTuple):
    scale: str
    data: Path
    runs: Path


class Job(NamedTuple):
    """One run: an arm with a seed, on validation images to choose a setting, or on test images."""

    place: Place
    group: str
    arm: str
    seed: int
    split: str
    chosen: Settings

    @property
    def folder(self) -> Path:
        value = "".join(f", {name} {value}" for name, value in self.chosen.items()) if self.split == "val" else ""
        return self.place.runs / self.group / f"{self.arm}{value}" / str(self.seed)

    def settings(self) -> Settings:
        return settings_of(self.place.scale, self.group, self.arm, self.chosen)

    def found(self) -> dict[str, Any] | None:
        """The results, if it is finished; ValueError if it was run with other settings."""
        path = self.folder / "found.json"
        found = json.loads(path.read_text()) if path.exists() else None
        if found and (changed := differences(found["settings"], self.settings())):
            raise ValueError(f"{self.folder} was run with other settings: {changed}; remove it, or give another --runs")
        return found

    def lacks(self) -> set[str]:
        """The measures that joined since it was finished."""
        found, s = self.found() or {}, self.settings()
        if s.get("told") is not True or "told" not in found:  # of validation images, accuracy alone
            return set()
        followed = JOINED_ON_THE_WAY if "r2" in s.get("curve", ()) else set()
        return (JOINED - found["told"].keys()).union(*(followed - values.keys() for values in found["curve"].values()))

    def waits(self) -> bool:
        return not self.found() or bool(self.lacks())


def execute(job: Job) -> None:
    """Train and measure on one thread, as far as that is not done; what is printed goes to ``output.txt``."""
    if not job.waits():
        return
    torch.set_num_threads(1)
    start, s, folder, seed = time.perf_counter(), job.settings(), job.folder, job.seed
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output, contextlib.redirect_stderr(output):
        kind = KINDS[s["kind"]]
        objective, images = kind.prepare(s, job.place.data, job.place.runs, folder, seed)
        if found := job.found():
            pretraining.add_what_joined(found, job.lacks(), objective, s, job.place.data, folder, seed)
            write(folder, found)
            return
        prepared = time.perf_counter() - start
        step = fit(objective, images, s, folder, seed)
        found = kind.results(objective, s, job.place.data, job.place.runs, folder, job.split, seed)
    found |= {"settings": s, "chosen": job.chosen, "step_seconds": step, "prepare_seconds": prepared}
    found["seconds"] = time.perf_counter() - start
    write(folder, found)
    for checkpoint in folder.rglob("checkpoint-*.pt"):
        checkpoint.unlink()


def trained(job: Job) -> nn.Module:
    """What a finished pretraining left, in eval mode."""
    objective, _ = pretraining.prepare(job.settings(), job.place.data, job.place.runs, job.folder, job.seed)
    objective.network.load_state_dict(torch.load(job.folder / "encoder.pt", weights_only=True))
    return objective.eval()


def write(folder: Path, found: dict[str, Any]) -> None:
    write_file(folder / "found.json", (json.dumps(found, indent=1) + "\n").encode())


def run_all(place: Place, groups: list[str], processes: int) -> None:
    """First settings are chosen on validation images, then every arm is trained with every seed."""
    os.environ.update(KEEP_MEMORY)
    needed = {GROUPS[group]["settings"].get("encoder") for group in groups}
    first = [group for group in GROUPS if group in ENCODERS and (group in needed or group in groups)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for part in (first, [group for group in groups if group not in first]):
            steps = {"of the base": tuning_of_base, "on validation images": tuning, "on test images": final}
            for title, jobs in steps.items():
                finish(pool, [job for group in part for job in jobs(place, group)], title)


def tuning_of_base(place: Place, group: str) -> list[Job]:
    """For each value of a setting of the base one run, or several with seeds of their own."""
    values = [{name: value} for name, values in GROUPS[group].get("tuned", {}).items() for value in values]
    return [Job(place, group, "off", seed, "val", chosen) for chosen in values for seed in tuning_seeds(group)]


def tuning(place: Place, group: str) -> list[Job]:
    """The same of the arms, with what was chosen for the base."""
    base, arms = best(tuning_of_base(place, group)).get("off", {}), GROUPS[group]["arms"]
    values = [(arm, {**base, **chosen}) for arm in arms for chosen in tried(group, arm)]
    return [Job(place, group, arm, seed, "val", chosen) for arm, chosen in values for seed in tuning_seeds(group)]


def tuning_seeds(group: str) -> range:
    return range(TUNING_SEED, TUNING_SEED + GROUPS[group]["settings"]["tuned_on"])


def final(place: Place, group: str) -> list[Job]:
    chosen, seeds = choose(place, group), range(seeds_of(place.scale, group))
    return [Job(place, group, arm, seed, "test", chosen[arm]) for arm in GROUPS[group]["arms"] for seed in seeds]


def choose(place: Place, group: str) -> dict[str, Settings]:
    """For each arm: what was tried, or is that of an arm that it is like, or of the base."""
    base, own = best(tuning_of_base(place, group)).get("off", {}), best(tuning(place, group))
    return {arm: own.get(plan.get("like", arm), base) for arm, plan in GROUPS[group]["arms"].items()}


def best(jobs: list[Job]) -> dict[str, Settings]:
    """The values with the highest mean accuracy on validation images, for each arm."""
    values: dict[str, dict[str, list[float]]] = {}
    for job in jobs:
        accuracy = job.found()["accuracy"]
        of_arm = values.setdefault(job.arm, {}).setdefault(json.dumps(job.chosen), [])
        of_arm.append(accuracy.get("val", mean(accuracy.values())))
    return {arm: json.loads(max(tried, key=lambda chosen: mean(tried[chosen]))) for arm, tried in values.items()}


def finish(pool: ProcessPoolExecutor, jobs: list[Job], title: str) -> None:
    """All of them, under a bar; a run that fails is told, and the others go on."""
    waiting = {pool.submit(execute, job): job for job in jobs if job.waits()}
    failed = 0
    for future in tqdm(as_completed(waiting), title, len(jobs), unit="run", initial=len(jobs) - len(waiting)):
        if error := future.exception():
            failed += 1
            tqdm.write(f"{waiting[future].folder}: {type(error).__name__}: {error}")
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} runs failed; the others are kept, and a new start repeats these")


def collect(place: Place) -> dict[str, Any]:
    """The results by group, arm and seed, of each arm whose runs are all finished, if those of the first one are."""
    found: dict[str, Any] = {}
    for group in groups_of(place.scale):
        if any(job.waits() for jobs in (tuning_of_base, tuning) for job in jobs(place, group)):
            continue
        jobs = final(place, group)
        waiting = {job.arm for job in jobs if job.waits()}
        if jobs[0].arm in waiting:  # nothing to compare the others with
            continue
        for job in (job for job in jobs if job.arm not in waiting):
            run = {name: value for name, value in job.found().items() if name != "settings"}
            found.setdefault(group, {}).setdefault(job.arm, {})[str(job.seed)] = run
    return found


def beside(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Known arms of a group stay beside new ones where all were trained beside the same base, which is the first."""
    base = next(iter(new), None)
    return {**old, **new} if not new or old.get(base) == new[base] else new
