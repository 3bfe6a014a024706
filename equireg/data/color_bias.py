"""Colour bias for any image data set: most samples of a class have the colour of the class."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from equireg._checks import Arguments
from equireg.data.k_shot import labels_of
from equireg.data.with_index import check_map_style

__all__ = ["ColorBias"]


class ColorBias(Dataset[tuple[Any, ...]]):
    """Tints the images of a data set: with probability ``bias`` in the colour of their class, else in any colour.

    Args:
        dataset: gives ``(image, label)``, or more behind them; an image is a ``PIL.Image``, or a tensor [3, H, W] or
            [1, H, W], floating point in 0 .. 1 or uint8. Its labels are found without reading samples, as by `k_shot`.
        num_classes: C; class c has colour c.
        bias: in 0 .. 1; EqInv's Coloured MNIST has 0.995 (supplement, B.3). The other samples take any colour with
            equal probability, that of their class included.
        colors: [K, 3] with K >= C, red, green and blue in 0 .. 1. ``None``: C hues evenly around the circle, at a
            saturation of 0.8, so that no channel vanishes.
        seed: draws the colours once: an index has the same colour whenever it is read.
        transform: called with every tinted image.

    A tint multiplies the channels by the colour: white becomes the colour, black stays black, and a photo looks as
    through coloured glass. Gray images become RGB. The result has the type of the image.

    Attributes: ``labels`` (int64 [N]), ``targets`` (the same as a list), ``contexts`` (int64 [N], the colour of each
    sample), ``colors`` (float32 [K, 3]), ``classes`` (the data set's, if it has them), ``dataset``, ``transform``.

    Raises:
        TypeError: the data set is not map-style or its labels are not found; an item is no image with a label.
        ValueError: a label is not in 0 .. C - 1, ``bias`` or ``colors`` are out of range.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> digits = TensorDataset(torch.ones(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
        >>> painted = ColorBias(digits, 2, bias=1.0, colors=[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> image, label = painted[1]
        >>> image[:, 0, 0].tolist(), int(label), painted.contexts.tolist()
        ([0.0, 1.0, 0.0], 1, [0, 1, 1, 0])
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_classes: int,
        *,
        bias: float = 0.995,
        colors: Tensor | Sequence[Sequence[float]] | None = None,
        seed: int = 0,
        transform: Callable[[Any], Any] | None = None,
    ):
        args = Arguments("ColorBias")
        check_map_style(args, dataset)
        args.count("num_classes", num_classes)
        args.share("bias", bias)
        args.count("seed", seed, least=0)
        self.labels = labels_of(args, dataset)
        args.below("the dataset's labels", self.labels, num_classes, "num_classes")
        if colors is None:
            colors = [colorsys.hsv_to_rgb(color / num_classes, 0.8, 1.0) for color in range(num_classes)]
        self.colors = torch.as_tensor(colors, dtype=torch.float32).detach().cpu().clone()
        if self.colors.dim() != 2 or self.colors.shape[1] != 3:
            args.fail("colors", "[K, 3]", list(self.colors.shape))
        if len(self.colors) < num_classes:
            args.fail("colors", f"of {num_classes} rows or more, one for each class", len(self.colors))
        if not ((self.colors >= 0) & (self.colors <= 1)).all():
            args.fail("colors", "in 0 .. 1", self.colors.tolist())
        generator = torch.Generator().manual_seed(seed)
        any_color = torch.randint(len(self.colors), self.labels.shape, generator=generator)
        of_class = torch.rand(self.labels.shape, generator=generator, dtype=torch.float64) < bias
        self.contexts = torch.where(of_class, self.labels, any_color)
        self.dataset = dataset
        self.transform = transform
        if hasattr(dataset, "classes"):
            self.classes = dataset.classes

    @property
    def targets(self) -> list[int]:
        return self.labels.tolist()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"ColorBias: index must be in 0 .. {len(self) - 1}, got {index}")
        item = self.dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            Arguments("ColorBias").fail_type("dataset", "one of (image, label)", f"items of {type(item).__name__}")
        image = _tinted(item[0], self.colors[self.contexts[index]])
        return (image if self.transform is None else self.transform(image), *item[1:])


def _tinted(image: Any, color: Tensor) -> Any:
    args = Arguments("ColorBias")
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            args.fail("an image", "a PIL.Image or a tensor [3, H, W] or [1, H, W]", list(image.shape))
        if not image.is_floating_point() and image.dtype != torch.uint8:
            args.fail_type("an image", "of floating point numbers or uint8", image.dtype)
        tinted = image * color.to(image.device)[:, None, None]
        return (tinted.round() if image.dtype == torch.uint8 else tinted).to(image.dtype)
    if not hasattr(image, "convert"):
        args.fail_type("an image", "a PIL.Image or a tensor", type(image).__name__)
    factors = [factor for factor in color.tolist() for _ in range(256)]
    return image.convert("RGB").point([round(value % 256 * factor) for value, factor in enumerate(factors)])
