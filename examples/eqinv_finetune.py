"""Fine-tune a network on a few labelled images per class: by cross entropy, and with EqInv's one line beside it.

    python examples/eqinv_finetune.py --data folder-with-train-and-test --checkpoint encoder.pt

Each run draws its labelled images, and trains three times from the same weights and on the same batches: by cross
entropy alone; with ``ClassWiseIRM`` on the environments that it finds in the features; and, as the control, with
``ClassWiseIRM`` on random environments. If the control does as well, the environments found did not help. All three
classify masked, normalised features, so only the loss differs. ``--checkpoint`` is the ``state_dict`` of a timm model
that you pretrained. Without one, weights are random, and the line joins after a third of the epochs.
"""

import argparse
import os
import statistics
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from equireg import ClassWiseIRM, Environments, FeatureMask, WithIndex, extract_features, k_shot, read_image_folder

PLAIN, EQINV, RANDOM = ARMS = ("cross entropy", "+ ClassWiseIRM", "+ random environments")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def images_of(options: argparse.Namespace, part: str, augment: bool = False) -> Dataset:
    size = options.image_size
    crop = [v2.RandomResizedCrop(size, (0.3, 1)), v2.RandomHorizontalFlip()] if augment else [v2.Resize([size] * 2)]
    normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = v2.Compose([*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize])
    classes = read_image_folder(options.data / "train").classes  # test images are numbered alike
    return read_image_folder(options.data / part, class_list=classes, transform=transform)


def train(options: argparse.Namespace, arm: str, seed: int, bar: tqdm) -> tuple[float, Environments, list]:
    """Fine-tune once: the test accuracy in percent, the environments, and the parts of the loss by epoch."""
    torch.manual_seed(seed)
    # An index is a place among the images that the seed draws. The same seed draws the same images.
    augmented, plain = (
        WithIndex(k_shot(images_of(options, "train", augment), options.shots, seed=seed)) for augment in (True, False)
    )
    backbone = timm.create_model(options.model, num_classes=0, **options.model_kwargs)
    if options.checkpoint:
        backbone.load_state_dict(torch.load(options.checkpoint, map_location="cpu", weights_only=True))
    width, num_classes = backbone.num_features, len(plain.classes)
    head = nn.Linear(width, num_classes)
    irm = ClassWiseIRM(width, num_classes, weight=options.weight)
    irm.mask = FeatureMask(width, scale=10.0)  # 10 * normalize(mask * features)
    modules = nn.ModuleList([backbone, head, irm]).to(DEVICE)

    loader = DataLoader(augmented, min(options.batch_size, len(augmented)), shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(loader))
    start, told = 0 if options.checkpoint else options.epochs // 3, []
    for epoch in range(options.epochs):
        if epoch == start:
            features, labels, idx = extract_features(backbone, DataLoader(plain, 250), progress=False)
            if arm == RANDOM:
                features = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
            irm.fit_environments(features, labels, idx)
        for x, y, idx in loader:
            x, y, idx = x.to(DEVICE), y.to(DEVICE), idx.to(DEVICE)
            f = backbone(x)
            loss = F.cross_entropy(head(irm.mask(f)), y)
            if epoch >= start and arm != PLAIN:
                parts = irm.parts(f, y, idx)
                loss = loss + parts.loss  # the one line: loss + irm(f, y, idx)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch >= start and arm != PLAIN:
            told.append((parts.risk.mean().item(), parts.penalty.mean().item()))
            bar.set_postfix(zip(("risk", "penalty"), told[-1]), refresh=False)
        bar.update()

    modules.eval()
    test = DataLoader(images_of(options, "test"), 250)
    with torch.no_grad():  # the classifier sees features through the mask here too
        answers = [(head(irm.mask(backbone(x.to(DEVICE)))).argmax(1).cpu(), y) for x, y in test]
    right = torch.cat([predicted == y for predicted, y in answers])
    return 100 * right.float().mean().item(), irm.environments, told


def shares(environments: Environments) -> Tensor:
    """[C, C]: the share of each class (column) in Env#1 of each class (row); a half where only context decides."""
    classes = torch.arange(environments.num_classes)
    member = F.one_hot(environments.labels, len(classes)).float()
    first = environments.similar(classes, torch.arange(environments.num_samples)).float()
    return (first @ member / member.sum(0)).fill_diagonal_(float("nan"))


def report(table: dict[str, list[float]], environments: Environments, told: list, path: Path) -> None:
    print(f"\n{'test accuracy, %':24}{'mean':>8}{'gain':>8}    runs")
    for arm, values in table.items():
        mean, gain = statistics.mean(values), statistics.mean(values) - statistics.mean(table[PLAIN])
        print(f"{arm:24}{mean:8.1f}{gain:+8.1f}    {'  '.join(f'{value:.1f}' for value in values)}")

    left, right, middle = Figure((10, 6), layout="constrained").subplot_mosaic("AC;BC", width_ratios=(4, 3)).values()
    for run in zip(*table.values()):
        left.plot(ARMS, run, "o-")
    left.set(ylabel="test accuracy, %", xmargin=0.2, title="each line: one draw of labelled images")
    middle.semilogy(told, label=("risk", "penalty"))
    middle.set(xlabel="epoch with the line", title="parts of ClassWiseIRM, in the last batch")
    middle.legend()
    grid = right.imshow(shares(environments.cpu()).numpy(), vmin=0, vmax=1, cmap="coolwarm")
    right.set(xlabel="class", ylabel="anchor class", title="share of a class in Env#1 of the anchor")
    right.figure.colorbar(grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    left.figure.savefig(path, dpi=110)
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data, images = os.environ.get("EQUIREG_DATA"), "holds {train,test}/<class>/*; default: $EQUIREG_DATA/cifar10"
    parser.add_argument("--data", type=Path, default=data and Path(data, "cifar10"), required=not data, help=images)
    parser.add_argument("--checkpoint", type=Path, help="of --model without a classifier; default: random weights")
    parser.add_argument("--model", default="resnet18", help="any of timm")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="of timm.create_model")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--shots", type=int, default=20, help="labelled images per class")
    parser.add_argument("--weight", type=float, default=10.0, help="of the penalty")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--runs", type=int, default=3, help="how many seeds, from --seed on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/eqinv_finetune"))
    options = parser.parse_args()

    table, found = {arm: [] for arm in ARMS}, {}
    with tqdm(total=options.runs * len(ARMS) * options.epochs, unit="epoch") as bar:
        for seed in range(options.seed, options.seed + options.runs):
            for arm in ARMS:
                bar.set_description(f"seed {seed}, {arm}")
                accuracy, *found[arm] = train(options, arm, seed, bar)
                table[arm].append(accuracy)
    report(table, *found[EQINV], options.out / "eqinv_finetune.png")


if __name__ == "__main__":
    main()
