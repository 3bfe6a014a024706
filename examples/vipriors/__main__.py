"""The VIPriors recipe: much from few labels, without any other data.

    python examples/vipriors all --data folder-with-train-val-test

runs its steps one after the other, each into a folder of ``--out`` with its options, log, checkpoint and pictures:

    pretrain        Step 1: self-supervised, by SimCLR, MoCo-v2 or SimSiam; IP-IRM, SER and reconstruction beside it
    environments    Step 2: what keeps the same company as each class, and a sheet of it
    finetune        Step 3: cross entropy and EqInv on the labels
    distill         a student of the fine-tuned model
    test            flips, crops and the ensemble

Each is a command too, with flags of its own (``python examples/vipriors finetune --help``); for ``all`` these carry the
step's name: ``--finetune-epochs 10``. ``--preset vipriors10`` (or 20, 50) takes the papers' values, ``tiny10`` (the
default; or 20, 50) some for 64 pixels and a CPU. A killed run goes on with ``--resume``, and leaves out the steps that
are done. Several processes: ``torchrun --nproc-per-node 8 examples/vipriors all ...``.

To take it elsewhere, copy this folder, and beside it ipirm_pretrain.py, distill.py and the folder training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # what is shared

import distillation
import environments
import finetune
import images
import presets
import pretrain
import test_time
import torch
from backbone import as_json
from curves import draw_curves
from training import as_program, parse, start_processes, write_atomically

STEPS = {
    "pretrain": pretrain,
    "environments": environments,
    "finetune": finetune,
    "distill": distillation,
    "test": test_time,
}
TRAININGS = ("pretrain", "finetune", "distill")


def options_of(step: str, arguments: list[str]) -> argparse.Namespace:
    """The options of a step, from the preset and from its flags."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=presets.PRESETS, default=presets.PRESETS[0])
    first.add_argument("--method")
    known = first.parse_known_args(arguments)[0]
    preset, values = known.preset, presets.values(known.preset, step, known.method)
    scratch = argparse.ArgumentParser(add_help=False)
    add_flags(scratch, step, preset)
    declared = vars(scratch.parse_args([]))

    def add_options(parser: argparse.ArgumentParser) -> None:
        add_flags(parser, step, preset)
        parser.set_defaults(**{name: value for name, value in values.items() if name in declared})

    if "--data" not in arguments and "EQUIREG_DATA" in os.environ:
        arguments = ["--data", str(Path(os.environ["EQUIREG_DATA"]) / "tiny-vipriors64"), *arguments]
    recipe = {name: value for name, value in values.items() if name not in declared}
    description = STEPS[step].__doc__.splitlines()[0]
    return parse(description, {preset: recipe}, add_options, arguments)


def add_flags(parser: argparse.ArgumentParser, step: str, preset: str) -> None:
    parser.add_argument("--preset", choices=presets.PRESETS, default=preset, help="flags change its parts")
    parser.add_argument("--out", type=Path, default=Path("runs") / preset, help="a folder in it for each step")
    images.add_options(parser)
    STEPS[step].add_options(parser)


def run_step(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one step; those on the disk where it is done and goes on."""
    rank, world, _ = start_processes()
    if step in TRAININGS:
        results = fine_tune(options) if step == "finetune" else STEPS[step].run(options)
        if rank == 0:
            draw_curves(options.out / step, results)
        return results
    results: dict[str, Any] = {}
    if rank == 0:
        results = done_before(options, options.out / step) or STEPS[step].run(options)
    if world > 1:
        torch.distributed.barrier()
    return results


def done_before(options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """The results of a step without training, where it is to go on and was done with the same options."""
    if not (options.resume and (folder / "results.json").exists()):
        return None
    old, new = (json.loads(text) for text in ((folder / "options.json").read_text(), as_json(options)))
    changed = [name for name in new if old.get(name) != new[name] and name not in ("resume", "out", "workers")]
    if changed:
        was = ", ".join(f"{name} {old.get(name)!r} (now {new[name]!r})" for name in changed)
        raise ValueError(f"--resume: {folder} was made with other options: {was}")
    return json.loads((folder / "results.json").read_text())


def fine_tune(options: argparse.Namespace) -> dict[str, Any]:
    """Step 3, with what Steps 1 and 2 left in ``--out`` where nothing else is given."""
    for name, step in (("encoder", "pretrain"), ("environments", "environments")):
        path = getattr(options, name) or options.out / step / f"{name}.pt"
        given = getattr(options, name) is not None or path.exists()
        setattr(options, name, path if given else None)
    options.method = "cross entropy" if options.penalty == "off" else f"EqInv ({options.penalty})"
    return finetune.train(options, options.out / "finetune")


def run_all(arguments: list[str]) -> None:
    """One step after the other, and what came out of all in ``recipe.json``."""
    parser = argparse.ArgumentParser(
        prog="vipriors all", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="leave out the optional ones")
    chosen, rest = parser.parse_known_args(arguments)
    shared, own = sort_flags(rest)
    options = {step: options_of(step, [*shared, *own[step]]) for step in chosen.steps}  # mistakes show before any work
    found: dict[str, Any] = {}
    for step in chosen.steps:
        start = time.monotonic()
        results = run_step(step, options[step])
        found[step] = {"seconds": round(time.monotonic() - start, 1), **results}
        if start_processes()[0] == 0:
            print(f"{step}: {found[step]['seconds']} s, {summary(results)}", flush=True)
            path = options[step].out / "recipe.json"
            write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())


def sort_flags(arguments: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The flags of all steps, and those of each one, ``--finetune-epochs 10`` as ``--epochs 10``."""
    shared: list[str] = []
    own: dict[str, list[str]] = {step: [] for step in STEPS}
    into = shared
    for argument in arguments:
        if argument.startswith("--"):
            step = next((step for step in STEPS if argument.startswith(f"--{step}-")), None)
            into = shared if step is None else own[step]
            argument = argument if step is None else f"--{argument[len(step) + 3 :]}"
        into.append(argument)
    return shared, own


def summary(results: dict[str, Any]) -> str:
    shares = results.get("merged", results)
    best = {name: value for name, value in shares.items() if isinstance(value, float)}
    if "merged" in results:
        best = dict([max(best.items(), key=lambda row: row[1])])
    return ", ".join(f"{name} {value:.1f}%" for name, value in best.items()) or "done"


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
    elif command == "all":
        run_all(arguments[1:])
    elif command in STEPS:
        results = run_step(command, options_of(command, arguments[1:]))
        if results:
            print(f"{command}: {summary(results)}")
    else:
        raise ValueError(f"no step {command!r}; choose from {', '.join(STEPS)}, all")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    as_program(partial(main, sys.argv[1:]))
