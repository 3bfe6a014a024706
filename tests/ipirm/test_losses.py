"""Step 1 of IP-IRM and the loss of Step 2, against loops over rows in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from equireg import IPIRMLoss, MoCoIPIRMLoss, PartitionUpdater, mix_images, soft_info_nce
from tests import loss_references, references
from tests.similarity.test_pair_lse import Watch


def views(count=9, width=5, dtype=torch.float64):
    return torch.randn(count, width, dtype=dtype), torch.randn(count, width, dtype=dtype)


# ------------------------------------------------------------------------------------------------- soft InfoNCE


def test_without_weights_it_is_simclr():
    z1, z2 = views()
    loss, slope = soft_info_nce(z1, z2)
    x = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (x @ x.T / 0.5).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, torch.arange(18).roll(9))
    torch.testing.assert_close(loss, expected[None])
    ones = soft_info_nce(z1, z2, torch.full((9, 1), 0.3, dtype=torch.float64))
    torch.testing.assert_close((loss, slope), ones)


def test_groups_without_negatives_are_left_out():  # E1, E3
    """A row without a negative is no row; a group without a row is 0 with zero gradients."""
    z1, z2 = views(5)
    weights = torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (z1, z2, weights)]
    loss, slope = soft_info_nce(z1, z2, weights)
    assert loss[1:].tolist() == slope[1:].tolist() == [0, 0]
    torch.testing.assert_close(loss[0], references.soft_info_nce(z1, z2, weights, 0.5)[0])
    for gradient in torch.autograd.grad((loss + slope).sum(), inputs):
        assert gradient.isfinite().all()
    one = soft_info_nce(z1[:1], z2[:1])
    assert one[0].tolist() == one[1].tolist() == [0]


def test_streams():
    """No tensor of the size of the matrix is ever made, forward or backward."""
    from equireg.similarity.streamed import tiles

    z1, z2 = views(1000, 4, torch.float32)
    weights = torch.rand(1000, 2, requires_grad=True)
    with Watch() as watch:
        loss, slope = soft_info_nce(z1, z2, weights)
        (loss.sum() + slope.square().sum()).backward()
    assert watch.largest <= tiles.ROWS**2  # of 2,000²


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"z1": [1.0]}, TypeError, "z1 must be a tensor of floating point numbers, got list"),
        ({"z1": torch.ones(4, 3).long()}, TypeError, "z1 must be a tensor of floating point numbers, got torch.int64"),
        ({"z1": torch.ones(4)}, ValueError, r"z1 must be \[N, d\], got \[4\]"),
        ({"z2": torch.ones(4, 3).double()}, TypeError, "z2 must be of z1's dtype torch.float32, got torch.float64"),
        ({"weights": torch.ones(5, 2)}, ValueError, r"weights must be \[N, K\] = \[4, K\], got \[5, 2\]"),
        ({"weights": torch.ones(4, 2).long()}, TypeError, "weights must be a tensor of floating point numbers"),
        ({"weights": torch.full((4, 2), math.nan)}, ValueError, "weights must be finite and at least 0, got nan"),
        ({"temperature": True}, TypeError, "temperature must be a number, got bool True"),
    ],
)
def test_wrong_arguments(changes, error, message):  # E2, E4
    arguments = {"z1": torch.ones(4, 3), "z2": torch.ones(4, 3), "weights": torch.ones(4, 2), "temperature": 0.5}
    with pytest.raises(error, match=f"soft_info_nce: {message}"):
        soft_info_nce(**{**arguments, **changes})


# ------------------------------------------------------------------------------------------------- invariant losses

PARTITIONS = torch.stack([torch.zeros(30).long(), torch.arange(30) % 2, torch.arange(30) // 12])


def test_groups_that_the_batch_lacks_are_left_out():
    """Of the third partition the batch has one sample of group 2, and none of group 1."""
    z1, z2 = views(4)
    indices = torch.tensor([1, 3, 5, 29])
    loss = IPIRMLoss(PARTITIONS, temperature=0.2, weight=0.7)(z1.requires_grad_(), z2, indices.to(torch.int32))
    expected = loss_references.ip_irm(z1, z2, PARTITIONS[1:, indices], 0.2, 0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    alone = IPIRMLoss(PARTITIONS)(z1[:1], z2[:1], indices[:1])  # one sample has no negative
    assert alone.item() == 0
    assert torch.autograd.grad(alone, z1)[0].abs().sum() == 0


def test_follows_the_updater():
    updater = PartitionUpdater(30)
    criterion = IPIRMLoss(updater)
    z1, z2 = views(10)
    indices = torch.arange(10)
    before = criterion(z1, z2, indices)
    torch.testing.assert_close(before, IPIRMLoss(PARTITIONS[:1])(z1, z2, indices))
    found = updater.update(torch.randn(30, 4), torch.randn(30, 4), progress=False)
    torch.testing.assert_close(
        criterion(z1, z2, indices), IPIRMLoss(torch.stack([PARTITIONS[0], found]))(z1, z2, indices)
    )
    assert not torch.equal(criterion(z1, z2, indices), before)
    assert set(criterion.state_dict()) == {f"partitions.{name}" for name in updater.state_dict()}


def test_moco_queue():
    criterion = MoCoIPIRMLoss(PARTITIONS, num_features=4, queue_size=10)
    random = criterion.queue.clone()
    key = torch.randn(6, 4)
    first = criterion(torch.randn(6, 4, requires_grad=True), key, torch.arange(6))
    assert first.isfinite()
    torch.testing.assert_close(criterion.queue[:6], F.normalize(key, dim=1))
    assert torch.equal(criterion.queue[6:], random[6:])
    assert criterion.queue_indices.tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1, -1]
    criterion(torch.randn(6, 4), key, torch.arange(6, 12))
    assert criterion.queue_indices.tolist() == [10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    state = copy.deepcopy(criterion.state_dict())
    criterion.eval()(torch.randn(6, 4), key, torch.arange(6))
    assert all(torch.equal(value, state[name]) for name, value in criterion.state_dict().items())
    first.backward()  # the queue has changed since; what the loss needs has not


def test_moco_queue_filled_in_inference_mode():
    criterion = MoCoIPIRMLoss(PARTITIONS, num_features=4, queue_size=10)
    with torch.inference_mode():
        criterion(*torch.randn(2, 6, 4), torch.arange(6))
    assert criterion.queue_indices.tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1, -1]
    criterion(torch.randn(6, 4, requires_grad=True), torch.randn(6, 4), torch.arange(6)).backward()
    criterion.load_state_dict(criterion.state_dict())


def test_mix_is_both_labels():
    """An anchor mixed from two samples is worth both, by their shares; all of one share is the plain anchor."""
    z1, z2 = views(8)
    indices, partner = torch.arange(8), torch.randperm(8)
    share = torch.rand(8, dtype=torch.float64)
    criterion = IPIRMLoss(PARTITIONS[:1], weight=0.0)
    x1, x2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    logits = x1 @ x2.T / 0.5
    expected = share * F.cross_entropy(logits, indices, reduction="none") + (1 - share) * F.cross_entropy(
        logits, partner, reduction="none"
    )
    torch.testing.assert_close(criterion(z1, z2, indices, mix=(partner, share)), expected.mean())
    whole = criterion(z1, z2, indices, mix=(partner, 1.0))
    torch.testing.assert_close(whole, F.cross_entropy(logits, indices))


def test_mix_stays_within_the_group():
    z1, z2 = views(6)
    indices, partner = torch.arange(6), torch.tensor([1, 0, 3, 2, 5, 4])  # of the other group
    found = IPIRMLoss(PARTITIONS[:2], weight=0.0)(z1, z2, indices, mix=(partner, 0.7))
    x1, x2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    logits = x1 @ x2.T / 0.5
    whole = 0.7 * F.cross_entropy(logits, indices) + 0.3 * F.cross_entropy(logits, partner)
    groups = []
    for k in range(2):
        members = (indices % 2 == k).nonzero().squeeze(1)
        place = torch.arange(len(members))
        own = F.cross_entropy(logits[members][:, members], place, reduction="sum")
        mixed = F.cross_entropy(logits[partner[members]][:, members], place, reduction="sum")  # whose partner is here
        groups.append((0.7 * own + 0.3 * mixed) / len(members))
    torch.testing.assert_close(found, whole + torch.stack(groups).mean())


def test_mix_images():
    images = torch.rand(50, 3, 4, 4)
    state = torch.get_rng_state()
    mixed, partner, share = mix_images(images, alpha=0.5, generator=torch.Generator().manual_seed(0))
    again = mix_images(images, alpha=0.5, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(one, other) for one, other in zip((mixed, partner, share), again))
    assert torch.equal(torch.get_rng_state(), state)
    by_image = share[:, None, None, None]
    torch.testing.assert_close(mixed, by_image * images + (1 - by_image) * images[partner])
    assert partner.sort().values.tolist() == list(range(50))


def test_mix_images_within_groups():
    """Each partner is of the image's own group in every partition, and any of them may be."""
    images, groups = torch.rand(40, 1), torch.stack([torch.arange(40) % 2, torch.arange(40) // 25])
    met = torch.zeros(40, 40, dtype=torch.bool)
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        _, partner, _ = mix_images(images, groups=groups, generator=generator)
        assert torch.equal(groups[:, partner], groups)
        assert partner.sort().values.tolist() == list(range(40))
        met[torch.arange(40), partner] = True
    assert torch.equal(met, (groups[:, :, None] == groups[:, None]).all(0))
    seeded = [torch.Generator().manual_seed(0) for _ in range(3)]
    free, one_group, none = (
        mix_images(images, groups=given, generator=generator)[1]
        for given, generator in zip((None, torch.zeros(40).long(), groups[:0]), seeded)
    )
    assert torch.equal(free, one_group)
    assert torch.equal(free, none)
    with pytest.raises(ValueError, match=r"mix_images: groups must be \[P, B\] = \[P, 40\], got \[2, 39\]"):
        mix_images(images, groups=groups[:, 1:])


def test_scale_of_each_logit_with_mixed_images():
    """As the authors' code for mixup: logits of mixed images and second views, a scale of each second view."""
    z1, z2 = views(7)
    partner, share, indices = torch.randperm(7), torch.rand(7, dtype=torch.float64), torch.arange(7)
    criterion = IPIRMLoss(PARTITIONS[:1], dummy_scales="logits", global_penalty=True, weight=0.6)
    found = criterion.parts(z1.requires_grad_(), z2, indices, mix=(partner, share))
    logits = (F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / 0.5).repeat(2, 1)
    risk, penalty = loss_references.squared_slopes(logits, torch.cat([indices, partner]), torch.cat([share, 1 - share]))
    torch.testing.assert_close(found.loss, risk + 0.6 * penalty)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, z1, retain_graph=True), torch.autograd.grad(risk + 0.6 * penalty, z1)
    )


