"""Partitions of a dataset that expose what features still entangle (Step 2 of IP-IRM)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from equireg._agreement import Facts, checksum
from equireg._checks import Arguments
from equireg.distributed import Processes, broadcast_from_rank0, gather_rows
from equireg.features import extract_two_views
from equireg.ipirm.partition_report import PartitionReport, as_bytes, from_bytes
from equireg.ipirm.partition_search import SearchConfig, SearchResult, adjusted_rand_index, find_partition
from equireg.ipirm.soft_info_nce import check_views

__all__ = ["PartitionUpdater"]

_COLLAPSED = 0.02  # a group of less than this share of an even one holds nothing to be invariant over


class PartitionUpdater(nn.Module):
    r"""The set of partitions of IP-IRM, and the step that finds a new one.

    .. math::
        P^* = \operatorname*{argmax}_P \sum_k \Big[ L_k + \lambda_2 \Big( \frac{\partial L_k}{\partial \theta} \Big)^2
        \Big], \qquad P = \text{softmax}(S)

    (Wang et al., 2021, Eq. 3) with the losses and slopes of :func:`soft_info_nce` on frozen features of two views, by
    Adam on fresh logits :math:`S \in \mathbb{R}^{N \times K}`; at the end each sample goes to its likelier group. A
    group whose samples resemble each other has a large contrastive loss, so the partition follows what the features
    encode most, and a loss that is to be the same in both groups has to let go of it (``IPIRMLoss``).

    In a pass every sample takes one step of the optimizer, with its negatives in a block of up to ``block_size``
    samples drawn anew for each pass; the objective is a mean over blocks, balanced over the whole dataset. The step is
    ``lr``, a fifth of it after 5 passes and of that after 35; past 50 passes, five without gain end it; the logits of
    the best pass count.

    Args:
        num_samples: N, length of the dataset.
        num_groups: K, 2 or more, at most N.
        temperature: τ of the similarities, above 0.
        weight: λ₂ of the squared slopes, at least 0. With the paper's 0.5, groups that nothing tells apart can have the
            largest objective where features tell samples apart, as trained ones do; with 0 the losses alone decide.
        lr: Adam's learning rate, above 0.
        max_passes: at most this many passes; with 0 ``update`` finds nothing and gives the last partition.
        block_size: samples compared with each other at once; None compares all, in time that grows with N².
        balance: ``"relaxed"`` takes ``10 relu(h - H)`` off the objective, with H the entropy of the mean of P over all
            samples and h that of two groups of 2 : 1 (0.6365 for K = 2); ``"strict"`` adds H. With either, no group is
            more than twice another, unless it collapsed: where the hard ones are a little beyond, their least certain
            samples move. None does nothing.
        starts: how many searches, each from logits of its own. The partition of the largest objective is kept, of
            those that have not collapsed (to a group of one sample, or of less than a fiftieth of an even share).
        keep: how many of the partitions found stay in the set, the newest; None keeps all, as the paper. The released
            code has both.
        seed: of the updater's own generator, which travels in the ``state_dict``.

    Attributes:
        partitions: int64 [P, N], the group of each sample in each partition; the first has all samples in one group.
        reports: a :class:`PartitionReport` for each update, those included whose partitions ``keep`` has dropped.

    Across processes, rank 0 looks for the partition and all get it; each must hold the same partitions before, or every
    process raises. A ``state_dict`` of another number of samples or groups is refused.

    Raises:
        TypeError, ValueError: arguments of a wrong type or range; more groups than samples.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> hidden = torch.arange(40) % 2  # what the features encode: two directions, and noise
        >>> z = torch.eye(8)[hidden] + 0.1 * torch.randn(2, 40, 8, generator=generator)
        >>> updater = PartitionUpdater(40)
        >>> found = updater.update(z[0], z[1], generator, progress=False)
        >>> bool((found == hidden).all() or (found == 1 - hidden).all()), updater.partitions.shape
        (True, torch.Size([2, 40]))
    """

    partitions: Tensor
    generator_state: Tensor

    def __init__(
        self,
        num_samples: int,
        num_groups: int = 2,
        *,
        temperature: float = 0.5,
        weight: float = 0.5,
        lr: float = 0.5,
        max_passes: int = 61,
        block_size: int | None = 3096,
        balance: str | None = "relaxed",
        starts: int = 3,
        keep: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        check = Arguments("PartitionUpdater")
        check.count("num_samples", num_samples, least=2)
        check.count("num_groups", num_groups, least=2)
        if num_groups > num_samples:
            check.fail("num_groups", f"at most the {num_samples} samples", num_groups)
        check.number("temperature", temperature)  # frozen here, so no tensor that learns
        check.positive("temperature", temperature)
        check.not_negative("weight", weight)
        check.positive("lr", lr)
        check.count("max_passes", max_passes, least=0)
        if block_size is not None:
            check.count("block_size", block_size, least=2)
        check.option("balance", balance, ("relaxed", "strict", None))
        check.count("starts", starts)
        if keep is not None:
            check.count("keep", keep)
        check.count("seed", seed, least=0)
        self.num_samples, self.num_groups = num_samples, num_groups
        self.temperature, self.weight, self.lr, self.max_passes = temperature, weight, lr, max_passes
        self.block_size, self.balance, self.starts, self.keep = block_size, balance, starts, keep
        # No buffers, though in the ``state_dict``: moving averages copy buffers, or average them, and the table grows.
        self.partitions = torch.zeros(1, num_samples, dtype=torch.int64)
        self.generator_state = torch.Generator().manual_seed(seed).get_state()
        self.reports: list[PartitionReport] = []
        self._of_one_group: set[int] = set()  # rows beside the first, as a partition that collapsed

    @property
    def splitting(self) -> Tensor:
        """The partitions that have more than one group, int64 [P, N]."""
        if not self._of_one_group:
            return self.partitions[1:]
        return self.partitions[[row for row in range(1, len(self.partitions)) if row not in self._of_one_group]]

    def update(
        self,
        z1: Tensor | Iterable[Any],
        z2: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        encoder: Callable[[Tensor], Tensor] | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Find the next partition, from frozen features or from an encoder and a loader of two views.

        Args:
            z1: features of the first views, [N, d], sample n in row n; or, with ``encoder``, a loader of
                ``((view1, view2), indices)``, in any order. Across processes each may see a part of the dataset. What
                comes twice counts as it came first.
            z2: features of the second views, [N, d]; not with ``encoder``.
            generator: source of the logits and blocks, on the CPU; None takes the updater's own.
            encoder: views [B, ...] to features [B, d]. Run in eval mode without gradient, and left as it was.
            progress: whether to show bars, where tqdm is installed.

        Returns:
            int64 [N]: the group of each sample. It is now the last of ``partitions``, and a report the last of
            ``reports``.

        Raises:
            TypeError, ValueError: features of wrong types or shapes or that are not finite, samples that the loader did
                not give; across processes, other partitions than rank 0's.
            FloatingPointError: the objective is not finite.

        Warns:
            UserWarning: the partitions of all starts collapsed.

        Whatever is raised, the partitions and the generator stay as they were.
        """
        with Processes("PartitionUpdater.update", True).alike() as facts:
            rows, indices = self._rows(z1, z2, generator, encoder, progress)
            facts.update(self._facts(rows, indices))
        if indices is not None:
            rows = self._in_order(gather_rows(rows), gather_rows(indices))
            self._check_features(*rows.chunk(2, 1))
        x1, x2 = rows.chunk(2, 1)
        if self.max_passes == 0:
            return self.partitions[-1].clone()
        source = torch.Generator() if generator is None else generator
        if generator is None:
            source.set_state(self.generator_state)
        before = source.get_state()
        try:
            # One process looks; all get what it found, and the state its generator is left in.
            found, after = broadcast_from_rank0(lambda: (self._search(x1, x2, source, progress), source.get_state()))
            report = self._report(found)
            if report.collapsed:
                warnings.warn(
                    f"PartitionUpdater: the partition collapsed, its groups are of {report.group_sizes} samples from "
                    f"each of {self.starts} starts: the features do not tell samples apart, or balance is None",
                    stacklevel=2,
                )
        except BaseException:
            source.set_state(before)
            raise
        source.set_state(after)
        self.reports.append(report)
        if generator is None:
            with torch.inference_mode(False):  # what is made in that mode could not be loaded into later
                self.generator_state = after.clone()
        return self._join(found.partition)

    def add(self, groups: Tensor) -> None:
        """A partition of your own joins the set: of known groups, or of random ones as a control.

        Args:
            groups: int64 [N], the group of each sample, 0 .. K - 1.

        Raises:
            TypeError, ValueError: groups that are not whole numbers, of another length, or out of range.
        """
        check = Arguments("PartitionUpdater.add")
        check.sizes["N"] = self.num_samples
        groups = check.integers("groups", groups, "N")
        check.below("groups", groups, self.num_groups, "num_groups")
        self._join(groups)

    def _join(self, groups: Tensor) -> Tensor:
        """A copy of the groups, which is now the last of the partitions."""
        with torch.inference_mode(False):
            partition = groups.to(self.partitions.device, copy=True)
            found = torch.cat([self.partitions[1:], partition[None]])
            self.partitions = torch.cat([self.partitions[:1], found if self.keep is None else found[-self.keep :]])
        self._note_those_of_one_group()
        return partition

    def _note_those_of_one_group(self) -> None:
        """Once, so that no step waits for a GPU."""
        alone = (self.partitions == self.partitions[:, :1]).all(1).tolist()
        self._of_one_group = {row for row in range(1, len(alone)) if alone[row]}

    def _rows(
        self,
        z1: Tensor | Iterable[Any],
        z2: Tensor | None,
        generator: torch.Generator | None,
        encoder: Callable[[Tensor], Tensor] | None,
        progress: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Both views' features side by side, [n, 2 d]; and where an encoder made them, whose they are, [n]."""
        check = Arguments("PartitionUpdater.update")
        if generator is not None and not isinstance(generator, torch.Generator):
            check.fail_type("generator", "a torch.Generator or None", type(generator).__name__)
        if encoder is not None:
            if isinstance(z1, Tensor) or z2 is not None:
                check.fail_type("z1 and z2", "a loader and None where encoder is given", "tensors")
            first, second, indices = extract_two_views(encoder, z1, progress=progress)
            check.below("indices", indices, self.num_samples, "num_samples")
            return torch.cat([first, second], 1), indices
        if not isinstance(z1, Tensor):
            check.fail_type("z1", "a tensor, or a loader together with encoder", type(z1).__name__)
        if z2 is None:
            check.fail("z2", "given with z1", None)
        self._check_features(z1, z2)
        return torch.cat([z1, z2], 1), None

    def _check_features(self, z1: Tensor, z2: Tensor) -> None:
        check = Arguments("PartitionUpdater.update")
        check_views(check, z1, z2, self.temperature)
        if len(z1) != self.num_samples:
            check.fail("z1", f"of num_samples = {self.num_samples} rows", list(z1.shape))
        for name, z in (("z1", z1), ("z2", z2)):
            check.finite(name, z)

    def _in_order(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Sample n in row n, as it came first."""
        order = indices.argsort(stable=True)
        known = indices[order]
        first = torch.cat([known.new_ones(1, dtype=torch.bool), known[1:] != known[:-1]])
        if int(first.sum()) < self.num_samples:
            there = torch.zeros(self.num_samples, dtype=torch.bool)
            there[known] = True
            missing = (~there).nonzero().squeeze(1)
            got = f"none of index {int(missing[0])} ({len(missing)} missing)"
            Arguments("PartitionUpdater.update").fail("loader", f"of all {self.num_samples} samples", got)
        return rows[order[first]]

    def _search(self, z1: Tensor, z2: Tensor, generator: torch.Generator, progress: bool) -> SearchResult:
        config = SearchConfig(
            self.num_groups, self.temperature, self.weight, self.lr, self.max_passes, self.block_size, self.balance
        )
        found = [find_partition(z1, z2, config, generator, progress=progress) for _ in range(self.starts)]
        # The objective has local maxima; and a partition that collapsed is the last choice.
        best = max(found, key=lambda one: (not self._collapsed(one.partition), self._objective(one)))
        return best._replace(partition=best.partition.cpu())

    def _objective(self, found: SearchResult) -> float:
        return found.loss + self.weight * found.penalty - found.balance

    def _collapsed(self, partition: Tensor) -> bool:
        smallest = int(partition.bincount(minlength=self.num_groups).min())
        share = self.num_samples / self.num_groups
        return smallest < max(min(2, int(share)), _COLLAPSED * share)

    def _report(self, found: SearchResult) -> PartitionReport:
        partition = found.partition.to(self.partitions.device)
        return PartitionReport(
            objective=self._objective(found),
            loss=found.loss,
            penalty=found.penalty,
            balance=found.balance,
            passes=found.passes,
            group_sizes=tuple(partition.bincount(minlength=self.num_groups).tolist()),
            agreement=tuple(adjusted_rand_index(partition, earlier) for earlier in self.partitions),
            collapsed=self._collapsed(partition),
        )

    def _facts(self, rows: Tensor, indices: Tensor | None) -> Facts:
        """What must be alike in all processes; they may have encoded other numbers of samples."""
        return {
            "num_groups": self.num_groups,
            "partitions": list(self.partitions.shape),
            "partitions' sum": partial(checksum, self.partitions),
            "the generator's state": partial(checksum, self.generator_state),
            "whether there is an encoder": indices is not None,
            "features": [rows.shape[1], str(rows.dtype)],
        }

    def extra_repr(self) -> str:
        options = ("temperature", "weight", "lr", "max_passes", "block_size", "balance", "keep")
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
        return f"{self.num_samples}, {self.num_groups}, partitions={len(self.partitions)}, {shown}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartitionUpdater:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.partitions = fn(self.partitions)
        return self

    def get_extra_state(self) -> Tensor:
        return as_bytes(self.num_groups, self.reports)

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        _, self.reports = from_bytes(state)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "partitions"] = self.partitions
        destination[prefix + "generator_state"] = self.generator_state
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        missing: list[str] = args[2]
        errors: list[str] = args[4]
        keys = [prefix + name for name in ("partitions", "generator_state", "_extra_state")]
        absent = [name for name in keys if name not in state_dict]
        if absent:  # all or nothing
            missing.extend(absent)
            return
        saved, generator, extra = (state_dict[name] for name in keys)
        groups, _ = from_bytes(extra)
        fits = saved.dim() == 2 and len(saved) and saved.shape[1] == self.num_samples and groups == self.num_groups
        whole = saved.dtype == torch.int64 and saved.numel() and 0 <= int(saved.min()) <= int(saved.max()) < groups
        if not fits or not whole or generator.shape != self.generator_state.shape:
            errors.append(
                f"PartitionUpdater: the partitions saved are {list(saved.shape)} with {groups} groups, "
                f"this updater is of {self.num_samples} samples and {self.num_groups} groups"
                + ("" if not fits else "; they or the generator's state are damaged")
            )
            return
        others = {key: value for key, value in state_dict.items() if key not in keys[:2]}
        super()._load_from_state_dict(others, prefix, *args)
        assigned = args[0].get("assign_to_params_buffers", False)
        self.partitions = saved if assigned else saved.to(self.partitions.device, copy=True)
        self.generator_state = generator.to("cpu", copy=True)
        self._note_those_of_one_group()
