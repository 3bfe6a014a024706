"""Group actions on a batch of token maps and of images, against a loop over the images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from equireg import GridTransform
from tests.benchmarks.measure import medians

IMAGES, SIDE, WIDTH, PATCH = 256, 14, 384, 16


def one_by_one(maps, turns, flips, target):
    """Flip, turn and resize each [C, h, w] by itself, as a transform inside a dataset would."""
    results = []
    for image, turn, flip in zip(maps, turns.tolist(), flips.tolist()):
        moved = torch.rot90(image.flip(-1) if flip else image, turn, (-2, -1))
        if tuple(moved.shape[1:]) != target:
            moved = F.interpolate(moved[None], target, mode="bicubic", align_corners=False)[0]
        results.append(moved)
    return torch.stack(results)


def benchmark(repeats: int, threads: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    turns, flips = torch.randint(4, (IMAGES,)), torch.rand(IMAGES) < 0.5
    tokens, images = torch.randn(IMAGES, SIDE * SIDE, WIDTH), torch.rand(IMAGES // 4, 3, SIDE * PATCH, SIDE * PATCH)
    rows: list[dict[str, object]] = []
    for name, target in (("flips and turns", (SIDE, SIDE)), ("with scaling", (SIDE - 1, SIDE + 2))):
        g = GridTransform(turns, flips, (SIDE, SIDE), target)

        def loop_tokens(target=target):
            maps = tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE))
            return one_by_one(maps, turns, flips, target).flatten(2).transpose(1, 2)

        some = GridTransform(turns[: len(images)], flips[: len(images)], (SIDE, SIDE), target)
        pixels = target[0] * PATCH, target[1] * PATCH
        works = {
            f"{name}, tokens {IMAGES} x {SIDE * SIDE} x {WIDTH}": (loop_tokens, lambda g=g: g.on_tokens(tokens)),
            f"{name}, images {len(images)} x 3 x {SIDE * PATCH} x {SIDE * PATCH}": (
                lambda pixels=pixels: one_by_one(images, turns, flips, pixels),
                lambda some=some: some.on_images(images, PATCH),
            ),
        }
        for work, (loop, ours) in works.items():
            torch.testing.assert_close(ours(), loop(), rtol=1e-4, atol=1e-4)
            seconds = medians({"loop over images": loop, "GridTransform": ours}, repeats)
            rows += [{"work": work, "version": version, "seconds": value} for version, value in seconds.items()]
    return rows
