"""Self-supervised pretraining of a ViT with and without transformed image reconstruction: VICReg, DINO, iBOT, DINOv2.

The regularizer is the line

    loss = ssl(invariant1, invariant2) + weight * head(equivariant1, equivariant2, targets)

where the second view is the first one turned, moved, recoloured and blurred, and ``head`` rebuilds the images on the
way there from one half of the features, without being told the way. Run it with

    python examples/reconstruction_pretrain.py --data folder-with-train-and-test

which trains a ViT-Tiny three times, without the head and with 1 and 2 intermediate images, and compares them: how well
each parameter of the transformation is read off the frozen features (R²), k-NN and linear accuracy; a table, and two
pictures in runs/reconstruction. ``--head 2`` trains once. Several processes: ``torchrun --nproc-per-node 2
examples/reconstruction_pretrain.py ...``. The paper's setting: ``--recipe imagenet-vits16``. A killed run goes on with
``--resume``. Copy ssl_methods.py and the folder training along with this file.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
from ssl_methods import METHODS
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.transforms import v2
from training import (
    MEAN,
    STD,
    as_program,
    averaged,
    evenly,
    folder_images,
    load_safely,
    parse,
    plain_transform,
    precision,
    run_training,
    save_atomically,
    seed_everything,
    test_folder,
)

from equireg import (
    IntermediateReconstructionHead,
    IntermediateViews,
    WithIndex,
    extract_features,
    extract_view_features,
    knn_accuracy,
    linear_probe,
    transformation_accuracy,
    transformation_r2,
)

RECIPES: dict[str, dict[str, Any]] = {
    # Minutes on a CPU: a ViT-Tiny with patches of 8 pixels, as many steps count for more than small patches.
    "cifar10-vit-tiny": {
        "model": "vit_tiny_patch16_224",
        "depth": 6,  # half of its blocks, for more epochs
        "image_size": 32,
        "patch_size": 8,
        "crop_scale": 0.5,
        "sigma": 1.0,  # as strong as 2 pixels of 64
        "images": 4000,
        "epochs": 18,
        "warmup_epochs": 2,
        "batch_size": 64,
        "lr": 1e-3,
        "weight_decay": 0.05,
        "momentum": 0.98,
        "hidden_dim": 1024,
        "output_dim": 4096,
    },
    # Wang et al., Section 4.1: iBOT for 800 epochs of 1,024 images, on several GPUs, at iBOT's learning rate.
    "imagenet-vits16": {
        "model": "vit_small_patch16_224",
        "depth": 0,  # the model's own
        "image_size": 224,
        "patch_size": 16,
        "crop_scale": 0.4,
        "sigma": 2.0,
        "images": 0,  # all
        "epochs": 800,
        "warmup_epochs": 10,
        "batch_size": 1024,
        "lr": 2e-3,
        "weight_decay": 0.05,
        "momentum": 0.996,
        "hidden_dim": 2048,
        "output_dim": 8192,
    },
}


KINDS = {
    "rotation": ("angle",),
    "translation": ("dx", "dy"),
    "color": ("brightness", "contrast", "saturation", "hue"),
    "blur": ("sigma",),
}
QUARTERS, WHOLE = "means of quarters", "mean of all patches"  # of what R² is regressed from
PICTURES = "pictures.pt"


# ---------------------------------------------------------------------------------------------------------- the views


class Crops:
    """Makes a batch of first views; what turns them into second ones is done on the device."""

    def __init__(self, options: argparse.Namespace, rank: int):
        self.options, self.rank = options, rank
        crop = v2.RandomResizedCrop(
            options.image_size, scale=(options.crop_scale, 1.0), interpolation=3, antialias=True
        )
        self.policy = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __call__(self, samples: list[tuple[int, Any, int, int]]) -> tuple[Tensor, Tensor]:
        """The first views, and where asked for other crops of the same images."""
        images = [v2.functional.to_dtype(v2.functional.to_image(s[1]), torch.float32, scale=True) for s in samples]
        with torch.random.fork_rng(devices=[]):
            seed_everything(self.options.seed, samples[0][0], self.rank)
            # Bicubic resizing overshoots.
            crops = [torch.stack([self.policy(x) for x in images]).clamp(0, 1) for _ in range(self.options.crops)]
        return crops[0], crops[-1]


def make_views(options: argparse.Namespace, num_images: int) -> IntermediateViews:
    return IntermediateViews(
        options.views,
        num_intermediate=num_images,
        reconstruct=options.reconstruct or None,
        sigma=(0.1, options.sigma),
        padding=options.padding,
    )


# ----------------------------------------------------------------------------------------------------------- the loss


class Backbone(nn.Module):
    """A timm ViT: its class token or the mean of its patches, and these, some hidden where a method wants it."""

    def __init__(self, vit: nn.Module, masks: bool, pooled: bool):
        super().__init__()
        self.pooled = pooled
        self.masked = MaskedVisionTransformerTIMM(vit, weight_initialization="skip", pos_embed_initialization="skip")
        self.masked.mask_token.requires_grad_(masks)

    @property
    def vit(self) -> nn.Module:
        return self.masked.vit

    def forward(self, images: Tensor, return_tokens: bool = True, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        prefix = self.vit.num_prefix_tokens
        if mask is not None:
            mask = nn.functional.pad(mask, (prefix, 0), value=False)
        tokens = self.masked.encode(images, mask=mask)
        patches = tokens[:, prefix:]
        return patches.mean(1) if self.pooled else tokens[:, 0], patches


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it.

    With ``num_images`` 0 the method has all of the features, and two decoders learn beside it from features that they
    do not change, to show what these hold.
    """

    def __init__(self, options: argparse.Namespace, num_images: int):
        super().__init__()
        depth = {"depth": options.depth} if options.depth else {}
        size = {"img_size": options.image_size, "patch_size": options.patch_size}
        vit = timm.create_model(options.model, num_classes=0, **size, **depth)
        self.head = IntermediateReconstructionHead(
            vit.embed_dim,
            image_size=options.image_size,
            patch_size=options.patch_size,
            num_images=num_images or 2,
            equivariant_fraction=options.fraction if num_images else 1.0,
            mean=MEAN,
            std=STD,
            detach=num_images == 0,
        )
        method, width, invariant = METHODS[options.method], vit.embed_dim, {}
        if num_images:
            width -= self.head.equivariant_dim
            invariant = {"invariant": lambda features: self.head.split(features)[0]}
        self.method = method(Backbone(vit, method.masks, options.method == "vicreg"), width, options, **invariant)
        self.views, self.weight, self.options = make_views(options, num_images or 2), options.weight, options

    def forward(self, first: Tensor, other: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts for the log."""
        second, targets, parameters = self.views(first)
        if self.options.crops == 2:
            second = self.views.transform(other, parameters)
        ssl, (tokens1, tokens2) = self.method([first, second])
        with precision(self.options, first.device):
            reconstruction = self.head(self.head.split(tokens1)[1], self.head.split(tokens2)[1], targets)
        return ssl + self.weight * reconstruction, {"ssl": ssl.detach(), "reconstruction": reconstruction.detach()}


# ------------------------------------------------------------------------------------------------------- the measures


class Frozen(nn.Module):
    """The mean of the patches in each quarter of the image, [B, 4 D]."""

    def __init__(self, vit: nn.Module, options: argparse.Namespace):
        super().__init__()
        self.vit, self.options, self.normalize = vit, options, v2.Normalize(MEAN, STD)
        self.grid = (options.image_size // options.patch_size,) * 2

    def forward(self, images: Tensor) -> Tensor:
        with precision(self.options, images.device):
            tokens = self.vit.forward_features(self.normalize(images))[:, self.vit.num_prefix_tokens :]
        quarters = nn.functional.adaptive_avg_pool2d(tokens.float().transpose(1, 2).unflatten(2, self.grid), 2)
        return quarters.flatten(2).transpose(1, 2).flatten(1)


def over_the_image(quarters: Tensor) -> Tensor:
    """The mean of all patches, [B, D]."""
    return quarters.unflatten(1, (4, -1)).mean(1)


@torch.no_grad()
def evaluate(objective: Objective, device: torch.device, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """R² of every parameter, accuracy of quarter turns and flips by layer, k-NN and linear accuracy, and pictures."""
    vit = objective.method.backbone.vit
    save_atomically(folder / "encoder.pt", vit.state_dict())  # plain timm keys
    frozen = Frozen(vit, options)
    train, test = (
        evenly(folder_images(path, options, plain_transform(options)), options.probe_images)
        for path in (Path(options.data) / "train", test_folder(options))
    )

    def loader(dataset: Any) -> DataLoader:
        return DataLoader(dataset, batch_size=256, num_workers=options.workers)

    (x, y), (x_test, y_test) = (extract_features(frozen, loader(WithIndex(part)))[:2] for part in (train, test))
    x, x_test = over_the_image(x), over_the_image(x_test)
    results: dict[str, Any] = {
        "k-NN": 100 * knn_accuracy(x, y, x_test, y_test),
        "linear": 100 * linear_probe(x, y, x_test, y_test),
        "r2": {QUARTERS: {}, WHOLE: {}},
        "accuracy": {},
    }
    pairs_of = evenly(ConcatDataset([train, test]), options.r2_images)
    for kind in KINDS:
        views = IntermediateViews(kind, sigma=(0.1, options.sigma), padding=options.padding)
        pairs = extract_view_features(frozen, loader(pairs_of), views, generator=torch.Generator().manual_seed(0))
        whole = (*map(over_the_image, pairs[:2]), pairs[2])
        for name, features in ((QUARTERS, pairs), (WHOLE, whole)):
            results["r2"][name].update(zip(views.parameter_names, transformation_r2(*features).tolist()))
    layers = [f"blocks.{i}" for i in range(len(vit.blocks))]
    for transformation in ("rotation", "flip"):
        images = (frozen.normalize(batch[0]) for batch in loader(evenly(test, options.r2_images // 6)))
        with precision(options, device):
            found = transformation_accuracy(vit, images, layers, transformation=transformation)
        results["accuracy"][transformation] = [100 * share for share in found.values()]
    results["size"] = {
        name: sum(p.numel() for p in module.parameters()) / 1e6
        for name, module in (("backbone", vit), ("decoders", objective.head))
    }
    write_pictures(objective, torch.stack([image for image, _ in evenly(test, 6)]).to(device), folder / PICTURES)
    return results


def write_pictures(objective: Objective, images: Tensor, path: Path) -> None:
    """First view, targets, reconstructions and second view, [rows, B, 3, H, W]; the same for every training."""
    options = objective.options
    views = make_views(options, len(objective.head.decoders))
    second, targets, _ = views(images, torch.Generator().manual_seed(1))
    with precision(options, images.device):
        tokens = [objective.method.tokens(objective.method.backbone, view)[1] for view in (images, second)]
        found = objective.head.reconstruct(*(objective.head.split(part)[1] for part in tokens))
    rows = {"first": images[None], "targets": targets, "found": found.float().clamp(0, 1), "second": second[None]}
    save_atomically(path, {name: row.cpu() for name, row in rows.items()})


def report(results: dict[str, dict[str, Any]], logs: dict[str, list[dict[str, float]]], out: Path, name: str) -> None:
    """A table, and beside it a picture: losses, accuracies, and R² of each transformation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, first = list(results), next(iter(results.values()))
    r2 = {
        source: {
            kind: [mean(found["r2"][source][key] for key in keys) for found in results.values()]
            for kind, keys in KINDS.items()
        }
        for source in (QUARTERS, WHOLE)
    }
    rows = {key: [found[key] for found in results.values()] for key in ("k-NN", "linear")}
    turned = {key: [found["accuracy"][key] for found in results.values()] for key in first["accuracy"]}
    print(f"\n{'':36}" + "".join(f"{name:>14}" for name in names))
    for source, table in r2.items():
        print(f"R² from the {source}")
        for kind, values in table.items():
            print(f"{'  ' + kind:36}" + "".join(f"{value:14.3f}" for value in values))
            for key in KINDS[kind] if len(KINDS[kind]) > 1 else ():
                cells = (f"{found['r2'][source][key]:14.3f}" for found in results.values())
                print(f"{'    ' + key:36}" + "".join(cells))
    for key, values in rows.items():
        print(f"{key + ' accuracy, %':36}" + "".join(f"{value:14.1f}" for value in values))
    for key, of_layers in turned.items():
        for layer in range(len(of_layers[0])):
            title = f"{'quarter turns' if key == 'rotation' else 'flips'} told, layer {layer + 1}, %"
            print(f"{title:36}" + "".join(f"{values[layer]:14.1f}" for values in of_layers))
    size = list(results.values())[-1]["size"]
    print(f"\nbackbone {size['backbone']:.2f} M parameters, decoders {size['decoders']:.2f} M")

    figure, (curves, accuracy, told) = plt.subplots(1, 3, figsize=(15, 4.2), width_ratios=(1.2, 0.8, 1.6))
    for color, (name_of, log) in enumerate(logs.items()):
        steps = [row["step"] for row in log]
        curves.plot(steps, averaged([row["ssl"] for row in log]), f"C{color}", label=f"self-supervised, {name_of}")
        values = averaged([row["reconstruction"] for row in log])
        curves.plot(steps, values, f"C{color}--", label=f"reconstruction, {name_of}")
    curves.set(xlabel="step", ylabel="loss", title="training", yscale="log")
    curves.legend(fontsize=7)
    for axes, table in ((accuracy, rows), (told, r2[QUARTERS])):
        for i, name_of in enumerate(names):
            places = [j + (i - (len(names) - 1) / 2) * 0.27 for j in range(len(table))]
            bars = axes.bar(
                places, [max(0, values[i]) for values in table.values()], 0.25, color=f"C{i}", label=name_of
            )
            labels = [f"{values[i]:.1f}" if axes is accuracy else f"{values[i]:.2f}" for values in table.values()]
            axes.bar_label(bars, labels, fontsize=8)
            if axes is told:
                lines = [max(0, values[i]) for values in r2[WHOLE].values()]
                axes.scatter(places, lines, color="black", marker="_", s=120, zorder=3)
        axes.set_xticks(range(len(table)), table)
    accuracy.set(ylabel="test accuracy, %", title="frozen features")
    told.set(ylabel="R²", title=f"R² from {QUARTERS} (line: {WHOLE})", ylim=(0, 1.1))
    told.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / f"{name}.png", dpi=130)
    print(f"\n{out / name}.png")


