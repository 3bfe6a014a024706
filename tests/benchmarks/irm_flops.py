"""What EqInv adds to a network in parameters and FLOPs: to a forward pass, as its Table 6, and to a step of training.

Counted by PyTorch: every product is. The networks are on the meta device, where no number is computed. The loss, which
looks at labels, is computed on features of its own.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from equireg import ClassWiseIRM
from tests.benchmarks.measure import Row, Settings

BATCH, CLASSES = 128, 50
NETWORKS = {
    "ResNet-18": (models.resnet18, "fc"),
    "ResNet-50": (models.resnet50, "fc"),
    "ViT-B/16": (models.vit_b_16, "heads"),
}


def gram_flops(*shapes: Any, **_: Any) -> int:
    """Of all similarities of a batch [B, d], the last argument; and as many of their gradient."""
    rows, width = shapes[-1]
    return 2 * rows * rows * width


def counted(call: Callable[[], object]) -> int:
    formulas = dict.fromkeys((torch.ops.equireg.gram, torch.ops.equireg.gram_backward), gram_flops)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return counter.get_total_flops()


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def backbone(name: str, classifier: nn.Module) -> tuple[nn.Module, int]:
    """With this in the place of its classifier, on the meta device; and the width of its features."""
    make, last = NETWORKS[name]
    with torch.device("meta"):
        network = make()
    width = next(m.in_features for m in getattr(network, last).modules() if isinstance(m, nn.Linear))
    setattr(network, last, classifier)
    return network, width


def benchmark(settings: Settings) -> Iterator[Row]:
    torch.manual_seed(0)
    names = list(NETWORKS)[: 1 if settings.quick else None]
    for name in names:
        network, width = backbone(name, nn.Identity())
        irm = ClassWiseIRM(width, CLASSES).eval()
        image, features = torch.zeros(1, 3, 224, 224, device="meta"), torch.randn(1, width)
        plain = {"parameters": size(network), "flops": counted(lambda network=network, x=image: network(x))}
        added = counted(lambda irm=irm, f=features: irm.projection(irm.mask(f)))
        work = f"{name} without its classifier, an image of 224 x 224, forward"
        yield {"work": work, "version": name, **plain}
        both = {"parameters": plain["parameters"] + size(irm), "flops": plain["flops"] + added}
        yield {"work": work, "version": "+ mask and projection", **both}

    network, width = backbone(names[0], nn.Linear(512, CLASSES, device="meta"))
    images, labels = torch.zeros(BATCH, 3, 224, 224, device="meta"), torch.arange(BATCH) % CLASSES
    irm = ClassWiseIRM(width, CLASSES).fit_environments(torch.randn(1000, width), torch.arange(1000) % CLASSES)
    features, indices = torch.randn(BATCH, width, requires_grad=True), torch.arange(BATCH)
    plain = counted(lambda: network(images).sum().backward())
    work = f"Step of {names[0]}, {BATCH} images of 224 x 224, {CLASSES} classes, forward + backward"
    yield {"work": work, "version": "cross entropy", "flops": plain}
    added = counted(lambda: irm(features, labels, indices).backward())
    yield {"work": work, "version": "+ ClassWiseIRM", "flops": plain + added}
