"""Self-supervised pretraining of a ViT with and without soft equivariance (SER): MoCo-v3, DINO or Barlow Twins.

The regularizer is the line

    loss = ssl(b1) + ssl(b2) + weight * ser(tokens1, tokens2, g1, g2)

where ``b2`` is a small part of the batch, seen by flips, quarter turns and scalings instead of crops. Run it with

    python examples/ser_pretrain.py --data folder-with-train-and-test

which trains a ViT-Tiny twice, without and with SER, and compares them: k-NN and linear accuracy, and how far the
token maps turn with the image; a table, and a picture in runs/ser. ``--ser on`` trains once. Several processes:
``torchrun --nproc-per-node 2 examples/ser_pretrain.py ...``. The paper's setting: ``--recipe imagenet-vits16``.
A killed run goes on with ``--resume``. Copy pretraining.py along with this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, DINOLoss
from lightly.models.modules.heads import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    DINOProjectionHead,
    MoCoProjectionHead,
)
from lightly.models.utils import concat_all_gather, update_momentum
from pretraining import Run, StepBatches, WithStep, cosine, seed_everything, start_processes, write_atomically
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm.auto import tqdm

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
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------- the views


def into_range(image: Tensor) -> Tensor:
    """Bicubic resizing overshoots, and the jittered hue of a colour outside of 0 .. 1 can be NaN."""
    return image.clamp(0, 1)


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

    def __call__(self, samples: list[tuple[int, Any, int]]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
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


# ------------------------------------------------------------------------- the base methods: views to a loss and tokens


def precision(options: argparse.Namespace, device: torch.device) -> torch.autocast:
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.amp]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


class Method(nn.Module):
    """A self-supervised method. The first two views are global; the others are seen by the student alone."""

    clip = 0.0  # largest norm of the gradient; 0 for any

    def __init__(self, backbone: LateClassToken, options: argparse.Namespace):
        super().__init__()
        self.backbone, self.options = backbone, options

    def encode(self, backbone: nn.Module, head: nn.Module, view: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings in fp32, and the token map where the class token enters."""
        mean, std = (torch.tensor(part, device=view.device).view(1, 3, 1, 1) for part in (MEAN, STD))
        with precision(self.options, view.device):
            features, tokens = backbone((view - mean) / std, return_tokens=True)
            return head(features).float(), tokens

    def update(self, step: int, steps: int) -> None:
        """After each step of the optimizer."""

    def before_step(self, epoch: int) -> None:
        """Before each step of the optimizer."""


class MoCoV3(Method):
    """Chen, Xie and He, 2021: each view predicts the other's key, against the keys of the batch."""

    def __init__(self, backbone: LateClassToken, options: argparse.Namespace):
        super().__init__(backbone, options)
        hidden = options.hidden_dim
        self.projector = MoCoProjectionHead(backbone.vit.embed_dim, hidden, 256, num_layers=3, batch_norm=True)
        self.predictor = BYOLPredictionHead(256, hidden, 256)
        self.teacher = copy.deepcopy(nn.ModuleList([self.backbone, self.projector])).requires_grad_(False)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        head = nn.Sequential(self.projector, self.predictor)
        queries, tokens = zip(*(self.encode(self.backbone, head, view) for view in views))
        with torch.no_grad():
            keys = [self.encode(*self.teacher, view)[0] for view in views[:2]]
        losses = [contrast(q, k) for i, q in enumerate(queries) for j, k in enumerate(keys) if i != j]
        return 2 * torch.stack(losses).mean(), list(tokens)

    def update(self, step: int, steps: int) -> None:
        momentum = cosine(step, steps, self.options.momentum, 1.0)
        update_momentum(nn.ModuleList([self.backbone, self.projector]), self.teacher, momentum)


