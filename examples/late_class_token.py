"""Let the class token of a vision transformer enter late, and measure which layers turn with the image.

    python examples/late_class_token.py --data folder-with-train-and-test

``LateClassToken`` takes a timm ViT as it is, and its first blocks see patches alone. The example shows three things:

- The wrapped model has the ``state_dict`` of the model: a checkpoint of either loads into the other.
- The token maps turn exactly with the image if tokens do not know their positions and the patch embedding is symmetric
  under quarter turns. This holds with an early and with a late class token: attention treats all patches alike.
- Two ViTs start from the same weights and are trained by cross entropy, one with an early class token (``layer=0``) and
  one with a late one. The table has their accuracies, and the ``equivariance_score`` of each layer for quarter turns
  beside the score with another image, which needs no equivariance.

``--checkpoint`` is the ``state_dict`` of a timm ViT that you pretrained; ``--epochs 0`` measures without training.
"""

import argparse
import os
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm

from equireg import GridTransform, LateClassToken, TokenTap, equivariance_score, k_shot, read_image_folder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def vit(options: argparse.Namespace, num_classes: int = 0) -> nn.Module:
    """A timm ViT, with the same weights at each call."""
    torch.manual_seed(options.seed)
    size = {"num_classes": 0, "img_size": options.image_size, "patch_size": options.patch_size}
    model = timm.create_model(options.model, **size, **options.model_kwargs)
    if options.checkpoint:
        model.load_state_dict(torch.load(options.checkpoint, map_location="cpu", weights_only=True))
    model.reset_classifier(num_classes)
    return model.to(DEVICE)


def make_exact(model: nn.Module) -> nn.Module:
    """Forget positions, and average the patch embedding over quarter turns."""
    kernel = model.patch_embed.proj.weight.data
    kernel.copy_(sum(kernel.rot90(turns, (2, 3)) for turns in range(4)) / 4)
    model.pos_embed.data.zero_()
    return model


def scores_by_layer(model: nn.Module, images: Tensor, patch_size: int) -> tuple[list[float], list[float]]:
    """The equivariance of every layer for quarter turns, and the same with another image."""
    grid, turns = (images.shape[-1] // patch_size,) * 2, 1 + torch.arange(len(images)) % 3
    transform = GridTransform(turns, torch.zeros(len(images), dtype=torch.bool), grid, grid)
    scores: tuple[list[float], list[float]] = ([], [])
    for layer in ("patch_embed", *(f"blocks.{block}" for block in range(len(model.vit.blocks)))):

        def encode(views: Tensor, layer: str = layer) -> Tensor:
            with TokenTap(model.vit, layer) as tap:
                model(views)
            return tap.tokens

        for other, column in enumerate(scores):
            column.append(equivariance_score(encode, images, transform, shuffled=bool(other)).mean().item())
    return scores


def train(model: nn.Module, loader: DataLoader, epochs: int, bar: tqdm) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(DEVICE)), y.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bar.update()


def report(scores: dict[str, tuple[list[float], list[float]]], accuracies: dict[str, float], path: Path) -> None:
    print("\nequivariance".ljust(22) + "".join(f"{name:>24}{'other image':>14}" for name in scores))
    for layer, row in enumerate(zip(*(column for pair in scores.values() for column in pair))):
        print(f"layer {layer}".ljust(21) + "".join(f"{v:{14 if i % 2 else 24}.3f}" for i, v in enumerate(row)))
    print("test accuracy, %".ljust(21) + "".join(f"{value:24.1f}{'':14}" for value in accuracies.values()))
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for color, (name, (own, other)) in enumerate(scores.items()):
        left.plot(own, "o-", color=f"C{color}", label=name)
        left.plot(other, ":", color=f"C{color}")
    left.set(xlabel="layer", ylabel="equivariance", title="quarter turns (dotted: with another image)")
    left.legend()
    bars = right.bar(list(accuracies), list(accuracies.values()), color=["C0", "C1"])
    right.bar_label(bars, fmt="%.1f")
    right.set(ylabel="test accuracy, %", ymargin=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("EQUIREG_DATA")
    images = "holds train/<class>/* and test/<class>/*; default: $EQUIREG_DATA/cifar10"
    parser.add_argument("--data", type=Path, default=data and Path(data, "cifar10"), required=not data, help=images)
    parser.add_argument("--checkpoint", type=Path, help="of --model without a classifier; default: random weights")
    parser.add_argument("--model", default="test_vit", help="a ViT of timm; the default is its smallest")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="of timm.create_model")
    parser.add_argument("--layer", type=int, default=3, help="blocks before the class token enters")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--shots", type=int, default=200, help="training images per class")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/late_class_token"))
    options = parser.parse_args()

    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.25,) * 3)]
    crop = [v2.RandomResizedCrop(options.image_size, scale=(0.5, 1)), v2.RandomHorizontalFlip()]
    train_images = read_image_folder(options.data / "train", transform=v2.Compose([*crop, *tensor]))
    few = k_shot(train_images, options.shots, seed=options.seed)
    resized = v2.Compose([v2.Resize([options.image_size] * 2), *tensor])
    test = read_image_folder(options.data / "test", class_list=train_images.classes, transform=resized)
    measured = torch.stack([test[i][0] for i in range(0, len(test), 1 + len(test) // 150)]).to(DEVICE)

    plain, wrapped = (model.state_dict() for model in (vit(options), LateClassToken(vit(options), options.layer)))
    same = plain.keys() == wrapped.keys() and all(torch.equal(plain[key], wrapped[key]) for key in plain)
    print(f"state_dict of the ViT and of the wrapped ViT: {'the same' if same else 'different'}, {len(plain)} tensors")
    scores, accuracies = {}, {}
    with tqdm(total=2 * options.epochs, unit="epoch") as bar:
        for name, layer in (("early", 0), ("late", options.layer)):
            exact = LateClassToken(make_exact(vit(options)), layer).eval()
            lowest = min(scores_by_layer(exact, measured, options.patch_size)[0])
            tqdm.write(f"{name}, no positions, symmetric patches: equivariance of at least {lowest:.6f} in every layer")
            model = LateClassToken(vit(options, len(few.classes)), layer)
            bar.set_description(f"class token {name}")
            train(model, DataLoader(few, 100, shuffle=True), options.epochs, bar)
            with torch.no_grad():
                right = [model.eval()(x.to(DEVICE)).argmax(1).cpu() == y for x, y in DataLoader(test, 250)]
            accuracies[name] = 100 * torch.cat(right).float().mean().item()
            scores[name] = scores_by_layer(model, measured, options.patch_size)
    report(scores, accuracies, options.out / "late_class_token.png")


if __name__ == "__main__":
    main()