def test_scale_of_each_logit_of_moco():
    """The positive's, and one of each key in the queue that is of another sample."""
    query, key = views(5)
    criterion = MoCoIPIRMLoss(PARTITIONS[:1], num_features=5, queue_size=8, dummy_scales="logits", global_penalty=True)
    criterion.double().queue_indices = torch.tensor([9, 2, 8, 7, 6, 5, -1, 9])  # one key is of sample 2
    queue = criterion.queue.clone()
    found = criterion.parts(query, key, torch.arange(5))
    q = F.normalize(query, dim=1)
    positive = (q * F.normalize(key, dim=1)).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.T], 1) / 0.2
    logits[2, 2] = -1e3  # behind the positive
    risk, penalty = loss_references.squared_slopes(logits, torch.zeros(5).long(), torch.ones(5).double())
    torch.testing.assert_close((found.loss, found.global_penalty), (risk + 0.2 * penalty, penalty))


def test_parts_tell_a_partition_that_joins_from_an_explosion():
    """The global risk goes on; what joins is told apart."""
    z1, z2 = views(9)
    before, after = (IPIRMLoss(PARTITIONS[:count]).parts(z1, z2, torch.arange(9)) for count in (1, 2))
    assert before.of_groups == (0, 0)
    torch.testing.assert_close(after.global_risk, before.loss)
    risk, penalty = after.of_groups
    torch.testing.assert_close(after.loss, before.loss + risk + 0.2 * penalty)


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.1, 1.0, 30.0])
def test_mix_shares_are_betas(alpha):
    share = mix_images(torch.rand(20_000, 1, dtype=torch.float64), alpha=alpha)[2]
    variance = 1 / (4 * (2 * alpha + 1))  # of a beta distribution
    assert abs(float(share.mean()) - 0.5) < 0.015
    assert abs(float(share.var()) - variance) < 0.03 * variance


