"""Step 2 of IP-IRM: the search against one written out, what it finds on data with hidden factors, and faults."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from equireg import IPIRMLoss, PartitionUpdater, WithIndex, extract_two_views, soft_info_nce
from equireg.ipirm import partitions
from equireg.ipirm.partition_search import SearchConfig, adjusted_rand_index, entropy_limit, find_partition
from tests import references
from tests.processes import in_processes

QUIET = {"progress": False}


def same_state(updater, before):
    return all(
        torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name]
        for name, value in updater.state_dict().items()
    )


def clusters(count=60, factors=2, noise=0.1, seed=0):
    """Two views of samples whose features encode which of ``factors`` they have."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.arange(count) % factors
    return torch.eye(8)[hidden] + noise * torch.randn(2, count, 8, generator=generator), hidden


# ------------------------------------------------------------------------------------------------- the search


def written_out(z1, z2, groups, temperature, weight, lr, passes, generator):
    """The search on the whole matrix, with autograd's own double backward; blocks and balance left out."""
    logits = torch.randn(len(z1), groups, generator=generator).double().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 35], 0.2)
    x = torch.nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1)
    n, best, chosen = len(z1), -math.inf, None
    same = torch.arange(n).repeat(2)[:, None] == torch.arange(n).repeat(2)
    for _ in range(passes):
        w = logits.softmax(1).T.repeat(1, 2)
        theta = torch.ones((), dtype=torch.float64, requires_grad=True)
        s = theta * x @ x.T / temperature
        others = w[:, None] * ~same
        negatives = (2 * n - 2) * (others * s.exp()).sum(2) / others.sum(2)
        positive = s[torch.arange(2 * n), torch.arange(2 * n).roll(n)]
        loss = (w * ((positive.exp() + negatives).log() - positive)).sum(1) / w.sum(1)
        slopes = torch.stack([torch.autograd.grad(part, theta, create_graph=True)[0] for part in loss])
        objective = loss.sum() + weight * slopes.square().sum()
        if objective > best:
            best, chosen = objective.item(), logits.argmax(1)
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
        schedule.step()
    return best, chosen


@pytest.mark.parametrize("groups", [2, 3])
def test_search_equals_one_written_out(groups):
    z1, z2 = torch.randn(2, 24, 5, dtype=torch.float64)
    search = SearchConfig(groups, 0.3, 0.4, 0.6, 30, None, None)
    found = find_partition(z1, z2, search, torch.Generator().manual_seed(1), progress=False)
    best, chosen = written_out(z1, z2, groups, 0.3, 0.4, 0.6, 30, torch.Generator().manual_seed(1))
    assert torch.equal(found.partition, chosen)
    assert found.loss + 0.4 * found.penalty == pytest.approx(best, rel=1e-5)
    assert found.balance == 0


@pytest.mark.parametrize("balance", ["relaxed", "strict", None])
def test_report_is_the_objective_of_the_logits(balance):
    z, _ = clusters(20)
    updater = PartitionUpdater(20, 3, temperature=0.3, max_passes=1, balance=balance, weight=0.7, starts=1)
    updater.update(*z, torch.Generator().manual_seed(5), **QUIET)
    shares = torch.randn(20, 3, generator=torch.Generator().manual_seed(5)).softmax(1)
    report = updater.reports[0]
    assert report.loss == pytest.approx(float(sum(references.soft_info_nce(*z, shares, 0.3))), rel=1e-5)
    slopes = references.slope(references.soft_info_nce, *z, shares, 0.3)
    assert report.penalty == pytest.approx(float(sum(slope**2 for slope in slopes).detach()), rel=1e-4)
    mean = shares.mean(0)
    entropy = float(-(mean * mean.log()).sum())
    expected = {"relaxed": 10 * max(0, entropy_limit(3) - entropy), "strict": -entropy, None: 0}[balance]
    assert report.balance == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert report.objective == pytest.approx(report.loss + 0.7 * report.penalty - report.balance)
    assert report.passes == 1
    assert sum(report.group_sizes) == 20


