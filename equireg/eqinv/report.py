"""What environments say about a data set before anything is trained: whether it looks biased, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from equireg._checks import Arguments
from equireg.eqinv.context_weights import auto_sharpness, chance_shape, shape_of

__all__ = ["EnvironmentsReport"]

# A sample counts as being in another class's context from this many standard deviations on; of normally spread scores,
# one in 44 does.
THRESHOLD = 2.0


def names_of_classes(check: Arguments, class_names: Sequence[str] | None, count: int) -> Sequence[str]:
    """Those given, one of each class, or their numbers."""
    if class_names is not None and len(class_names) != count:
        check.fail("class_names", f"of {count} classes", list(class_names))
    return class_names or [str(k) for k in range(count)]


class EnvironmentsReport:
    """For each class how far it looks biased, and in which other classes' contexts its samples are.

    ``Environments.report()`` makes it, from features alone. Where a class is mostly seen in one context, the few
    samples that are not resemble other classes much more than the rest does: the scores have a long tail, and their
    excess kurtosis is large (1 to 56 where it was tried, -0.5 to 0.5 without bias); where they are a third or a
    quarter of the class, the scores are skewed. Print it for a table; :meth:`picture` draws it.

    Attributes:
        size: int64 [C], samples of each class.
        excess_kurtosis: [C], of the scores z of each class; 0 for a normal distribution.
        skewness: [C], likewise.
        in_context: int64 [C, C], how many samples of class i are in the context of class j: ``z`` above 2, and j the
            other class that the sample resembles most.
        sharpness: what ``weights(sharpness="auto")`` takes, 0 .. 2.
    """

    def __init__(self, z: Tensor, labels: Tensor, contexts: Tensor, num_classes: int):
        self.size = labels.bincount(minlength=num_classes)
        shape = shape_of(z.double(), labels, num_classes)
        self.excess_kurtosis, self.skewness, self.sharpness = *shape, auto_sharpness(shape, self.size)
        far = z > THRESHOLD
        pairs = labels[far] * num_classes + contexts[far]
        self.in_context = pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)

    @property
    def looks_biased(self) -> Tensor:
        """[C], whether the kurtosis of a class is beyond chance by 1, or its skewness by 0.7, by two errors too."""
        chance, errors = chance_shape(int((self.size > 0).sum()) - 1), (1 / self.size.clamp(min=1)).sqrt()
        few = self.excess_kurtosis - chance.excess_kurtosis > (2 * 24**0.5 * errors).clamp(min=1)
        return few | (self.skewness - chance.skewness > (2 * 6**0.5 * errors).clamp(min=0.7))

    @property
    def order(self) -> Tensor:
        """The classes that have samples, those that look most biased first."""
        by_kurtosis = self.excess_kurtosis.argsort(descending=True, stable=True)
        return by_kurtosis[self.size[by_kurtosis] > 0]

    def __str__(self) -> str:
        """The classes by falling kurtosis, twenty at most, each with its three most frequent contexts."""
        order = self.order[:20].tolist()
        lines = [
            f"{int(self.looks_biased.sum())} of {int((self.size > 0).sum())} classes look biased; "
            f"sharpness 'auto' is {self.sharpness:.2f}",
            f"{'class':>6} {'samples':>8} {'kurtosis':>9} {'skewness':>9}  in another class's context (class: samples)",
        ]
        for k in order:
            counts, others = self.in_context[k].sort(descending=True, stable=True)
            found = ", ".join(f"{j}: {n}" for n, j in zip(counts[:3].tolist(), others[:3].tolist()) if n)
            marked = "*" if self.looks_biased[k] else " "
            shape = f"{self.excess_kurtosis[k]:>9.1f} {self.skewness[k]:>8.1f}{marked}"
            lines.append(f"{k:>6} {int(self.size[k]):>8} {shape}  {found or '-'}")
        if len(order) < len(self.order):
            lines.append(f"... and {len(self.order) - len(order)} classes with less")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"EnvironmentsReport({len(self.size)} classes, sharpness={self.sharpness:.2f})"

    def picture(self, *, class_names: list[str] | None = None) -> Any:
        """A matplotlib figure: the kurtosis of each class, and which classes' contexts its samples are in.

        Args:
            class_names: of the C classes; by default their numbers.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another number of names than of classes.
        """
        from matplotlib.figure import Figure  # on use; without pyplot, so that no window opens

        names = names_of_classes(Arguments("EnvironmentsReport.picture"), class_names or None, len(self.size))
        side = min(12.0, max(4.0, 0.25 * len(names)))
        figure = Figure(figsize=(1.6 * side, side), layout="constrained")
        bars, table = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
        colors = ["tab:orange" if biased else "tab:gray" for biased in self.looks_biased]
        bars.barh(range(len(names)), self.excess_kurtosis.numpy(), color=colors)
        bars.set(xlabel="excess kurtosis (orange: looks biased)", ylabel="class")
        bars.set_yticks(range(len(names)), names, fontsize=9)
        bars.invert_yaxis()
        share = self.in_context / self.size.clamp(min=1)[:, None]
        shown = table.imshow(100 * share.numpy(), cmap="Oranges", aspect="auto")
        table.set_xticks(range(len(names)), names, fontsize=9, rotation=90)
        table.set_xlabel("in the context of class")
        figure.colorbar(shown, ax=table, label="% of the class")
        return figure
