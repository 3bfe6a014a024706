import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from equireg import ClassWiseIRM, FeatureMask, class_wise_risks
from tests import references

DENOMINATORS = ["own", "all"]


def batch(samples=14, width=6, classes=4):
    labels = torch.arange(samples) % classes
    labels[-1] = classes  # a class of one sample
    return torch.randn(samples, width).double(), labels, torch.rand(samples, samples) < 0.5


def plain(width, classes=5, **options):
    """ClassWiseIRM on the features themselves: no projection, and a mask that is the same everywhere."""
    irm = ClassWiseIRM(width, classes, projection=nn.Identity(), **options)
    nn.init.zeros_(irm.mask.weight)
    return irm


class Given(nn.Module):
    """Environments that answer a fixed table, and fixed weights."""

    num_samples, fitted = 1000, True

    def __init__(self, table, weights=None):
        super().__init__()
        self.table, self.of_samples = table, weights

    def check_labels(self, check, indices, labels):
        pass

    def weights(self, indices):
        return self.of_samples

    def similar(self, classes, indices):
        return self.table


@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(2, 12),
    classes=st.integers(1, 6),
    penalty=st.sampled_from(["rex", "irmv1"]),
    denominator=st.sampled_from(DENOMINATORS),
    temperature=st.sampled_from([0.05, 0.3, 1.0]),
)
def test_any_batch_equals_the_loop(seed, samples, classes, penalty, denominator, temperature):  # F28
    torch.manual_seed(seed)
    z, labels = torch.randn(samples, 3, dtype=torch.float64), torch.randint(classes, (samples,))
    similar = torch.rand(samples, samples) < torch.rand(())
    irm = plain(3, 6, weight=2.0, penalty=penalty, denominator=denominator, temperature=temperature)
    irm.environments = Given(similar)
    irm._warned = True
    loss = irm(z, labels, torch.arange(samples))
    if labels.bincount().max() < 2:
        assert loss == 0
    else:
        expected = references.class_wise_irm(z, labels, similar, temperature, 2.0, penalty, denominator)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


def test_closed_case():
    """Two anchors at cosine 1 and one negative at cosine 0: risk log(1 + e^-1/τ) with it, 0 without."""
    z = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    risks = class_wise_risks(z, torch.tensor([5, 5, 1]), torch.ones(3, 3).bool(), temperature=0.5)
    assert risks.classes.tolist() == [5]
    torch.testing.assert_close(risks.risk, torch.tensor([[math.log1p(math.exp(-2)), 0.0]]))
    torch.testing.assert_close(risks.slope, torch.tensor([[-2 / (1 + math.exp(2)), 0.0]]))


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_small_losses_keep_their_digits(denominator):
    """logaddexp(pos, lse) - pos would lose them."""
    z, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0, 1])
    risks = class_wise_risks(z, labels, torch.ones(3, 3).bool(), temperature=0.1, denominator=denominator)
    assert risks.risk[0, 0].item() == pytest.approx(math.exp(-20), rel=1e-5)


def test_no_class_with_two_samples():  # F30, D8
    z = torch.randn(3, 4, requires_grad=True)
    irm = plain(4, detach=False)
    with pytest.warns(UserWarning, match="no class has two samples in this batch"):
        loss = irm(z, torch.arange(3))
    assert loss == 0
    assert irm(z.detach(), torch.arange(3)) == 0  # it warns once
    assert irm.parts(z, torch.arange(3)).classes.shape == (0,)
    loss.backward()
    assert torch.equal(z.grad, torch.zeros(3, 4))
    assert torch.equal(irm.mask.weight.grad, torch.zeros(4))


