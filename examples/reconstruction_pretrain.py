"""Pretrain a small ViT by VICReg with and without transformed image reconstruction, and compare what its features keep.

    python reconstruction_pretrain.py --data folder    # folder/train/<class>/*.png and folder/test/<class>/*.png

VICReg makes two views alike, and so forgets how they were turned, moved or coloured. With the reconstruction head,
tokens are mapped to twice their width; one half is left to VICReg, and from the other weak decoders rebuild the images
half-way to the second view: one line of the training loop below. Both runs start from the same weights and see the same
views. It prints how well each transformation can be read from the frozen features; encoders and a picture go to --out.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from matplotlib.figure import Figure
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm

import equireg

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
SIGMA = (0.1, 1.0)  # of the blur, in pixels
normalize = v2.Normalize(MEAN, STD)
colors = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(0.2)]
augment = v2.Compose([v2.RandomResizedCrop(32, scale=(0.5, 1.0)), v2.RandomHorizontalFlip(), *colors])


def read(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """So many images, drawn at random, in 0 .. 1, [N, 3, 32, 32], and their labels."""
    classes = equireg.read_image_folder(folder.parent / "train").classes  # test images are numbered alike
    steps = v2.Compose([v2.PILToTensor(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, True)])
    files = equireg.read_image_folder(folder, class_list=classes, transform=steps)
    chosen = files.take(torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count])
    return torch.stack([image for image, _ in tqdm(chosen, str(folder))]), chosen.labels


def tokens_of(vit: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens [B, 16, 128], without the class token."""
    return vit.forward_features(normalize(images))[:, 1:]


