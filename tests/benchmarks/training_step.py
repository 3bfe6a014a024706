"""What one loss line adds to a training step: ResNet-18, batch 128, 64 x 64, with and without ``ClassWiseIRM``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from equireg import ClassWiseIRM
from tests.benchmarks.measure import medians

CLASSES, BATCH, SIZE = 50, 128, 64


def benchmark(repeats: int, threads: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    backbone, head = resnet18(), nn.Linear(512, CLASSES)
    backbone.fc = nn.Identity()
    irm = ClassWiseIRM(512, CLASSES).fit_environments(torch.randn(2500, 512), torch.arange(2500) % CLASSES)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))
    indices = torch.randint(2500 // CLASSES, (BATCH,)) * CLASSES + labels
    plain = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=1e-3, momentum=0.9)
    added = torch.optim.SGD([*backbone.parameters(), *head.parameters(), *irm.parameters()], lr=1e-3, momentum=0.9)

    def cross_entropy():
        plain.zero_grad()
        F.cross_entropy(head(backbone(images)), labels).backward()
        plain.step()

    def with_irm():
        added.zero_grad()
        features = backbone(images)
        loss = F.cross_entropy(head(irm.mask(features)), labels) + irm(features, labels, indices)
        loss.backward()
        added.step()

    work = f"training step, ResNet-18, batch {BATCH}, {SIZE} x {SIZE}, {CLASSES} classes"
    seconds = medians({"cross entropy": cross_entropy, "+ ClassWiseIRM": with_irm}, repeats)
    return [{"work": work, "version": name, "seconds": value} for name, value in seconds.items()]
