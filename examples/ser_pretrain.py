"""Self-supervised pretraining of a ViT with and without soft equivariance (SER): MoCo-v3, DINO or Barlow Twins.

The regularizer is the line

    loss = ssl(b1) + ssl(b2) + weight * ser(tokens1, tokens2, g1, g2)

where ``b2`` is a small part of the batch, seen by flips, quarter turns and scalings instead of crops. Run it with

    python examples/ser_pretrain.py --data folder-with-train-and-test

which trains a ViT-Tiny twice, without and with SER, and compares them: k-NN and linear accuracy, and how far the
token maps turn with the image; a table, and a picture in runs/ser. ``--ser on`` trains once. Several processes:
``torchrun --nproc-per-node 2 examples/ser_pretrain.py ...``. The paper's setting: ``--recipe imagenet-vits16``.
A killed run goes on with ``--resume``. Copy ssl_methods.py and the folder training along with this file.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from ssl_methods import METHODS
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from training import (
    as_program,
    evenly,
    folder_images,
    into_range,
    normalized_transform,
    parse,
    precision,
    run_training,
    save_atomically,
    seed_everything,
    test_folder,
)

from equireg import (
    EquivariantViews,
    GridTransform,
    LateClassToken,
    SERLoss,
    TokenTap,
    WithIndex,
    equivariance_score,
    extract_features,
    knn_accuracy,
    linear_probe,
    mocov3_photometric,
    split_batch,
)

RECIPES: dict[str, dict[str, Any]] = {
    # Minutes on a CPU: a ViT-Tiny with patches of 4 pixels. Of so small a batch SER takes half, as each part feeds the
    # base method by itself, and MoCo-v3 on 32 or 16 images lost more accuracy.
    "cifar10-vit-tiny": {
        "model": "vit_tiny_patch16_224",
        "depth": 6,  # half of its blocks, for more epochs
        "image_size": 32,
        "patch_size": 4,
        "local_size": 16,
        "crop_scale": 0.2,
        "images": 4000,
        "epochs": 14,
        "warmup_epochs": 2,
        "batch_size": 128,
        "lr": 5e-4,
        "weight_decay": 0.05,
        "momentum": 0.98,
        "hidden_dim": 1024,
        "output_dim": 4096,
        "layer": 2,
        "ratio": 0.5,
    },
    # Lee et al., Section 4.1, on several GPUs.
    "imagenet-vits16": {
        "model": "vit_small_patch16_224",
        "depth": 0,  # the model's own
        "image_size": 224,
        "patch_size": 16,
        "local_size": 96,
        "crop_scale": 0.08,
        "images": 0,  # all
        "epochs": 100,
        "warmup_epochs": 10,
        "batch_size": 2048,
        "lr": 1.2e-3,
        "weight_decay": 0.1,
        "momentum": 0.99,
        "hidden_dim": 4096,
        "output_dim": 65536,
        "layer": 3,
        "ratio": 0.01,
    },
}


# ---------------------------------------------------------------------------------------------------------- the views


class Views:
    """Makes a batch: most of it by the usual policy, the rest by group elements that are known."""

    def __init__(self, options: argparse.Namespace, with_ser: bool, rank: int):
        self.options, self.rank, self.ratio = options, rank, options.ratio if with_ser else 0.0
        size, local = options.image_size, options.local_size
        first, second = mocov3_photometric(size)
        crop = v2.RandomResizedCrop(size, scale=(options.crop_scale, 1.0), interpolation=3, antialias=True)
        self.usual = [v2.Compose([crop, into_range, v2.RandomHorizontalFlip(), policy]) for policy in (first, second)]
        self.local_crop = v2.RandomResizedCrop(local, scale=(0.05, 0.4), interpolation=3, antialias=True)
        small = v2.Compose([self.local_crop, into_range, v2.RandomHorizontalFlip(), mocov3_photometric(local)[0]])
        self.usual += [small] * (options.views - 2)
        self.whole = v2.Resize((size, size), interpolation=3, antialias=True)
        self.equivariant = EquivariantViews(size, options.patch_size)
        self.equivariant_local = EquivariantViews(local, options.patch_size)

    def __call__(self, samples: list[tuple[int, Any, int, int]]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """The views of ``b1``, the views of ``b2``, and the elements of each pair of the latter."""
        step = samples[0][0]
        images = [v2.functional.to_dtype(v2.functional.to_image(s[1]), torch.float32, scale=True) for s in samples]
        some, rest = split_batch(torch.arange(len(images)), self.ratio)
        # The elements are drawn alike in all processes, so that their token maps have one size.
        generator = torch.Generator().manual_seed(7_919 * self.options.seed + step)
        with torch.random.fork_rng(devices=[]):
            seed_everything(self.options.seed, step, self.rank)
            b1 = [torch.stack([policy(images[i]) for i in some]) for policy in self.usual]
            b2, elements = [], []
            if len(rest):
                pairs = [self.equivariant(torch.stack([self.whole(images[i]) for i in rest]), generator)]
                for _ in range((self.options.views - 2) // 2):
                    crops = torch.stack([self.local_crop(images[i]) for i in rest])
                    pairs.append(self.equivariant_local(crops, generator))
                for x1, x2, g1, g2 in pairs:
                    b2 += [x1, x2]
                    elements.append((g1, g2))
        return b1, b2, elements


# --------------------------------------------------------------------------------------------------------- the loss


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, options: argparse.Namespace, with_ser: bool):
        super().__init__()
        size = {"img_size": options.image_size, "patch_size": options.patch_size, "dynamic_img_size": True}
        depth = {"depth": options.depth} if options.depth else {}
        vit = timm.create_model(options.model, num_classes=0, **size, **depth)
        backbone = LateClassToken(vit, options.layer if with_ser else 0)
        self.method = METHODS[options.method](backbone, vit.embed_dim, options)
        self.weight = options.weight
        temperature = 0.5 if options.method == "dino" else 0.3
        self.ser = (
            SERLoss(vit.embed_dim, temperature=temperature, token_norm=True, gather_distributed=True)
            if with_ser
            else None
        )

    def forward(self, b1: list[Tensor], b2: list[Tensor], elements: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts for the log."""
        ssl, _ = self.method(b1)
        if self.ser is None:
            return ssl, {"ssl": ssl.detach()}
        ssl2, tokens = self.method(b2)
        pairs = zip(tokens[::2], tokens[1::2], elements)
        equivariance = torch.stack([self.ser(tokens1, tokens2, g1, g2) for tokens1, tokens2, (g1, g2) in pairs]).mean()
        parts = {"ssl": ssl.detach(), "ssl_b2": ssl2.detach(), "equivariance": equivariance.detach()}
        return ssl + ssl2 + self.weight * equivariance, parts


