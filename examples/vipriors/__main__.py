"""The VIPriors recipe: much from few labels, without any other data.

    python vipriors all --data folder-with-train-val-test

runs its steps one after the other, each into a folder of --out with its options, log and checkpoints:

    pretrain        Step 1: self-supervised, by SimCLR, MoCo-v2 or SimSiam; IP-IRM, SER and reconstruction beside it
    environments    Step 2: what keeps the same company as each class, and a sheet of it
    finetune        Step 3: cross entropy and EqInv on the labels
    distill         a student of the fine-tuned model
    test            flips, crops and the ensemble; predictions and the challenge's submission file

Each is a command too: vipriors finetune --epochs 10; flags of "all" carry the step's name: --finetune-epochs 10. A
killed run goes on with --resume. Several processes: accelerate launch or torchrun. To use it elsewhere, copy it.
"""

import argparse
import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where this folder lies

import torch
from accelerate import PartialState

from vipriors import distillation, environments, finetune, images, presets, pretrain, test_time
from vipriors.run_folder import save_json
from vipriors.training import TrainingError

STEPS = {"pretrain": pretrain, "environments": environments, "finetune": finetune, "distill": distillation}
STEPS["test"] = test_time
BF16 = torch.cuda.is_available() or (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
SHARED: dict[str, tuple[Any, ...]] = {
    "data": (None, "a folder with train/<class>/*, and val and test beside it where they are there"),
    "preset": ("tiny10", "values that flags change", presets.PRESETS),
    "out": (None, "gets a folder for each step; runs/PRESET where not given"),
    "encoder": (None, "an encoder.pt to use instead of that of Step 1"),
    "model": ("resnet10t", "a ResNet or vision transformer of timm"),
    "image_size": (64, "side of the images in pixels"),
    "crop_scale": (0.3, "smallest share of an image that a crop shows"),
    "patch_size": (8, "of a vision transformer"),
    "late_class_token": (0, "blocks of a vision transformer before its class token"),
    "shots": (0, "labelled images of each class, the first ones; 0: all"),
    "mixed_precision": ("bf16" if BF16 else "no", "of all trainings", ("no", "bf16", "fp16")),
    "seed": (0, "of weights, batches and augmentations"),
    "workers": (0, "processes that load and augment images"),
}
FORMATTER = argparse.RawDescriptionHelpFormatter


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def check_numbers(options: Namespace, prefix: dict[str, str], largest: dict[str, float]) -> None:
    """Finite, at least 0 or above it, and at most ``largest``."""
    largest = {"crop_scale": 1, **largest}
    for name, value in vars(options).items():
        most, positive = largest.get(name, math.inf), name in ("crop_scale", "ser_temperature")
        if not isinstance(value, (int, float)) or (0 <= value <= most and value < math.inf and (value or not positive)):
            continue
        flag = f"--{prefix.get(name, '')}{name}".replace("_", "-")
        raise ValueError(f"{flag} must be {'above 0, up to' if positive else 'in 0 ..'} {most}, got {value}")


def options_of(command: str, arguments: list[str]) -> dict[str, Namespace]:
    """The options of each step, from the preset and from its flags; wrong ones show before any work."""
    prefix = {step: f"{step}_" if command == "all" else "" for step in STEPS if command in (step, "all")}
    flags = {step: STEPS[step].OPTIONS for step in prefix}
    for step in prefix.keys() & {"pretrain", "finetune", "distill"}:
        flags[step] = presets.TRAINING | flags[step]
    how = {"usage": argparse.SUPPRESS, "allow_abbrev": False}  # an error is one line
    first = argparse.ArgumentParser(f"vipriors {command}", add_help=False, **how)
    first.add_argument("--preset", default="tiny10", choices=presets.PRESETS)
    first.add_argument("--model")
    first.add_argument(f"--{prefix.get('pretrain', '')}method".replace("_", "-"), dest="method")
    known = vars(first.parse_known_args(arguments)[0])
    text = __doc__ if command == "all" else STEPS[command].__doc__
    parser = argparse.ArgumentParser(f"vipriors {command}", description=text, formatter_class=FORMATTER, **how)

    def add(title: str, step: str, options: dict[str, tuple[Any, ...]], before: str = "") -> None:
        values, group = presets.values(step=step, **known), parser.add_argument_group(title)
        for name, (own, text, *choices) in options.items():
            kind = Path if own is None else positive if type(own) is int and own else type(own)
            how = {"type": kind, "default": values.get(name, own), "choices": choices[0] if choices else None}
            flag, text = f"--{before}{name}".replace("_", "-"), f"{text} (default: %(default)s)"
            group.add_argument(flag, help=text, required=name == "data", **how)

    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint; leave out done steps")
    if command == "all":
        parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="leave out optional ones")
    add("all steps", "all", SHARED)
    for step in prefix:
        add(step, step, flags[step], prefix[step])
    given = vars(parser.parse_args(arguments))
    given["out"] = given["out"] or Path("runs") / given["preset"]
    root = given["data"] = given["data"].absolute()
    if not (root / "train").is_dir() and (root / "imagenet_50").is_dir():  # as the challenge's script leaves it
        given["data"] = root / "imagenet_50"
    found = {}
    for step in given.get("steps", prefix):
        own = {name: given[f"{prefix[step]}{name}"] for name in flags[step]}
        found[step] = Namespace(**{name: given[name] for name in (*SHARED, "resume")}, **own)
        check_numbers(found[step], dict.fromkeys(own, prefix[step]), getattr(STEPS[step], "LARGEST", {}))
        getattr(STEPS[step], "check", lambda options: None)(found[step])
    if given["encoder"] and not given["encoder"].is_file():
        raise ValueError(f"--encoder must be a file, got {given['encoder']}")
    for step, options in found.items():
        sizes = {split: len(images.read(options, split)) for split in ("train", *images.measured(options))}
        if "batch_size" in options:
            samples = sizes["train"] + (sizes["val"] if step == "pretrain" else 0)
            parts = options.accumulate * PartialState().num_processes
            if options.batch_size % parts or options.batch_size > samples:
                fits = f"a multiple of {parts} and at most the {samples} images"
                flag = f"--{prefix[step]}batch-size".replace("_", "-")
                raise ValueError(f"{flag} must be {fits}, got {options.batch_size}")
    return found


def main(arguments: list[str]) -> None:
    first = argparse.ArgumentParser("vipriors", description=__doc__, formatter_class=FORMATTER, usage=argparse.SUPPRESS)
    first.add_argument("step", choices=("all", *STEPS))
    command = first.parse_args(arguments[:1] or ["--help"]).step
    PartialState(cpu=not torch.accelerator.is_available())  # accelerate starts gloo where it is told so
    found: dict[str, Any] = {}
    for step, options in options_of(command, arguments[1:]).items():
        start = time.monotonic()
        results = STEPS[step].run(options)
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            found[step] = {"seconds": round(time.monotonic() - start, 1), **results}
            shown = [f"{name} {value:.1f}%" for name, value in results.items() if isinstance(value, float)]
            print(f"{step}: {found[step]['seconds']} s, {', '.join(shown) or 'done'}", flush=True)
            if command == "all":
                save_json(options.out / "recipe.json", found)


def program(arguments: list[str]) -> None:
    """``main``; what is wrong with the data, the flags or the disk is said in one line."""
    try:
        main(arguments)
    except (TrainingError, ValueError, OSError) as error:
        # From a process that loads images comes a whole traceback, with the reason on its last line.
        sys.exit(f"vipriors: {str(error).strip().splitlines()[-1]}")


if __name__ == "__main__":
    program(sys.argv[1:])
