import math

import pytest
import torch

from equireg import within_class_variance


def of_the_formula(features, labels):
    """A loop in float64."""
    total = 0.0
    for x, y in zip(features.double(), labels):
        own = [other for other, label in zip(features.double(), labels) if int(label) == int(y)]
        mean = sum(own) / len(own)
        total += float(((x - mean) ** 2).sum())
    return total / len(labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_equals_the_loop(dtype):
    """Classes of any size and number, one of them absent; features far from 0."""
    generator = torch.Generator().manual_seed(0)
    labels = 3 * torch.randint(4, (60,), generator=generator)
    labels[0] = 100  # alone in its class
    features = (50 + torch.randn(60, 7, generator=generator) + labels[:, None] / 3).to(dtype)
    assert within_class_variance(features, labels) == pytest.approx(of_the_formula(features, labels), rel=1e-9)
    total = of_the_formula(features, torch.zeros(60))
    share = within_class_variance(features, labels, relative=True)
    assert share == pytest.approx(of_the_formula(features, labels) / total, rel=1e-9)


def test_only_the_share_ignores_scale():
    features, labels = torch.randn(40, 5), torch.arange(40) % 4
    assert within_class_variance(0.5 * features, labels) == pytest.approx(within_class_variance(features, labels) / 4)
    share = within_class_variance(features, labels, relative=True)
    assert within_class_variance(0.5 * features, labels, relative=True) == pytest.approx(share)
    assert within_class_variance(features, labels * 0, relative=True) == 1
    assert math.isnan(within_class_variance(torch.ones(4, 2), torch.arange(4) % 2, relative=True))


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.arange(4)[:, None], torch.arange(4), "features must be a tensor of floating"),
        (torch.rand(4, 2), torch.arange(3), r"labels must be \[N\] = \[4\], got \[3\]"),
        (torch.rand(0, 2), torch.arange(0), r"features must be of at least one sample and one feature, got \[0, 2\]"),
        (torch.rand(2, 2), torch.tensor([0, -1]), "labels must be 0 or above, got -1"),
        (torch.tensor([[torch.nan], [0.0]]), torch.arange(2), "features must be finite"),
    ],
)
def test_what_is_refused(features, labels, message):
    with pytest.raises((TypeError, ValueError), match=message):
        within_class_variance(features, labels)
