import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from equireg import WithIndex, extract_features


def loader(samples=10, **options):
    return DataLoader(WithIndex(TensorDataset(torch.randn(samples, 3), torch.arange(samples) % 2)), 4, **options)


def test_all_samples_in_the_order_of_the_loader():
    batches = loader()
    images = batches.dataset.tensors[0]
    features, labels, indices = extract_features(nn.Identity(), batches)
    assert torch.equal(features, images)
    assert torch.equal(labels, torch.arange(10) % 2)
    assert torch.equal(indices, torch.arange(10))


def test_any_function_will_do():
    features, _, indices = extract_features(lambda images: images * 2, batches := loader(shuffle=True), progress=False)
    assert torch.equal(features, batches.dataset.tensors[0][indices] * 2)


def test_encoder_is_left_as_it_was_also_when_it_fails():  # P5
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Dropout(0.5)

        def forward(self, images):
            assert not self.inner.training
            raise RuntimeError("no features today")

    encoder = Failing()
    with pytest.raises(RuntimeError, match="no features today"):
        extract_features(encoder, loader(), progress=False)
    assert encoder.training
    assert encoder.inner.training
    assert torch.is_grad_enabled()


def test_output_of_another_device_is_brought_to_the_cpu():
    """An encoder on an accelerator answers there; labels and indices stay on the CPU."""

    class Elsewhere(torch.Tensor):
        moved = False

        @property
        def device(self):
            return torch.device("cuda:0")

        def cpu(self):
            Elsewhere.moved = True
            return self.as_subclass(torch.Tensor)

    features, _, _ = extract_features(lambda images: images.as_subclass(Elsewhere), loader(), progress=False)
    assert Elsewhere.moved
    assert features.device.type == "cpu"


def test_random_state_is_untouched():
    state = torch.get_rng_state()
    batches = [(torch.ones(2, 3), torch.zeros(2).long(), torch.arange(2))]
    extract_features(nn.Dropout(0.5), batches, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_loaders():
    plain = DataLoader(TensorDataset(torch.randn(4, 3), torch.zeros(4).long()), 2)
    with pytest.raises(
        TypeError, match="loader must be a loader of .images, labels, indices., see WithIndex, got 2 parts"
    ):
        extract_features(nn.Identity(), plain, progress=False)
    with pytest.raises(TypeError, match="labels must be a tensor of any kind, got list"):
        extract_features(nn.Identity(), [(torch.ones(2, 3), [0, 1], torch.arange(2))], progress=False)
    with pytest.raises(ValueError, match="loader must be of at least one batch, got none"):
        extract_features(nn.Identity(), [], progress=False)
    with pytest.raises(ValueError, match=r"encoder's output must be \[B, D\], got \[4, 3, 1\]"):
        extract_features(lambda images: images[:, :, None], loader(), progress=False)
