import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from equireg import ImageFiles, WithIndex, k_shot


@pytest.mark.parametrize("workers", [0, 2])
def test_items_carry_their_index(workers):
    dataset = WithIndex(TensorDataset(torch.arange(20) * 2, torch.arange(20) % 3))
    assert len(dataset) == 20
    assert dataset[-1][2] == 19
    with pytest.raises(IndexError, match=r"index must be in 0 .. 19, got 20"):
        dataset[20]
    assert [item[2] for item in dataset] == list(range(20))  # iteration ends
    for values, labels, indices in DataLoader(dataset, batch_size=6, shuffle=True, num_workers=workers):
        assert torch.equal(values, indices * 2)
        assert torch.equal(labels, indices % 3)
    assert WithIndex(["a", "b"])[1] == ("b", 1)


def test_dicts_stay_dicts():
    items = [{"pixel_values": torch.full((3,), float(n)), "labels": n % 2} for n in range(6)]
    dataset = WithIndex(items)
    assert dataset[-1]["index"] == 5
    assert "index" not in items[5]
    for batch in DataLoader(dataset, batch_size=4, shuffle=True):
        assert torch.equal(batch["pixel_values"][:, 0], batch["index"].float())
        assert torch.equal(batch["labels"], batch["index"] % 2)
    with pytest.raises(ValueError, match="WithIndex: an item must be without a key 'index', got index = 2"):
        WithIndex(dataset)[2]


def test_other_attributes_are_those_of_the_dataset():
    inner = TensorDataset(torch.arange(3))
    inner.classes = ["cat", "dog"]
    wrapped = pickle.loads(pickle.dumps(WithIndex(inner)))  # noqa: S301
    assert wrapped.classes == ["cat", "dog"]
    assert not hasattr(wrapped, "targets")
    wrapped.classes = ["swan"]  # to set too: `wrapped.transform = ...` must reach the dataset that transforms
    assert wrapped.dataset.classes == ["swan"]
    wrapped.note = "mine"
    assert not hasattr(wrapped.dataset, "note")


def test_wrong_datasets():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(TypeError, match="dataset must be map-style, with a length, got Stream"):
        WithIndex(Stream())
    with pytest.raises(TypeError, match="got generator"):
        WithIndex(n for n in range(3))


# ---------------------------------------------------------------------------------------------- the index in the target


class Coloured(Dataset):
    """Image n is of colour n; what timm's loaders ask of a data set."""

    transform = None

    def __len__(self):
        return 23

    def __getitem__(self, index):
        image = Image.new("RGB", (8, 8), (index, index, index))
        return self.transform(image), index % 5


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")  # timm below 1.0.31
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("prefetcher", [True, False])
def test_timms_loaders_keep_the_index_in_the_target(prefetcher, workers):
    loading = pytest.importorskip("timm.data", reason="needs timm, of the examples extra")
    dataset = WithIndex(Coloured(), in_target=True)
    device, others = (
        torch.device("cpu"),
        {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "persistent_workers": False},
    )  # the prefetcher runs on CPU too
    loader = loading.create_loader(
        *(dataset, (3, 8, 8), 5),
        is_training=True,
        no_aug=True,
        num_workers=workers,
        use_prefetcher=prefetcher,
        device=device,
        **others,
    )
    seen = []
    for images, target in loader:
        labels, indices = WithIndex.labels_and_indices(target)
        assert target.dtype == labels.dtype == indices.dtype == torch.int64
        assert target.shape == (5, 2)
        assert torch.equal(labels, indices % 5)
        colours = images.mean((1, 2, 3))
        torch.testing.assert_close(colours, indices.float().expand(5))
        seen += indices.tolist()
    assert len(set(seen)) == 20  # drop_last


@pytest.mark.parametrize("label", [3, True, np.int32(3), torch.tensor(3), np.array(3)])
def test_labels_that_are_whole_numbers(label):
    _, target = WithIndex([("image", label)], in_target=True)[-1]
    assert target.tolist() == [int(label), 0]


