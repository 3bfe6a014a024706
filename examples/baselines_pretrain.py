"""Pretrain a small ViT by SimCLR with one of the methods that the papers compare with, on its last or first block.

    python baselines_pretrain.py --method essl --data folder  # folder/{train,test}/<class>/*.png

The method reads the tokens that one block makes of a third crop of each image, and of this crop turned by any angle.
Three runs from the same weights and views: SimCLR, with the method on its last block, and on its first, in one table.
"""

import argparse
import os
from functools import partial
from itertools import product
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

IMAGE_SIZE, PATCH_SIZE, GRID, WIDTH, DEPTH = 32, 8, (4, 4), 128, 4
BLOCKS = {"last block": f"blocks.{DEPTH - 1}", "first block": "blocks.0"}  # whose tokens a method reads
METHODS = {  # and their weights, which --weight multiplies: E-SSL's and STL's are published, the others' are ours
    "essl": (lambda: equireg.ESSLLoss(WIDTH, hidden_dim=512), 0.4),
    "stl": (lambda: equireg.STLLoss(WIDTH, transformation_dim=32), 1.0),
    "sie": (lambda: equireg.SIELoss(WIDTH, num_parameters=2), 0.04),
    "equimod": (lambda: equireg.EquiModLoss(WIDTH, num_parameters=2), 1.0),
    "augself": (lambda: equireg.AugSelfLoss(WIDTH, {"angle": ("regression", 2)}), 1.0),
    "cross-attention": (lambda: equireg.CrossAttentionReconstruction(WIDTH, image_size=32, patch_size=8), 1.0),
}
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
crop = v2.Compose([v2.RandomResizedCrop(IMAGE_SIZE, (0.2, 1.0)), v2.RandomHorizontalFlip()])
colors = equireg.mocov3_photometric(IMAGE_SIZE)  # of either view of SimCLR, a batch at once
turning = equireg.IntermediateViews("rotation", degrees=180, num_intermediate=1, padding="reflection")
normalize = v2.Normalize([0.5] * 3, [0.25] * 3)


