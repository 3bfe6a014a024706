"""Group actions on a batch of token maps and of images, with their gradient, against loops over the images."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from equireg import GridTransform
from tests.benchmarks.measure import Row, Settings, compare

SHAPE, SMALL = (256, 14, 384, 16), (8, 4, 8, 2)  # images, places in a row, width, pixels of a patch


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


def benchmark(settings: Settings) -> Iterator[Row]:
    torch.manual_seed(0)
    count, side, width, patch = SMALL if settings.quick else SHAPE
    turns, flips = torch.randint(4, (count,)).to(settings.device), (torch.rand(count) < 0.5).to(settings.device)
    tokens = torch.randn(count, side * side, width, device=settings.device, requires_grad=True)
    images = torch.rand(count // 4, 3, side * patch, side * patch, device=settings.device)
    for name, target in (("Flips and turns", (side, side)), ("With scaling", (side - 1, side + 2))):
        g = GridTransform(turns, flips, (side, side), target)

        def on_tokens(loop, target=target):
            maps = tokens.transpose(1, 2).unflatten(2, (side, side))
            return loop(maps, turns, flips, target).flatten(2).transpose(1, 2)

        def and_back(result):
            return torch.autograd.grad(result, tokens, torch.ones_like(result))[0]

        some = GridTransform(turns[: len(images)], flips[: len(images)], (side, side), target)
        pixels = target[0] * patch, target[1] * patch
        loops = {"loop by index": by_index, "loop over the unbound batch": unbound}
        works = {
            f"{name}, tokens {count} x {side * side} x {width}, forward + backward": {
                **{key: lambda loop=loop, run=on_tokens: and_back(run(loop)) for key, loop in loops.items()},
                "GridTransform": lambda g=g: and_back(g.on_tokens(tokens)),
            },
            f"{name}, tokens {count} x {side * side} x {width}, forward": {
                "loop over the unbound batch": lambda run=on_tokens: run(unbound).detach(),
                "GridTransform": lambda g=g: g.on_tokens(tokens).detach(),
            },
            f"{name}, images {len(images)} x 3 x {side * patch} x {side * patch}, forward": {
                "loop over the unbound batch": lambda pixels=pixels: unbound(images, turns, flips, pixels),
                "GridTransform": lambda some=some: some.on_images(images, patch),
            },
        }
        for work, runs in works.items():
            results = [run() for run in runs.values()]
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
            del results, result
            slow = "loop by index" in runs
            yield from compare(work, runs, settings, repeats=max(3, settings.repeats // 3) if slow else None)