# ------------------------------------------------------------------------------------------------------- the measures


class LastFour(nn.Module):
    """The class tokens of the last four blocks, [B, 4 D]; the last D are the usual features."""

    def __init__(self, vit: nn.Module, options: argparse.Namespace):
        super().__init__()
        self.vit, self.options = vit, options

    def forward(self, images: Tensor) -> Tensor:
        with precision(self.options, images.device):
            layers = self.vit.forward_intermediates(
                images, indices=4, return_prefix_tokens=True, norm=True, intermediates_only=True
            )
        return torch.cat([prefix[:, 0] for _, prefix in layers], 1).float()


@torch.no_grad()
def evaluate(objective: Objective, device: torch.device, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """k-NN and linear accuracy, and the equivariance of the layer where the class token enters and of the last."""
    vit, size = objective.method.backbone.vit, options.image_size
    save_atomically(folder / "encoder.pt", vit.state_dict())  # plain timm keys; the late class token is a hook
    plain = normalized_transform(options)
    folders = {"train": Path(options.data) / "train", "test": test_folder(options)}
    parts = {name: folder_images(path, options, plain) for name, path in folders.items()}
    found = {}
    for name, part in parts.items():
        loader = DataLoader(WithIndex(evenly(part, options.probe_images)), batch_size=256, num_workers=options.workers)
        found[name] = extract_features(LastFour(vit, options), loader)[:2]
    (x, y), (x_test, y_test) = found["train"], found["test"]
    width = vit.embed_dim
    results: dict[str, Any] = {
        "k-NN": 100 * knn_accuracy(x[:, -width:], y, x_test[:, -width:], y_test),
        "linear": 100 * linear_probe(x, y, x_test, y_test),
        "equivariance": {},
    }
    some = torch.linspace(0, len(parts["test"]) - 1, 128).round().long()
    images = torch.stack([parts["test"][i][0] for i in some]).to(device)
    for layer in (options.layer, len(vit.blocks)):

        def encode(views: Tensor, name: str = f"blocks.{layer - 1}") -> Tensor:
            with TokenTap(vit, name) as tap, precision(options, device):
                vit(views)
            return tap.tokens.float()

        for kind, transforms in elements_of(len(images), size // options.patch_size).items():
            for key, shuffled in ((f"layer {layer}, {kind}", False), (f"layer {layer}, {kind}, other image", True)):
                scores = [equivariance_score(encode, images, g, shuffled=shuffled).mean() for g in transforms]
                results["equivariance"][key] = torch.stack(scores).mean().item()
    return results


def elements_of(count: int, side: int) -> dict[str, list[GridTransform]]:
    """Elements of one kind each: quarter turns, flips, and the same four sizes for every model."""
    grid, none, unturned = (side, side), torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    sizes = [GridTransform.random(1, grid, generator=generator).target for _ in range(4)]
    return {
        "rotation": [GridTransform(1 + torch.arange(count) % 3, none, grid, grid)],
        "flip": [GridTransform(unturned, ~none, grid, grid)],
        "scale": [GridTransform(unturned, none, grid, size) for size in sizes],
    }


def report(results: dict[str, dict[str, Any]], logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A table, and beside it a picture: losses, accuracies, and equivariance over that of other images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, first = list(results), next(iter(results.values()))
    rows = {key: [found[key] for found in results.values()] for key in ("k-NN", "linear")}
    scores = {key: [found["equivariance"][key] for found in results.values()] for key in first["equivariance"]}
    print(f"\n{'':34}" + "".join(f"{name:>14}" for name in names))
    for key, values in rows.items():
        print(f"{key + ' accuracy, %':34}" + "".join(f"{value:14.1f}" for value in values))
    for key, values in scores.items():
        print(f"{'cosine, ' + key:34}" + "".join(f"{value:14.3f}" for value in values))

    figure, (curves, accuracy, equivariance) = plt.subplots(1, 3, figsize=(15, 4.2), width_ratios=(1.2, 0.8, 1.6))
    for color, (name, log) in enumerate(logs.items()):
        steps = [row["step"] for row in log]
        curves.plot(steps, [row["ssl"] for row in log], f"C{color}", label=f"self-supervised, {name}")
        if "equivariance" in log[0]:
            curves.plot(steps, [row["equivariance"] for row in log], "C2", label="equivariance")
    curves.set(xlabel="step", ylabel="loss", title="training")
    curves.legend(fontsize=8)
    shown = [key for key in scores if not key.endswith("other image")]
    for axes, table, keys in ((accuracy, rows, list(rows)), (equivariance, scores, shown)):
        for i, name in enumerate(names):
            places = [j + (i - (len(names) - 1) / 2) * 0.35 for j in range(len(keys))]
            bars = axes.bar(places, [table[key][i] for key in keys], 0.33, color=f"C{i}", label=name)
            axes.bar_label(bars, fmt="%.1f" if axes is accuracy else "%.2f", fontsize=8)
            if axes is equivariance:
                others = [table[f"{key}, other image"][i] for key in keys]
                axes.scatter(places, others, color="black", marker="_", s=150, zorder=3)
        axes.set_xticks(range(len(keys)), [key.replace(", ", "\n") for key in keys], fontsize=8)
    accuracy.set(ylabel="test accuracy, %", title="frozen features")
    equivariance.set(
        ylabel="cosine", title="equivariance of the token maps (line: with another image)", ylim=(None, 1.1)
    )
    equivariance.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"\n{path}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=("mocov3", "dino", "barlowtwins"), default="mocov3")
    parser.add_argument(
        "--ser", dest="variants", choices=("on", "off", "compare"), default="compare", help="compare: both"
    )
    parser.add_argument("--weight", type=float, default=0.5, help="of the equivariance loss")
    parser.add_argument("--views", type=int, choices=(2, 6), default=2, help="6: two global and four local ones")
    parser.add_argument("--out", type=Path, default=Path("runs/ser"))


def main() -> None:
    options = parse(__doc__.splitlines()[0], RECIPES, add_options)
    wanted = {"off": [False], "on": [True], "compare": [False, True]}[options.variants]
    results, logs = {}, {}
    for with_ser in wanted:
        folder = options.out / f"{options.method}-{'ser' if with_ser else 'base'}"
        name = "with SER" if with_ser else "without SER"
        results[name] = run_training(
            options,
            {"with_ser": with_ser},
            folder,
            name,
            make_objective=partial(Objective, options, with_ser),
            make_collate=partial(Views, options, with_ser),
            evaluate=partial(evaluate, options=options, folder=folder),
        )
        logs[name] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if all(results.values()):
        report(results, logs, options.out / f"{options.method}.png")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    as_program(main)