def test_what_the_target_refuses():
    for item, got in ((("image", 1, 2), "a tuple of 3"), ("image", "str"), (["image", 1], "list")):
        with pytest.raises(TypeError, match=rf"items must be \(image, label\) where in_target is set, got {got}"):
            WithIndex([item], in_target=True)[0]
    for label in (0.5, torch.rand(()), torch.tensor([1, 2]), None):
        with pytest.raises(TypeError, match=r"labels must be whole numbers where in_target is set, got "):
            WithIndex([("image", label)], in_target=True)[0]
    with pytest.raises(ValueError, match="in_target must be one of True, False, got 1"):
        WithIndex(["a"], in_target=1)
    for target, error in (
        (torch.rand(4, 2), r"torch.float32 \[4, 2\]: mixtures, as of Mixup or CutMix, have no index"),
        (torch.arange(4), r"\[4\]"),
        (torch.zeros(4, 3, dtype=torch.int64), r"\[4, 3\]"),
        (torch.zeros(4, 2, dtype=torch.bool), "torch.bool"),
        ([[1, 2]], "list"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"WithIndex.labels_and_indices: target must .*got {error}"):
            WithIndex.labels_and_indices(target)


# --------------------------------------------------------------------------------------------------------------- k_shot


def labelled(labels):
    return TensorDataset(torch.arange(len(labels)), torch.tensor(labels))


def test_the_first_of_each_class():
    assert k_shot(labelled([0, 0, 1, 0, 2, 1, 2, 2]), 2).indices == [0, 1, 2, 4, 5, 6]
    assert k_shot(labelled([5, -1, 9, 5, -1]), 1).indices == [0, 2]  # -1 belongs to no class


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.none() | st.integers(0, 99), st.data())
def test_k_shot(labels, seed, data):
    shots = data.draw(st.integers(1, min(labels.count(label) for label in set(labels))))
    chosen = k_shot(labelled(labels), shots, seed=seed).indices
    assert chosen == sorted(set(chosen)) == k_shot(labelled(labels), shots, seed=seed).indices
    for label in set(labels):
        found = [index for index in chosen if labels[index] == label]
        assert len(found) == shots
        if seed is None:
            assert found == [index for index, other in enumerate(labels) if other == label][:shots]
    if shots > 1:
        assert set(k_shot(labelled(labels), shots - 1, seed=seed).indices) <= set(chosen)


def test_seeds_draw_each_sample_as_often():
    """500 draws of 3 of 10: each is drawn 150 times, with a standard deviation of 10."""
    counts = torch.zeros(10)
    for seed in range(500):
        counts[k_shot(labelled([0] * 10), 3, seed=seed).indices] += 1
    assert counts.sum() == 1500
    assert ((counts - 150).abs() < 45).all()


def test_labels_of_any_data_set():
    class Targets(list):
        targets = (0, 1, 0, 1)

    inner = labelled([0, 1, 0, 1])
    assert k_shot(Targets("abcd"), 1).indices == [0, 1]
    assert k_shot(WithIndex(inner), 1).indices == [0, 1]
    assert k_shot(Subset(inner, [3, 2, 1]), 1).indices == [0, 1]
    assert k_shot(WithIndex(Subset(inner, [3, 1, 0])), 1).indices == [0, 2]
    assert k_shot(ConcatDataset([labelled([0]), inner]), 2).indices == [0, 1, 2, 4]
    files = ImageFiles(list("abcd"), [1, 0, 1, 0], ["x", "y"], contexts=[0, 1, 0, 1], context_names=["p", "q"])
    few = k_shot(files, 1)
    assert isinstance(few, ImageFiles)
    assert (few.paths, few.targets, few.contexts.tolist()) == (["a", "b"], [1, 0], [0, 1])


class Named(list):
    targets = ("cat", "dog")


FILES = ImageFiles(list("abc"), [0, 1, 1], ["cat", "dog", "elk"])


@pytest.mark.parametrize(
    ("dataset", "shots", "message"),
    [
        (FILES, 2, "shots must be at most 1, the samples of class 'cat', got 2"),
        (FILES.take([1, 2]), 1, "shots must be at most 0, the samples of class 'cat', got 1"),
        (labelled([3, 3]), 3, "shots .* the samples of class 3, got 3"),
        (labelled([0]), 0, "shots must be at least 1, got 0"),
        (labelled([-1]), 1, "dataset must be a data set with labelled samples, got none"),
        (Named("ab"), 1, r"the dataset's labels must be whole numbers, got \('cat', 'dog'\)"),
        (["a"], 1, r"dataset must .* its labels in \.labels or \.targets, got list"),
    ],
)
def test_what_k_shot_refuses(dataset, shots, message):
    with pytest.raises((TypeError, ValueError), match=f"k_shot: {message}"):
        k_shot(dataset, shots)
