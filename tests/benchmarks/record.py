"""What was measured, kept as JSON: for each benchmark and device its rows, with machine, versions and date."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Group = dict[str, Any]

# In the order in which they run and stand on the page.
TITLES = {
    "class_wise_irm": "Class-wise IRM step",
    "environments": "Environments",
    "training_step": "Training step with class-wise IRM",
    "irm_flops": "Parameters and FLOPs with class-wise IRM",
    "sup_con": "Supervised contrastive loss",
    "info_nce": "NT-Xent of two views",
    "pair_lse": "pair_lse",
    "ser": "SER loss",
    "ser_flops": "FLOPs of a step with SER",
    "grid": "Group actions",
    "views": "Views for SER",
    "reconstruction": "Image reconstruction",
    "partition": "Step of the search for a partition",
    "gpu": "Kernels on a GPU",
}
DEVICES = {"cpu": "On a CPU", "cuda": "On a GPU"}


def machine(device: str, threads: int, packages: tuple[str, ...] = ()) -> str:
    """What ran it: the processor and the versions that matter."""
    parts = [_processor(), f"{threads} thread{'s' if threads > 1 else ''}"]
    if device == "cuda":
        parts.insert(0, torch.cuda.get_device_name())
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join(parts)


def card(date: str) -> dict[str, Any]:
    """The GPU, and when it was measured, as the file of the automatic choice names it."""
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return {"card": name, "capability": list(capability), "date": date, "torch": torch.__version__}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load(path: Path) -> list[Group]:
    groups: list[Group] = json.loads(path.read_text()) if path.exists() else []
    return groups


def updated(groups: list[Group], new: Group) -> list[Group]:
    """The groups with the new one in the place of what was measured before on this kind of device."""
    key = ("benchmark", "device")
    kept = [group for group in groups if any(group[part] != new[part] for part in key)]
    return sorted([*kept, new], key=lambda group: (list(TITLES).index(group["benchmark"]), group["device"]))


def save(groups: list[Group], path: Path) -> None:
    """One line for each row, so that a new measurement changes the lines it is about."""
    blocks = []
    for group in groups:
        head = json.dumps({key: value for key, value in group.items() if key != "rows"}, ensure_ascii=False)
        rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in group["rows"])
        blocks.append(f'{head[:-1]}, "rows": [\n{rows}\n]}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(blocks) + "\n]\n")
