"""A class-wise IRM step, against loops over the classes that build the table of environments anew for each."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from equireg import ClassWiseIRM
from tests.benchmarks.measure import Row, Runs, Settings, compare

PER_CLASS, WIDTH, TEMPERATURE, WEIGHT = 50, 128, 0.1, 10.0


def environment_table(members, num_samples):
    """Who is in which environment of one class, [N, 2]; samples of the class itself are in both."""
    table = torch.ones(num_samples, 2, device=members[0].device)
    table[members[0], 1] = 0
    table[members[1], 0] = 0
    return table


def supervised_contrast(z, own, w):
    """A supervised contrastive loss as it is commonly released: all similarities, two masks, one log of a sum."""
    logits = w * (z @ z.T) / TEMPERATURE
    logits = logits - logits.max(1, keepdim=True).values.detach()
    positive = own[:, None] & own[None, :] & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    negative = own[:, None] & ~own[None, :]
    log_prob = logits - (logits.exp() + (logits.exp() * negative).sum(1, keepdim=True)).log()
    return -((log_prob * positive).sum(1)[own] / positive.sum(1)[own]).mean()


def penalized(risks, scales, penalty):
    both = torch.stack(risks)
    if penalty == "rex":
        return both.sum() + WEIGHT * both.var(unbiased=True)
    slopes = [torch.autograd.grad(risk, w, create_graph=True)[0] for risk, w in zip(risks, scales)]
    return both.sum() + WEIGHT * torch.stack(slopes).square().sum()


def released_loop(z, labels, indices, members, num_samples, penalty):
    """For each class of the batch the table [N, 2] anew, then the contrastive loss on the samples of each part."""
    z = F.normalize(z, dim=1)
    losses = []
    for k in labels.unique().tolist():
        table = environment_table(members[k], num_samples)
        if (labels == k).sum() < 2:
            continue
        risks, scales = [], [torch.ones((), device=z.device, requires_grad=True) for _ in range(2)]
        for e in (0, 1):
            inside = table[indices, e].bool().nonzero().squeeze(1)
            risks.append(supervised_contrast(z[inside], labels[inside] == k, scales[e]))
        losses.append(penalized(risks, scales, penalty))
    return torch.stack(losses).mean()


def lean_loop(z, labels, indices, members, num_samples, penalty):
    """The same loop with only the rows of the anchors: what a careful person writes before giving the loop up."""
    z = F.normalize(z, dim=1)
    losses = []
    for k in labels.unique().tolist():
        table = environment_table(members[k], num_samples)
        anchors = (labels == k).nonzero().squeeze(1)
        if len(anchors) < 2:
            continue
        others = ~torch.eye(len(anchors), dtype=torch.bool, device=z.device)
        risks, scales = [], [torch.ones((), device=z.device, requires_grad=True) for _ in range(2)]
        for w, inside in zip(scales, table[indices].bool().unbind(1)):
            negatives = (inside & (labels != k)).nonzero().squeeze(1)
            positive = w * (z[anchors] @ z[anchors].T) / TEMPERATURE
            negative = (w * (z[anchors] @ z[negatives].T) / TEMPERATURE).exp().sum(1, keepdim=True)
            log_prob = positive - (positive.exp() + negative).log()
            risks.append(-((log_prob * others).sum(1) / (len(anchors) - 1)).mean())
        losses.append(penalized(risks, scales, penalty))
    return torch.stack(losses).mean()


def title(penalty: str) -> str:
    return f"Class-wise IRM step ({penalty}), a batch of 2 and a dataset of {PER_CLASS} samples a class"


def steps(classes: int, penalty: str, settings: Settings) -> Runs:
    """Forward and backward pass of each version, which first are checked to compute the same."""
    torch.manual_seed(0)
    num_samples = classes * PER_CLASS
    features, labels = torch.randn(num_samples, WIDTH), torch.arange(num_samples) % classes
    features, labels = features.to(settings.device), labels.to(settings.device)
    irm = ClassWiseIRM(WIDTH, classes, weight=WEIGHT, penalty=penalty, projection=nn.Identity(), detach=False).to(
        settings.device
    )
    irm.fit_environments(features, labels)
    nn.init.zeros_(irm.mask.weight)  # the same factor everywhere, which the normalisation takes out
    members = [irm.environments.members(k) for k in range(classes)]

    # Two views of one image of each class.
    indices = (torch.randperm(PER_CLASS)[0] * classes + torch.arange(classes).repeat(2)).to(settings.device)
    noise = torch.randn(2 * classes, WIDTH).to(settings.device)
    z = (features[indices] + noise).requires_grad_()
    arguments = (z, labels[indices], indices, members, num_samples, penalty)
    versions = {
        "loop over classes, as released": lambda: released_loop(*arguments),
        "loop over classes, anchors only": lambda: lean_loop(*arguments),
        "ClassWiseIRM": lambda: irm(*arguments[:3]),
    }

    def step(version):
        z.grad = None
        loss = version()
        loss.backward()
        return loss.detach(), z.grad

    expected = step(versions["loop over classes, as released"])
    for version in versions.values():
        for got, value in zip(step(version), expected):
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-5)
    return {name: lambda v=version: step(v) for name, version in versions.items()}


def benchmark(settings: Settings) -> Iterator[Row]:
    sizes = (3, 4, 5, 5) if settings.quick else (50, 100, 200, 200)
    for classes, penalty in zip(sizes, ("rex", "rex", "rex", "irmv1")):
        yield from compare(title(penalty), steps(classes, penalty, settings), settings, size=classes, unit="classes")
