import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from equireg import WithIndex


def test_items_carry_their_index():
    dataset = WithIndex(TensorDataset(torch.arange(5) * 10, torch.arange(5)))
    assert len(dataset) == 5
    assert [tuple(int(part) for part in dataset[n]) for n in range(5)] == [(10 * n, n, n) for n in range(5)]
    assert dataset[-1][2] == 4
    with pytest.raises(IndexError, match=r"index must be in 0 .. 4, got 5"):
        dataset[5]
    assert [item[2] for item in dataset] == [0, 1, 2, 3, 4]  # iteration ends


def test_bare_items():
    assert WithIndex(["a", "b"])[1] == ("b", 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_shuffling_loader(workers):
    dataset = WithIndex(TensorDataset(torch.arange(20) * 2, torch.arange(20) % 3))
    for values, labels, indices in DataLoader(dataset, batch_size=6, shuffle=True, num_workers=workers):
        assert torch.equal(values, indices * 2)
        assert torch.equal(labels, indices % 3)


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


def test_real_images(real_images):
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(real_images / "cifar10" / "test"))
    dataset = WithIndex(folder)
    image, label, index = dataset[777]
    assert (label, index) == (folder.samples[777][1], 777)
    assert image.size == (32, 32)
    assert dataset.class_to_idx == folder.class_to_idx