@pytest.mark.parametrize("epsilon", [1e-6, 1e-14, 1e-16, 1e-18])
def test_sum_of_the_others_does_not_cancel(epsilon):
    z1, z2 = views(6)
    weights = torch.full((6, 1), epsilon, dtype=torch.float64)
    weights[0] = 1
    expected = torch.stack(references.soft_info_nce(z1, z2, weights, 0.5))
    torch.testing.assert_close(soft_info_nce(z1, z2, weights)[0], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IPIRMLoss(3), TypeError, "partitions must be a PartitionUpdater or a tensor .P, N., got int"),
        (
            lambda: IPIRMLoss(torch.zeros(3)),
            TypeError,
            "partitions must be a tensor of whole numbers, got torch.float32",
        ),
        (lambda: IPIRMLoss(torch.zeros(3).long()), ValueError, r"partitions must be \[P, N\], got \[3\]"),
        (lambda: IPIRMLoss(torch.zeros(0, 3).long()), ValueError, "partitions must be of at least one partition"),
        (
            lambda: IPIRMLoss(torch.tensor([[0, 2, 2]])),
            ValueError,
            r"partitions must be of groups 0 .. K - 1, each with a sample, got groups \[0, 2\] in partition 0",
        ),
        (lambda: IPIRMLoss(-PARTITIONS), ValueError, "partitions must be of groups 0 .. K - 1"),
        (lambda: IPIRMLoss(PARTITIONS, temperature=0), ValueError, "temperature must be finite and above 0, got 0"),
        (lambda: MoCoIPIRMLoss(PARTITIONS, queue_size=0), ValueError, "queue_size must be at least 1, got 0"),
    ],
)
def test_wrong_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": torch.arange(5)}, ValueError, r"indices must be \[N\] = \[4\], got \[5\]"),
        ({"indices": torch.tensor([0, 1, 2, -1])}, ValueError, r"indices must be in 0 .. 29 .*, got -1 at position 3"),
        ({"indices": torch.rand(4)}, TypeError, "indices must be a tensor of whole numbers"),
        ({"mix": 0.5}, ValueError, r"mix must be \(partner, share\) or None, got float"),
        ({"mix": (1, 2, 3)}, ValueError, r"mix must be \(partner, share\) or None, got 3 parts"),
        ({"mix": (torch.arange(4), torch.full((4,), 2.0))}, ValueError, "mix's share must be in 0 .. 1, got 2 .. 2"),
        ({"mix": (torch.arange(4) + 1, 0.5)}, ValueError, "mix's partner must be in 0 .. 3 .*, got 4"),
        ({"mix": (torch.arange(4), 1.5)}, ValueError, "mix's share must be in 0 .. 1, got 1.5"),
    ],
)
def test_wrong_batches(changes, error, message):  # E5
    arguments = {"z1": torch.ones(4, 3), "z2": torch.ones(4, 3), "indices": torch.arange(4)}
    with pytest.raises(error, match=f"IPIRMLoss: {message}"):
        IPIRMLoss(PARTITIONS)(**{**arguments, **changes})


def test_partitions_of_one_group_are_left_out():
    """The global term would count twice, once with a penalty; as ``partitions`` of a tensor leave them out too."""
    z1, z2 = views(8)
    groups, indices = torch.arange(8) % 2, torch.arange(8)
    updater = PartitionUpdater(8)
    updater.add(torch.zeros(8, dtype=torch.int64))
    alone = IPIRMLoss(updater)(z1, z2, indices)
    torch.testing.assert_close(alone, IPIRMLoss(updater.partitions)(z1, z2, indices))
    updater.add(groups)
    parts = IPIRMLoss(updater).parts(z1, z2, indices)
    assert parts.risk.shape == (1, 2)
    torch.testing.assert_close(parts.loss, IPIRMLoss(groups[None])(z1, z2, indices))
    loaded = PartitionUpdater(8)
    loaded.load_state_dict(updater.state_dict())
    assert torch.equal(IPIRMLoss(loaded)(z1, z2, indices), parts.loss)
    assert torch.equal(loaded.splitting, groups[None])
