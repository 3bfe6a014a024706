import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from equireg import Environments, adjusted_similarity
from equireg.eqinv.adjusted_similarity import Scores
from equireg.eqinv.halves import first_half, similar_in_batch
from tests import references
from tests.gpu.devices import needs_a_gpu
from tests.gpu.inside import Inside

ADJUSTMENTS = [True, "median", False]


def skewed(samples=40, classes=4, width=6, dtype=torch.float64):
    """Features whose similarities are skewed within each class, and classes of unequal size."""
    labels = torch.randint(classes, (samples,)).clamp(max=torch.randint(classes, (samples,)))
    return torch.randn(samples, width, dtype=dtype).exp() - 0.8, labels


@pytest.mark.parametrize("adjust", ADJUSTMENTS)
def test_similarity_equals_the_loop(adjust):
    features, labels = skewed()
    scores = adjusted_similarity(features, labels, 4, adjust=adjust)
    expected = references.adjusted_similarity(features, labels, 4, adjust)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(scores == -math.inf, labels == torch.arange(4)[:, None])


@pytest.mark.parametrize("adjust", ADJUSTMENTS)
@pytest.mark.parametrize("indexed", [False, True])
def test_split_equals_the_loop(adjust, indexed):
    features, labels = skewed()
    indices = torch.randperm(60)[:40] if indexed else torch.arange(40)
    environments = Environments.split(
        features, labels, 4, indices=indices if indexed else None, num_samples=60 if indexed else None, adjust=adjust
    )
    by_index = indices.argsort()  # the loop breaks ties by position: give it the samples in the order of their index
    scores = references.adjusted_similarity(features, labels, 4, adjust)[:, by_index]
    for k, (first, second) in enumerate(references.environments(scores, labels[by_index])):
        members = environments.members(k)
        assert members[0].tolist() == [int(indices[by_index[n]]) for n in first]
        assert members[1].tolist() == [int(indices[by_index[n]]) for n in second]
        similar = environments.similar(torch.tensor([k]), indices[by_index])[0]
        expected = [n in first or int(labels[by_index[n]]) == k for n in range(40)]
        assert similar.tolist() == expected


def test_ties_go_to_the_lower_index():  # E7
    features = torch.eye(2)[[0, 1, 1, 1, 1, 1]].double()
    labels = torch.tensor([0, 1, 1, 1, 1, 1])
    environments = Environments.split(features, labels)
    assert [part.tolist() for part in environments.members(0)] == [[1, 2, 3], [4, 5]]
    indices = torch.tensor([9, 8, 2, 6, 4, 0])
    environments = Environments.split(features, labels, indices=indices)
    assert [part.tolist() for part in environments.members(0)] == [[0, 2, 4], [6, 8]]


def test_some_ties_only_at_the_middle():
    similarity = torch.tensor([0.9, 0.5, 0.1, 0.5, 0.5, 0.8, 0.5])
    features = torch.stack([similarity, (1 - similarity**2).sqrt()], 1)
    features = torch.cat([torch.tensor([[1.0, 0.0]]), features])
    environments = Environments.split(features, torch.tensor([0] + [1] * 7), adjust=False)
    assert [part.tolist() for part in environments.members(0)] == [[1, 6, 2, 4], [5, 7, 3]]


@given(seed=st.integers(0, 2**31), samples=st.integers(1, 30), levels=st.integers(1, 40), indexed=st.booleans())
def test_first_half_is_that_of_a_sort(seed, samples, levels, indexed):
    """Few levels make many equals, of which a stable sort takes the earlier; each class has a size of its own."""
    torch.manual_seed(seed)
    labels = torch.randint(5, (samples,)).clamp(max=torch.randint(5, ()))
    own = labels == torch.arange(5)[:, None]
    scores = torch.randint(levels, (5, samples)).double().masked_fill(own, -math.inf)
    half = (samples - own.sum(1) + 1) // 2
    order = torch.randperm(samples) if indexed else torch.arange(samples)
    expected = torch.zeros_like(own)
    for k in range(5):
        expected[k, order[scores[k, order].argsort(descending=True, stable=True)][: half[k]]] = True
    assert torch.equal(first_half(scores, half, order if indexed else None), expected)


def test_empty_and_single_classes_and_one_sample():  # E1
    features = torch.randn(6, 4)
    environments = Environments.split(features, torch.tensor([0, 0, 2, 2, 2, 2]), 4)
    assert len(environments.members(0)[0]) == 2
    assert [part.tolist() for part in environments.members(1)] == [[0, 1, 2], [3, 4, 5]]  # a zero mean: all are equal
    alone = Environments.split(features, torch.zeros(6).long())
    assert [len(part) for part in alone.members(0)] == [0, 0]
    assert alone.similar(torch.tensor([0]), torch.arange(6)).all()
    environments = Environments.split(torch.ones(1, 2), torch.tensor([1]), 2)
    assert [part.tolist() for part in environments.members(0)] == [[0], []]


