"""Both views of SER for a batch, with group elements and colours of their own, against loops over the images."""

from collections.abc import Iterator
from functools import partial
from time import process_time

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from equireg import EquivariantViews, GridTransform, mocov3_photometric
from equireg.image_transforms import gaussian_blur, in_blocks
from tests.benchmarks.measure import Row, Settings, compare, medians

SHAPES = ((256, 32, 4), (32, 224, 16))  # images, side, pixels of a patch
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)


def by_image(image, t, i, kernel_size):
    """Image ``i`` by what the batched policy drew for it, one transform of torchvision after the other."""
    if t.jitter[i]:
        steps = [(ADJUST[kind], float(t.factors[i, kind])) for kind in t.order[i].tolist()]
        steps.insert(int(t.hue_at[i]), (tv.adjust_hue, float(t.hue[i])))
        for adjust, value in steps:
            image = adjust(image, value)
    if t.gray[i]:
        image = tv.rgb_to_grayscale(image, 3)
    if t.blur[i]:
        image = tv.gaussian_blur(image, [kernel_size] * 2, [float(t.sigma[i])] * 2)
    return tv.solarize(image, 0.5) if t.solarize[i] else image


def pipeline(kernel_size, blur, solarize):
    """MoCo-v3's, as a dataset applies it."""
    jitter, smooth = v2.ColorJitter(0.4, 0.4, 0.2, 0.1), v2.GaussianBlur(kernel_size, sigma=(0.1, 2.0))
    steps = [v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(p=0.2), v2.RandomApply([smooth], p=blur)]
    return v2.Compose([*steps, v2.RandomSolarize(threshold=0.5, p=solarize)])


def moved(images, g, patch):
    """Flipped, turned and resized, one image after the other."""
    size = [patch * side for side in g.target]
    for image, turns, flip in zip(images, g.quarter_turns.tolist(), g.flip.tolist()):
        turned = torch.rot90(image.flip(-1) if flip else image, turns, (1, 2))
        yield tv.resize(turned, size, v2.InterpolationMode.BICUBIC, antialias=False)


def benchmark(settings: Settings) -> Iterator[Row]:
    torch.manual_seed(0)
    for count, side, patch in ((2, 32, 4),) if settings.quick else SHAPES:
        images = torch.rand(count, 3, side, side, device=settings.device)
        views, policies = EquivariantViews(side, patch), mocov3_photometric(side)
        pipelines = [pipeline(policies[0].kernel_size, policy.blur, policy.solarize) for policy in policies]

        # The same elements and colours give the same views.
        g, t = GridTransform.random(count, views.grid), policies[0].draw(count)
        turned = g.on_images(images, patch)
        torch.testing.assert_close(torch.stack([*moved(images, g, patch)]), turned, rtol=0, atol=1e-4)
        colored = torch.stack([by_image(x, t, i, policies[0].kernel_size) for i, x in enumerate(images)])
        torch.testing.assert_close(policies[0].apply(images, t), colored, rtol=0, atol=1e-4)

        def loop(images=images, pipelines=pipelines, grid=views.grid, patch=patch):
            for steps in pipelines:
                g = GridTransform.random(len(images), grid)
                torch.stack([steps(x.clamp(0, 1)) for x in moved(images, g, patch)])

        runs = {"torchvision, image by image": loop, "EquivariantViews": lambda x=images, views=views: views(x)}
        sides, sigma = [policies[0].kernel_size] * 2, torch.ones(count, device=settings.device)
        blur = partial(gaussian_blur, radius=sides[0] // 2)
        blurs = {
            "torchvision, image by image": lambda x=images, k=sides: [tv.gaussian_blur(one, k, [1.0]) for one in x],
            "gaussian_blur": lambda x=images, blur=blur, sigma=sigma: in_blocks(blur, x, sigma),
        }
        of = f"{count} images of {side} x {side}"
        for work, versions in ((f"Both views of {of}", runs), (f"Blur of {of}, kernel of {sides[0]}", blurs)):
            rows = list(compare(work, versions, settings))
            used = medians(versions, 1 if settings.quick else settings.repeats, clock=process_time)
            yield from ({**row, "cpu_seconds": used[row["version"]]} for row in rows)