def contrast(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    first = 0
    if torch.distributed.is_initialized():
        first = torch.distributed.get_rank() * len(keys)
        keys = concat_all_gather(keys)
    target = first + torch.arange(len(queries), device=queries.device)
    return 2 * temperature * F.cross_entropy(queries @ keys.T / temperature, target)


class DINO(Method):
    """Caron et al., 2021: each view predicts the centred and sharpened output of a teacher for another."""

    clip = 3.0

    def __init__(self, backbone: LateClassToken, options: argparse.Namespace):
        super().__init__(backbone, options)
        self.head, head = (
            DINOProjectionHead(backbone.vit.embed_dim, options.hidden_dim, 256, options.output_dim, freeze_last_layer=1)
            for _ in range(2)
        )
        head.load_state_dict(self.head.state_dict())
        self.teacher = nn.ModuleList([copy.deepcopy(backbone), head]).requires_grad_(False)
        self.loss = DINOLoss(options.output_dim, teacher_temp=0.04)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        students, tokens = zip(*(self.encode(self.backbone, self.head, view) for view in views))
        with torch.no_grad():
            teachers = [self.encode(*self.teacher, view)[0] for view in views[:2]]
        return self.loss(teachers, list(students)), list(tokens)

    def before_step(self, epoch: int) -> None:
        self.head.cancel_last_layer_gradients(epoch)

    def update(self, step: int, steps: int) -> None:
        momentum = cosine(step, steps, self.options.momentum, 1.0)
        update_momentum(nn.ModuleList([self.backbone, self.head]), self.teacher, momentum)


class BarlowTwins(Method):
    """Zbontar et al., 2021: the correlations of two views' embeddings come near the identity."""

    def __init__(self, backbone: LateClassToken, options: argparse.Namespace):
        super().__init__(backbone, options)
        width = options.hidden_dim
        self.head = BarlowTwinsProjectionHead(backbone.vit.embed_dim, width, width)
        self.loss = BarlowTwinsLoss(gather_distributed=torch.distributed.is_initialized())

    def forward(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        z, tokens = zip(*(self.encode(self.backbone, self.head, view) for view in views))
        losses = [self.loss(z[i], z[j]) for i in range(len(z)) for j in range(min(i, 2))]
        return torch.stack(losses).mean(), list(tokens)


METHODS = {"mocov3": MoCoV3, "dino": DINO, "barlowtwins": BarlowTwins}


class Objective(nn.Module):
    """The whole loss of a step in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, options: argparse.Namespace, with_ser: bool):
        super().__init__()
        size = {"img_size": options.image_size, "patch_size": options.patch_size, "dynamic_img_size": True}
        depth = {"depth": options.depth} if options.depth else {}
        vit = timm.create_model(options.model, num_classes=0, **size, **depth)
        backbone = LateClassToken(vit, options.layer if with_ser else 0)
        with warnings.catch_warnings():  # DINO's head uses a form of weight norm that PyTorch is about to replace
            warnings.simplefilter("ignore", FutureWarning)
            self.method = METHODS[options.method](backbone, options)
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


# ------------------------------------------------------------------------------------------------------- the training


def train(options: argparse.Namespace, with_ser: bool, folder: Path) -> dict[str, Any]:
    """Train once, or go on where a checkpoint stands; the measures at the end (in the first process)."""
    rank, world, device = start_processes()
    if device.type == "cpu":  # at these sizes its backward pass takes as long as all the rest of a step
        timm.layers.set_fused_attn(False)
    known = {key: value for key, value in vars(options).items() if key not in ("resume", "ser", "out", "workers")}
    run = Run(folder, {**known, "with_ser": with_ser, "world": world}, resume=options.resume, main=rank == 0)
    done = folder / "results.json"
    if options.resume and done.exists():
        return json.loads(done.read_text())

    seed_everything(options.seed, -1)  # the same weights in all processes
    objective = Objective(options, with_ser).to(device)
    decayed = [p for p in objective.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in objective.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    start = 0
    if run.checkpoint is not None:
        objective.load_state_dict(run.checkpoint["objective"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        scaler.load_state_dict(run.checkpoint["scaler"])
        start = run.checkpoint["step"]
    model = nn.parallel.DistributedDataParallel(objective) if world > 1 else objective

    images = training_images(options)
    batches = StepBatches(
        len(images), options.batch_size, options.epochs, seed=options.seed, rank=rank, world=world, start=start
    )
    loader = DataLoader(
        WithStep(images), batch_sampler=batches, collate_fn=Views(options, with_ser, rank), num_workers=options.workers
    )
    warmup, name = options.warmup_epochs * batches.steps_per_epoch, "with SER" if with_ser else "without SER"
    bar = tqdm(loader, desc=f"{options.method} {name}", total=batches.steps, initial=start, disable=rank > 0)
    for step, (b1, b2, elements) in enumerate(bar, start):
        seed_everything(options.seed, step, rank)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, batches.steps, options.lr, 0.0, warmup)
        loss, parts = model([x.to(device) for x in b1], [x.to(device) for x in b2], elements)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; {folder} holds the last checkpoint")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if objective.method.clip:
            nn.utils.clip_grad_norm_(decayed + others, objective.method.clip)
        objective.method.before_step(step // batches.steps_per_epoch)
        scaler.step(optimizer)
        scaler.update()
        objective.method.update(step, batches.steps)

        row = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
        run.log({"step": step + 1, **row, "lr": group["lr"]})
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
        if (step + 1) % batches.steps_per_epoch == 0 or (step + 1) % options.save_every == 0:
            states = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
            run.save(step + 1, **states, scaler=scaler.state_dict())

    results: dict[str, Any] = {}
    if rank == 0:
        vit = objective.method.backbone.vit.eval()
        torch.save(vit.state_dict(), folder / "encoder.pt")  # plain timm keys; the late class token is a hook
        results = evaluate(vit, options, device)
        write_atomically(done, (json.dumps(results, indent=2) + "\n").encode())
    if world > 1:
        torch.distributed.barrier()
    return results


def training_images(options: argparse.Namespace) -> torch.utils.data.Dataset:
    """Those of ``train``, or as many of them as asked for, evenly over the classes."""
    folder = ImageFolder(Path(options.data) / "train")
    count = min(options.images or len(folder), len(folder))
    return Subset(folder, torch.linspace(0, len(folder) - 1, count).round().long().tolist())


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
def evaluate(vit: nn.Module, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """k-NN and linear accuracy, and the equivariance of the layer where the class token enters and of the last."""
    size = options.image_size
    steps = [v2.Resize((size, size), interpolation=3, antialias=True), v2.ToImage()]
    plain = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    root = Path(options.data)
    parts = {"train": ImageFolder(root / "train", plain), "test": ImageFolder(test_folder(root), plain)}
    found = {}
    for name, part in parts.items():
        chosen = torch.linspace(0, len(part) - 1, min(len(part), options.probe_images)).round().long().tolist()
        loader = DataLoader(WithIndex(Subset(part, chosen)), batch_size=256, num_workers=options.workers)
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


def test_folder(root: Path) -> Path:
    return root / "test" if (root / "test").is_dir() else root / "val"


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


def parse() -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument(
        "--recipe", choices=RECIPES, default="cifar10-vit-tiny", help="a setting; flags change its parts"
    )
    recipe = RECIPES[first.parse_known_args()[0].recipe]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[first])
    data = os.environ.get("EQUIREG_DATA")
    parser.add_argument(
        "--data",
        default=f"{data}/cifar10" if data else None,
        required=data is None,
        help="a folder with train/<class>/* and test/<class>/* or val/<class>/*",
    )
    parser.add_argument("--method", choices=METHODS, default="mocov3")
    parser.add_argument("--ser", choices=("on", "off", "compare"), default="compare", help="compare trains both")
    parser.add_argument("--weight", type=float, default=0.5, help="of the equivariance loss")
    parser.add_argument("--views", type=int, choices=(2, 6), default=2, help="6: two global and four local ones")
    parser.add_argument("--amp", choices=("auto", "none", "bf16", "fp16"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/ser"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, bit for bit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that load and augment images")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints, besides every epoch")
    parser.add_argument("--probe-images", type=int, default=50_000, help="at most so many for k-NN and linear probe")
    for name, value in recipe.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    if not (Path(options.data) / "train").is_dir() or not test_folder(Path(options.data)).is_dir():
        parser.error(f"--data {options.data} must hold the folders train and test (or val)")
    if options.amp == "auto":  # where the device multiplies bf16 in hardware
        cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        options.amp = "bf16" if torch.cuda.is_available() or cpu else "none"
    return options


def main() -> None:
    options = parse()
    wanted = {"off": [False], "on": [True], "compare": [False, True]}[options.ser]
    results, logs = {}, {}
    for with_ser in wanted:
        folder = options.out / f"{options.method}-{'ser' if with_ser else 'base'}"
        name = "with SER" if with_ser else "without SER"
        results[name] = train(options, with_ser, folder)
        logs[name] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if all(results.values()):
        report(results, logs, options.out / f"{options.method}.png")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
