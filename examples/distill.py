"""Distil a fine-tuned network into students of the same pretraining (Stage II of the VIPriors recipe).

    python examples/distill.py --data folder-with-train-and-test --checkpoint encoder.pt

The teacher is fine-tuned on a few labelled images per class, then frozen. Students start from the same pretrained
weights and learn from the labels and the teacher: by its logits (``DistillationLoss``), by its maps before the ReLU
(``OverhaulDistillation``) or by contrast (``ContrastiveDistillation``). The control has the students' seed and no
teacher. Then flips and crops of the test images are merged (``predict_tta``), and all models (``ensemble``).
``--checkpoint`` is the ``state_dict`` of a timm ResNet that you pretrained; without one, weights are random.
"""

import argparse
import os
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm

import equireg

METHODS, VIEWS = ("logits", "overhaul", "contrastive"), ("one view", "flip", "ten crops")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TO_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.48, 0.46, 0.41), (0.23, 0.22, 0.23))]


def run(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, pooled features, and the maps before the last ReLU of each stage of a timm ResNet."""
    maps: list[Tensor] = []
    blocks = [stage[-1] for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    relus = [block.act3 if hasattr(block, "act3") else block.act2 for block in blocks]
    hooks = [relu.register_forward_pre_hook(lambda _, x: maps.append(x[0].clone())) for relu in relus]  # works in place
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    for hook in hooks:
        hook.remove()
    return model.get_classifier()(features), features, maps


def pretrained(options: argparse.Namespace, num_classes: int, seed: int) -> nn.Module:
    """The Stage I weights, the same for all, and a new classifier drawn by ``seed``."""
    torch.manual_seed(options.seed)
    model = timm.create_model(options.model, num_classes=0, **options.model_kwargs)
    if options.checkpoint:
        model.load_state_dict(torch.load(options.checkpoint, map_location="cpu", weights_only=True))
    torch.manual_seed(seed)
    model.reset_classifier(num_classes)
    return model.to(DEVICE)


def train(student: nn.Module, teacher: nn.Module | None, method: str, loader: DataLoader, epochs: int, bar: tqdm):
    """Train on the labels and, where ``method`` is one of METHODS, from the teacher. Returns parts of the loss."""
    criterion = equireg.DistillationLoss(beta=None if method == "logits" else 0.0)  # 0: cross entropy alone
    widths = [stage["num_chs"] for stage in student.feature_info][-4:]
    overhaul = equireg.OverhaulDistillation(widths, widths).to(DEVICE)
    contrastive = equireg.ContrastiveDistillation(widths[-1], widths[-1], num_samples=len(loader.dataset)).to(DEVICE)
    if method == "overhaul":
        with torch.random.fork_rng(devices=[]):  # it sees the batches of the others
            overhaul.fit_margins(run(teacher, x.to(DEVICE))[2] for x, _, _ in loader)
    modules, told = nn.ModuleList([student, overhaul, contrastive]), []
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for x, y, idx in loader:
            x, y, idx = x.to(DEVICE), y.to(DEVICE), idx.to(DEVICE)
            logits, features, maps = run(student, x)
            with torch.no_grad():
                goal, goal_features, goal_maps = run(teacher, x) if method in METHODS else (logits, features, maps)
            parts = criterion.parts(logits, goal, y)
            loss = parts.loss  # the one line of "logits": criterion(logits, goal, y)
            if method == "overhaul":
                loss = loss + overhaul(maps, goal_maps)
            if method == "contrastive":
                loss = loss + 0.1 * contrastive(features, goal_features, idx)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        told.append((parts.cross_entropy.item(), parts.divergence.item()))
        bar.set_postfix(zip(("cross entropy", "divergence"), told[-1]), refresh=False)
        bar.update()
    return told


@torch.no_grad()
def predict(model: nn.Module, batches: DataLoader, views: str) -> Tensor:
    """Class probabilities [N, C] of the images as they are, or merged over flips or ten crops."""
    merge = {"flip": {"crops": "flip"}, "ten crops": {"crops": "ten", "merge": "gmean"}}.get(views)
    images = (x.to(DEVICE) for x, _ in batches)
    return torch.cat([equireg.predict_tta(model, x, **merge) if merge else model(x).softmax(1) for x in images]).cpu()


def report(table: dict[str, dict[str, float]], told: list, path: Path) -> None:
    print("\ntest accuracy, %".ljust(28) + "".join(f"{views:>12}" for views in VIEWS))
    for name, row in table.items():
        print(name.ljust(27) + "".join(f"{value:12.1f}" for value in row.values()))
    axes, curves = Figure(figsize=(9, 6.5), layout="constrained").subplots(2, 1)
    curves.semilogy(told, label=("cross entropy", "divergence from the teacher"))
    curves.set(xlabel="epoch", title="DistillationLoss of the first student, in the last batch")
    curves.legend()
    for views, marker in zip(VIEWS, "osD"):
        axes.plot([row[views] for row in table.values()], list(table), marker, label=views)
    axes.set(xlabel="test accuracy, %", ylim=(len(table) - 0.5, -0.5))
    axes.legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=110)
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data, text = os.environ.get("EQUIREG_DATA"), "holds {train,test}/<class>/*; default: $EQUIREG_DATA/cifar10"
    parser.add_argument("--data", type=Path, default=data and Path(data, "cifar10"), required=not data, help=text)
    parser.add_argument("--checkpoint", type=Path, help="of --model without a classifier; default: random weights")
    parser.add_argument("--model", default="resnet18", help="a ResNet of timm")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="a student for each")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="of timm.create_model")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--shots", type=int, default=50, help="labelled images per class")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    options = parser.parse_args()
    crop = [v2.RandomResizedCrop(options.image_size, scale=(0.5, 1)), v2.RandomHorizontalFlip(), v2.RandAugment()]
    images = equireg.read_image_folder(options.data / "train", transform=v2.Compose([*crop, *TO_TENSOR]))
    few = equireg.WithIndex(equireg.k_shot(images, options.shots, seed=options.seed))
    loader = DataLoader(few, min(100, len(few)), shuffle=True, drop_last=True)
    whole = v2.Compose([v2.Resize([options.image_size] * 2), *TO_TENSOR])
    test = equireg.read_image_folder(options.data / "test", class_list=images.classes, transform=whole)
    models, told = {}, {}
    with tqdm(total=(2 + len(options.methods)) * options.epochs, unit="epoch") as bar:
        for name in ("teacher", "control: no teacher", *options.methods):
            bar.set_description(name)
            model = pretrained(options, len(images.classes), options.seed + (name != "teacher"))
            told[name] = train(model, models.get("teacher"), name, loader, options.epochs, bar)
            models[name] = model.eval()
    table: dict[str, dict[str, float]] = {name: {} for name in (*models, "ensemble of all")}
    for views in VIEWS:
        each = [predict(model, DataLoader(test, 250), views) for model in models.values()]
        for row, probabilities in zip(table.values(), [*each, equireg.ensemble(each)]):
            row[views] = 100 * (probabilities.argmax(1) == test.labels).float().mean().item()
    report(table, told[options.methods[0]], options.out / "distill.png")


if __name__ == "__main__":
    main()
