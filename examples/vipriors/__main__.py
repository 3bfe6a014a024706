"""The VIPriors recipe: much from few labels, without any other data.

    python examples/vipriors all --data folder-with-train-val-test

runs its steps one after the other, each into a folder of ``--out`` with its options, log, checkpoint and pictures:

    pretrain        Step 1: self-supervised, by SimCLR, MoCo-v2 or SimSiam; IP-IRM, SER and reconstruction beside it
    environments    Step 2: what keeps the same company as each class, and a sheet of it
    finetune        Step 3: cross entropy and EqInv on the labels
    distill         a student of the fine-tuned model
    test            flips, crops and the ensemble

Each is a command too, with flags of its own (``python examples/vipriors finetune --help``); for ``all`` these carry the
step's name: ``--finetune-epochs 10``, ``--pretrain-method mocov2``. ``--preset vipriors10`` (or 20, 50) takes the
papers' values, ``tiny10`` (the default; or 20, 50) some for 64 pixels and a CPU. A killed run goes on with
``--resume``, and leaves out the steps that are done. Several processes: ``torchrun --nproc-per-node 8
examples/vipriors all ...``.

To take it elsewhere, copy this folder, and beside it ipirm_pretrain.py, distill.py, merged_predictions.py and the
folder training.
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

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where this folder and what it shares lie

import torch
from merged_predictions import UNKNOWN
from training import (
    add_training_options,
    add_values,
    as_program,
    hash_of,
    parse_checked,
    start_processes,
    write_atomically,
)

from vipriors import distillation, environments, finetune, images, presets, pretrain, test_time
from vipriors.curves import draw_curves
from vipriors.results import given_or_made, made_with

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
    first.add_argument("--model")
    known = first.parse_known_args(arguments)[0]
    values = presets.values(known.preset, step, method=known.method, model=known.model)

    module = STEPS[step]
    parser = argparse.ArgumentParser(prog=f"vipriors {step}", description=module.__doc__.splitlines()[0])
    data = os.environ.get("EQUIREG_DATA")
    data = f"{data}/tiny-vipriors64" if data else None
    parser.add_argument("--data", type=Path, default=data, required=data is None, help="a folder as --layout says")
    parser.add_argument("--preset", choices=presets.PRESETS, default=known.preset, help="flags change its parts")
    parser.add_argument("--out", type=Path, default=Path("runs") / known.preset, help="a folder in it for each step")
    images.add_options(parser)
    module.add_options(parser)
    parser.add_argument(
        "--evaluate-on", choices=("test", "val"), default="test", help="val: test images are left alone, for choices"
    )
    add_training_options(parser)
    declared = vars(parser.parse_known_args(["--data", "."])[0])
    parser.set_defaults(**{name: value for name, value in values.items() if name in declared})
    add_values(parser, {name: value for name, value in values.items() if name not in declared})
    return parse_checked(parser, arguments, *([module.check] if hasattr(module, "check") else []), images.check)


def run_step(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one step; those on the disk where it is done and goes on."""
    rank, world, _ = start_processes()
    if step in TRAININGS:
        results = fine_tune(options) if step == "finetune" else STEPS[step].run(options)
        if rank == 0:
            draw_curves(options.out / step, results)
        return results
    results: dict[str, Any] = STEPS[step].run(options) if rank == 0 else {}
    if world > 1:
        torch.distributed.barrier()
    return results


def fine_tune(options: argparse.Namespace) -> dict[str, Any]:
    """Step 3, with what Steps 1 and 2 left in ``--out`` where nothing else is given."""
    folder = options.out / "environments"
    given = options.environments is not None
    options.encoder = given_or_made(options.encoder, options.out / "pretrain" / "encoder.pt")
    options.environments = given_or_made(options.environments, folder / "environments.pt")
    of_step_two = options.environments is not None and not given and options.penalty != "off"
    if of_step_two and options.encoder and made_with(folder, "encoder") != hash_of(options.encoder):
        raise ValueError(
            f"{options.environments} was made with another encoder than {options.encoder}; run Step 2 (environments) "
            "again, or give --environments"
        )
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
    if "merged" in results:  # one row, named before it is measured, and not the best one of test images
        name = results["result"]
        results = {f"{results['on']}: {name}": results["merged"][name]}
    shown = {name: f"{value:.1f}%" for name, value in results.items() if isinstance(value, float)}
    shown.update({name: value for name, value in results.items() if value == UNKNOWN})
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "done"


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
