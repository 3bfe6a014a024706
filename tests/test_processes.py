"""Every loss that gathers, by its record: in any number of processes it is that of one with the whole batch."""

import copy
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from equireg import (
    ClassWiseIRM,
    GridTransform,
    IPIRMLoss,
    MoCoIPIRMLoss,
    SERLoss,
    SimSiamIPIRMLoss,
    soft_info_nce,
)
from equireg.distributed import Processes
from tests.processes import in_processes
from tests.records import RECORDS
from tests.records.record import BATCH, leaves, outputs, take

GATHERING = [record for record in RECORDS if record.processes == "gather"]
MEANS = [record for record in RECORDS if record.processes == "mean"]


class Model(nn.Module):
    """A linear layer for each argument that gets a gradient, and the loss behind them."""

    def __init__(self, loss, args):
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        # Near the identity, and of positive entries, so that weights stay weights.
        self.layers = nn.ParameterList(
            torch.eye(leaf.shape[-1], dtype=leaf.dtype)
            + 0.1 * torch.rand(leaf.shape[-1], leaf.shape[-1], dtype=leaf.dtype, generator=draw)
            for leaf in leaves(args)
        )
        self.loss = loss

    def forward(self, *args):
        layers = iter(self.layers)

        def through(value):
            gets = isinstance(value, torch.Tensor) and value.requires_grad
            return value.detach() @ next(layers) if gets else value

        parts = outputs(self.loss(*tree_map(through, args)))
        return sum((k + 1) * part.sum() for k, part in enumerate(parts))


def model_of(record, gather=False):
    return Model(record.build(**({"gather_distributed": True} if gather else {})), record.sample())


