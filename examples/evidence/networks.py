"""The networks of all arms, on pixels in 0 .. 1, and how they are trained: by the recipe's loop, one run a folder."""

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from evidence.datasets import Images
from evidence.experiments import Settings
from evidence.frozen import WIDTH as FROZEN_WIDTH
from quickstart import WIDTH, small_cnn
from torch import Tensor, nn
from vipriors.finetune import steps_down
from vipriors.run_folder import warm_cosine
from vipriors.training import train

OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=0.9)}


def create(s: Settings) -> nn.Module:
    if s.get("frozen"):
        network = nn.Identity()
        network.num_features = s["axes"] or FROZEN_WIDTH
        return network
    if s["model"] == "digits":
        network = small_cnn().to(memory_format=torch.channels_last)
        network.num_features = WIDTH
        return network
    sizes = {name: s[name] for name in ("depth", "patch_size") if name in s}
    if sizes:  # a vision transformer
        sizes |= {"img_size": s["image_size"], "dynamic_img_size": True, "global_pool": s["pool"], "fc_norm": False}
    sizes |= {name: s[name] for name in ("channels", "layers") if name in s}  # a residual network
    network = timm.create_model(s["model"], num_classes=0, **sizes)
    if s.get("stem") == "cifar":  # of full resolution, for small images
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network.to(memory_format=torch.channels_last)


def unit(pixels: Tensor) -> Tensor:
    """uint8 pixels in 0 .. 1; features, in their place, as they are."""
    return pixels / 255 if pixels.dtype == torch.uint8 else pixels


@torch.no_grad()
def encode(features: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """[N, D] of uint8 pixels by a module or its method, computed where that is, returned on the CPU."""
    device = next(getattr(features, "__self__", features).parameters()).device
    return torch.cat([features(unit(part.to(device))).float().cpu() for part in pixels.split(250)])


def fit(objective: nn.Module, images: Images, s: Settings, folder: Path, seed: int) -> float:
    """Train ``objective(pixels, labels, indices, progress)``, or go on from the folder's last checkpoint.

    ``pixels`` are uint8, and ``progress`` is the share of the training that is done. After the shares ``snapshots`` the
    network is kept, by the number of steps. Returns the seconds of a step.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[s["optimizer"]](parameters, lr=s["lr"], weight_decay=s["weight_decay"])
    sizes = {"samples": len(images.labels), "batch_size": min(s["batch_size"], len(images.labels))}
    per_epoch, start, done = sizes["samples"] // sizes["batch_size"], time.perf_counter(), []

    def make_batch(step: int, indices: list[int]) -> tuple[Any, ...]:
        done.append(step)
        return images.pixels[indices], images.labels[indices], torch.tensor(indices), step / (s["epochs"] * per_epoch)

    snapshots = [round(share * s["epochs"] * per_epoch) for share in s.get("snapshots", ())]

    def keep(step: int) -> None:
        if step + 1 in snapshots:
            torch.save(objective.network.state_dict(), folder / f"encoder-{step + 1}.pt")

    rate = (steps_down if s["schedule"] == "steps" else warm_cosine)(Namespace(**s))
    AcceleratorState._reset_state()  # a process trains one run after the other, whose precision may differ
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=s["precision"])
    how = {"accelerator": accelerator, "learning_rate": rate, "epochs": s["epochs"], "seed": seed, "settings": s}
    how["after_step"] = keep
    if hasattr(objective, "before_epoch"):
        how["before_epoch"] = partial(objective.before_epoch, images=images)
    try:
        train(objective, make_batch, optimizer, folder=folder, resume=True, **sizes, **how)
    finally:
        AcceleratorState._reset_state()
    return (time.perf_counter() - start) / max(1, len(done))
