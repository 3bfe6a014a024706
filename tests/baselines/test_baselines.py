import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equireg import AugSelfLoss, EquiModLoss
from tests import references

TARGETS = {"scale": ("regression", 2), "flip": ("binary", 1), "rotation": ("classification", 4)}


def differences(count):
    return {
        "scale": torch.rand(count, 2) * 2 - 1,
        "flip": torch.rand(count) < 0.5,
        "rotation": torch.arange(count) % 4,
    }


@pytest.mark.parametrize("shape", [(6, 8), (6, 5, 8)])
def test_equimod_is_a_contrast_of_predictions(shape):
    loss = EquiModLoss(8, 3, projection_dim=7, parameter_dim=4, temperature=0.3)
    features, transformed, parameters = torch.randn(shape), torch.randn(shape), torch.rand(6, 3)
    before, after = (x.mean(1) if x.dim() == 3 else x for x in (features, transformed))
    given = torch.cat([loss.projection(before), loss.parameters_projection(parameters)], 1)
    expected = float(references.equimod(loss.predictor(given), loss.projection(after), 0.3).detach())
    assert float(loss(features, transformed, parameters).detach()) == pytest.approx(expected, rel=1e-5)
    alignment = F.cosine_similarity(loss.predictor(given), loss.projection(after)).mean().detach()
    torch.testing.assert_close(loss.parts(features, transformed, parameters).alignment, alignment)


def test_equimod_learns_what_a_parameter_does():
    """Embeddings shifted by the parameter: predicted, where the parameter is known, better than where it is not."""
    torch.manual_seed(0)
    found = []
    for known in (True, False):
        loss = EquiModLoss(6, 6, projection_dim=6)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        generator, values = torch.Generator().manual_seed(1), []
        for _ in range(150):
            features, parameter = torch.randn(2, 32, 6, generator=generator)
            value = loss(features, features + 2 * parameter, parameter if known else torch.zeros(32, 6))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        found.append(sum(values[-20:]) / 20)
    assert found[0] < 0.8 * found[1]


@pytest.mark.parametrize("shape", [(6, 8), (6, 5, 8)])
def test_augself_is_the_sum_of_its_parts(shape):
    loss = AugSelfLoss(8, TARGETS, hidden_dim=16)
    features1, features2 = torch.randn(shape), torch.randn(shape)
    there, back = differences(6), differences(6)
    a, b = (x.mean(1) if x.dim() == 3 else x for x in (features1, features2))
    expected = 0.0
    for name, (kind, _) in TARGETS.items():
        parts = []
        for first, second, wanted in ((a, b, there[name]), (b, a, back[name])):
            for i in range(6):
                out = loss.predictors[name](torch.cat([first[i], second[i]])).double().detach()
                if kind == "regression":
                    parts.append(float((out.tanh() - wanted[i].double()).square().mean()))
                elif kind == "binary":
                    p = float(torch.sigmoid(out[0]))
                    parts.append(-float(torch.tensor(p if wanted[i] else 1 - p).log()))
                else:
                    parts.append(-float(out.log_softmax(0)[wanted[i]]))
        expected += sum(parts) / len(parts)
    assert float(loss(features1, features2, there, back).detach()) == pytest.approx(expected, rel=1e-5)


def test_augself_learns_the_difference():
    loss = AugSelfLoss(4, {"rotation": ("classification", 4)}, hidden_dim=32)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(80):
        turns = torch.randint(4, (2, 64))
        features = F.one_hot(turns, 4).float()
        there, back = (turns[1] - turns[0]) % 4, (turns[0] - turns[1]) % 4
        value = loss(features[0], features[1], {"rotation": there}, {"rotation": back})
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value < 0.2


def calls():
    equimod, augself = EquiModLoss(8, 3), AugSelfLoss(8, TARGETS, hidden_dim=16)
    features = torch.randn(6, 4, 8)
    return {
        "EquiMod": (equimod, (features, features.flip(0), torch.rand(6, 3))),
        "AugSelf": (augself, (features, features.flip(0), differences(6), differences(6))),
    }


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: EquiModLoss(0, 3), ValueError, "EquiModLoss: dim must be at least 1"),
        (lambda: EquiModLoss(8, 3, temperature=0), ValueError, "EquiModLoss: temperature must be"),
        (lambda: AugSelfLoss(8, {}), ValueError, "AugSelfLoss: targets must be at least one"),
        (lambda: AugSelfLoss(8, {"x": ("ordinal", 3)}), ValueError, r"targets\['x'\] must be one of 'regression'"),
        (lambda: AugSelfLoss(8, {"x": ("binary", 2)}), ValueError, r"targets\['x'\] must be \('binary', 1\)"),
    ],
)
def test_wrong_options(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def wrong_calls():
    (equimod, (x, y, p)), (augself, (_, _, there, back)) = calls().values()
    return {
        "width": (equimod, (x[..., :3], y, p), ValueError, r"features must be .*8\], got \[6, 4, 3\]"),
        "batch": (equimod, (x, y[:5], p), ValueError, r"transformed must be .*got \[5, 4, 8\]"),
        "parameters": (equimod, (x, y, p[:, :2]), ValueError, r"parameters must be \[B, P\] = \[6, 3\], got \[6, 2\]"),
        "one image": (equimod, (x[:1], y[:1], p[:1]), ValueError, "features must be of at least 2 images"),
        "whole numbers": (equimod, (x, y, p.long()), TypeError, "parameters must be a tensor of floating point"),
        "missing": (augself, (x, y, {"flip": there["flip"]}, back), ValueError, "forward_targets must be with"),
        "kind": (augself, (x, y, {**there, "flip": there["rotation"]}, back), TypeError, r"flip.* must be a"),
        "class": (augself, (x, y, there, {**back, "rotation": torch.full((6,), 4)}), ValueError, r"in 0 .. 3 \(cl"),
        "shape": (augself, (x, y, {**there, "scale": p}, back), ValueError, r"_targets\['scale'\] must be"),
        "empty": (augself, (x[:0], y[:0], there, back), ValueError, "features1 must be of at least one image"),
    }  # fmt: skip


@pytest.mark.parametrize("case", wrong_calls())
def test_wrong_calls(case):
    loss, arguments, kind, message = wrong_calls()[case]
    with pytest.raises(kind, match=message):
        loss(*arguments)


def test_widths_of_the_two_layers_may_differ_in_tokens():
    """Views of two sizes have different numbers of tokens."""
    loss = EquiModLoss(8, 1)
    assert loss(torch.randn(3, 16, 8), torch.randn(3, 12, 8), torch.rand(3, 1)).isfinite()
    assert isinstance(loss.predictor, nn.Linear)
