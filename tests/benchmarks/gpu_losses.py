"""The losses at the sizes of a GPU.

SER's and NT-Xent are shapes beside those of ``pair_lse``. Runs of their own are a training step with SER, class-wise
IRM, a partition's step, and environments of features that lie on the host.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg import Environments, split_batch
from equireg.similarity import choice
from tests.benchmarks import class_wise_irm, gpu_shapes, info_nce, partition, ser
from tests.benchmarks.environments import bare_products as of_environments
from tests.benchmarks.floor import bare_products
from tests.benchmarks.gpu_shapes import Shape, Version
from tests.benchmarks.gpu_targets import BATCH, STEP
from tests.benchmarks.measure import Row, Runs, Settings, compare, peak

try:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
except ImportError:
    CompilationError = OutOfResources = RuntimeError
# Out of memory, no kernel, a kernel that does not compile or does not fit on the chip.
FAILURES = (RuntimeError, NotImplementedError, CompilationError, OutOfResources)

LARGE = (1_280_000, 1000, 2048)  # samples, classes and width of the environments


def ser_loss(settings: Settings) -> Shape:
    """In the form without kernels (gradients at once, or ``chunked``) and by kernels, whatever the table says."""
    _, tokens, width = ser.shape(settings)

    def inputs(images: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z, z_prime = (part.detach().to(dtype).requires_grad_() for part in ser.inputs(images, settings))
        return z, z_prime

    def by(form: Callable[[Tensor, bool], str]) -> Version:
        def version(z: Tensor, z_prime: Tensor) -> Tensor:
            before, choice.of_contrast = choice.of_contrast, form
            try:
                return ser.ours(z, z_prime)
            finally:
                choice.of_contrast = before

        return version

    def floor(z: Tensor, z_prime: Tensor) -> None:
        z, z_prime = z.flatten(0, 1), z_prime.flatten(0, 1)
        bare_products(z, torch.cat([z, z_prime]), recomputed=False)

    versions = {name: version for name, version in ser.versions(settings).items() if name != "patch_nt_xent"}
    versions["patch_nt_xent, chunked"] = by(lambda x, few: "at once" if few else "chunked")
    versions["patch_nt_xent, triton"] = by(lambda x, few: "triton")
    return Shape(
        title=f"SER loss, {tokens} tokens an image, D = {width}, forward + backward",
        unit="images",
        sizes=(2,) if settings.quick else (64, 512),
        versions=versions,
        inputs=inputs,
        learns="contrast",
        width=width,
        flops=lambda images: 3 * 2 * (images * tokens) * (2 * images * tokens) * width,
        floor=floor,
    )


OTHERS = {
    "Liger, linear cross entropy with the diagonal, bf16": "liger_kernel",
    "Cut Cross Entropy with the diagonal, bf16": "cut_cross_entropy",
}


def linear_cross_entropy(name: str) -> Version | None:
    """The nearest kernel of a library that fuses a classifier with its cross entropy; None where it is not installed.

    Its classes are the rows themselves, and its diagonal cannot be left out: it computes another number.
    """
    if importlib.util.find_spec(name) is None:
        return None

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1).bfloat16()
        sample = torch.arange(len(z1), device=z.device)
        partner, scaled = torch.cat([sample + len(z1), sample]), z / info_nce.TEMPERATURE
        if name == "liger_kernel":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss()(z, scaled, partner)
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(scaled, z, partner)

    return loss


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    before = os.environ.get(choice.VARIABLE, "")
    os.environ[choice.VARIABLE] = name
    try:
        yield
    finally:
        os.environ[choice.VARIABLE] = before


def nt_xent(settings: Settings) -> Shape:
    def inputs(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z1, z2 = (part.detach().to(dtype).requires_grad_() for part in info_nce.inputs(rows, settings))
        return z1, z2

    def by(name: str) -> Version:
        def version(z1: Tensor, z2: Tensor) -> Tensor:
            with backend(name):
                return info_nce.ours(z1, z2)

        return version

    left_out = (info_nce.OURS, info_nce.BY_PAIRS, info_nce.BY_MATRIX)
    versions = {name: version for name, version in info_nce.versions(settings).items() if name not in left_out}
    versions |= {f"{info_nce.OURS}, {name}": by(name) for name in ("chunked", "triton")}
    versions |= {name: linear_cross_entropy(package) for name, package in OTHERS.items()}
    return Shape(
        title=f"NT-Xent loss of two views, D = {info_nce.WIDTH}, forward + backward",
        unit="rows",
        sizes=(16, 32) if settings.quick else (8192, 65_536, 262_144),
        versions=versions,
        inputs=inputs,
        learns="features",
        width=info_nce.WIDTH,
        flops=lambda rows: 3 * rows * rows * info_nce.WIDTH,
        floor=lambda z1, z2: bare_products(torch.cat([z1, z2]), recomputed=False),
    )


def timed(work: str, runs: Runs, settings: Settings, repeats: int = 3, **labels: Any) -> Iterator[Row]:
    """Time and, on a GPU, peak memory; in few turns, for there the runs differ little."""

    def memory(name: str) -> float | None:
        return peak(lambda: None, runs[name], settings.device) if settings.device == "cuda" else None

    yield from compare(work, runs, settings, repeats=repeats, memory=memory, may_fail=FAILURES, **labels)


def training_step(settings: Settings) -> Iterator[Row]:
    """What SER adds to a step of MoCo-v3 where it takes a hundredth of the batch, in bf16."""
    batch, depth, grids = (8, 4, [(2, 2), (2, 3)]) if settings.quick else (BATCH, 12, [(14, 14), (12, 16)])
    work = f"{STEP}{batch}"
    try:
        from tests.benchmarks.ser_flops import RATIO, training_step
    except ImportError:
        yield {"work": work, "version": "timm and lightly", "not_measured": "not installed"}
        return
    few, (grid, drawn) = len(split_batch(torch.zeros(batch), RATIO)[1]), grids
    base, turned = (training_step(layer, depth=depth, device=settings.device) for layer in (0, 3))
    runs: Runs = {
        "MoCo-v3": lambda: base([(batch, grid, grid)]),
        f"+ SER, r = {RATIO}": lambda: turned([(batch - few, grid, grid), (few, drawn, drawn[::-1])]),
    }
    yield from timed(work, runs, settings, repeats=9)


def class_wise(settings: Settings) -> Iterator[Row]:
    classes = 4 if settings.quick else 1000
    for penalty in ("rex", "irmv1"):
        runs = class_wise_irm.steps(classes, penalty, settings)
        yield from timed(class_wise_irm.title(penalty), runs, settings, size=classes, unit="classes")


def partition_step(settings: Settings) -> Iterator[Row]:
    samples = 64 if settings.quick else 50_000
    arguments, by_name = partition.inputs(samples, settings), partition.steps()
    runs: Runs = {name: lambda r=by_name[name]: r(arguments) for name in ("soft_info_nce", partition.PASS)}
    z, floor = torch.cat(arguments[:2]), gpu_shapes.partition(settings).floor
    runs["the bare products"] = lambda: floor(z, z)
    yield from timed(partition.title(), runs, settings, size=samples, unit="samples")


def environments(settings: Settings) -> Iterator[Row]:
    """Of features that lie on the host and are streamed; beside a copy of all of them, and what that costs alone."""
    samples, classes, width = (60, 6, 16) if settings.quick else LARGE
    block = torch.randn(min(samples, 4096), width)
    features = block.repeat(-(-samples // len(block)), 1)[:samples]  # drawing all of them would take longest
    features += torch.arange(samples)[:, None] / samples
    labels = (torch.arange(samples) % classes).to(settings.device)
    runs: Runs = {
        "Environments.split, streamed": lambda: Environments.split(features, labels, classes),
        "Environments.split, with a copy": lambda: Environments.split(features.to(labels.device), labels, classes),
        "the bare products, with a copy": lambda: of_environments(features.to(labels.device), labels, classes),
        "a copy": lambda: features.to(labels.device),
    }
    work = f"Environments from the host, {samples:,} samples, {classes:,} classes, D = {width:,}"
    yield from timed(work, runs, settings, repeats=1)


STEPS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "Training step with SER": training_step,
    "Step of the search for a partition": partition_step,
    "Class-wise IRM step": class_wise,
    "Environments from the host": environments,
}
