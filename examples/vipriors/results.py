"""What a step without training leaves in its folder, and whether that is still true."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from training import write_atomically

OPTIONS, RESULTS = "options.json", "results.json"


def done_before(folder: Path, options: argparse.Namespace, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """The results in the folder, where ``--resume`` is given and they were made of the same.

    Raises:
        ValueError: they were made with other options, of other images or of another model.
    """
    if not (options.resume and (folder / RESULTS).exists()):
        return None
    old, free = json.loads((folder / OPTIONS).read_text()), {"files"} if options.allow_data_change else set()
    changed = [name for name in made_of if old.get(name) != made_of[name] and name not in free]
    if changed:
        was = ", ".join(f"{name} {old.get(name)!r} (now {made_of[name]!r})" for name in changed)
        raise ValueError(f"--resume: {folder} was made with other options: {was}; without --resume it is made anew")
    return json.loads((folder / RESULTS).read_text())


def keep(folder: Path, made_of: dict[str, Any], results: dict[str, Any]) -> None:
    """The results come last: where they are, all is there."""
    for name, content in ((OPTIONS, made_of), (RESULTS, results)):
        write_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())


def made_with(folder: Path, name: str) -> Any:
    """An option of the step that filled the folder, or the hash of what it took; None where that is not known."""
    path = folder / OPTIONS
    return json.loads(path.read_text()).get(name) if path.exists() else None


def given_or_made(given: Path | None, made: Path) -> Path | None:
    """The file that a flag names, or the one that an earlier step left; None for ``none``, or if there is neither."""
    if given is not None:
        return None if str(given) == "none" else given
    return made if made.exists() else None
