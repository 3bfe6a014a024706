"""The images of the recipe, and how they become tensors."""

import hashlib
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from equireg import ImageFiles, k_shot, read_vipriors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
TO_TENSOR, NORMALIZE = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)], v2.Normalize(MEAN, STD)


def read(options: Namespace, split: str) -> ImageFiles:
    """The images of ``train`` (as few of each class as asked for), ``val`` or ``test``."""
    images = read_split(options.data, split)
    return k_shot(images, options.shots) if split == "train" and options.shots else images


def read_split(root: Path, split: str) -> ImageFiles:
    """A folder of class folders, or ``test`` as a folder of images without labels.

    Where there is no ``val``, it is the last fifth of each class's training images, and ``train`` the others.
    """
    if split == "test" and not (root / "testgt").is_dir():
        files = sorted((root / "test").glob("[!.]*"))
        flat = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
        if flat and not any(path.is_dir() for path in files):
            return ImageFiles(flat, [-1] * len(flat), read_vipriors(root, "train").classes)
    if split == "test" or (root / "val").is_dir():
        return read_vipriors(root, split)
    images = read_vipriors(root, "train")
    places = [(images.labels == label).nonzero().squeeze(1) for label in range(len(images.classes))]
    parts = [own[: len(own) * 4 // 5] if split == "train" else own[len(own) * 4 // 5 :] for own in places]
    return images.take(torch.cat(parts))


def measured(options: Namespace) -> tuple[str, ...]:
    """The splits that accuracies are about: ``val``, and ``test`` where it is there."""
    return ("val", "test") if any((options.data / name).is_dir() for name in ("test", "testgt")) else ("val",)


def labelled(options: Namespace) -> list[str]:
    """Those of these that have labels."""
    return [split for split in measured(options) if (read(options, split).labels >= 0).all()]


def names_hash(*parts: ImageFiles) -> str:
    """SHA-256 of the names of the images, in their order, wherever their folder lies."""
    names = (os.fsencode("/".join(path.split(os.sep)[-3:])) for images in parts for path in images.paths)
    return hashlib.sha256(b"\0".join(names)).hexdigest()


def whole(options: Namespace) -> v2.Compose:
    """What is measured on."""
    resize = v2.Resize((options.image_size,) * 2, interpolation=3, antialias=True)
    return v2.Compose([resize, *TO_TENSOR, NORMALIZE])


def crop(options: Namespace) -> list[Any]:
    """The first steps of every augmentation."""
    resized = v2.RandomResizedCrop(options.image_size, scale=(options.crop_scale, 1.0), interpolation=3)
    return [resized, v2.RandomHorizontalFlip()]


def colors(options: Namespace) -> list[Any]:
    """What self-supervised views change besides: colours and, of images that have details, sharpness."""
    size, jitter = options.image_size, v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = [v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1)], p=0.5)] if size >= 64 else []
    return [jitter, v2.RandomGrayscale(0.2), *blur]


class Augmented:
    """Makes a batch: some ``views`` of each image, with its label and its place in the dataset."""

    def __init__(self, options: Namespace, images: ImageFiles, views: int = 1, before: Any = (), after: Any = ()):
        self.images, self.views = images, views
        self.policy = v2.Compose([*crop(options), *before, *TO_TENSOR, NORMALIZE, *after])

    def __call__(self, step: int, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        pictures = [self.images[index][0] for index in indices]
        views = torch.stack([self.policy(picture) for _ in range(self.views) for picture in pictures])
        return views, self.images.labels[indices].repeat(self.views), torch.tensor(indices).repeat(self.views)
