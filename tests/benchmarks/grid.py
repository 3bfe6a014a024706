"""Group actions on a batch of token maps and of images, with their gradient, against loops over the images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from equireg import GridTransform
from tests.benchmarks.measure import medians

IMAGES, SIDE, WIDTH, PATCH = 256, 14, 384, 16


def moved(image, turn, flip, target):
    """Flip, turn and resize one [C, h, w], as a transform inside a dataset would."""
    image = torch.rot90(image.flip(-1) if flip else image, turn, (-2, -1))
    if tuple(image.shape[1:]) != target:
        image = F.interpolate(image[None], target, mode="bicubic", align_corners=False)[0]
    return image


def by_index(maps, turns, flips, target):
    """``for i in range(B)``: the gradient of each ``maps[i]`` is a whole batch of zeros but for one image."""
    return torch.stack([moved(maps[i], int(turns[i]), bool(flips[i]), target) for i in range(len(maps))])


def unbound(maps, turns, flips, target):
    """``for image in maps``: one gradient for all."""
    return torch.stack([moved(*one, target) for one in zip(maps, turns.tolist(), flips.tolist())])


def benchmark(repeats: int, threads: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    turns, flips = torch.randint(4, (IMAGES,)), torch.rand(IMAGES) < 0.5
    tokens = torch.randn(IMAGES, SIDE * SIDE, WIDTH, requires_grad=True)
    images = torch.rand(IMAGES // 4, 3, SIDE * PATCH, SIDE * PATCH)
    rows: list[dict[str, object]] = []
    for name, target in (("flips and turns", (SIDE, SIDE)), ("with scaling", (SIDE - 1, SIDE + 2))):
        g = GridTransform(turns, flips, (SIDE, SIDE), target)

        def on_tokens(loop, target=target):
            maps = tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE))
            return loop(maps, turns, flips, target).flatten(2).transpose(1, 2)

        def and_back(result):
            return torch.autograd.grad(result, tokens, torch.ones_like(result))[0]

        some = GridTransform(turns[: len(images)], flips[: len(images)], (SIDE, SIDE), target)
        pixels = target[0] * PATCH, target[1] * PATCH
        loops = {"loop by index": by_index, "loop over the unbound batch": unbound}
        works = {
            f"{name}, tokens {IMAGES} x {SIDE * SIDE} x {WIDTH}, forward + backward": {
                **{key: lambda loop=loop, run=on_tokens: and_back(run(loop)) for key, loop in loops.items()},
                "GridTransform": lambda g=g: and_back(g.on_tokens(tokens)),
            },
            f"{name}, tokens {IMAGES} x {SIDE * SIDE} x {WIDTH}, forward": {
                "loop over the unbound batch": lambda run=on_tokens: run(unbound).detach(),
                "GridTransform": lambda g=g: g.on_tokens(tokens).detach(),
            },
            f"{name}, images {len(images)} x 3 x {SIDE * PATCH} x {SIDE * PATCH}, forward": {
                "loop over the unbound batch": lambda pixels=pixels: unbound(images, turns, flips, pixels),
                "GridTransform": lambda some=some: some.on_images(images, PATCH),
            },
        }
        for work, runs in works.items():
            results = [run() for run in runs.values()]
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
            del results, result
            seconds = medians(runs, max(3, repeats // 3) if "loop by index" in runs else repeats)
            rows += [{"work": work, "version": version, "seconds": value} for version, value in seconds.items()]
    return rows