def test_extreme_logits():  # F35
    features = torch.eye(4, dtype=torch.float32)[[0, 0, 1, 1]].requires_grad_()
    irm = plain(4, temperature=1e-4, penalty="irmv1", detach=False)
    loss = irm(features, torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 1e4
    assert torch.isfinite(features.grad).all()


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    irm = ClassWiseIRM(numpy.int64(6), numpy.int64(5), weight=numpy.float32(2), temperature=numpy.float64(0.2))
    assert torch.isfinite(irm(torch.randn(8, 6), torch.arange(8) % 4))


def test_half_precision_module_gives_a_loss_in_fp32():
    irm = ClassWiseIRM(4, 2, detach=False).bfloat16()
    for samples in (1, 6):
        assert irm(torch.randn(samples, 4).bfloat16(), torch.zeros(samples).long()).dtype == torch.float32


def test_environments_are_in_the_state():  # T10
    features, labels = torch.randn(20, 6), torch.arange(20) % 4
    irm, unfitted, other = ClassWiseIRM(6, 4).fit_environments(features, labels), ClassWiseIRM(6, 4), ClassWiseIRM(6, 4)
    other.load_state_dict(irm.state_dict())
    rows = torch.arange(0, 20, 2)
    assert torch.equal(other(features[rows], labels[rows], rows), irm(features[rows], labels[rows], rows))
    assert not any("environments" in name for name in unfitted.state_dict())
    with pytest.raises(RuntimeError, match="environments are of 4 classes, num_classes is 9"):
        ClassWiseIRM(6, 9).load_state_dict(irm.state_dict())
    with pytest.raises(RuntimeError, match="environments.bits"):
        irm.load_state_dict(unfitted.state_dict())


def test_labels_of_any_whole_kind_sparse_and_huge():  # F31, F33
    z, labels, similar = batch()
    expected = class_wise_risks(z, labels, similar)
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(class_wise_risks(z, labels.to(kind), similar).risk, expected.risk)
    got = class_wise_risks(z, labels * 10**12, similar)
    assert got.classes.tolist() == [0, 10**12, 2 * 10**12, 3 * 10**12]
    assert torch.equal(got.risk, expected.risk)


def test_feature_mask():
    mask = FeatureMask(1000)
    assert 0 <= mask.weight.min() < 0.05
    assert 0.95 < mask.weight.max() < 1
    features = torch.randn(3, 1000)
    torch.testing.assert_close(mask(features), torch.sigmoid(mask.weight) * features)
    scaled = FeatureMask(1000, scale=10.0)
    scaled.load_state_dict(mask.state_dict())
    torch.testing.assert_close(scaled(features), 10 * F.normalize(mask(features), dim=1))
    torch.testing.assert_close(scaled.select(features), mask(features))


def test_default_projection_is_the_papers():
    first, norm, relu, last = ClassWiseIRM(64, 3).projection
    assert (type(norm), type(relu)) == (nn.BatchNorm1d, nn.ReLU)
    assert (first.in_features, first.out_features, first.bias, last.out_features) == (64, 512, None, 128)


def module(num_features=4, num_classes=2, **options):
    return lambda: ClassWiseIRM(num_features, num_classes, **options)


def call(**changes):
    labels = torch.arange(6) % 2
    irm = ClassWiseIRM(4, 2).fit_environments(torch.randn(6, 4), labels)
    return lambda: irm(**{"features": torch.ones(6, 4), "labels": labels, "indices": torch.arange(6), **changes})


def risks(**changes):
    arguments = {"z": torch.ones(4, 3), "labels": torch.arange(4) % 2, "similar": torch.ones(4, 4).bool()}
    return lambda: class_wise_risks(**{**arguments, **changes})


def fit(*arguments, **options):
    return lambda: ClassWiseIRM(4, 2).fit_environments(*arguments, **options)


ONES, SIX = torch.ones(6, 4), torch.arange(6)
REFUSED = [
    (module(num_features=0), ValueError, "num_features must be at least 1, got 0"),
    (module(num_classes=2.5), TypeError, "num_classes must be a whole number, got float 2.5"),
    (module(weight=math.nan), ValueError, "weight must be finite and at least 0, got nan"),
    (module(temperature=math.inf), ValueError, "temperature must be finite and above 0, got inf"),
    (module(temperature="0.1"), TypeError, "temperature must be a number, got str '0.1'"),
    (module(temperature=True), TypeError, "temperature must be a number, got bool True"),
    (module(projection="mlp"), TypeError, "projection must be an nn.Module or None, got str"),
    (call(features=torch.ones(6, 5)), ValueError, r"features must be \[B, D\] = \[B, 4\], got \[6, 5\]"),
    (call(features=torch.ones(6, 4, 1)), ValueError, r"features must be \[B, D\], got \[6, 4, 1\]"),
    (call(features=[[1.0] * 4] * 6), TypeError, "features must be a tensor of .* got list"),
    (call(labels=torch.zeros(5).long()), ValueError, r"labels must be \[B\] = \[6\], got \[5\]"),
    (call(indices=torch.zeros(7).long()), ValueError, r"indices must be \[B\] = \[6\], got \[7\]"),
    (lambda: ClassWiseIRM(4, 2)(ONES, SIX % 2, SIX), ValueError, r"None before fit_environments, got \[6\]"),
    (
        lambda: ClassWiseIRM(4, 2, projection=nn.Sequential(nn.Sequential(nn.Linear(7, 3)))),
        ValueError,
        r"projection must be of 4 features \(num_features\), got one of 7",
    ),
    (
        lambda: ClassWiseIRM(4, 2)(torch.ones(6, 4, device="meta"), SIX),
        ValueError,
        r"on cpu as the loss module \(its .to\(device\) moves it\) is, got meta",
    ),
    (lambda: ClassWiseIRM(4, 2).mask(torch.ones(6, 4, device="meta")), ValueError, r"irm.to\(device\) .* got meta"),
    (lambda: module(sample_weights=True)()(ONES, SIX % 2), ValueError, "fit_environments must be called first, as"),
    (
        lambda: module(sample_weights=True)().fit_environments(ONES, SIX % 2)(ONES, SIX % 2),
        ValueError,
        "indices must be given with sample_weights",
    ),
    (risks(similar=torch.ones(4, 4)), TypeError, "similar must be a bool tensor, got torch.float32"),
    (risks(temperature=torch.ones(2)), ValueError, r"temperature must be a number or .* got \[2\]"),
    (risks(temperature=torch.zeros(())), ValueError, "temperature must be finite and above 0"),
    (risks(labels=torch.ones(4, device="meta").long()), ValueError, "labels must be on cpu as z is, got meta"),
    (risks(z=torch.ones(4, 0)), ValueError, r"z must be at least one wide, got \[4, 0\]"),
    (fit(ONES), ValueError, "labels must be given with features, got None"),
    (fit([ONES]), TypeError, "features must be a tensor, or a loader together with encoder, got list"),
    (fit(ONES, encoder=nn.Identity()), TypeError, "features must be a loader where encoder is given, got a tensor"),
    (fit([], SIX, encoder=nn.Identity()), ValueError, "labels and indices must be None where encoder is given"),
    (fit(ONES, SIX % 3), ValueError, "labels must be in 0 .. 1 .*, got 2"),
    (lambda: FeatureMask(9)(ONES), ValueError, r"features must be \[..., 9\], got \[6, 4\]"),
    (lambda: FeatureMask(4)([1.0]), TypeError, "features must be a tensor of floating point numbers, got list"),
    (lambda: FeatureMask(4, scale=-1.0), ValueError, "scale must be finite and above 0, got -1.0"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused(wrong, error, message):  # F1, F3, F4, F5, F7, F12, F31, F34
    with pytest.raises(error, match=message):
        wrong()
