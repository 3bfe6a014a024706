"""The losses at the sizes of a GPU: SER's, NT-Xent, class-wise IRM, a partition's step, environments from the host."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from equireg import Environments
from tests.benchmarks import class_wise_irm, gpu_shapes, info_nce, partition, ser
from tests.benchmarks.environments import bare_products as of_environments
from tests.benchmarks.floor import bare_products
from tests.benchmarks.measure import Row, Runs, Settings, compare, difference, peak, step

try:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
except ImportError:
    CompilationError = OutOfResources = RuntimeError
# Out of memory, no kernel, a kernel that does not compile or does not fit on the chip.
FAILURES = (RuntimeError, NotImplementedError, CompilationError, OutOfResources)


@dataclass(frozen=True)
class Sizes:
    """What the losses are timed at."""

    ser_images: tuple[int, ...] = (64, 512)
    nt_xent_rows: tuple[int, ...] = (8192, 65_536, 262_144)
    classes: int = 1000
    partition_samples: int = 50_000
    environments: tuple[int, int, int] = (1_280_000, 1000, 2048)  # samples, classes, width


def sizes(settings: Settings) -> Sizes:
    return Sizes((2,), (16, 32), 4, 64, (60, 6, 16)) if settings.quick else Sizes()


def timed(work: str, runs: Runs, settings: Settings, repeats: int = 3, **labels: Any) -> Iterator[Row]:
    """Time and, on a GPU, peak memory; in few turns, for there the runs differ little."""

    def memory(name: str) -> float | None:
        return peak(lambda: None, runs[name], settings.device) if settings.device == "cuda" else None

    yield from compare(work, runs, settings, repeats=repeats, memory=memory, may_fail=FAILURES, **labels)


def of_loss(
    work: str,
    versions: dict[str, Callable[..., Any]],
    inputs: Callable[[int], list[torch.Tensor]],
    floor: Callable[[list[torch.Tensor]], None],
    counts: tuple[int, ...],
    settings: Settings,
    **labels: Any,
) -> Iterator[Row]:
    """Of full precision and with products in TF32; versions that are to agree with the first do so at a small size."""
    small = inputs(min(16, *counts))
    expected = step(versions["dense eager"], small)
    for name, version in versions.items():
        if "diagonal" not in name and "compile" not in name:
            assert difference(step(version, small), expected) < 1e-3, name
    for products, precision in (("highest", "fp32"), ("high", "tf32")):
        for count in counts:
            arguments = inputs(count)
            runs: Runs = {name: lambda v=v, a=arguments: step(v, a) for name, v in versions.items()}
            runs["three bare products"] = lambda a=arguments: floor(a)
            repeats = 1 if count == max(counts) else 3  # the largest takes seconds
            with ser.precision(products):
                yield from timed(f"{work}, {precision}", runs, settings, repeats, size=count, **labels)


def ser_loss(settings: Settings) -> Iterator[Row]:
    _, tokens, width = ser.shape(settings)

    def floor(arguments: list[torch.Tensor]) -> None:
        z, z_prime = (part.detach().flatten(0, 1) for part in arguments)
        bare_products(z, torch.cat([z, z_prime]), recomputed=False)

    work = f"SER loss, {tokens} tokens an image, D = {width}, forward + backward"
    counts = sizes(settings).ser_images
    inputs = lambda count: ser.inputs(count, settings)  # noqa: E731
    yield from of_loss(work, ser.versions(settings), inputs, floor, counts, settings, unit="images")


def linear_cross_entropy(name: str) -> Callable[..., Any] | None:
    """The nearest kernel of a library that fuses a classifier with its cross entropy; None where it is not installed.

    Its classes are the rows themselves, and its diagonal cannot be left out: it computes another number.
    """
    if importlib.util.find_spec(name) is None:
        return None

    def loss(z1, z2):
        z = F.normalize(torch.cat([z1, z2]), dim=1).bfloat16()
        sample = torch.arange(len(z1), device=z.device)
        partner, scaled = torch.cat([sample + len(z1), sample]), z / info_nce.TEMPERATURE
        if name == "liger_kernel":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss()(z, scaled, partner)
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(scaled, z, partner)

    return loss


OTHERS = {
    "Liger, linear cross entropy with the diagonal, bf16": "liger_kernel",
    "Cut Cross Entropy with the diagonal, bf16": "cut_cross_entropy",
}


def nt_xent(settings: Settings) -> Iterator[Row]:
    versions = {
        name: version
        for name, version in info_nce.versions(settings).items()
        if name not in (info_nce.BY_PAIRS, info_nce.BY_MATRIX)
    }
    versions |= {name: linear_cross_entropy(package) for name, package in OTHERS.items()}
    work = f"NT-Xent loss of two views, D = {info_nce.WIDTH}, forward + backward"
    counts = sizes(settings).nt_xent_rows
    for name in [name for name, version in versions.items() if version is None]:
        del versions[name]
        row = {"work": f"{work}, fp32", "version": name, "size": counts[0], "unit": "rows"}
        yield {**row, "not_measured": "not installed"}

    def floor(arguments: list[torch.Tensor]) -> None:
        bare_products(torch.cat(arguments).detach(), recomputed=False)

    inputs = lambda count: info_nce.inputs(count, settings)  # noqa: E731
    yield from of_loss(work, versions, inputs, floor, counts, settings, unit="rows")


def class_wise(settings: Settings) -> Iterator[Row]:
    classes = sizes(settings).classes
    for penalty in ("rex", "irmv1"):
        runs = class_wise_irm.steps(classes, penalty, settings)
        yield from timed(class_wise_irm.title(penalty), runs, settings, size=classes, unit="classes")


def partition_step(settings: Settings) -> Iterator[Row]:
    samples = sizes(settings).partition_samples
    arguments, by_name = partition.inputs(samples, settings), partition.steps()
    runs: Runs = {name: lambda r=by_name[name]: r(arguments) for name in ("soft_info_nce", partition.PASS)}
    z, floor = torch.cat(arguments[:2]), gpu_shapes.partition(settings).floor
    runs["the bare products"] = lambda: floor(z, z)
    yield from timed(partition.title(), runs, settings, size=samples, unit="samples")


def environments(settings: Settings) -> Iterator[Row]:
    """Features that lie on the host, and how long they take to the GPU alone."""
    samples, classes, width = sizes(settings).environments
    block = torch.randn(min(samples, 4096), width)
    features = block.repeat(-(-samples // len(block)), 1)[:samples]  # drawing all of them would take longest
    features += torch.arange(samples)[:, None] / samples
    labels = torch.arange(samples) % classes

    def there() -> tuple[torch.Tensor, torch.Tensor]:
        return features.to(settings.device), labels.to(settings.device)

    runs: Runs = {
        "Environments.split, with the copy": lambda: Environments.split(*there(), classes),
        "the bare products, with the copy": lambda: of_environments(*there(), classes),
        "the copy": there,
    }
    work = f"Environments from the host, {samples:,} samples, {classes:,} classes, D = {width:,}"
    yield from timed(work, runs, settings)


LOSSES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "SER loss": ser_loss,
    "NT-Xent loss": nt_xent,
    "Step of the search for a partition": partition_step,
    "Class-wise IRM step": class_wise,
    "Environments from the host": environments,
}
