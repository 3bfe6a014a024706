"""What one line adds to a training step: ResNet-18, batch 128, 64 x 64; the weights of a batch, ``ClassWiseIRM``."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from equireg import ClassWiseIRM
from tests.benchmarks.measure import Row, Settings, compare

CLASSES = 50


def benchmark(settings: Settings) -> Iterator[Row]:
    torch.manual_seed(0)
    batch, side = (8, 32) if settings.quick else (128, 64)
    backbone, head = resnet18(), nn.Linear(512, CLASSES)
    backbone.fc = nn.Identity()
    irm = ClassWiseIRM(512, CLASSES).fit_environments(torch.randn(2500, 512), torch.arange(2500) % CLASSES)
    nn.ModuleList([backbone, head, irm]).to(settings.device)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(CLASSES, (batch,))
    labels[1] = labels[0]  # a class has a risk from two samples on
    indices = torch.randint(2500 // CLASSES, (batch,)) * CLASSES + labels
    images, labels, indices = (part.to(settings.device) for part in (images, labels, indices))
    plain = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=1e-3, momentum=0.9)
    added = torch.optim.SGD([*backbone.parameters(), *head.parameters(), *irm.parameters()], lr=1e-3, momentum=0.9)

    def cross_entropy():
        plain.zero_grad()
        F.cross_entropy(head(backbone(images)), labels).backward()
        plain.step()

    def with_weights():
        plain.zero_grad()
        losses = F.cross_entropy(head(backbone(images)), labels, reduction="none")
        (irm.environments.weights(indices) * losses).mean().backward()
        plain.step()

    def with_irm():
        added.zero_grad()
        features = backbone(images)
        loss = F.cross_entropy(head(irm.mask(features)), labels) + irm(features, labels, indices)
        loss.backward()
        added.step()

    work = f"Training step, ResNet-18, batch {batch}, {side} x {side}, {CLASSES} classes"
    runs = {
        "cross entropy": cross_entropy,
        "+ weights": with_weights,
        "+ ClassWiseIRM": with_irm,
        "the weights alone": lambda: irm.environments.weights(indices),
    }
    yield from compare(work, runs, settings)
