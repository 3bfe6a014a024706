import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from equireg import ClassWiseIRM, Environments, FeatureMask, WithIndex, class_wise_risks
from tests import references

PENALTIES = ["rex", "irmv1"]
DENOMINATORS = ["own", "all"]


def batch(samples=14, width=6, classes=4, dtype=torch.float64):
    labels = torch.arange(samples) % classes
    labels[-1] = classes  # a class of one sample
    return torch.randn(samples, width, dtype=dtype), labels[torch.randperm(samples)], split_of(labels)


def split_of(labels):
    """A random table of environments with, for class 0, no negative in Env#2."""
    similar = torch.rand(len(labels), len(labels)) < 0.5
    similar[labels == 0] = True
    return similar


def plain(**options):
    """ClassWiseIRM on the features themselves: no projection, and a mask that is the same everywhere."""
    irm = ClassWiseIRM(options.pop("width", 6), options.pop("classes", 5), projection=nn.Identity(), **options)
    nn.init.zeros_(irm.mask.weight)
    return irm


class Given(nn.Module):
    """Environments that answer a fixed table."""

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


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_risks_and_slopes_equal_the_loop(temperature, denominator):
    z, labels, similar = batch()
    risks = class_wise_risks(z, labels, similar, temperature=temperature, denominator=denominator)
    assert risks.classes.tolist() == [0, 1, 2, 3]
    for row, k in enumerate(risks.classes.tolist()):
        for e in (0, 1):
            w = torch.ones((), dtype=torch.float64, requires_grad=True)
            expected = references.class_risk(z, labels, similar, k, e, temperature, denominator, w)
            (slope,) = torch.autograd.grad(expected, w)  # the reference lets autograd differentiate
            torch.testing.assert_close(risks.risk[row, e], expected.detach(), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(risks.slope[row, e], slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_loss_and_gradient_equal_the_loop(penalty, denominator):
    features, labels, similar = batch()
    irm = plain(weight=3.0, penalty=penalty, denominator=denominator, detach=False)
    irm.environments = Given(similar)
    mine, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    loss = irm(mine, labels, torch.arange(14))
    expected = references.class_wise_irm(theirs, labels, similar, 0.1, 3.0, penalty, denominator)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_gradcheck(denominator):
    z, labels, similar = batch(9, 4, 3)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)  # F14

    def outputs(z, temperature):
        _, risk, slope = class_wise_risks(z, labels, similar, temperature=temperature, denominator=denominator)
        return risk, slope

    assert torch.autograd.gradcheck(outputs, (z.requires_grad_(), temperature), atol=1e-7, rtol=1e-5)


@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(2, 12),
    classes=st.integers(1, 6),
    penalty=st.sampled_from(PENALTIES),
    denominator=st.sampled_from(DENOMINATORS),
)
def test_any_batch_equals_the_loop(seed, samples, classes, penalty, denominator):
    torch.manual_seed(seed)
    z, labels = torch.randn(samples, 3, dtype=torch.float64), torch.randint(classes, (samples,))
    similar = torch.rand(samples, samples) < torch.rand(())
    irm = plain(width=3, classes=6, weight=2.0, penalty=penalty, denominator=denominator, temperature=0.3)
    irm.environments = Given(similar)
    irm._warned = True
    loss = irm(z, labels, torch.arange(samples))
    if labels.bincount().max() < 2:
        assert loss == 0
    else:
        expected = references.class_wise_irm(z, labels, similar, 0.3, 2.0, penalty, denominator)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


def test_closed_case():
    """Two anchors at cosine 1 and one negative at cosine 0: risk log(1 + e^-1/τ) with it, 0 without."""
    z = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    risks = class_wise_risks(z, torch.tensor([5, 5, 1]), torch.ones(3, 3).bool(), temperature=0.5)
    assert risks.classes.tolist() == [5]
    torch.testing.assert_close(risks.risk, torch.tensor([[math.log1p(math.exp(-2)), 0.0]]))
    torch.testing.assert_close(risks.slope, torch.tensor([[-2 / (1 + math.exp(2)), 0.0]]))


