"""Pretrain a small ResNet by SimCLR with and without IP-IRM's partitions, and compare the features.

    python ipirm_pretrain.py --data folder    # folder/train/<class>/*.png and folder/test/<class>/*.png

Before the first epoch and every few epochs from then on, IP-IRM divides the training images into two groups by what the
features still mix up. SimCLR's loss has to be small in both groups by the same similarity: one line of the training
loop below. Three runs start from the same weights and, without --mix, see the same views: SimCLR, IP-IRM with random
partitions (its control), and with those it finds. It prints a table and writes encoders and a picture to --out.
"""

import argparse
import os
from pathlib import Path

import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from equireg import IPIRMLoss, PartitionUpdater, knn_accuracy, linear_probe, mix_images, read_image_folder

BASE, RANDOM, FOUND = RUNS = ("SimCLR", "random partitions", "found partitions")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

load = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
augment = v2.Compose([v2.RandomResizedCrop(32, (0.2, 1.0)), v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2)])


def read_images(folder: Path, count: int) -> TensorDataset:
    """Images [N, 3, 32, 32] and labels, evenly over the folder; a sample's place in it is its index from now on."""
    classes = read_image_folder(folder.parent / "train").classes  # test images are numbered alike
    files = read_image_folder(folder, class_list=classes, transform=load)
    chosen = files.take(torch.linspace(0, len(files) - 1, min(count, len(files))).long())
    return TensorDataset(torch.stack([image for image, _ in tqdm(chosen, str(folder))]), chosen.labels)


def two_views(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each image by a crop and colours of its own."""
    first, second = (torch.stack([augment(image) for image in images]) for _ in range(2))
    return first.to(device), second.to(device)


def train(run: str, images: Tensor, options: argparse.Namespace) -> tuple[nn.Module, list[tuple]]:
    """The trained encoder; in each step the contrast of all images, SimCLR's loss, and the groups' squared slopes."""
    torch.manual_seed(options.seed)  # the same weights, order and views in every run
    resnet = timm.create_model("resnet18", num_classes=0, channels=(32, 64, 128, 256))  # half of its width
    resnet.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=2, padding=1, bias=False)  # for small images
    encoder = nn.Sequential(v2.Normalize([0.5] * 3, [0.25] * 3), resnet)
    model = nn.Sequential(encoder, SimCLRProjectionHead(256, 512, 128)).to(device)
    partitions = PartitionUpdater(len(images), seed=options.seed, keep=options.keep or None)
    how = {"global_penalty": options.global_penalty, "dummy_scales": options.dummy_scales}
    simclr, ipirm = NTXentLoss(temperature=0.5), IPIRMLoss(partitions, weight=options.weight, **how).to(device)
    dataset = TensorDataset(images, torch.arange(len(images)))
    loader = DataLoader(dataset, options.batch_size, shuffle=True, drop_last=len(images) > options.batch_size)
    optimizer = torch.optim.Adam(model.parameters(), options.lr)
    losses = []
    for epoch in range(options.epochs):
        if run != BASE and epoch % options.update_every == 0:
            with torch.random.fork_rng(devices=[]):  # the views of the search are not those of the training
                find_partition(partitions, model, images, run)
        for batch, indices in (bar := tqdm(loader, f"{run}, epoch {epoch + 1}")):
            view1, view2 = two_views(batch)
            mix = None
            if options.mix and run != BASE:  # first views with others of their group
                groups = partitions.partitions[1:, indices.to(partitions.partitions.device)]
                view1, *mix = mix_images(view1, alpha=options.mix, groups=groups)
            z1, z2 = model(view1), model(view2)
            if run == BASE:
                loss = contrast = simclr(z1, z2)
            else:
                parts = ipirm.parts(z1, z2, indices.to(device), mix and tuple(mix))
                loss, contrast = parts.loss, parts.global_risk  # the one line: loss = ipirm(z1, z2, indices)
                shown = map(float, (contrast, *parts.of_groups))  # apart: a partition that joins is no explosion
                bar.set_postfix(zip(("contrast", "groups", "slopes²"), shown), refresh=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((contrast.item(), 0.0 if run == BASE else parts.of_groups[1].item()))
    return encoder.eval(), losses


def find_partition(partitions: PartitionUpdater, model: nn.Module, images: Tensor, run: str) -> None:
    """One more partition joins."""
    if run == RANDOM:
        partitions.add(torch.randint(2, (len(images),)).to(device))
        return
    batches = ((two_views(images[part]), part) for part in torch.arange(len(images)).split(250))
    partitions.update(batches, encoder=model)
    tqdm.write(f"partition {len(partitions.reports)}: {partitions.reports[-1]}")


@torch.no_grad()
def accuracies(encoder: nn.Module, *datasets: TensorDataset) -> dict[str, float]:
    """In percent, of the features before the projection head."""
    samples = []
    for images, labels in (dataset.tensors for dataset in datasets):
        samples += [torch.cat([encoder(part.to(device)).cpu() for part in images.split(500)]), labels]
    return {"k-NN": 100 * knn_accuracy(*samples), "linear": 100 * linear_probe(*samples)}


def draw(table: dict[str, dict[str, float]], losses: dict[str, list[tuple]], path: Path) -> None:
    *curves, bars = Figure(figsize=(10, 3.6), layout="constrained").subplots(1, 3)
    for i, (run, row) in enumerate(table.items()):
        for axes, values in zip(curves, zip(*losses[run])):
            axes.plot(values, label=run)
        bars.bar_label(bars.bar([i, i + 4], row.values(), color=f"C{i}"), fmt="%.1f")
    curves[0].set(xlabel="step", title="contrast of all images")
    curves[1].set(xlabel="step", title="squared slopes of all groups")
    curves[0].legend()
    bars.set_xticks([1, 5], ["k-NN", "linear"])
    bars.set(title="accuracy, %")
    bars.figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.getenv("EQUIREG_DATA", "."), "cifar10"))
    for name, value in {"images": 4000, "epochs": 6, "batch-size": 128, "lr": 1e-3, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default %(default)s")
    parser.add_argument("--keep", type=int, default=0, help="newest partitions that count; 0: all")
    parser.add_argument("--mix", type=float, default=0.0, help="alpha of mixup within the groups; 0: unmixed")
    parser.add_argument("--weight", type=float, default=0.2, help="of the squared slopes")
    parser.add_argument("--update-every", type=int, default=3, help="epochs from one partition to the next")
    parser.add_argument("--global-penalty", action="store_true", help="of all images as one group, too (the paper)")
    parser.add_argument("--dummy-scales", choices=("one", "logits"), default="one", help="logits: as released")
    parser.add_argument("--out", type=Path, default=Path("runs/ipirm_pretrain"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    training, test = read_images(options.data / "train", options.images), read_images(options.data / "test", 2000)
    table, losses = {}, {}
    for run in RUNS:
        encoder, losses[run] = train(run, training.tensors[0], options)
        table[run] = accuracies(encoder, training, test)
        torch.save(encoder[1].state_dict(), options.out / f"{run}.pt")
    print(f"\n{'accuracy, %':20}{'k-NN':>10}{'linear':>10}")
    for run, row in table.items():
        print(f"{run:20}{row['k-NN']:10.1f}{row['linear']:10.1f}")
    draw(table, losses, options.out / "ipirm.png")
    print(f"\n{options.out / 'ipirm.png'}")


if __name__ == "__main__":
    main()
