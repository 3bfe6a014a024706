"""Pretrain a small ViT by SimCLR with and without soft equivariance regularization (SER), and compare the features.

    python ser_pretrain.py --data folder    # folder/train/<class>/*.png and folder/test/<class>/*.png

A part of each batch is turned, flipped and stretched instead of cropped, and the token map of an early layer has to
turn with it: one line of the training loop below. Three runs from the same weights: SimCLR, with the turned views alone
(SER of weight 0, the control), and with SER. It prints a table; encoders and a picture go to --out.
"""

import argparse
import os
from pathlib import Path

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from matplotlib.figure import Figure
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm

import equireg

IMAGE_SIZE, PATCH_SIZE, WIDTH, DEPTH = 32, 8, 128, 4
LAYER = 1  # SER reads the patch tokens behind it, where the class token enters
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
crop = v2.Compose([v2.RandomResizedCrop(IMAGE_SIZE, (0.2, 1.0)), v2.RandomHorizontalFlip()])
colors = equireg.mocov3_photometric(IMAGE_SIZE)  # of either view, a batch at once; the turned views have them, too
normalize = v2.Normalize([0.5] * 3, [0.25] * 3)


def load(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Random images, uint8 [count, 3, IMAGE_SIZE, IMAGE_SIZE], and their labels."""
    classes = equireg.read_image_folder(folder.parent / "train").classes  # test images are numbered alike
    steps = v2.Compose([v2.Resize(IMAGE_SIZE), v2.CenterCrop(IMAGE_SIZE), v2.PILToTensor()])
    files = equireg.read_image_folder(folder, class_list=classes, transform=steps)
    chosen = files.take(torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count])
    return torch.stack([image for image, _ in tqdm(chosen, str(folder))]), chosen.labels


def train(name: str, images: Tensor, options: argparse.Namespace) -> tuple[nn.Module, list[tuple]]:
    with_views, weight = name != "SimCLR", options.weight if name == "SER" else 0.0
    torch.manual_seed(options.seed)  # the same initial weights in every run
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "num_classes": 0, "dynamic_img_size": True}
    vit = VisionTransformer(IMAGE_SIZE, PATCH_SIZE, **sizes).to(device)
    equireg.LateClassToken(vit, LAYER if with_views else 0)  # hooks the ViT; with 0 it stays as it is
    head = SimCLRProjectionHead(WIDTH, 512, 128).to(device)
    layers = list(range(DEPTH)) if options.layers == "all" else [LAYER - 1]
    ser = equireg.SERLoss(WIDTH, temperature=options.temperature, token_norm=True, layers=len(layers)).to(device)
    simclr, turned_views, losses = NTXentLoss(0.2), equireg.EquivariantViews(IMAGE_SIZE, PATCH_SIZE), []
    loader = DataLoader(images, options.batch_size, shuffle=True, drop_last=len(images) > options.batch_size)
    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters(), *ser.parameters()], options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * len(loader))
    for epoch in range(1, options.epochs + 1):
        for batch in (bar := tqdm(loader, f"{name}, epoch {epoch}")):
            cropped, turned = equireg.split_batch(batch.to(device) / 255, options.ratio if with_views else 0.0)
            views = (color(torch.stack([crop(image) for image in cropped])) for color in colors)
            features = [[vit(normalize(view))] for view in views]  # of each view: of its parts, which differ in size
            if with_views:
                *turned_pair, g1, g2 = turned_views(turned)
                taps = [vit.forward_intermediates(normalize(x), layers, output_fmt="NLC") for x in turned_pair]
                features = [[*of_view, vit.forward_head(last)] for of_view, (last, _) in zip(features, taps)]
            if options.base_loss == "joint":  # one loss over both parts, in which all images count alike
                features = [[torch.cat(of_view)] for of_view in features]
            loss = base = sum(simclr(head(f1), head(f2)) for f1, f2 in zip(*features))  # or the sum, as in Eq. 3
            if with_views:
                parts = ser.parts(taps[0][1], taps[1][1], g1, g2)
                loss = base + weight * parts.loss  # the one line: base + weight * ser(tokens1, tokens2, g1, g2)
                bar.set_postfix({name: f"{part:.3f}" for name, part in parts._asdict().items()}, refresh=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append((base.item(), *([parts.loss.item()] if with_views else [])))
    return vit.eval(), losses


@torch.no_grad()
def measure(vit: nn.Module, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Accuracy of the frozen class tokens, and how far the token map of LAYER turns with the image."""

    def token_map(images: Tensor) -> Tensor:
        return vit.forward_intermediates(normalize(images), [LAYER - 1], output_fmt="NLC", intermediates_only=True)[0]

    def class_tokens(images: Tensor) -> Tensor:  # of the last four blocks, as the paper probes; here all that have one
        images = normalize(images.to(device) / 255)
        _, found = vit.forward_intermediates(images, DEPTH - LAYER, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in found], 1).cpu()

    (x, y), (x_test, y_test) = ((torch.cat([*map(class_tokens, x.split(500))]), y) for x, y in (train_set, test_set))
    results = {"k-NN, %": 100 * equireg.knn_accuracy(x[:, -WIDTH:], y, x_test[:, -WIDTH:], y_test)}  # the last one
    results["linear, %"] = 100 * equireg.linear_probe(x, y, x_test, y_test)
    images, grid = test_set[0][:500].to(device) / 255, 2 * (IMAGE_SIZE // PATCH_SIZE,)
    turns = torch.arange(len(images)) % 3 + 1
    elements = {  # how many quarter turns, whether flipped, from which grid to which
        "quarter turn": equireg.GridTransform(turns, turns < 0, grid, grid),
        "flip": equireg.GridTransform(0 * turns, turns > 0, grid, grid),
        "stretch": equireg.GridTransform(0 * turns, turns < 0, grid, (grid[0] + 1, grid[1])),
    }
    for kind, element in elements.items():
        for key, shuffled in ((kind, False), (f"{kind}, other image", True)):
            results[key] = equireg.equivariance_score(token_map, images, element, shuffled=shuffled).mean().item()
    return results


def draw(results: dict[str, dict[str, float]], losses: dict[str, list[tuple]], path: Path) -> None:
    curves, accuracy, equivariance = Figure((10, 3.6), layout="constrained").subplots(1, 3, width_ratios=(3, 2, 3))
    for (name, result), marker, color in zip(results.items(), "osD", ("C0", "C1", "C2")):
        keys, values = list(result), list(result.values())
        style = {"marker": marker, "linestyle": "", "fillstyle": "none", "markersize": 9, "label": name}
        for curve, line in zip(zip(*losses[name]), ("-", ":")):
            curves.plot(curve, color + line)
        accuracy.plot(keys[:2], values[:2], **style)
        equivariance.plot(keys[2::2], values[2::2], **style)
        equivariance.plot(keys[2::2], values[3::2], "_", color="gray")
    curves.set(xlabel="step", title="losses (dotted: SER's)")
    accuracy.set(title="accuracy", xlim=(-0.5, 1.5), ylim=(0, 100))
    equivariance.set(title="equivariance (gray: other image)", xlim=(-0.5, 2.5), ylim=(0, 1))
    accuracy.legend()
    curves.figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.getenv("EQUIREG_DATA", "."), "cifar10"))
    numbers = {"images": 4000, "epochs": 6, "batch-size": 128, "lr": 1e-3, "seed": 0}
    numbers |= {"weight": 0.5, "temperature": 0.3, "ratio": 0.25}  # of SER; share of the batch with turned views
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default %(default)s")
    parser.add_argument("--layers", choices=("one", "all"), default="one", help="whose maps turn with the image")
    parser.add_argument("--base-loss", choices=("joint", "separate"), default="joint", help="over both parts, or a sum")
    parser.add_argument("--out", type=Path, default=Path("runs/ser_pretrain"))
    options = parser.parse_args()
    train_set, test_set = load(options.data / "train", options.images), load(options.data / "test", 2000)
    options.out.mkdir(parents=True, exist_ok=True)
    results, losses = {}, {}
    for name in ("SimCLR", "views alone", "SER"):
        vit, losses[name] = train(name, train_set[0], options)
        results[name] = measure(vit, train_set, test_set)
        torch.save(vit.state_dict(), options.out / f"{name}.pt")  # timm's keys; but for SimCLR, of a LateClassToken
    print(f"\n{'':28}" + "".join(f"{name:>14}" for name in results))
    for key in results["SER"]:
        print(f"{key:28}" + "".join(f"{result[key]:14.2f}" for result in results.values()))
    draw(results, losses, options.out / "ser.png")


if __name__ == "__main__":
    main()