def test_small_losses_keep_their_digits():
    """logaddexp(pos, lse) - pos would lose them."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    for denominator in DENOMINATORS:
        risks = class_wise_risks(
            z, torch.tensor([0, 0, 1]), torch.ones(3, 3).bool(), temperature=0.1, denominator=denominator
        )
        assert risks.risk[0, 0].item() == pytest.approx(math.exp(-20), rel=1e-5)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
def test_half_precision_is_summed_in_fp32(dtype, temperature, denominator):
    z, labels, similar = batch(60, 16, 5)
    z = z.to(dtype)
    got = class_wise_risks(z, labels, similar, temperature=temperature, denominator=denominator)
    expected = class_wise_risks(z.double(), labels, similar, temperature=temperature, denominator=denominator)
    assert got.risk.dtype == torch.float32
    torch.testing.assert_close(got.risk.double(), expected.risk, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.slope.double(), expected.slope, rtol=1e-5, atol=2e-7 / temperature)


def test_no_class_with_two_samples():  # F30
    z = torch.randn(3, 4, requires_grad=True)
    risks = class_wise_risks(z, torch.arange(3), torch.ones(3, 3).bool())
    assert risks.classes.shape == (0,)
    assert risks.risk.shape == risks.slope.shape == (0, 2)
    irm = plain(width=4, detach=False)
    with pytest.warns(UserWarning, match="no class has two samples in this batch"):
        loss = irm(z, torch.arange(3))
    assert loss == 0
    assert irm(z.detach(), torch.arange(3)) == 0  # it warns once
    loss.backward()
    assert torch.equal(z.grad, torch.zeros(3, 4))
    assert torch.equal(irm.mask.weight.grad, torch.zeros(4))


@pytest.mark.parametrize("samples", [0, 1])
def test_batch_too_small_for_a_pair(samples):  # F6, R10, D8
    irm = ClassWiseIRM(4, 2, detach=False)
    features = torch.full((samples, 4), math.nan, requires_grad=True)
    loss = irm(features, torch.zeros(samples).long())
    assert loss.shape == ()
    assert loss == 0
    loss.backward()
    assert torch.equal(features.grad, torch.zeros(samples, 4))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in irm.parameters())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_class(penalty):  # F28: no negatives, so both risks are 0 under Eq. 5
    features = torch.randn(5, 4)
    irm = plain(width=4, classes=1, penalty=penalty).fit_environments(features, torch.zeros(5).long())
    assert irm(features, torch.zeros(5).long(), torch.arange(5)) == 0


def test_weight_zero_leaves_the_risks():  # F34
    features, labels, similar = batch()
    irm = plain(weight=0.0)
    irm.environments = Given(similar)
    risks = class_wise_risks(features, labels, similar)
    torch.testing.assert_close(irm(features, labels, torch.arange(14)), risks.risk.sum(1).mean())


def test_one_line_trains_the_mask_with_the_classifier():
    """The line of the documentation: cross entropy reaches backbone, mask and head; the penalty mask and projection."""
    backbone, head, irm = nn.Linear(5, 8), nn.Linear(8, 3), ClassWiseIRM(8, 3)
    images, labels = torch.randn(30, 5), torch.arange(30) % 3
    irm.fit_environments(backbone(images), labels)
    features = backbone(images)
    loss = F.cross_entropy(head(irm.mask(features)), labels) + irm(features, labels, torch.arange(30))
    loss.backward()
    for module in (backbone, head, irm):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_zero_features_are_defined():  # F9
    features = torch.zeros(6, 4, requires_grad=True)
    loss = plain(width=4, detach=False)(features, torch.arange(6) % 2)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_nan_is_not_masked():  # F15
    features, labels, _ = batch()
    features[3, 2] = math.nan
    assert plain()(features, labels).isnan()


def test_risk_extreme_logits():  # F35
    features = torch.eye(4, dtype=torch.float32)[[0, 0, 1, 1]].requires_grad_()
    irm = plain(width=4, temperature=1e-4, penalty="irmv1", detach=False)
    loss = irm(features, torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 1e4
    assert torch.isfinite(features.grad).all()


def test_environments_split_inside_the_batch_without_indices():
    features, labels, _ = batch(30, 6, 4)
    irm = plain()
    expected = plain()
    expected.environments = Environments.split(features, labels, 5)
    torch.testing.assert_close(irm(features, labels), expected(features, labels, torch.arange(30)))
    # Fitted ones are not used either where the loader gives no index.
    irm.fit_environments(torch.randn(30, 6), labels)
    torch.testing.assert_close(irm(features, labels), expected(features, labels, torch.arange(30)))


def test_batch_looks_its_environments_up_by_index():
    features, labels = torch.randn(50, 6), torch.arange(50) % 5
    irm = plain().fit_environments(features, labels)
    rows = torch.randperm(50)[:20]
    table = Environments.split(features, labels).similar(labels[rows], rows)
    expected = class_wise_risks(features[rows], labels[rows], table)
    penalty = expected.risk.var(1, unbiased=True)
    torch.testing.assert_close(irm(features[rows], labels[rows], rows), (expected.risk.sum(1) + 10 * penalty).mean())


def test_fits_from_a_loader_and_an_encoder():
    from torch.utils.data import DataLoader, TensorDataset

    images, labels = torch.randn(25, 3, 4, 4), torch.arange(25) % 3
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 7), nn.BatchNorm1d(7), nn.Dropout(0.5))
    encoder[3].eval()  # a module that was in eval mode stays there
    before = copy.deepcopy(encoder.state_dict())
    loader = DataLoader(WithIndex(TensorDataset(images, labels)), batch_size=8, shuffle=True)
    irm = ClassWiseIRM(6, 3).fit_environments(loader, encoder=encoder)
    assert [module.training for module in encoder] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    with torch.no_grad():
        features = encoder.eval()(images)
    assert torch.equal(irm.environments.bits, Environments.split(features, labels).bits)
    assert irm.environments._ranked_by is None  # a whole dataset's features are not kept alive


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    irm = ClassWiseIRM(numpy.int64(6), numpy.int64(5), weight=numpy.float32(2), temperature=numpy.float64(0.2))
    assert torch.isfinite(irm(torch.randn(8, 6), torch.arange(8) % 4))


def test_half_precision_module_gives_a_loss_in_fp32():
    irm = ClassWiseIRM(4, 2, detach=False).bfloat16()
    for samples in (1, 6):
        assert irm(torch.randn(samples, 4).bfloat16(), torch.zeros(samples).long()).dtype == torch.float32


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])  # P10, T10
def test_environments_travel(how, tmp_path):
    features, labels = torch.randn(20, 6), torch.arange(20) % 4
    irm = ClassWiseIRM(6, 4).fit_environments(features, labels).eval()
    if how == "state_dict":
        torch.save(irm.state_dict(), tmp_path / "state.pt")
        other = ClassWiseIRM(6, 4).eval()
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    else:
        other = pickle.loads(pickle.dumps(irm)) if how == "pickle" else copy.deepcopy(irm)  # noqa: S301
    rows = torch.arange(0, 20, 2)
    assert torch.equal(other(features[rows], labels[rows], rows), irm(features[rows], labels[rows], rows))
    assert other.environments.num_samples == 20
    unfitted = ClassWiseIRM(6, 4)
    assert not any("environments" in name for name in unfitted.state_dict())
    with pytest.raises(RuntimeError, match="environments are of 4 classes, num_classes is 9"):
        ClassWiseIRM(6, 9).load_state_dict(irm.state_dict())
    with pytest.raises(RuntimeError, match="environments.bits"):
        irm.load_state_dict(unfitted.state_dict())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])  # F31
def test_labels_of_any_whole_kind(kind):
    z, labels, similar = batch()
    got = class_wise_risks(z, labels.to(kind), similar)
    assert torch.equal(got.risk, class_wise_risks(z, labels, similar).risk)


def test_labels_may_be_sparse_and_huge():  # F33
    z, labels, similar = batch()
    got = class_wise_risks(z, labels * 10**12, similar)
    assert got.classes.tolist() == [0, 10**12, 2 * 10**12, 3 * 10**12]
    assert torch.equal(got.risk, class_wise_risks(z, labels, similar).risk)


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
    with pytest.raises(ValueError, match=r"features must be \[..., 1000\], got \[3, 999\]"):
        mask(torch.randn(3, 999))
    with pytest.raises(TypeError, match="features must be a tensor of floating point numbers, got list"):
        mask([1.0])
    with pytest.raises(ValueError, match="scale must be finite and above 0, got -1.0"):
        FeatureMask(4, scale=-1.0)


def test_default_projection_is_the_papers():
    kinds = [type(layer) for layer in ClassWiseIRM(64, 3).projection]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    first, _, _, last = ClassWiseIRM(64, 3).projection
    assert (first.in_features, first.out_features, first.bias, last.out_features) == (64, 512, None, 128)


WRONG_MODULE = {
    "num_features": ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
    "num_classes": ({"num_classes": 2.5}, TypeError, "num_classes must be a whole number, got float 2.5"),
    "weight": ({"weight": -1.0}, ValueError, "weight must be finite and at least 0, got -1.0"),
    "weight NaN": ({"weight": math.nan}, ValueError, "weight must be finite and at least 0, got nan"),
    "penalty": ({"penalty": "vrex"}, ValueError, "penalty must be one of 'rex', 'irmv1', got 'vrex'"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0, got 0.0"),
    "temperature inf": ({"temperature": math.inf}, ValueError, "temperature must be finite and above 0, got inf"),
    "temperature text": ({"temperature": "0.1"}, TypeError, "temperature must be a number, got str '0.1'"),
    "temperature bool": ({"temperature": True}, TypeError, "temperature must be a number, got bool True"),
    "denominator": ({"denominator": "both"}, ValueError, "denominator must be one of 'own', 'all', got 'both'"),
    "projection": ({"projection": "mlp"}, TypeError, "projection must be an nn.Module or None, got str"),
    "detach": ({"detach": "yes"}, ValueError, "detach must be one of 'penalty', True, False, got 'yes'"),
}


@pytest.mark.parametrize("case", WRONG_MODULE)
def test_wrong_settings(case):  # F12, F27, F34
    changes, error, message = WRONG_MODULE[case]
    with pytest.raises(error, match=f"ClassWiseIRM: {message}"):
        ClassWiseIRM(**({"num_features": 4, "num_classes": 2} | changes))


WRONG_CALL = {
    "width": ({"features": torch.ones(6, 5)}, ValueError, r"features must be \[B, D\] = \[B, 4\], got \[6, 5\]"),
    "map": ({"features": torch.ones(6, 4, 1)}, ValueError, r"features must be \[B, D\], got \[6, 4, 1\]"),
    "array": ({"features": [[1.0] * 4] * 6}, TypeError, "features must be a tensor of .* got list"),
    "integers": ({"features": torch.ones(6, 4).long()}, TypeError, "features must be .* got torch.int64"),
    "labels length": ({"labels": torch.zeros(5).long()}, ValueError, r"labels must be \[B\] = \[6\], got \[5\]"),
    "labels float": ({"labels": torch.zeros(6)}, TypeError, "labels must be .* got torch.float32"),
    "label range": ({"labels": torch.tensor([0, 1, 0, 1, 2, 0])}, ValueError, "labels .* got 2 at position 4"),
    "index length": ({"indices": torch.zeros(7).long()}, ValueError, r"indices must be \[B\] = \[6\], got \[7\]"),
    "index range": ({"indices": torch.tensor([0, 1, 2, 3, 4, 60])}, ValueError, "indices .* got 60 at position 5"),
}


@pytest.mark.parametrize("case", WRONG_CALL)
def test_wrong_calls(case):  # F1 to F5, F31, F32, E5
    changes, error, message = WRONG_CALL[case]
    labels = torch.arange(6) % 2
    irm = ClassWiseIRM(4, 2).fit_environments(torch.randn(6, 4), labels)
    running = irm.projection[1].running_mean.clone()
    with pytest.raises(error, match=message):
        irm(**({"features": torch.ones(6, 4), "labels": labels, "indices": torch.arange(6)} | changes))
    assert torch.equal(irm.projection[1].running_mean, running)  # refused before any state changes


WRONG_RISKS = {
    "similar shape": ({"similar": torch.ones(4, 8).bool()}, ValueError, r"similar must be \[B, B\] = \[4, 4\], got"),
    "similar dtype": ({"similar": torch.ones(4, 4)}, TypeError, "similar must be a bool tensor, got torch.float32"),
    "temperature": ({"temperature": -0.1}, ValueError, "temperature must be finite and above 0, got -0.1"),
    "temperature tensor": ({"temperature": torch.ones(2)}, ValueError, r"temperature must be a number or .* got \[2\]"),
    "temperature zero": ({"temperature": torch.zeros(())}, ValueError, "temperature must be finite and above 0"),
    "denominator": ({"denominator": "Own"}, ValueError, "denominator must be one of 'own', 'all', got 'Own'"),
    "device": ({"labels": torch.ones(4, device="meta").long()}, ValueError, "labels must be on cpu as z is, got meta"),
    "no width": ({"z": torch.ones(4, 0)}, ValueError, r"z must be at least one wide, got \[4, 0\]"),
}


@pytest.mark.parametrize("case", WRONG_RISKS)
def test_wrong_risks(case):
    changes, error, message = WRONG_RISKS[case]
    arguments = {"z": torch.ones(4, 3), "labels": torch.arange(4) % 2, "similar": torch.ones(4, 4).bool()} | changes
    with pytest.raises(error, match=f"class_wise_risks: {message}"):
        class_wise_risks(**arguments)


def test_wrong_fits():
    irm = ClassWiseIRM(4, 2)
    with pytest.raises(ValueError, match=r"indices must be None before fit_environments, got \[6\]"):
        irm(torch.ones(6, 4), torch.arange(6) % 2, torch.arange(6))
    with pytest.raises(ValueError, match="labels must be given with features, got None"):
        irm.fit_environments(torch.ones(6, 4))
    with pytest.raises(TypeError, match="features must be a tensor, or a loader together with encoder, got list"):
        irm.fit_environments([torch.ones(6, 4)])
    with pytest.raises(TypeError, match="features must be a loader where encoder is given, got a tensor"):
        irm.fit_environments(torch.ones(6, 4), encoder=nn.Identity())
    with pytest.raises(ValueError, match="labels and indices must be None where encoder is given"):
        irm.fit_environments([], torch.arange(6), encoder=nn.Identity())
    with pytest.raises(ValueError, match="labels must be in 0 .. 1 .*, got 2"):
        irm.fit_environments(torch.ones(6, 4), torch.arange(6) % 3)
    assert irm.environments is None