def report_pictures(folders: dict[str, Path], path: Path) -> None:
    """First view, what lies half-way, what the decoders make of it, and the second view."""
    import matplotlib.pyplot as plt

    pictures = {name: load_safely(folder / PICTURES) for name, folder in folders.items()}
    last = list(pictures.values())[-1]
    lines = [("first view", last["first"][0])]
    for i in range(len(last["targets"])):
        lines.append((f"target {i + 1}", last["targets"][i]))
        fitting = {
            name: parts["found"] for name, parts in pictures.items() if len(parts["found"]) == len(last["found"])
        }
        lines += [(f"rebuilt {i + 1},\n{name}", found[i]) for name, found in fitting.items()]
    lines.append(("second view", last["second"][0]))
    count = len(last["first"][0])
    figure, grid = plt.subplots(len(lines), count, figsize=(1.3 * count + 1.4, 1.3 * len(lines)))
    for row, (label, images) in zip(grid, lines):
        for axes, image in zip(row, images):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    print(path)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=("vicreg", "dino", "ibot", "dinov2"), default="vicreg")
    parser.add_argument(
        "--head",
        dest="variants",
        choices=("off", "1", "2", "3", "compare"),
        default="compare",
        help="how many images lie half-way; off: no head; compare: off, 1 and 2",
    )
    parser.add_argument("--weight", type=float, default=1.0, help="of the reconstruction loss")
    parser.add_argument("--fraction", type=float, default=0.5, help="of the features, for reconstruction")
    parser.add_argument("--views", default="all", help="what the second view undergoes")
    parser.add_argument("--reconstruct", default="se2", help="what the images half-way undergo; empty: the same")
    parser.add_argument("--padding", choices=("zeros", "border", "reflection"), default="zeros")
    parser.add_argument("--crops", type=int, choices=(1, 2), default=1, help="2: the second view has a crop of its own")
    parser.add_argument("--r2-images", type=int, default=6000, help="to tell the transformations from")
    parser.add_argument("--out", type=Path, default=Path("runs/reconstruction"))


def main() -> None:
    options = parse(__doc__.splitlines()[0], RECIPES, add_options)
    wanted = {"off": [0], "compare": [0, 1, 2]}.get(options.variants) or [int(options.variants)]
    results, logs, folders = {}, {}, {}
    for num_images in wanted:
        name = f"{num_images} image{'s' * (num_images > 1)}" if num_images else "without"
        folders[name] = folder = options.out / f"{options.method}-{num_images or 'base'}"
        results[name] = run_training(
            options,
            {"num_images": num_images},
            folder,
            name,
            make_objective=partial(Objective, options, num_images),
            make_collate=partial(Crops, options),
            evaluate=partial(evaluate, options=options, folder=folder),
        )
        logs[name] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if all(results.values()):
        report(results, logs, options.out, options.method)
        report_pictures(folders, options.out / f"{options.method}-pictures.png")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    as_program(main)
