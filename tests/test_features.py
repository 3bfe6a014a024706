import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from equireg import WithIndex, extract_features


def loader(**options):
    return DataLoader(WithIndex(TensorDataset(torch.randn(10, 3), torch.arange(10) % 2)), 4, **options)


@pytest.mark.parametrize("shuffle", [False, True])
def test_all_samples_in_the_order_of_the_loader(shuffle):
    batches = loader(shuffle=shuffle)
    images = batches.dataset.tensors[0]
    features, labels, indices = extract_features(lambda images: images * 2, batches, progress=not shuffle)
    assert torch.equal(features, images[indices] * 2)
    assert torch.equal(labels, indices % 2)
    assert torch.equal(indices, torch.arange(10)) != shuffle


def test_encoder_is_left_as_it_was_also_when_it_fails():  # P5
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Dropout(0.5)

        def forward(self, images):
            assert not self.inner.training
            raise RuntimeError("no features today")

    encoder, state = Failing(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no features today"):
        extract_features(encoder, [(torch.ones(2, 3), torch.arange(2), torch.arange(2))], progress=False)
    assert encoder.training
    assert encoder.inner.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


class Elsewhere(torch.Tensor):
    """Says that it is on an accelerator, until it is brought to the CPU."""

    moved = False

    @property
    def device(self):
        return torch.device("cuda:0")

    def cpu(self):
        Elsewhere.moved = True
        return self.as_subclass(torch.Tensor)


def test_output_of_another_device_is_brought_to_the_cpu():
    """An encoder on an accelerator answers there; labels and indices stay on the CPU."""
    Elsewhere.moved = False
    features, _, _ = extract_features(lambda images: images.as_subclass(Elsewhere), loader(), progress=False)
    assert Elsewhere.moved
    assert features.device.type == "cpu"


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (
            [(torch.ones(2, 3), torch.arange(2))],
            TypeError,
            "loader must be a loader of .images, labels, indices., .* got 2 parts",
        ),
        ([(torch.ones(2, 3), [0, 1], torch.arange(2))], TypeError, "labels must be a tensor of any kind, got list"),
        ([], ValueError, "loader must be of at least one batch, got none"),
        ([(torch.ones(2, 3, 1), *torch.ones(2, 2).long())], ValueError, r"output must be \[B, D\], got \[2, 3, 1\]"),
    ],
)
def test_wrong_loaders(batches, error, message):
    with pytest.raises(error, match=message):
        extract_features(nn.Identity(), batches, progress=False)


def test_a_bar_begins_a_loader_once():
    """Twice would start its workers twice, and draw two seeds from the global generator."""
    pytest.importorskip("tqdm", reason="without it there is no bar")

    class Counted(DataLoader):
        begun = 0

        def __iter__(self):
            Counted.begun += 1
            return super().__iter__()

    loader = Counted(WithIndex(TensorDataset(torch.rand(8, 3), torch.arange(8))), batch_size=4, shuffle=True)
    torch.manual_seed(0)
    features, labels, _ = extract_features(nn.Identity(), loader, progress=True)
    torch.manual_seed(0)
    plain, same, _ = extract_features(nn.Identity(), loader, progress=False)
    assert Counted.begun == 2
    assert torch.equal(features, plain)
    assert torch.equal(labels, same)


def test_encoder_that_calls_a_function_of_no_module():
    def double(x):
        return 2 * x

    double.__module__ = None
    loader = DataLoader(WithIndex(TensorDataset(torch.ones(4, 3), torch.arange(4))), batch_size=4)
    features, _, _ = extract_features(double, loader)
    assert features.eq(2).all()


def test_encoder_that_reads_a_configuration():
    class Config(dict):
        __getattr__ = dict.__getitem__  # raises a KeyError

    config, model = Config(factor=2), nn.BatchNorm1d(3)

    def encode(x):
        assert not model.training
        return config.factor * model(x)

    loader = DataLoader(WithIndex(TensorDataset(torch.ones(4, 3), torch.arange(4))), batch_size=4)
    features, _, _ = extract_features(encode, loader)
    torch.testing.assert_close(features, torch.full((4, 3), 2.0), rtol=1e-4, atol=0)


class Holder:
    """An object that is no module and cannot be called, such as a trainer."""

    def __init__(self):
        self.model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
        self.name = "holder"

    def encode(self, images):
        assert not self.model.training
        return self.model(images)


HOLDER = Holder()


@pytest.mark.parametrize("encoder", [HOLDER.encode, lambda images: HOLDER.encode(images)], ids=["method", "function"])
def test_model_of_an_object_is_frozen_too(encoder):
    before = HOLDER.model[1].running_mean.clone()
    extract_features(encoder, loader(), progress=False)
    assert HOLDER.model.training
    assert torch.equal(HOLDER.model[1].running_mean, before)
