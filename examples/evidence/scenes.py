"""Street scenes, as they are or with objects of CIFAR-10 on them, and how well a linear map reads them from tokens."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from evidence.datasets import folders
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, resize

import equireg

ANIMALS = torch.tensor([2, 3, 4, 5, 6, 7])  # bird, cat, deer, dog, frog, horse; the others are vehicles


@cache
def streets(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """All scenes of a split in 0 .. 1, [N, 3, 96, 128], and the classes of their pixels, [N, 96, 128]."""
    files = sorted((folder / split / "images").iterdir())
    found = [(read(file), read(folder / split / "masks" / f"{file.stem}.png")) for file in files]
    images, masks = (torch.stack(part) for part in zip(*found))
    return images / 255, masks[:, 0].long()


def read(path: Path) -> Tensor:
    with Image.open(path) as image:
        return pil_to_tensor(image)


def classes_of_pixels(encode: Callable[[Tensor], Tensor], data: Path) -> dict[str, float]:
    """Mean IoU of 11 classes, of a head that was fitted on upright scenes; ``encode`` gives token maps."""

    def loader(split: str) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*(part.split(50) for part in streets(data / "camvid128", split))))

    found = equireg.dense_probe(encode, loader("train"), loader("test"), 11, max_iterations=50, progress=False)
    return {"street scenes, mean IoU": found["upright"], "street scenes, turned": turned(found)}


def turned(found: dict[str, float]) -> float:
    return mean(found[name] for name in ("90", "180", "flip"))


@cache
def with_objects(data: Path, split: str) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Each scene with a vehicle (0) or an animal (1) in its left half, and another in its right half.

    Their sides are 25 to 46% of the height.
    """
    scenes, things = streets(data / "camvid128", split)[0].clone(), folders(data / "cifar10", split, 32)
    generator, targets = torch.Generator().manual_seed(0), []

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    height, half = scenes.shape[2], scenes.shape[3] // 2
    for scene in scenes:
        boxes, labels = [], []
        for left in (0, half):
            chosen, side = draw(0, len(things.labels) - 1), draw(height // 4, 11 * height // 24)
            x, y = left + draw(0, half - side), draw(0, height - side)
            scene[:, y : y + side, x : x + side] = resize(things.pixels[chosen] / 255, [side, side], antialias=True)
            boxes.append([x, y, x + side, y + side])
            labels.append(int(things.labels[chosen] in ANIMALS))
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
    return scenes, targets


def boxes(encode: Callable[[Tensor], Tensor], data: Path) -> dict[str, float]:
    """Average precision of vehicles and animals at an IoU of 0.5, of a head that was fitted on upright scenes."""

    def loader(split: str) -> list[tuple[Tensor, list[dict[str, Tensor]]]]:
        scenes, targets = with_objects(data, split)
        return [(scenes[n : n + 50], targets[n : n + 50]) for n in range(0, len(scenes), 50)]

    found = equireg.detection_probe(encode, loader("train"), loader("test"), 2, max_iterations=50, progress=False)
    return {"boxes, average precision": found["upright"], "boxes, turned": turned(found)}