def test_zero_features_are_defined():  # F9
    scores = adjusted_similarity(torch.zeros(4, 3, dtype=torch.float16), torch.tensor([0, 0, 1, 1]), 2)
    assert (scores[:, :2][1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_features_are_summed_in_fp32(dtype):
    features, labels = skewed(80, 5, 32)
    features = features.to(dtype)
    scores = adjusted_similarity(features, labels, 5)
    assert scores.dtype == torch.float32
    expected = adjusted_similarity(features.double(), labels, 5)
    torch.testing.assert_close(scores.double(), expected, rtol=2e-6, atol=5e-7)


def test_autocast_does_not_change_the_split():
    features, labels = skewed(80, 5, 32, torch.float32)
    expected = Environments.split(features, labels), similar_in_batch(features, labels)
    expected = *expected, Environments.split(features, labels, whiten=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Environments.split(features, labels).bits, expected[0].bits)
        assert torch.equal(Environments.split(features, labels, whiten=8).scores, expected[2].scores)
        assert torch.equal(similar_in_batch(features, labels), expected[1])


def test_one_bit_for_each_class_and_sample():
    environments = Environments.split(torch.randn(1000, 8), torch.arange(1000) % 10)
    assert environments.bits.dtype == torch.uint8
    assert environments.bits.shape == (10, 125)
    assert {name: value.shape for name, value in environments.state_dict().items()} == {
        "bits": (10, 125),
        "labels": (1000,),
        "contexts": (1000,),
        "scores": (1000,),
    }


def test_saved_and_restored():  # P10
    environments, other = Environments.split(*skewed(), 4), Environments()
    other.load_state_dict(environments.state_dict())
    for k in range(4):  # the same members, by index: the features that rank them are not saved
        for mine, theirs in zip(other.members(k), environments.members(k)):
            assert torch.equal(mine, theirs.sort().values)
    assert other.half().bits.dtype == torch.uint8


def test_another_dataset_is_refused_when_loading():  # E6, P9
    saved = Environments.split(*skewed(), 4).state_dict()
    other = Environments.split(*skewed(50), 4)
    before = other.bits.clone()
    with pytest.raises(RuntimeError, match=r"shape torch.Size\(\[40\]\).*torch.Size\(\[50\]\)"):
        other.load_state_dict(saved)
    assert torch.equal(other.bits, before)


def test_features_are_kept_by_reference_and_released():
    features = torch.randn(10, 4)
    environments = Environments.split(features, torch.arange(10) % 2)
    assert environments._ranked_by[0].data_ptr() == features.data_ptr()
    environments.release()
    first, second = environments.members(0)
    assert torch.equal(first, first.sort().values)
    assert torch.equal(second, second.sort().values)


@given(seed=st.integers(0, 2**31), samples=st.integers(2, 30), classes=st.integers(1, 5))
def test_split_inside_a_batch_is_the_split_of_the_batch(seed, samples, classes):
    torch.manual_seed(seed)
    features, labels = torch.randn(samples, 4, dtype=torch.float64), torch.randint(classes, (samples,))
    expected = Environments.split(features, labels, classes).similar(labels, torch.arange(samples))
    assert torch.equal(similar_in_batch(features, labels), expected)


class Crossings(Inside):
    """The shapes of what is copied from one device to another; nothing else may touch two."""

    def __init__(self):
        super().__init__()
        self.copied = []

    def seen(self, function, given, made):
        if len({part.device.type for part in (*given, *made) if part.dim()}) > 1:
            assert "_to_copy" in str(function), function
            self.copied.append(tuple(made[0].shape))


@pytest.mark.parametrize("adjust", ADJUSTMENTS[::2])
def test_features_on_the_host_are_streamed_to_the_labels(adjust, monkeypatch):
    """To a GPU that is not there, whose tensors have no values: blocks of 4,096 rows cross, and nothing else."""
    monkeypatch.setattr(torch.Tensor, "bincount", lambda labels, minlength: labels.new_ones(minlength))
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda mask: mask.new_zeros(3, 1, dtype=torch.int64))
    monkeypatch.setattr("equireg.eqinv.adjusted_similarity._STREAMED_ENTRIES", 3 * 9000)
    with FakeTensorMode():
        features, labels = torch.empty(9000, 8), torch.empty(9000, dtype=torch.int64, device="cuda")
        with Crossings() as crossings:
            blocks = list(Scores(features, labels, 5, adjust).blocks())
    assert [(classes, scores.device.type) for classes, scores in blocks] == [
        (slice(0, 3), "cuda"),
        (slice(3, 5), "cuda"),
    ]
    assert crossings.copied == [(4096, 8), (4096, 8), (808, 8)] * 3  # for the means, and for each block of classes


@pytest.mark.gpu
@needs_a_gpu
def test_streamed_or_not_the_split_is_the_same():
    features, labels = torch.randn(100_000, 512), torch.arange(100_000, device="cuda") % 50
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    streamed = Environments.split(features, labels)
    assert torch.cuda.max_memory_allocated() - before < features.nbytes
    there = Environments.split(features.cuda(), labels)
    for name, buffer in there.named_buffers():
        assert torch.equal(buffer, dict(streamed.named_buffers())[name])
    for mine, theirs in zip(streamed.members(7), there.members(7)):
        assert torch.equal(mine, theirs)


def split(**changes):
    arguments = {"features": torch.ones(4, 2), "labels": torch.tensor([0, 1, 1, 0]), "num_classes": 2}
    return lambda: Environments.split(**{**arguments, **changes})


def fitted():
    return Environments.split(torch.randn(4, 2), torch.arange(4) % 2, indices=torch.tensor([0, 1, 2, 5]))


ONE = torch.tensor([0])
REFUSED = [
    (split(labels=torch.zeros(4)), TypeError, "labels must be a tensor of whole numbers, got torch.float32"),
    (split(labels=torch.zeros(4).bool()), TypeError, "labels .* got torch.bool"),
    (split(labels=torch.zeros(5).long()), ValueError, r"labels must be \[N\] = \[4\], got \[5\]"),
    (split(labels=torch.tensor([0, 1, 7, 0])), ValueError, "labels .* 0 .. 1 .* got 7 at position 2"),
    (split(labels=torch.tensor([0, -100, 1, 0])), ValueError, "labels .* got -100 at position 1"),
    (
        split(labels=torch.full((4,), -1), num_classes=None),
        ValueError,
        r"labels must be in 0 .. 0 \(num_classes\), got -1 at position 0",
    ),
    (split(features=[[1.0]]), TypeError, "features must be a tensor .* got list"),
    (split(features=torch.ones(4, 2).long()), TypeError, "features .* got torch.int64"),
    (split(features=torch.ones(4, 2, 2)), ValueError, r"features must be \[N, D\], got \[4, 2, 2\]"),
    (split(features=torch.tensor([[1.0], [2.0], [math.nan], [1.0]])), ValueError, "finite, got nan in row 2"),
    (split(features=torch.tensor([[1.0], [math.inf], [1.0], [1.0]])), ValueError, "finite, got inf in row 1"),
    (split(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
    (split(num_classes=2.0), TypeError, "num_classes must be a whole number, got float 2.0"),
    (split(adjust="mode"), ValueError, "adjust must be one of True, False, 'median', got 'mode'"),
    (split(adjust=1), ValueError, "adjust must be one of .* got 1"),
    (split(features=torch.ones(0, 2), labels=torch.ones(0).long()), ValueError, "at least one sample"),
    (split(indices=torch.tensor([0, 3, 3, 1])), ValueError, "indices must be all different, got 3 twice"),
    (split(indices=torch.tensor([0, 1, 2, 9]), num_samples=9), ValueError, "indices must be in 0 .. 8 .*, got 9"),
    (split(indices=torch.tensor([0, 1, 2, -1])), ValueError, "indices must be .* got -1"),
    (split(num_samples=3), ValueError, "num_samples must be at least the 4 rows of features, got 3"),
    (lambda: fitted().similar(ONE + 2, ONE), ValueError, "classes must be in 0 .. 1 .*, got 2 at position 0"),
    (lambda: fitted().similar(ONE, ONE + 6), ValueError, "indices must be in 0 .. 5 .*, got 6 at position 0"),
    (lambda: fitted().similar(ONE, ONE + 3), ValueError, "labels of indices .* not in the split.* got -1 at"),
    (lambda: fitted().similar(ONE, ONE.float()), TypeError, "indices must be a tensor of whole .* torch.float32"),
    (lambda: fitted().members(2), ValueError, "k must be in 0 .. 1 .*, got 2"),
    (lambda: fitted().members("cat"), TypeError, "k must be a whole number, got str 'cat'"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused(wrong, error, message):  # F31, F32, E5, E8
    with pytest.raises(error, match=message):
        wrong()