def test_blocks_are_even_and_drawn_anew(monkeypatch):
    from equireg.ipirm import partition_search

    seen = []
    soft_info_nce = partition_search.soft_info_nce

    def watched(z1, z2, shares, *, temperature):
        seen.append(z1[:, 0].long())
        return soft_info_nce(z1, z2, shares, temperature=temperature)

    monkeypatch.setattr(partition_search, "soft_info_nce", watched)
    z = torch.randn(2, 50, 4)
    z[0, :, 0] = torch.arange(50)
    PartitionUpdater(50, block_size=20, max_passes=3, starts=1).update(*z, **QUIET)
    assert [len(block) for block in seen] == [17, 17, 16] * 3
    passes = [torch.cat(seen[i : i + 3]) for i in (0, 3, 6)]
    for samples in passes:
        assert samples.sort().values.tolist() == list(range(50))
    assert not torch.equal(passes[0], passes[1])


def test_stops_after_five_passes_without_gain_once_past_fifty():
    z, _ = clusters()
    updater = PartitionUpdater(60, max_passes=500, block_size=25, starts=1)
    updater.update(*z, **QUIET)
    assert 51 <= updater.reports[0].passes < 500


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_entropy_limit(groups):
    """No shares of larger entropy have a group of more than twice another; some of nearly that entropy have."""
    shares = torch.rand(200_000, groups).double() + 0.5
    shares = shares / shares.sum(1, keepdim=True)
    entropy = -(shares * shares.log()).sum(1)
    beyond = shares.amax(1) > 2 * shares.amin(1)
    assert entropy[beyond].max() < entropy_limit(groups) < entropy[beyond].max() + 0.01
    assert groups != 2 or round(entropy_limit(2), 4) == 0.6365


def test_adjusted_rand_index():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the examples extra")
    for groups in (1, 2, 5):
        one, other = torch.randint(groups, (300,)), torch.randint(3, (300,))
        assert adjusted_rand_index(one, other) == pytest.approx(metrics.adjusted_rand_score(one, other))
    assert adjusted_rand_index(other, 2 - other) == 1


# ------------------------------------------------------------------------------------------------- what it finds


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("block_size", [3096, 40])
def test_finds_what_the_features_encode(groups, block_size):
    z, hidden = clusters(120, groups)
    updater = PartitionUpdater(120, groups, block_size=block_size)
    found = updater.update(*z, **QUIET)
    assert adjusted_rand_index(found, hidden) >= (1 if block_size > 120 else 0.6)
    assert updater.reports[0].agreement == (0.0,)
    assert not updater.reports[0].collapsed