def load(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Random images, uint8 [count, 3, IMAGE_SIZE, IMAGE_SIZE], and their labels."""
    classes = equireg.read_image_folder(folder.parent / "train").classes  # test images are numbered alike
    steps = v2.Compose([v2.Resize(IMAGE_SIZE), v2.CenterCrop(IMAGE_SIZE), v2.PILToTensor()])
    files = equireg.read_image_folder(folder, class_list=classes, transform=steps)
    chosen = files.take(torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count])
    return torch.stack([image for image, _ in tqdm(chosen, str(folder))]), chosen.labels


def tokens_of(vit: nn.Module, layer: str, images: Tensor) -> Tensor:
    with equireg.TokenTap(vit, layer) as tap:
        vit(normalize(images))
    return tap.tokens


def regularizer(method: str, loss, encode: partial, images: Tensor, turned: Tensor, angle: Tensor) -> tuple:
    """What the method asks of the tokens of images, and of the same images turned by the angle, in degrees [B, 1]."""
    if method == "essl":  # all four turns of every fourth image; the paper takes small crops of all
        turns = torch.arange(4, device=device).repeat_interleave(len(images[::4]))
        quarters = equireg.GridTransform(turns, turns < 0, GRID, GRID)
        return loss(encode(quarters.on_images(images[::4].repeat(4, 1, 1, 1), PATCH_SIZE)), turns)
    if method == "stl":  # the other half of the batch turns as the first does; nobody tells how
        (first, others), (first_turned, _) = (x[: len(x) // 2 * 2].chunk(2) for x in (images, turned))
        return loss(*map(encode, (first, first_turned, others, turning.transform(others, angle[: len(others)]))))
    if method == "cross-attention":
        return loss(encode(images), encode(turned), images)
    there, back = (torch.cat([x.deg2rad().cos(), x.deg2rad().sin()], 1) for x in (angle, -angle))
    told = [{"angle": there}, {"angle": back}] if method == "augself" else [there]
    return loss(encode(images), encode(turned), *told)


def train(name: str, images: Tensor, options: argparse.Namespace) -> nn.Module:
    """The ViT; ``name`` is "SimCLR", or the block that the method reads."""
    torch.manual_seed(options.seed)  # the same initial weights in every run
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "num_classes": 0}
    vit = VisionTransformer(IMAGE_SIZE, PATCH_SIZE, **sizes, class_token=False, global_pool="avg").to(device)
    head, simclr = SimCLRProjectionHead(WIDTH, 512, 128).to(device), NTXentLoss(0.2)
    method, weight = METHODS[options.method][0]().to(device), options.weight * METHODS[options.method][1]
    loader = DataLoader(images, options.batch_size, shuffle=True, drop_last=len(images) > options.batch_size)
    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters(), *method.parameters()], options.lr)
    torch.manual_seed(options.seed)  # the same views, which every run draws
    for epoch in range(1, options.epochs + 1):
        for batch in (bar := tqdm(loader, f"{name}, epoch {epoch}")):
            *views, third = (torch.stack([crop(image) for image in batch.to(device) / 255]) for _ in range(3))
            loss = simclr(*(head(vit(normalize(color(view)))) for color, view in zip(colors, views)))
            turned, _, angle = turning(third)
            if name in BLOCKS:
                encode = partial(tokens_of, vit, BLOCKS[name])
                parts = regularizer(options.method, method.parts, encode, third, turned, angle)
                loss = loss + weight * parts.loss  # the one line: loss + weight * method(...)
                bar.set_postfix({k: v.mean().item() for k, v in parts._asdict().items() if torch.is_tensor(v)}, False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return vit.eval()


@torch.no_grad()
def measure(vit: nn.Module, *train_and_test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Accuracy of the frozen features; how often a block tells quarter turns, and how far its tokens turn with them."""
    samples = []
    for images, labels in train_and_test:
        samples += [torch.cat([vit(normalize(x.to(device) / 255)).cpu() for x in images.split(500)]), labels]
    results = {"k-NN, %": 100 * equireg.knn_accuracy(*samples), "linear, %": 100 * equireg.linear_probe(*samples)}
    images = images[:1000].to(device) / 255
    told = equireg.transformation_accuracy(vit, normalize(images).split(250), list(BLOCKS.values()))
    results |= {f"turn told, {name}, %": 100 * told[layer] for name, layer in BLOCKS.items()}
    element = equireg.GridTransform(turns := torch.arange(len(images)) % 3 + 1, turns < 0, GRID, GRID)
    for (name, layer), shuffled in product(BLOCKS.items(), (False, True)):
        score = equireg.equivariance_score(partial(tokens_of, vit, layer), images, element, shuffled=shuffled)
        results[f"equivariance, {name}" + ", other image" * shuffled] = score.mean().item()
    return results


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    accuracy, equivariance = Figure(figsize=(10, 7), layout="constrained").subplots(2, 1)
    for (name, result), marker in zip(results.items(), "osD"):
        style = {"marker": marker, "linestyle": "", "fillstyle": "none", "markersize": 9, "label": name}
        keys, values = [key.replace(", ", "\n") for key in result], list(result.values())
        accuracy.plot(keys[:4], values[:4], **style)
        equivariance.plot(keys[4:], values[4:], **style)
    accuracy.legend()
    accuracy.figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="essl")
    parser.add_argument("--data", type=Path, default=Path(os.getenv("EQUIREG_DATA", "."), "cifar10"))
    for name, value in {"images": 4000, "epochs": 6, "batch-size": 128, "lr": 1e-3, "seed": 0, "weight": 1.0}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/baselines_pretrain"))
    options = parser.parse_args()
    out, results = options.out / options.method, {}
    out.mkdir(parents=True, exist_ok=True)
    train_set, test_set = load(options.data / "train", options.images), load(options.data / "test", 2000)
    for name in ("SimCLR", *BLOCKS):
        results[name] = measure(vit := train(name, train_set[0], options), train_set, test_set)
        torch.save(vit.state_dict(), out / f"{name}.pt")  # timm's own keys
    print(f"\n{options.method:40}" + "".join(f"{name:>14}" for name in results))
    for key in results["SimCLR"]:
        print(f"{key:40}" + "".join(f"{result[key]:14.2f}" for result in results.values()))
    draw(results, out / "baselines.png")


if __name__ == "__main__":
    main()
