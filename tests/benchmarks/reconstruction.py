"""What image reconstruction adds to a step of ViT-S/16 at 224, and its views against loops over the images."""

from collections.abc import Iterator

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from equireg import IntermediateReconstructionHead, IntermediateViews
from tests.benchmarks.measure import Row, Settings, compare

BATCH, MANY = 16, 192


def step(vit, heads, images, view, targets):
    """Both views through the encoder, a mean square for the self-supervised loss, and the heads, with gradients."""
    tokens = [vit.forward_features(x)[:, 1:] for x in (images, view)]
    loss = (tokens[0][..., :192].mean(1) - tokens[1][..., :192].mean(1)).square().mean()
    for head in heads:
        loss = loss + head(*(head.split(part)[1] for part in tokens), targets)
    loss.backward()
    return loss.detach()


def by_image(images, parameters, kind):
    """As a dataset would, one image after the other."""
    if kind == "se2":
        linear = InterpolationMode.BILINEAR
        made = [tv.affine(x, -a, [dx, dy], 1.0, [0.0, 0.0], linear) for x, (a, dx, dy) in zip(images, parameters)]
    elif kind == "color":
        made = [
            tv.adjust_hue(tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(x, b), c), s), h)
            for x, (b, c, s, h) in zip(images, parameters)
        ]
    else:
        made = [tv.gaussian_blur(x, [17, 17], [sigma, sigma]) for x, (sigma,) in zip(images, parameters)]
    return torch.stack(made)


def flops(heads, depth):
    """Counted by PyTorch on the meta device: no number is computed, every product is counted."""
    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_224", num_classes=0, depth=depth)
        parts = [IntermediateReconstructionHead(384, image_size=224, patch_size=16) for _ in range(heads)]
        images, targets = torch.zeros(BATCH, 3, 224, 224), torch.zeros(2, BATCH, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        step(vit, parts, images, images, targets)
    return counter.get_total_flops()


def benchmark(settings: Settings) -> Iterator[Row]:
    torch.manual_seed(0)
    batch, depth = (1, 2) if settings.quick else (BATCH, 12)
    counted = f"FLOPs of a step of ViT-S/16 at 224, two views of {BATCH} images, forward + backward"
    for version, heads in (("encoder", 0), ("+ IntermediateReconstructionHead", 1)):
        yield {"work": counted, "version": version, "flops": flops(heads, depth)}
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, depth=depth).to(settings.device)
    head = IntermediateReconstructionHead(384, image_size=224, patch_size=16).to(settings.device)
    images, views = torch.rand(batch, 3, 224, 224, device=settings.device), IntermediateViews("se2")
    made = views(images)[:2]

    def whole(with_views):
        nn.ModuleList([vit, head]).zero_grad()
        return step(vit, [head], images, *(views(images)[:2] if with_views else made))

    def encoder():
        vit.zero_grad()
        return step(vit, [], images, *made)

    versions = {
        "encoder": encoder,
        "+ IntermediateReconstructionHead": lambda: whole(False),
        "+ IntermediateViews": lambda: whole(True),
    }
    work = f"Step of ViT-S/16 at 224, two views of {batch} images, forward + backward"
    yield from compare(work, versions, settings)

    for side in (32,) if settings.quick else (32, 224):
        images = torch.rand(2 if settings.quick else MANY, 3, side, side, device=settings.device)
        for kind in ("se2", "color", "blur"):
            views = IntermediateViews(kind)
            parameters = views.draw(len(images), (side, side), torch.Generator().manual_seed(0)).to(settings.device)
            versions = {
                "torchvision, image by image": lambda kind=kind, x=images, t=parameters: by_image(x, t.tolist(), kind),
                "IntermediateViews": lambda views=views, x=images, t=parameters: views.transform(x, t),
            }
            expected, own = (version() for version in versions.values())
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-4)
            work = f"Views ({kind}), {len(images)} images of {side} x {side}"
            yield from compare(work, versions, settings)