def test_slopes_hide_what_losses_find_in_features_that_tell_samples_apart():
    """As trained ones do. With slopes, groups that nothing tells apart have the larger objective."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(2, (400,), generator=generator)
    own = torch.nn.functional.normalize(torch.randn(400, 64, generator=generator), dim=1)
    z = own + 0.6 * torch.eye(64)[hidden] + 0.01 * torch.randn(2, 400, 64, generator=generator)
    found, objective, of_hidden = {}, {}, {}
    for weight in (0.0, 0.5):
        updater = PartitionUpdater(400, weight=weight)
        found[weight] = adjusted_rand_index(updater.update(*z, **QUIET), hidden)
        objective[weight] = updater.reports[0].objective
        risk, slope = soft_info_nce(*z, torch.eye(2)[hidden], temperature=0.5)
        of_hidden[weight] = float(risk.sum() + weight * slope.square().sum())
    assert found[0.0] == 1
    assert abs(found[0.5]) < 0.05
    assert objective[0.0] == pytest.approx(of_hidden[0.0], rel=1e-3)
    assert objective[0.5] > of_hidden[0.5] + 0.1


@pytest.mark.parametrize("groups", [2, 3])
def test_balance_keeps_groups_within_two_to_one(groups):
    """Samples of which nine in ten are alike; without balance the groups are far more unequal."""
    z = torch.randn(2, 200, 8) * 0.3
    z[:, :180, 0] += 1
    z[:, 180:, 1] += 1
    sizes = {}
    for kind in ("relaxed", "strict", None):
        updater = PartitionUpdater(200, groups, balance=kind)
        updater.update(*z, **QUIET)
        sizes[kind] = updater.reports[0].group_sizes
    assert max(sizes["relaxed"]) <= 2 * min(sizes["relaxed"])
    assert max(sizes["strict"]) <= 2 * min(sizes["strict"])
    assert max(sizes[None]) > 3 * min(sizes[None])


def tinted(images, seed=0):
    """Each image in one of two tints, and two noisy views of it as plain features."""
    generator = torch.Generator().manual_seed(seed)
    tint = torch.randint(2, (len(images),), generator=generator)
    scale = torch.tensor([[1.0, 0.7, 0.4], [0.4, 0.7, 1.0]])[tint, :, None, None]
    images = images * scale
    noise = 0.1 * torch.randn(2, *images.shape, generator=generator)
    return (images + noise).flatten(2), tint


def test_finds_the_tint_of_photographs(real_images):
    image, tv = pytest.importorskip("PIL.Image"), pytest.importorskip("torchvision.transforms.v2.functional")
    paths = sorted((real_images / "cifar10" / "train").glob("*/*.jpg"))[::10][:400]
    images = torch.stack([tv.to_dtype(tv.to_image(image.open(path)), torch.float32, scale=True) for path in paths])
    z, tint = tinted(images)
    z = z.unflatten(2, (3, -1)).mean(3)  # colour is what such features hold most of
    z = z - z.mean((0, 1))
    assert adjusted_rand_index(PartitionUpdater(len(images)).update(*z, **QUIET), tint) > 0.5


# ------------------------------------------------------------------------------------------------- its state


def test_joins_the_set():
    updater = PartitionUpdater(60, max_passes=5)
    assert updater.partitions.tolist() == [[0] * 60]
    first = updater.update(*torch.randn(2, 60, 4), **QUIET)
    second = updater.update(*torch.randn(2, 60, 4), **QUIET)
    assert first.dtype == torch.int64
    assert torch.equal(updater.partitions, torch.stack([torch.zeros(60).long(), first, second]))
    assert len(updater.reports[1].agreement) == 2
    first.fill_(0)  # what is returned is a copy
    assert updater.partitions[1].sum() > 0


def test_draws_from_one_generator_alone():  # P6, E9, E7
    z = torch.randn(2, 60, 4)
    z[:, 30:] = z[:, :30]  # ties
    state, options = torch.get_rng_state(), {"block_size": 25, "max_passes": 9}
    first, again, other = (PartitionUpdater(60, **options, seed=seed).update(*z, **QUIET) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    updater, generator = PartitionUpdater(60, **options), torch.Generator().manual_seed(3)
    before, own = generator.get_state(), updater.generator_state.clone()
    updater.update(*z, generator, **QUIET)
    assert torch.equal(updater.generator_state, own)
    assert not torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_resumes_bit_for_bit(tmp_path):  # P8
    z = torch.randn(3, 2, 60, 4)
    whole = PartitionUpdater(60, block_size=25, max_passes=9)
    for pair in z:
        whole.update(*pair, **QUIET)
    first = PartitionUpdater(60, block_size=25, max_passes=9)
    first.update(*z[0], **QUIET)
    second = PartitionUpdater(60, block_size=25, max_passes=9, seed=9)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for pair in z[1:]:
        second.update(*pair, **QUIET)
    assert torch.equal(second.partitions, whole.partitions)
    assert torch.equal(second.generator_state, whole.generator_state)
    assert second.reports == whole.reports


def test_whole_numbers_of_any_kind_are_saved():
    numpy = pytest.importorskip("numpy")
    updater = PartitionUpdater(numpy.int64(60), numpy.int64(3))
    PartitionUpdater(60, 3).load_state_dict(updater.state_dict())


def test_loads_into_an_updater_without_memory():
    saved = PartitionUpdater(60, max_passes=3)
    saved.update(*torch.randn(2, 60, 4), **QUIET)
    with torch.device("meta"):
        loaded = PartitionUpdater(60, max_passes=3)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True)
    assert same_state(loaded, saved.state_dict())


def test_loads_what_0_1_0_saved():
    """Its extra state was a dictionary."""
    updater, loaded = PartitionUpdater(60, max_passes=3), PartitionUpdater(60, max_passes=3)
    updater.update(*torch.randn(2, 60, 4), **QUIET)
    reports = [report._asdict() for report in updater.reports]
    loaded.load_state_dict({**updater.state_dict(), "_extra_state": {"num_groups": 2, "reports": reports}})
    assert loaded.reports == updater.reports
    assert torch.equal(loaded.partitions, updater.partitions)


def test_beside_a_model_in_one_module(tmp_path):
    """A moving average, whose copy is from before the first partition, and accelerate, which saves tensors alone."""
    accelerate = pytest.importorskip("accelerate", reason="needs the examples extra")
    updater = PartitionUpdater(8)
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 4), "criterion": IPIRMLoss(updater)})
    averages = [torch.optim.swa_utils.AveragedModel(model, use_buffers=buffers) for buffers in (False, True)]
    alone = copy.deepcopy(updater.state_dict())
    updater.update(*torch.randn(2, 8, 4), **QUIET)
    updater.add(torch.arange(8) % 2)
    for average in averages:
        average.update_parameters(model)
        assert torch.equal(average.module["encoder"].weight, model["encoder"].weight)
        assert same_state(average.module["criterion"].partitions, alone)  # the copy's partitions stay as they were

    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(tmp_path, safe_serialization=True)
    before = copy.deepcopy(updater.state_dict())
    with torch.inference_mode():
        updater.add(torch.arange(8) // 4)
    assert updater.partitions.shape == (4, 8)
    accelerator.load_state(tmp_path)
    assert same_state(updater, before)
    assert updater.partitions.shape == (3, 8)
    assert len(updater.reports) == 1


@pytest.mark.parametrize(("samples", "groups"), [(50, 2), (60, 2), (60, 4)])
def test_another_dataset_is_refused_when_loading(samples, groups):  # P9, E6
    saved, other = PartitionUpdater(60, 3, max_passes=2), PartitionUpdater(samples, groups)
    saved.update(*torch.randn(2, 60, 4), **QUIET)
    before = copy.deepcopy(other.state_dict())
    mine = f"this updater is of {samples} samples and {groups} groups"
    with pytest.raises(RuntimeError, match=rf"partitions saved are \[2, 60\] with 3 groups, {mine}"):
        other.load_state_dict(saved.state_dict())
    assert same_state(other, before)


def test_keys_are_checked_when_loading():  # P9
    state, changed = PartitionUpdater(60).state_dict(), PartitionUpdater(60, seed=1).state_dict()
    for name in state:  # nothing is half loaded
        updater = PartitionUpdater(60)
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            updater.load_state_dict({k: v for k, v in changed.items() if k != name})
        assert same_state(updater, state)
    saved = state["partitions"]
    for broken in (saved - 1, saved + 2, saved.float(), torch.zeros(0, 60).long()):
        with pytest.raises(RuntimeError, match="the partitions saved are"):
            PartitionUpdater(60).load_state_dict({**state, "partitions": broken})
    with pytest.raises(RuntimeError, match="Unexpected key.*more"):
        PartitionUpdater(60).load_state_dict({**state, "more": torch.zeros(1)})


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.half(), lambda m: m.to("cpu")],  # noqa: S301
)
def test_copies_and_casts(change):  # P10
    updater = PartitionUpdater(60, max_passes=5)
    z = torch.randn(2, 2, 60, 4)
    updater.update(*z[0], **QUIET)
    other = change(copy.deepcopy(updater))
    assert other.partitions.dtype == torch.int64
    assert torch.equal(other.update(*z[1], **QUIET), updater.update(*z[1], **QUIET))


# ------------------------------------------------------------------------------------------------- from an encoder


class Pairs(Dataset):
    """Two views of each sample."""

    def __init__(self, z):
        self.z = z

    def __len__(self):
        return self.z.shape[1]

    def __getitem__(self, i):
        return tuple(self.z[:, i]), 0


def test_from_an_encoder_and_a_loader_in_any_order():
    z, _ = clusters()
    encoder = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    loader = DataLoader(WithIndex(Pairs(z)), batch_size=16, shuffle=True)
    found = PartitionUpdater(60, max_passes=5).update(loader, encoder=encoder, **QUIET)
    encoder.eval()
    with torch.no_grad():
        expected = PartitionUpdater(60, max_passes=5).update(encoder(z[0]), encoder(z[1]), **QUIET)
    assert torch.equal(found, expected)


def test_encoder_is_left_as_it_was():  # P5
    z, _ = clusters()
    encoder = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4)).train()
    encoder[1].eval()
    encoder[0].bias.requires_grad_(False)
    encoder[0].weight.grad = torch.ones_like(encoder[0].weight)
    before = copy.deepcopy(encoder.state_dict())
    loader = DataLoader(WithIndex(Pairs(z)), batch_size=16)
    for last in (None, ((z[0, :3], z[1, :3]), torch.arange(3) + 100)):
        batches = list(loader) + ([last] if last else [])
        updater = PartitionUpdater(60, max_passes=2)
        if last:
            with pytest.raises(ValueError, match="indices must be in 0 .. 59 .*, got 100"):
                updater.update(batches, encoder=encoder, **QUIET)
        else:
            updater.update(batches, encoder=encoder, **QUIET)
        assert encoder.training
        assert not encoder[1].training
        assert not encoder[0].bias.requires_grad
        assert (encoder[0].weight.grad == 1).all()
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_loader_that_lacks_or_repeats_samples():
    z, _ = clusters()
    batches = [((z[0, i], z[1, i]), i) for i in torch.arange(60).split(16)]
    with pytest.raises(ValueError, match=r"loader must be of all 60 samples, got none of index 48 \(12 missing\)"):
        PartitionUpdater(60, max_passes=5).update(batches[:-1], encoder=torch.nn.Identity(), **QUIET)
    twice = batches + [((torch.randn(60, 8), torch.randn(60, 8)), torch.arange(60)) for _ in range(60)]
    again = PartitionUpdater(60, max_passes=5).update(twice, encoder=torch.nn.Identity(), **QUIET)
    assert torch.equal(again, PartitionUpdater(60, max_passes=5).update(*z, **QUIET))
    again = [*batches, ((torch.randn(4, 8), torch.randn(4, 8)), torch.arange(4))]
    found = PartitionUpdater(60, max_passes=5).update(again, encoder=torch.nn.Identity(), **QUIET)
    assert torch.equal(found, PartitionUpdater(60, max_passes=5).update(*z, **QUIET))


FOUR = torch.arange(4)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([torch.rand(3, 4)], TypeError, "loader must be a loader of .*view1, view2.*, got Tensor"),
        ([((torch.rand(4, 2), torch.rand(3, 2)), FOUR)], ValueError, r"output must be .* = \[4, 2\], got \[3, 2\]"),
        ([((torch.rand(4, 2), torch.rand(4, 3)), FOUR)], ValueError, r"output must be .* = \[4, 2\], got \[4, 3\]"),
        ([((torch.rand(4, 2), torch.rand(4, 2)), FOUR[:3])], ValueError, r"indices must be \[B\] = \[4\], got \[3\]"),
        ([(([1.0], [1.0]), torch.arange(1))], TypeError, "a view must be a tensor of images, got list"),
        (5, TypeError, "loader must be a loader of .*, got int"),
        ([], ValueError, "loader must be of at least one batch, got none"),
    ],
)
def test_wrong_loaders(loader, error, message):
    with pytest.raises(error, match=message):
        extract_two_views(torch.nn.Identity(), loader, **QUIET)


# ------------------------------------------------------------------------------------------------- faults


def test_objective_that_is_not_finite_leaves_everything_as_it_was(monkeypatch):  # P2
    from equireg.ipirm import partition_search

    calls = 0

    def broken(z1, z2, shares, *, temperature):
        nonlocal calls
        calls += 1
        return shares.sum(0) * (math.nan if calls == 3 else 1), shares.sum(0)

    updater = PartitionUpdater(60)
    updater.update(*torch.randn(2, 60, 4), **QUIET)
    before = copy.deepcopy(updater.state_dict())
    monkeypatch.setattr(partition_search, "soft_info_nce", broken)
    with pytest.raises(FloatingPointError, match="the objective must be finite, got nan in pass 3"):
        updater.update(*torch.randn(2, 60, 4), **QUIET)
    assert same_state(updater, before)
    assert len(updater.reports) == 1


@pytest.mark.parametrize("collapsing", [2, 3])
def test_collapse_is_avoided_or_said(collapsing, monkeypatch):  # P3
    """A start that collapses is passed over, however good its objective; where all do, it is said."""
    attempts = []

    def some_collapse(z1, z2, search, generator, *, progress):
        found = find_partition(z1, z2, search, generator, progress=progress)
        attempts.append(found)
        if (len(attempts) - 1) % 3 >= collapsing:
            return found
        return found._replace(partition=torch.zeros(60).long(), loss=found.loss + 10)

    monkeypatch.setattr(partitions, "find_partition", some_collapse)
    z, _ = clusters()
    updater = PartitionUpdater(60)
    if collapsing < 3:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            updater.update(*z, **QUIET)
        assert not updater.reports[0].collapsed
        assert torch.equal(updater.partitions[1], attempts[2].partition)
        return
    with pytest.warns(UserWarning, match=r"the partition collapsed, its groups are of \(60, 0\) samples"):
        updater.update(*z, **QUIET)
    assert updater.reports[0].collapsed
    before = copy.deepcopy(updater.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="collapsed"):
            updater.update(*z, **QUIET)
    assert same_state(updater, before)


def test_the_best_of_several_starts():
    """One start stops at a local maximum that another gets past."""
    z = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(1)
    search = SearchConfig(2, 0.5, 0.5, 0.5, 61, 3096, "relaxed")
    singles = [find_partition(*z, search, generator, progress=False) for _ in range(4)]
    objectives = [one.loss + 0.5 * one.penalty - one.balance for one in singles]
    assert max(objectives) - objectives[0] > 1e-3
    updater = PartitionUpdater(60, starts=4)
    found = updater.update(*z, torch.Generator().manual_seed(1), **QUIET)
    assert torch.equal(found, singles[objectives.index(max(objectives))].partition)
    assert updater.reports[0].objective == max(objectives)


def test_no_passes_find_nothing():  # P4
    updater = PartitionUpdater(60, max_passes=0)
    assert updater.update(*torch.randn(2, 60, 4), **QUIET).tolist() == [0] * 60
    assert updater.partitions.shape == (1, 60)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_in_any_mode(mode):
    z, _ = clusters()
    expected = PartitionUpdater(60, max_passes=5).update(*z, **QUIET)
    updater = PartitionUpdater(60, max_passes=5)
    with mode():
        assert torch.equal(updater.update(*z.clone(), **QUIET), expected)
    updater.load_state_dict(updater.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 1}, ValueError, "num_samples must be at least 2, got 1"),
        ({"num_groups": 1}, ValueError, "num_groups must be at least 2, got 1"),
        ({"num_groups": 61}, ValueError, "num_groups must be at most the 60 samples, got 61"),
        ({"lr": 0}, ValueError, "lr must be finite and above 0, got 0"),
        ({"max_passes": -1}, ValueError, "max_passes must be at least 0, got -1"),
        ({"balance": "loose"}, ValueError, "balance must be one of 'relaxed', 'strict', None, got 'loose'"),
        ({"starts": 0}, ValueError, "starts must be at least 1, got 0"),
    ],
)
def test_wrong_options(options, error, message):  # P4, E2
    with pytest.raises(error, match=f"PartitionUpdater: {message}"):
        PartitionUpdater(**{"num_samples": 60, **options})


GOOD = torch.ones(60, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((GOOD[:0], GOOD[:0]), ValueError, "z1 must be of at least one sample"),  # P1
        ((GOOD[:50], GOOD[:50]), ValueError, r"z1 must be of num_samples = 60 rows, got \[50, 4\]"),
        ((GOOD, GOOD[:50]), ValueError, r"z2 must be \[N, d\] = \[60, 4\], got \[50, 4\]"),
        ((GOOD, None), ValueError, "z2 must be given with z1, got None"),
        ((GOOD, GOOD * math.nan), ValueError, "z2 must be finite, got nan in row 0"),
        ((GOOD, GOOD, 7), TypeError, "generator must be a torch.Generator or None, got int"),
        (([GOOD], None), TypeError, "z1 must be a tensor, or a loader together with encoder, got list"),
    ],
)
def test_wrong_features(arguments, error, message):
    updater = PartitionUpdater(60)
    before = copy.deepcopy(updater.state_dict())
    with pytest.raises(error, match=f"PartitionUpdater.update: {message}"):
        updater.update(*arguments, **QUIET)
    assert same_state(updater, before)


# ------------------------------------------------------------------------------------------------- several processes


def _search_here(rank):
    """Each process has half of the dataset in its loader; one looks for the partition."""
    z, _ = clusters()
    mine = torch.arange(60)[rank::2]
    loader = [((z[0, part], z[1, part]), part) for part in mine.split(7)]
    updater = PartitionUpdater(60, max_passes=20)
    updater.update(loader, encoder=torch.nn.Identity(), **QUIET)
    updater.update(*torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(rank)), **QUIET)  # rank 0's count
    return [updater.partitions.tolist(), updater.generator_state.tolist(), updater.reports[1].passes]


CASES = ("state", "features", "search", "generator", "kind", "dtype")


def _refuse_here(rank):
    """What does not fit in one of the processes, each time; none may wait for the other."""
    z, _ = clusters()
    loader = [((z[0, part], z[1, part]), part) for part in torch.arange(60)[rank::2].split(7)]
    found = []
    for case in CASES:
        updater = PartitionUpdater(60, max_passes=5, seed=rank if case == "state" else 0)
        arguments, options = (z[0], z[1]), {}
        if case == "search" and rank == 0:
            updater._search = lambda *_: (_ for _ in ()).throw(FloatingPointError("the objective must be finite"))
        if case == "features" and rank == 1:
            arguments = (z[0] * math.nan, z[1])
        if case == "generator" or (case == "kind" and rank == 1):
            arguments, options = (loader,), {"encoder": torch.nn.Identity()}
        if case == "generator" and rank == 0:
            options["generator"] = "bad"
        if case == "dtype":
            batches = [((a.double(), b.double()), i) for (a, b), i in loader] if rank else loader
            arguments, options = (batches,), {"encoder": torch.nn.Identity()}
        try:
            updater.update(*arguments, **options, **QUIET)
            found.append("nothing")
        except (TypeError, ValueError, FloatingPointError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_processes_share_one_partition(tmp_path):  # P7
    one, other = in_processes(2, _search_here, tmp_path)
    assert one == other
    z, _ = clusters()
    alone = PartitionUpdater(60, max_passes=20)
    alone.update(*z, **QUIET)
    alone.update(*torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(0)), **QUIET)
    assert one == [alone.partitions.tolist(), alone.generator_state.tolist(), alone.reports[1].passes]


def test_processes_refuse_together(tmp_path):  # P7
    results = (dict(zip(CASES, found)) for found in in_processes(2, _refuse_here, tmp_path))
    first, second = results
    facts = {"state": "the generator's state", "kind": "whether there is an encoder", "dtype": "features"}
    for case, fact in facts.items():
        assert first[case] == second[case]
        assert f"PartitionUpdater.update: {fact} must be alike in every process, got rank 0: " in first[case]
    assert "rank 1: refused, see the error there" in first["features"]
    assert "z1 must be finite, got nan" in second["features"]
    assert first["generator"].startswith("TypeError: PartitionUpdater.update: generator must be")
    assert "rank 0: refused, see the error there" in second["generator"]
    assert first["search"] == second["search"] == "FloatingPointError: the objective must be finite"


def test_keeps_the_newest_partitions():
    """The first, of all samples, always stays; every update is reported."""
    z = torch.randn(2, 20, 4)
    every, newest = (PartitionUpdater(20, max_passes=2, starts=1, keep=keep) for keep in (None, 2))
    for updater in (every, newest):
        for _ in range(3):
            updater.update(*z, **QUIET)
        updater.add(torch.arange(20) % 2)
        updater.update(*z, **QUIET)
    assert torch.equal(newest.partitions, every.partitions[[0, 4, 5]])
    assert len(newest.reports) == len(every.reports) == 4
    assert newest.reports[3].agreement == tuple(every.reports[3].agreement[place] for place in (0, 3, 4))
    again = PartitionUpdater(20, keep=2)
    again.load_state_dict(newest.state_dict())
    assert torch.equal(again.partitions, newest.partitions)
    with pytest.raises(ValueError, match=r"PartitionUpdater.add: groups must be in 0 .. 1 .*, got 2 at position 3"):
        newest.add(torch.tensor([0, 0, 1, 2] * 5))


def test_a_report_says_when_the_bound_decided():
    """Of ninety samples, twenty that are apart from the others, which are less than a third; and two halves."""
    generator = torch.Generator().manual_seed(0)
    reports = []
    for rare in (20, 45):
        z = torch.eye(8)[(torch.arange(90) < rare).long()] + 0.05 * torch.randn(2, 90, 8, generator=generator)
        updater = PartitionUpdater(90, starts=1)
        updater.update(*z, **QUIET)
        reports.append(updater.reports[0])
    assert [report.at_the_bound for report in reports] == [True, False]
    assert "groups of 45 + 45 samples; objective" in str(reports[1])
    assert "at the bound of 2 : 1" in str(reports[0])
