"""IP-IRM finds a planted factor: images have two tints that no label mentions, and a partition separates them.

    python examples/planted_partition.py
    python examples/planted_partition.py --source photographs --data folder-with-train

A small encoder is trained by ``IPIRMLoss``, whose views never change the tint. After each round, ``PartitionUpdater``
divides the images in two groups that the features take for alike. The first partition is expected to follow the tint,
as it dominates the features. From then on the loss must be the same in both groups, so the next partitions have to
follow something else. The table has the agreement of each partition with the tint and with the classes (adjusted Rand
index: 1 is the same, 0 is chance); the picture shows samples of each group.
"""

import argparse
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm.auto import tqdm

from equireg import IPIRMLoss, PartitionUpdater, read_image_folder

TINTS = {"digits": ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)), "photographs": ((1.0, 0.75, 0.45), (0.45, 0.75, 1.0))}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(source: str, folder: Path | None, count: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] in 0 .. 1 and their classes."""
    if source == "digits":
        digits = load_digits()
        images = torch.tensor(digits.images[:count] / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
        return images, torch.tensor(digits.target[:count])
    steps = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dataset = read_image_folder(folder / "train", transform=steps)
    chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long()
    return torch.stack([dataset[i][0] for i in chosen]), dataset.labels[chosen]


def encoder(side: int) -> nn.Module:
    """Convolutions and a projection."""

    def block(channels: int, width: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(3, 32), *block(32, 64)] + (block(64, 128) if side > 8 else [])
    width = (128 if side > 8 else 64) * (side // (8 if side > 8 else 4)) ** 2
    projection = [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32)]
    return nn.Sequential(*layers, nn.Flatten(), *projection)


def view(images: Tensor) -> Tensor:
    """Images moved by up to an eighth, brighter or darker, with noise. The tint stays."""
    reach = images.shape[-1] // 8
    moves = torch.randint(-reach, reach + 1, (len(images), 2)).tolist()
    moved = torch.stack([image.roll(move, (1, 2)) for image, move in zip(images, moves)])
    return (0.6 + 0.8 * torch.rand(len(images), 1, 1, 1)) * moved + 0.1 * torch.randn(moved.shape)


def report(table: list[dict[str, float]], images: Tensor, partitions: Tensor, path: Path) -> None:
    print(f"\n{'adjusted Rand index':20}{'tint':>8}{'classes':>10}{'group sizes':>16}")
    each, rows = 12, []
    for number, (row, partition) in enumerate(zip(table, partitions), start=1):
        sizes = torch.bincount(partition, minlength=2).tolist()
        print(f"partition {number:<10}{row['tint']:8.2f}{row['classes']:10.2f}{' + '.join(map(str, sizes)):>16}")
        for group, size in enumerate(sizes):
            members = (partition == group).nonzero().squeeze(1)
            name = f"partition {number}, group {group + 1}\n({size} samples)"
            rows.append((name, members[torch.randperm(size)[:each]].tolist()))

    figure = Figure(figsize=(0.62 * each + 2.2, 0.65 * len(rows)), layout="tight")
    for (name, chosen), line in zip(rows, figure.subplots(len(rows), each)):
        for axes in line:
            axes.set(xticks=[], yticks=[])
        for axes, index in zip(line, chosen):
            axes.imshow(images[index].permute(1, 2, 0).numpy())
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=tuple(TINTS), default="digits")
    data = os.environ.get("EQUIREG_DATA")
    parser.add_argument("--data", type=Path, default=data and Path(data, "cifar10"), help="holds train/<class>/*")
    parser.add_argument("--images", type=int, default=2000, help="at most")
    parser.add_argument("--rounds", type=int, default=3, help="each trains, then looks for a partition")
    parser.add_argument("--epochs", type=int, default=10, help="of each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/planted_partition"))
    options = parser.parse_args()
    if options.source == "photographs" and not options.data:
        parser.error("--source photographs needs --data, or EQUIREG_DATA")

    torch.manual_seed(options.seed)
    images, labels = load(options.source, options.data, options.images)
    tint = torch.randint(2, (len(images),))
    images = images * torch.tensor(TINTS[options.source])[tint, :, None, None]

    net = encoder(images.shape[-1]).to(DEVICE)
    updater = PartitionUpdater(len(images), seed=options.seed).to(DEVICE)
    criterion = IPIRMLoss(updater)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    table = []
    for number in range(options.rounds):
        for _ in tqdm(range(options.epochs), desc=f"round {number + 1}", unit="epoch"):
            for idx in torch.randperm(len(images)).split(256):
                if len(idx) > 1:
                    z1, z2 = (net(view(images[idx]).to(DEVICE)) for _ in range(2))
                    loss = criterion(z1, z2, idx.to(DEVICE))  # the one line
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        net.eval()
        with torch.no_grad():
            found = updater.update(*(net(view(images).to(DEVICE)) for _ in range(2)))
        net.train()
        agreement = {
            name: adjusted_rand_score(truth, found.cpu()) for name, truth in (("tint", tint), ("classes", labels))
        }
        table.append(agreement)
    report(table, images, updater.partitions[1:].cpu(), options.out / "planted_partition.png")


if __name__ == "__main__":
    main()