def halves(count, rank=0, world=1):
    """The rows of a process in the whole batch, or in each of its halves."""
    length = BATCH // count // world
    return [slice(start + rank * length, start + (rank + 1) * length) for start in range(0, BATCH, BATCH // count)]


def accumulated(model, batches):
    """The loss of the last batch, and the gradients of all."""
    for k, batch in enumerate(batches):
        parallel = isinstance(model, nn.parallel.DistributedDataParallel)
        with model.no_sync() if parallel and k + 1 < len(batches) else nullcontext():
            loss = model(*batch)
            loss.backward()
    return loss.item(), [p.grad.flatten().tolist() for p in model.parameters()]


def assert_alike(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-10)
    for mine, wanted in zip(found[1], expected[1], strict=True):
        assert mine == pytest.approx(wanted, rel=1e-10, abs=1e-12)


def all_records(rank, world):
    """Of each record the loss and gradients: of the batch, and of its halves in turn without synchronising between."""
    found = {}
    for record in [*GATHERING, *MEANS]:
        for count in (1, 2) if BATCH // 2 % world == 0 else (1,):
            model = nn.parallel.DistributedDataParallel(model_of(record, gather=record in GATHERING))
            args = record.sample()
            batches = [take(args, rows) for rows in halves(count, rank, world)]
            found[record.name, count] = accumulated(model, batches)
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_one_process_with_the_whole_batch(world, tmp_path):  # D4, D5, D7, D13, D14
    results = in_processes(world, all_records, tmp_path, world)
    assert len(results[0]) == (len(GATHERING) + len(MEANS)) * (1 if world == 4 else 2)
    for record in [*GATHERING, *MEANS]:
        args = record.sample()
        for count in (1, 2):
            if (record.name, count) not in results[0]:
                continue
            expected = accumulated(model_of(record), [take(args, rows) for rows in halves(count)])
            assert any(any(gradient) for gradient in expected[1])
            found = [result[record.name, count] for result in results]
            if record in MEANS:
                average = sum(loss for loss, _ in found) / world
                found = [(average, gradients) for _, gradients in found]
            for each in found:
                assert_alike(each, expected)


LONELY = torch.tensor([0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 1, 0])  # the second of three processes has no pair of a class


def lonely(rank, gather=True):
    """Losses on a batch of which the second third is alone: in its class, or in its group."""
    torch.manual_seed(0)
    z1, z2 = (torch.randn(BATCH, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    irm = ClassWiseIRM(5, 6, projection=nn.Identity(), detach=False, penalty="irmv1", gather_distributed=gather)
    ipirm = IPIRMLoss(torch.stack([LONELY, torch.arange(BATCH) % 2]), gather_distributed=gather)
    found = []
    for loss, args in ((irm.double(), (z1, LONELY)), (ipirm, (z1, z2, torch.arange(BATCH)))):
        model = nn.parallel.DistributedDataParallel(Model(loss, args)) if gather else Model(loss, args)
        found.append(accumulated(model, [take(args, halves(1, rank, 3)[0] if gather else slice(None))]))
    return found


def test_process_without_rows_that_count(tmp_path):  # D2
    for found in in_processes(3, lonely, tmp_path):
        for mine, wanted in zip(found, lonely(0, gather=False), strict=True):
            assert_alike(mine, wanted)


def in_groups(rank):
    """Two groups of two, each with half of the batch; and what a group cannot do."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, other = groups[rank // 2], groups[1 - rank // 2]
    found = {}
    for record in GATHERING:
        model = Model(record.build(gather_distributed=group), record.sample())
        rows = halves(2, rank % 2, 2)[rank // 2]
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model), process_group=group)
        found[record.name] = accumulated(parallel, [take(record.sample(), rows)])
    with pytest.raises(ValueError, match="SERLoss: gather_distributed must be .* group that this process is in, got"):
        SERLoss(4, gather_distributed=other)
    with pytest.raises(TypeError, match="SERLoss: a process group cannot be pickled"):
        pickle.dumps(SERLoss(4, gather_distributed=group))
    assert "a group of 2" in repr(SERLoss(4, gather_distributed=group))
    return found


def test_groups_of_processes(tmp_path):  # D10
    results = in_processes(4, in_groups, tmp_path)
    for record in GATHERING:
        for half, rows in enumerate(halves(2)):
            expected = accumulated(model_of(record), [take(record.sample(), rows)])
            for found in results[2 * half : 2 * half + 2]:
                assert_alike(found[record.name], expected)


def misfits(rank):
    """What each record raises where one process has a sample less, and where it is called wrongly."""
    found = []
    for record in GATHERING:
        loss, args = record.build(gather_distributed=True), record.sample()
        cases = {"uneven": take(args, slice(0, 6 - rank))}
        for name, refused in record.refused.items():
            if not refused.options:
                cases[name] = refused.change(args) if rank else args
        for name, case in cases.items():
            try:
                loss(*case)
                said = "nothing"
            except (TypeError, ValueError) as error:
                said = f"{type(error).__name__}: {error}"
            found.append((record.name, name, said))
        assert all(part.isfinite().all() for part in outputs(loss(*args)))  # and afterwards all is well
    return found


def test_misfits_are_the_same_error_everywhere(tmp_path):  # D1, D3
    first, second = in_processes(2, misfits, tmp_path)
    assert len(first) > 2 * len(GATHERING)
    for (name, case, mine), (*_, theirs) in zip(first, second, strict=True):
        function = name.split("/")[0]
        assert mine.startswith(f"ValueError: {function}: ")
        assert "must be alike in every process" in mine
        if case == "uneven":
            assert mine == theirs
            assert "6" in mine
            assert "5" in mine
        else:
            assert "rank 1: refused, see the error there" in mine
            record = next(record for record in GATHERING if record.name == name)
            assert re.search(record.refused[case].message, theirs)


def different_calls(rank):
    """Calls that every process could answer alone, and that do not fit together."""
    torch.manual_seed(0)  # masks that are alike
    draw = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 6, 5, generator=draw)
    learned, indices, labels = z1.clone().requires_grad_(), torch.arange(6), torch.arange(6) % 2
    gathering = {"gather_distributed": True}
    groups = [torch.arange(30) % 2, torch.arange(30) % 3, torch.zeros(30).long(), (torch.arange(30) + 1) % 2]
    still = GridTransform.identity(6, (1, 1))

    def irm(seen=20, **options):
        irm = ClassWiseIRM(5, 2, projection=nn.Identity(), detach=False, **gathering, **options)
        return irm.fit_environments(torch.randn(seen, 5, generator=draw), torch.arange(seen) % 2)

    def moco():
        return MoCoIPIRMLoss(groups[0][None], num_features=5, queue_size=24, **gathering).train(bool(rank))

    frozen = SERLoss(5, **gathering).requires_grad_(False)
    tokens = learned[:, None] if rank else z1[:, None]
    half = z1.bfloat16() if rank else z1
    ipirm = IPIRMLoss(groups[0][None], **gathering)
    calls = {
        "indices": lambda: irm()(z1, labels, indices if rank else None),
        "environments": lambda: irm(30 if rank else 20)(z1, labels, indices),
        "environments' sum": lambda: irm(22 + rank)(z1, labels, indices),
        "settings": lambda: irm(weight=float(rank), penalty="irmv1")(z1, labels),
        "whether parameters learn": lambda: irm().requires_grad_(bool(rank))(z1, labels),
        "features": lambda: irm()(half, labels),
        "weights": lambda: soft_info_nce(z1, z2, torch.ones(6, 2) if rank else None, **gathering),
        "weights ": lambda: soft_info_nce(z1, z2, torch.ones(6, 2 + rank), **gathering),
        "weights  ": lambda: soft_info_nce(z1, z2, torch.ones(6, 2, requires_grad=bool(rank)), **gathering),
        "mix": lambda: ipirm(z1, z2, indices, mix=(indices, 0.5) if rank else None),
        "partitions": lambda: IPIRMLoss(groups[0][None, : 30 - 10 * rank], **gathering)(z1, z2, indices),
        "partitions' sum": lambda: IPIRMLoss(groups[3 * rank][None], **gathering)(z1, z2, indices),
        "partitions' sum ": lambda: IPIRMLoss(groups[rank][None], **gathering)(z1, z2, indices),
        "partitions' sum  ": lambda: SimSiamIPIRMLoss(groups[2 * rank][None], **gathering)(z1, z2, z1, z2, indices),
        "training": lambda: moco()(z1, z2, indices),
        "projected tokens2": lambda: frozen(z1[:, None], tokens, still, still),
    }
    found = []
    for name, call in calls.items():
        with pytest.raises(ValueError, match="must be alike in every process") as caught:
            call()
        found.append((name.strip(), str(caught.value)))
    return found


def test_calls_that_do_not_fit_together(tmp_path):  # D1, D3
    first, second = in_processes(2, different_calls, tmp_path)
    assert first == second
    for fact, message in first:
        assert f": {fact} must be alike in every process, got rank 0: " in message


def outside(rank, seeded, accumulate):
    """A mask that DistributedDataParallel does not wrap, from the same start or not, and moved in every n-th call."""
    torch.manual_seed(0 if seeded else rank)
    irm, head = ClassWiseIRM(5, 2, projection=nn.Identity()), nn.Linear(5, 2)
    inside = nn.parallel.DistributedDataParallel(nn.ModuleList([ClassWiseIRM(5, 2)]))
    torch.manual_seed(rank)
    features, labels = torch.randn(6, 5), torch.arange(6) % 2
    for step in range(4):
        inside.module[0](features, labels)
        try:
            loss = head(irm.mask(features)).square().sum() + irm(features, labels)
        except ValueError as raised:
            return step, str(raised)
        loss.backward()
        if (step + 1) % accumulate == 0:
            torch.optim.SGD(irm.parameters(), lr=0.1).step()
    return None


@pytest.mark.parametrize(("seeded", "accumulate"), [(False, 1), (True, 1), (True, 3)])
def test_a_mask_outside_ddp_is_refused(seeded, accumulate, tmp_path):
    for step, message in in_processes(2, outside, tmp_path, seeded, accumulate):
        assert step == seeded * accumulate
        assert "wrap it in DistributedDataParallel together with the backbone" in message


def compiled(rank):
    """In several processes the collectives break the graph; the numbers stay."""
    torch._dynamo.reset()
    found = []
    for record in GATHERING:
        args = take(record.sample(), halves(1, rank, 2)[0])
        results = []
        for wrap in (lambda loss: loss, lambda loss: torch.compile(loss, backend="eager")):
            loss = wrap(record.build(gather_distributed=True))
            parts = outputs(loss(*args))
            grads = torch.autograd.grad(sum(part.sum() for part in parts), leaves(args))
            results.append([part.detach().sum().item() for part in (*parts, *grads)])
        found.append(results)
    return found


def test_compiled_losses_gather_too(tmp_path):
    for results in in_processes(2, compiled, tmp_path):
        for eager, fused in results:
            assert fused == pytest.approx(eager, rel=1e-12)


def derivatives(rank):
    """First, second and third derivative of a sum over processes of cubes of all that they gather."""
    x = torch.tensor([1.0 + rank], dtype=torch.float64, requires_grad=True)
    processes = Processes("f", True)
    value = processes.total(processes.gather(x).pow(3).sum() * (1 + rank))
    found = []
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        found.append(value.item())
    return found


def test_gathering_differentiates_again_and_again(tmp_path):
    """The loss of both is 3 (x0³ + x1³), and what they ask of a copy adds up: to 2 · 9 x²."""
    for rank, found in enumerate(in_processes(2, derivatives, tmp_path)):
        x = 1.0 + rank
        assert found == pytest.approx([18 * x**2, 36 * x, 36.0])


def test_without_processes_nothing_changes():  # D10
    for record in GATHERING:
        args = record.sample()
        alone, gathering = (outputs(record.build(gather_distributed=gather)(*args)) for gather in (False, True))
        assert all(torch.equal(a, b) for a, b in zip(alone, gathering, strict=True))
