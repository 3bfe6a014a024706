"""Reads ``experiments.yaml``: what is compared, and the settings of each run."""

from itertools import product
from pathlib import Path
from typing import Any

import yaml

Settings = dict[str, Any]
PLAN: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("experiments.yaml").read_text())
GROUPS: dict[str, Any] = PLAN["groups"]
for plan in GROUPS.values():  # a grid has an arm for each of its places
    places = product(*([(name, value) for value in values] for name, values in plan.get("grid", {}).items()))
    plan["arms"] |= {", ".join(f"{name} {value:g}" for name, value in place): dict(place) for place in places if place}
ENCODERS = dict.fromkeys(own for group in GROUPS.values() if (own := group["settings"].get("encoder")))
TUNING_SEED = 100  # of no seed that is reported


def groups_of(scale: str) -> list[str]:
    """Those that a scale trains; a test has all."""
    return [group for group, plan in GROUPS.items() if scale in ("test", plan.get("scale", "cpu"))]


def settings_of(scale: str, group: str, arm: str, chosen: Settings) -> Settings:
    """All that decides a run but for its seed: those of the base, of the scale, of the arm, and what was chosen."""
    sizes, own = PLAN["scales"][scale], GROUPS[group]["arms"][arm]
    found = {**GROUPS[group]["settings"], **sizes.get("all", {}), **sizes.get(group, {}), **own, **chosen}
    if found.get("encoder"):
        found["pretraining"] = settings_of(scale, found["encoder"], "off", {})
    return {name: value for name, value in found.items() if name not in ("try", "like", "seeds", "tuned_on")}


def seeds_of(scale: str, group: str) -> int:
    """How many; one of an encoder that others start from, whatever their seed."""
    if group in ENCODERS:
        return 1
    return {**GROUPS[group]["settings"], **PLAN["scales"][scale].get("all", {})}["seeds"]


def tried(group: str, arm: str) -> list[Settings]:
    return [{name: value} for name, values in GROUPS[group]["arms"][arm].get("try", {}).items() for value in values]