def train(with_head: bool, images: Tensor, options: argparse.Namespace) -> tuple[nn.Module, list[tuple]]:
    """The trained ViT, and of each step VICReg's loss, and that of the reconstruction."""
    torch.manual_seed(options.seed)  # the same weights at first
    vit = VisionTransformer(32, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=0).to(device)
    # The linear head leaves VICReg its width; 0 splits the tokens themselves. Errors are in units of pixels' variance.
    shape = {"image_size": 32, "patch_size": 8, "num_images": options.num_images, "head_dim": options.head_dim or None}
    head = equireg.IntermediateReconstructionHead(128, **shape, mean=MEAN, std=STD).to(device)
    projector = VICRegProjectionHead(head.invariant_dim if with_head else 128, 512, 512).to(device)
    # VICReg's weights of 25 : 25 : 1, on a scale where a second loss of weight 1 counts.
    vicreg, losses = VICRegLoss(lambda_param=1.0, mu_param=1.0, nu_param=0.04), []
    how = {"num_intermediate": options.num_images, "reconstruct": options.reconstruct, "sigma": SIGMA}
    path = equireg.IntermediateViews("all", **how)

    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters(), *projector.parameters()], options.lr)
    loader = DataLoader(images, options.batch_size, shuffle=True, drop_last=len(images) > options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * len(loader))
    torch.manual_seed(options.seed)  # the same views in the same order
    for epoch in range(1, options.epochs + 1):
        for batch in (bar := tqdm(loader, f"{'with' if with_head else 'without'} reconstruction, epoch {epoch}")):
            view1, view2 = (torch.stack([augment(image) for image in batch.to(device)]) for _ in range(2))
            _, targets, parameters = path(view1)  # what lies half-way, and what each image undergoes
            view2 = path.transform(view2, parameters)  # all of it, on top of the second view
            invariant1, invariant2 = tokens_of(vit, view1), tokens_of(vit, view2)
            if with_head:
                (invariant1, equivariant1), (invariant2, equivariant2) = map(head.split, (invariant1, invariant2))
            loss = base = vicreg(projector(invariant1.mean(1)), projector(invariant2.mean(1)))
            if with_head:
                parts = head.parts(equivariant1, equivariant2, targets)
                loss = base + options.weight * parts.loss  # the one line: head(equivariant1, equivariant2, targets)
                bar.set_postfix(errors=[f"{error:.3f}" for error in parts.errors], refresh=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append((base.item(), *([parts.loss.item()] if with_head else [])))
    return vit.eval(), losses


@torch.no_grad()
def measure(vit: nn.Module, pairs: Tensor, *train_and_test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """R² of each kind of transformation from the features of an image and its view, and accuracy."""

    def quarters(images: Tensor) -> Tensor:  # the means over the four quarters of the map: they tell places
        return F.adaptive_avg_pool2d(tokens_of(vit, images).mT.unflatten(2, (4, 4)), 2).flatten(1)

    results = {}
    for kind in ("rotation", "translation", "color", "blur"):
        views, generator = equireg.IntermediateViews(kind, sigma=SIGMA), torch.Generator().manual_seed(0)
        found = equireg.extract_view_features(quarters, pairs.split(500), views, generator=generator)
        results[f"R², {kind}"] = equireg.transformation_r2(*found, hidden_dim=256, epochs=50).mean().item()
    samples = []
    for images, labels in train_and_test:  # the mean over all patches
        samples += [torch.cat([tokens_of(vit, part.to(device)).mean(1).cpu() for part in images.split(500)]), labels]
    results["k-NN, %"] = 100 * equireg.knn_accuracy(*samples)
    results["linear, %"] = 100 * equireg.linear_probe(*samples)
    return results


def draw(results: dict[str, dict[str, float]], losses: dict[str, list[tuple]], path: Path) -> None:
    curves, r2, accuracy = Figure(figsize=(10, 3.6), layout="constrained").subplots(1, 3, width_ratios=(3, 3, 2))
    for i, (name, result) in enumerate(results.items()):
        for curve, line in zip(zip(*losses[name]), ("-", ":")):
            curves.plot(curve, f"C{i}{line}", label=name if line == "-" else "")
        for axes, keys in ((r2, list(result)[:-2]), (accuracy, list(result)[-2:])):
            bars = axes.bar([j + 0.4 * i for j in range(len(keys))], [result[key] for key in keys], 0.38)
            axes.bar_label(bars, fmt="%.3g", fontsize=9)
            axes.set_xticks([j + 0.2 for j in range(len(keys))], [key.removeprefix("R², ") for key in keys])
    curves.set(xlabel="step", title="losses (dotted: reconstruction)", yscale="log")
    curves.legend()
    r2.set(title="R² of the transformation")
    curves.figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.getenv("EQUIREG_DATA", "."), "cifar10"))
    numbers = {"images": 4000, "epochs": 6, "batch-size": 64, "lr": 1e-3, "seed": 0, "num-images": 2, "head-dim": 256}
    numbers["pairs"] = 10_000  # images to regress transformations on
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default %(default)s")
    parser.add_argument("--weight", type=float, default=1.0, help="of the reconstruction loss")
    parser.add_argument("--reconstruct", default="se2", help="what the images half-way undergo; the view undergoes all")
    parser.add_argument("--out", type=Path, default=Path("runs/reconstruction_pretrain"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    every = read(options.data / "train", max(options.images, options.pairs))
    train_set, pairs = [part[: options.images] for part in every], every[0][: options.pairs]
    test_set, results, losses = read(options.data / "test", 2000), {}, {}
    for name in ("without", "with reconstruction"):
        vit, losses[name] = train(name != "without", train_set[0], options)
        results[name] = measure(vit, pairs, train_set, test_set)
        torch.save(vit.state_dict(), options.out / f"{name}.pt")  # timm's own keys
    print(f"\n{'':20}{'without':>12}{'with reconstruction':>22}")
    for key, value in results["without"].items():
        print(f"{key:20}{value:12.2f}{results['with reconstruction'][key]:22.2f}")
    draw(results, losses, options.out / "reconstruction.png")
    print(f"\n{options.out / 'reconstruction.png'}")


if __name__ == "__main__":
    main()
