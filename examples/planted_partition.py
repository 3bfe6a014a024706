"""What a partition finds: images in two tints that no label tells of, and a little encoder trained by IP-IRM on SimCLR.

The first partition follows the tint, which is what the features hold most; once the loss is invariant over it, the next
partitions have to find something else. Prints how far each agrees with the tint and with the classes (adjusted Rand
index: 1 the same, 0 chance), and draws samples of each group. About a minute on a CPU.

    python examples/planted_partition.py                       # scikit-learn's digits, red and blue
    python examples/planted_partition.py --source cifar10 --data folder-with-class-folders   # warm and cold photographs
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm.auto import tqdm

from equireg import IPIRMLoss, PartitionUpdater

TINTS = {"digits": ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)), "cifar10": ((1.0, 0.75, 0.45), (0.45, 0.75, 1.0))}


def load(source: str, folder: str | None, count: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] in 0 .. 1 and their classes."""
    if source == "digits":
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
        return images, torch.tensor(digits.target)
    steps = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dataset = ImageFolder(Path(folder), steps)
    chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long().tolist()
    images, labels = zip(*(dataset[i] for i in chosen))
    return torch.stack(images), torch.tensor(labels)


def encoder(side: int) -> nn.Module:
    """Three convolutions and a head; the tint passes through unharmed."""

    def block(channels: int, width: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(3, 32), *block(32, 64)] + (block(64, 128) if side > 8 else [])
    width = (128 if side > 8 else 64) * (side // (8 if side > 8 else 4)) ** 2
    head = [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to an eighth, brighter or darker, noisy. Nothing here changes the tint."""
    count, side = len(images), images.shape[-1]
    reach = side // 8
    moves = torch.randint(-reach, reach + 1, (count, 2), generator=generator).tolist()
    moved = torch.stack([image.roll(move, (1, 2)) for image, move in zip(images, moves)])
    brightness = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    return brightness * moved + 0.1 * torch.randn(moved.shape, generator=generator)


def draw(images: Tensor, updater: PartitionUpdater, agreement: list[tuple[float, float]], path: Path) -> None:
    """Samples of both groups of each partition, drawn at random."""
    each, generator = 16, torch.Generator().manual_seed(0)
    partitions = updater.partitions[1:]
    figure, grid = plt.subplots(2 * len(partitions), each, figsize=(0.62 * each + 2.2, 1.3 * len(partitions)))
    for row, axes in enumerate(grid):
        partition, group = divmod(row, 2)
        members = (partitions[partition] == group).nonzero().squeeze(1)
        chosen = members[torch.randperm(len(members), generator=generator)[:each]]
        for one, index in zip(axes, chosen.tolist()):
            one.imshow(images[index].permute(1, 2, 0).numpy())
        for one in axes:
            one.set(xticks=[], yticks=[])
        tint, label = agreement[partition]
        text = f"partition {partition + 1}, group {group + 1}"
        text += f"\n(tint {tint:.2f}, class {label:.2f})" if group == 0 else f"\n{len(members)} samples"
        axes[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=110)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", choices=tuple(TINTS), default="digits")
    data = os.environ.get("EQUIREG_DATA")
    parser.add_argument("--data", default=f"{data}/cifar10/train" if data else None, help="class folders of images")
    parser.add_argument("--images", type=int, default=2000, help="of --data")
    parser.add_argument("--rounds", type=int, default=3, help="each trains, then looks for a partition")
    parser.add_argument("--epochs", type=int, default=10, help="of each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/planted_partition.png"))
    options = parser.parse_args()
    if options.source != "digits" and not options.data:
        parser.error("--source cifar10 needs --data, or EQUIREG_DATA")

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    images, labels = load(options.source, options.data, options.images)
    tint = torch.randint(2, (len(images),), generator=generator)
    images = images * torch.tensor(TINTS[options.source])[tint, :, None, None]

    net = encoder(images.shape[-1])
    updater = PartitionUpdater(len(images), seed=options.seed)
    criterion = IPIRMLoss(updater)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    agreement = []
    for number in range(options.rounds):
        for _ in tqdm(range(options.epochs), desc=f"round {number + 1}", leave=False):
            for batch in torch.randperm(len(images), generator=generator).split(256):
                if len(batch) > 1:
                    loss = criterion(*(net(view(images[batch], generator)) for _ in range(2)), batch)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        with torch.no_grad():
            net.eval()
            z1, z2 = (net(view(images, generator)) for _ in range(2))
            net.train()
        found = updater.update(z1, z2)
        agreement.append((adjusted_rand_score(tint, found), adjusted_rand_score(labels, found)))
        report = updater.reports[-1]
        before = ", ".join(f"{value:.2f}" for value in report.agreement[1:]) or "-"
        print(
            f"partition {number + 1}: groups of {report.group_sizes}, agreement with tint {agreement[-1][0]:.2f}, "
            f"with classes {agreement[-1][1]:.2f}, with partitions before {before}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(images, updater, agreement, options.out)


if __name__ == "__main__":
    main()
