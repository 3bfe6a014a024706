"""The baselines where their records do not reach: tokens, what the parts tell, what their options refuse."""

import pytest
import torch
import torch.nn.functional as F

from equireg import AugSelfLoss, CrossAttentionReconstruction, EquiModLoss, ESSLLoss, SIELoss, STLLoss

TARGETS = {"scale": ("regression", 2), "flip": ("binary", 1), "rotation": ("classification", 4)}


def differences(count):
    scale, flip = torch.rand(count, 2) * 2 - 1, torch.rand(count) < 0.5
    return {"scale": scale, "flip": flip, "rotation": torch.arange(count) % 4}


@pytest.mark.parametrize("shape", [(6, 8), (6, 5, 8)])
def test_equimod_tells_how_well_it_predicts(shape):
    loss = EquiModLoss(8, 3, projection_dim=7, parameter_dim=4, temperature=0.3)
    features, transformed, parameters = torch.randn(shape), torch.randn(shape), torch.rand(6, 3)
    before, after = (x.mean(1) if x.dim() == 3 else x for x in (features, transformed))
    given = torch.cat([loss.projection(before), loss.parameters_projection(parameters)], 1)
    alignment = F.cosine_similarity(loss.predictor(given), loss.projection(after)).mean().detach()
    torch.testing.assert_close(loss.parts(features, transformed, parameters).alignment, alignment)


def test_tokens_are_averaged():
    """Views of two sizes have different numbers of them."""
    equimod, augself = EquiModLoss(8, 1), AugSelfLoss(8, TARGETS, hidden_dim=16)
    tokens, fewer, parameters = torch.randn(3, 16, 8), torch.randn(3, 12, 8), torch.rand(3, 1)
    pooled = tokens.mean(1), fewer.mean(1)
    torch.testing.assert_close(equimod(tokens, fewer, parameters), equimod(*pooled, parameters))
    there, back = differences(3), differences(3)
    torch.testing.assert_close(augself(tokens, fewer, there, back), augself(*pooled, there, back))
    essl, stl, sie, turns = ESSLLoss(8, hidden_dim=16), STLLoss(8), SIELoss(8, 1), torch.arange(3)
    torch.testing.assert_close(essl(tokens, turns), essl(pooled[0], turns))
    torch.testing.assert_close(stl(tokens, fewer, fewer, tokens), stl(*pooled, *pooled[::-1]))
    torch.testing.assert_close(sie(tokens, fewer, parameters), sie(*pooled, parameters))


def test_augself_takes_targets_of_any_name():
    targets = {name: torch.zeros(6, 2) for name in ("color jitter", "B")}
    loss = AugSelfLoss(8, dict.fromkeys(targets, ("regression", 2)))
    assert loss(*torch.randn(2, 6, 8), targets, targets).isfinite()


def test_essl_tells_how_often_the_turn_is_told():
    loss = ESSLLoss(8, hidden_dim=16)
    features, turns = torch.randn(40, 8), torch.randint(4, (40,))
    told = sum(int(max(range(4), key=row.__getitem__)) == k for row, k in zip(loss.predictor(features).tolist(), turns))
    assert float(loss.parts(features, turns).accuracy) == pytest.approx(told / 40)


def test_sie_counts_each_term_by_its_weight():
    (features, transformed), parameters = torch.randn(2, 6, 8), torch.rand(6, 2)
    names = ("invariance", "equivariance", "variance", "covariance")
    for name in names:
        loss = SIELoss(8, 2, **{f"{other}_weight": 2.0 * (other == name) for other in names})
        parts = loss.parts(features, transformed, parameters)
        expected = getattr(parts, name) + (parts.predictor_variance if name == "variance" else 0)
        torch.testing.assert_close(parts.loss, 2 * expected)


def equimod(features=6, transformed=6, parameters=3):
    EquiModLoss(8, 3)(torch.randn(features, 4, 8), torch.randn(transformed, 4, 8), torch.rand(features, parameters))


def augself(**changes):
    AugSelfLoss(8, TARGETS, hidden_dim=16)(*torch.randn(2, 6, 4, 8), differences(6), {**differences(6), **changes})


def rebuild(tokens2=(6, 9, 8), images1=(6, 3, 4, 6)):
    head = CrossAttentionReconstruction(8, image_size=(4, 6), patch_size=2)
    head(torch.randn(6, 6, 8), torch.randn(tokens2), torch.rand(images1))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: EquiModLoss(0, 3), ValueError, "EquiModLoss: dim must be at least 1"),
        (lambda: EquiModLoss(8, 3, temperature=0), ValueError, "EquiModLoss: temperature must be"),
        (lambda: equimod(transformed=5), ValueError, r"transformed must be .*got \[5, 4, 8\]"),
        (lambda: equimod(parameters=2), ValueError, r"parameters must be \[B, P\] = \[6, 3\], got \[6, 2\]"),
        (lambda: equimod(features=1, transformed=1), ValueError, "features must be of at least 2 images"),
        (lambda: AugSelfLoss(8, {}), ValueError, "AugSelfLoss: targets must be at least one"),
        (lambda: AugSelfLoss(8, {"x": ("ordinal", 3)}), ValueError, r"targets\['x'\] must be one of 'regression'"),
        (lambda: AugSelfLoss(8, {"x": "binary"}), ValueError, r"targets\['x'\] must be \(kind, width\), got binary"),
        (
            lambda: AugSelfLoss(8, {"a.b": ("binary", 1)}),
            ValueError,
            "targets must be named by strings that can name modules, .* got 'a",
        ),
        (lambda: AugSelfLoss(8, {"type": ("binary", 1)}), ValueError, "targets must be named by .* got 'type'"),
        (lambda: AugSelfLoss(8, {"training": ("binary", 1)}), ValueError, "targets must be named by .* got 'training'"),
        (
            lambda: AugSelfLoss(8, TARGETS)(*torch.randn(2, 6, 8), None, differences(6)),
            TypeError,
            "forward_targets must be a dictionary of tensors, got NoneType",
        ),
        (lambda: AugSelfLoss(8, {"x": ("binary", 2)}), ValueError, r"targets\['x'\] must be \('binary', 1\)"),
        (lambda: augself(flip=torch.arange(6) % 4), TypeError, r"flip.* must be a"),
        (lambda: augself(rotation=torch.full((6,), 4)), ValueError, r"in 0 .. 3 \(cl"),
        (lambda: augself(scale=torch.rand(6, 3)), ValueError, r"_targets\['scale'\] must be"),
        (lambda: augself(scale=torch.full((6, 2), -90.0)), ValueError, r"_targets\['scale'\] must be in -1 .. 1.*90"),
        (lambda: ESSLLoss(8)(torch.randn(6, 8), torch.rand(6)), TypeError, "quarter_turns must be a tensor of whole"),
        (lambda: STLLoss(8, transformation_dim=0), ValueError, "transformation_dim must be at least 1"),
        (lambda: STLLoss(8)(*torch.randn(4, 6, 9)), ValueError, r"features must be \[B, D\] = \[B, 8\], got \[6, 9\]"),
        (lambda: SIELoss(1, 2), ValueError, "SIELoss: dim must be at least 2"),
        (lambda: rebuild(tokens2=(6, 0, 8)), ValueError, "tokens2 must be of at least one token"),
        (lambda: rebuild(tokens2=(5, 9, 8)), ValueError, r"tokens2 must be .*got \[5, 9, 8\]"),
        (lambda: rebuild(images1=(6, 3, 4, 4)), ValueError, r"images1 must be .*got \[6, 3, 4, 4\]"),
    ],
)
def test_refuses(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
