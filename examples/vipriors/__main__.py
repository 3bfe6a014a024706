"""The VIPriors recipe: much from few labels, without any other data.

    python vipriors all --data folder-with-train-val-test

runs its steps one after the other, each into a folder of --out with its options, log, checkpoints and pictures:

    pretrain        Step 1: self-supervised, by SimCLR, MoCo-v2 or SimSiam; IP-IRM, SER and reconstruction beside it
    environments    Step 2: what keeps the same company as each class, and a sheet of it
    finetune        Step 3: cross entropy and EqInv on the labels
    distill         a student of the fine-tuned model
    test            flips, crops and the ensemble; predictions and the challenge's submission file

Each is a command too: vipriors finetune --epochs 10; for all the flags carry the step's name: --finetune-epochs 10.
--preset vipriors10 (or 20, 50) takes the papers' values, tiny10 (or 20, 50) some for 64 pixels and a CPU. A killed run
goes on with --resume. Several processes: accelerate launch, or torchrun. To take it elsewhere, copy this folder.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import time
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where this folder lies

import torch
from accelerate import PartialState

from vipriors import distillation, environments, finetune, images, presets, pretrain, test_time
from vipriors.run_folder import save_json
from vipriors.training import TrainingError

MODULES = (pretrain, environments, finetune, distillation, test_time)
STEPS = dict(zip(("pretrain", "environments", "finetune", "distill", "test"), MODULES))
TRAININGS = ("pretrain", "finetune", "distill")
SHARED: dict[str, tuple[Any, ...]] = {
    "data": (None, "a folder as --layout says"),
    "preset": ("tiny10", "values that flags change", presets.PRESETS),
    "out": (None, "gets a folder for each step; runs/PRESET where not given"),
    "model": ("resnet10t", "a ResNet or vision transformer of timm"),
    "image_size": (64, "side of the images in pixels"),
    "crop_scale": (0.3, "smallest share of an image that a crop shows"),
    "patch_size": (8, "of a vision transformer"),
    "late_class_token": (0, "blocks of a vision transformer before its class token"),
    **images.OPTIONS,
    "mixed_precision": ("auto", "auto: bf16 where the device multiplies it", ("auto", "no", "bf16", "fp16")),
    "resume": (False, "go on from the last checkpoint; leave out the steps that are done"),
    "seed": (0, "of weights, batches and augmentations"),
    "workers": (0, "processes that load and augment images"),
    "save_every": (500, "steps between checkpoints, besides every epoch"),
    "max_skipped": (10, "so many steps in a row without a finite loss and gradient end a training"),
    "traceback": (False, "say where an error came from, besides what it is"),
}


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> Any:
        unknown = message.split("unrecognized arguments: ")[-1].split()[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1) if unknown[:2] == "--" else []
        raise TrainingError(message + (f"; did you mean {near[0]}?" if near else ""))

    def add(self, title: str, options: dict[str, tuple[Any, ...]], values: dict[str, Any], prefix: str = "") -> None:
        """A group of flags, whose defaults are the preset's ``values`` or their own."""
        group = self.add_argument_group(title)
        for name, (own, text, *choices) in options.items():
            default, flag = values.get(name, own), f"--{prefix}{name}".replace("_", "-")
            if own is False:
                group.add_argument(flag, action="store_true", help=text)
                continue
            kind = {"type": Path if own is None else type(own), "choices": choices[0] if choices else None}
            group.add_argument(flag, default=default, help=f"{text} (default: {default})", **kind)


def options_of(command: str, arguments: list[str]) -> dict[str, Namespace]:
    """The options of each step, from the preset and from its flags; wrong ones show before any work."""
    prefix = {step: f"{step}_" if command == "all" else "" for step in STEPS if command in (step, "all")}
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--model", f"--{prefix.get('pretrain', '')}method".replace("_", "-")):
        first.add_argument(flag, dest=flag.split("-")[-1], default="tiny10" if flag == "--preset" else None)
    known = vars(first.parse_known_args(arguments)[0])
    if known["preset"] not in presets.PRESETS:
        raise TrainingError(f"--preset must be one of {', '.join(presets.PRESETS)}, got {known['preset']}")
    data = os.environ.get("EQUIREG_DATA")
    shared = {"data": Path(data) / "tiny-vipriors64" if data else None, **presets.values(step="all", **known)}
    formatter = argparse.RawDescriptionHelpFormatter
    text = __doc__ if command == "all" else STEPS[command].__doc__
    parser = Parser(f"vipriors {command}", description=text, formatter_class=formatter, allow_abbrev=False)
    if command == "all":
        parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="leave out optional ones")
    parser.add("all steps", SHARED, shared)
    flags = {step: (presets.TRAINING if step in TRAININGS else {}) | STEPS[step].OPTIONS for step in prefix}
    for step in prefix:
        parser.add(step, flags[step], presets.values(step=step, **known), prefix[step])
    given = vars(parser.parse_args(arguments))
    if given["data"] is None:
        raise TrainingError("--data must name a folder with train/<class>/*, or as --layout says")
    given["out"] = given["out"] or Path("runs") / given["preset"]
    if given["mixed_precision"] == "auto":
        cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        given["mixed_precision"] = "bf16" if torch.cuda.is_available() or cpu else "no"
    for name, value in given.items():
        least = 0 if name.endswith(("shots", "workers", "warmup_epochs", "token")) else 1
        if isinstance(value, float) and not math.isfinite(value):
            raise TrainingError(f"--{name.replace('_', '-')} must be finite, got {value}")
        if type(value) is int and name not in ("seed", "draw") and value < least:
            raise TrainingError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    found = {}
    for step in given.get("steps", prefix):
        own = {name: given[f"{prefix[step]}{name}"] for name in flags[step]}
        found[step] = Namespace(**{name: given[name] for name in SHARED}, **own)
        getattr(STEPS[step], "check", lambda options: None)(found[step])
        for split in ("train", *images.measured(found[step])):
            images.read(found[step], split)
    return found


def summary(results: dict[str, Any]) -> str:
    if "merged" in results:  # one row, named before it is measured, and not the best one of test images
        name = results["result"]
        results = {f"{results['on']}: {name}": results["merged"][name]}
    shown = {name: f"{value:.1f}%" for name, value in results.items() if isinstance(value, float)}
    shown |= {name: value for name, value in results.items() if value == test_time.UNKNOWN}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "done"


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        return print(__doc__)
    if command not in ("all", *STEPS):
        raise TrainingError(f"no step {command!r}; choose from {', '.join(STEPS)}, all")
    PartialState(cpu=not torch.accelerator.is_available())  # accelerate starts gloo where it is told so
    found: dict[str, Any] = {}
    for step, options in options_of(command, arguments[1:]).items():
        start = time.monotonic()
        results = STEPS[step].run(options)
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            found[step] = {"seconds": round(time.monotonic() - start, 1), **results}
            print(f"{step}: {found[step]['seconds']} s, {summary(results)}", flush=True)
            if command == "all":
                save_json(options.out / "recipe.json", found)


def program(arguments: list[str]) -> None:
    """``main``; what is wrong with the data, the flags or the disk is said in one line."""
    try:
        main(arguments)
    except (TrainingError, ValueError, OSError) as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        # From a process that loads images comes a whole traceback, with the reason on its last line.
        sys.exit(f"vipriors: {str(error).strip().splitlines()[-1]}")


if __name__ == "__main__":
    program(sys.argv[1:])
