import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from equireg import ClassWiseIRM, Environments
from equireg._checks import Arguments
from equireg.eqinv import adjusted_similarity as module
from equireg.eqinv.context_weights import Shape, auto_sharpness, chance_shape, shape_of, standardized
from equireg.eqinv.whitening import whitened
from tests import references


def biased(seed=0, per_class=200, classes=4, conflicting=0.05, width=16):
    """Features = class + context + noise; a share of each class is in the context of another. Contexts come back."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    contexts = labels.clone()
    strays = torch.rand(len(labels), generator=generator) < conflicting
    contexts[strays] = (labels[strays] + torch.randint(1, classes, (int(strays.sum()),), generator=generator)) % classes
    directions = torch.randn(2, classes, width, generator=generator)
    noise = torch.randn(len(labels), width, generator=generator)
    return directions[0][labels] + 2 * directions[1][contexts] + noise, labels, contexts


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("score", ["similarity", "margin"])
@pytest.mark.parametrize("adjust", [True, "median", False])
@pytest.mark.parametrize(("sharpness", "cap"), [(1.0, 2.5), (0.4, 1.0), (0.0, 2.5)])
def test_weights_and_contexts_equal_the_loop(sharpness, cap, adjust, score, indexed):
    features, labels = torch.randn(40, 6, dtype=torch.float64), torch.randint(4, (40,))
    indices = torch.randperm(60)[:40] if indexed else torch.arange(40)
    where = {"indices": indices, "num_samples": 60} if indexed else {}
    environments = Environments.split(features, labels, 4, adjust=adjust, score=score, **where)
    scores = references.adjusted_similarity(features, labels, 4, adjust)
    own = references.similarity_to_own_class(features, labels) if score == "margin" else None
    expected, contexts = references.context_weights(scores, labels, sharpness, cap, own)
    weights = environments.weights(indices, sharpness=sharpness, cap=cap)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    assert environments.context(indices).tolist() == contexts
    if not indexed:
        assert torch.equal(environments.weights(sharpness=sharpness, cap=cap), weights)
        assert environments.context().tolist() == contexts


def test_mean_of_each_class_is_one_and_blocks_do_not_matter(monkeypatch):
    features, labels, _ = biased()
    whole = Environments.split(features, labels)
    for k in range(4):
        assert whole.weights()[labels == k].mean().item() == pytest.approx(1, abs=1e-6)
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 800)  # a class at a time
    blocks = Environments.split(features, labels)
    torch.testing.assert_close(blocks.weights(), whole.weights())
    assert torch.equal(blocks.bits, whole.bits)
    assert torch.equal(blocks.context(), whole.context())


def test_the_samples_of_another_context_weigh_most_and_their_context_is_told():
    features, labels, contexts = biased()
    environments = Environments.split(features, labels)
    strays = contexts != labels
    weights = environments.weights()
    pairs = weights[strays][:, None] - weights[~strays][None]
    assert (pairs > 0).float().mean() > 0.9  # the area under the curve
    told = environments.context()[strays] == contexts[strays]
    assert told.float().mean() > 0.9


def test_a_class_without_samples_is_nobodys_context():
    features, labels, _ = biased()
    environments = Environments.split(-features, labels, 7)  # classes 4 to 6 are empty, and their similarity is 0
    assert environments.context().max() < 4


def test_classes_of_one_sample_or_of_equals_weigh_one():
    features = torch.cat([torch.randn(8, 4), torch.ones(5, 4)])
    labels = torch.tensor([0, *[1] * 7, *[2] * 5])
    weights = Environments.split(features, labels).weights()
    assert weights.isfinite().all()
    torch.testing.assert_close(weights[labels != 1], torch.ones(6))


def test_whitened_axes_have_unit_variance_and_no_correlation():
    features = torch.randn(500, 6) @ torch.randn(6, 6) * 5 + 3
    axes = whitened(Arguments("test"), features, 4)
    torch.testing.assert_close(axes.T @ axes / 499, torch.eye(4), atol=1e-4, rtol=0)
    # They span what the largest singular vectors span.
    _, _, directions = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    projected = (features - features.mean(0)) @ directions[:4].T
    fitted = projected @ torch.linalg.lstsq(projected, axes).solution
    torch.testing.assert_close(fitted, axes, atol=1e-3, rtol=0)
    environments = Environments.split(features, torch.arange(500) % 3, whiten=4)
    fitted = ClassWiseIRM(features.shape[1], 3).fit_environments(features, torch.arange(500) % 3, whiten=4).environments
    assert torch.equal(fitted.scores, environments.scores)
    assert not torch.equal(fitted.scores, Environments.split(features, torch.arange(500) % 3).scores)
    expected = Environments.split(axes, torch.arange(500) % 3)
    assert torch.equal(environments.bits, expected.bits)
    assert environments.members(1)[0].tolist() == expected.members(1)[0].tolist()


def test_shape_is_that_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(20000, generator=generator), torch.randn(20000, generator=generator)
    exponential = -torch.rand(20000, generator=generator).log()
    labels = torch.arange(3).repeat_interleave(20000)
    shape = shape_of(standardized(7 * torch.cat([uniform, normal, exponential]), labels, 3), labels, 3)
    torch.testing.assert_close(shape.excess_kurtosis, torch.tensor([-1.2, 0.0, 6.0]).double(), atol=0.7, rtol=0)
    torch.testing.assert_close(shape.skewness, torch.tensor([0.0, 0.0, 2.0]).double(), atol=0.2, rtol=0)
    few = shape_of(torch.randn(3).double(), torch.zeros(3).long(), 2)
    assert few.excess_kurtosis.tolist() == [0, 0]


@pytest.mark.parametrize("others", [1, 2, 10, 100])
def test_chance_is_that_of_drawn_numbers(others):
    largest = torch.randn(200_000, others, generator=torch.Generator().manual_seed(0)).amax(1)
    z = standardized(largest, torch.zeros(len(largest)).long(), 1)
    drawn, chance = shape_of(z, torch.zeros(len(z)).long(), 1), chance_shape(others)
    assert chance.excess_kurtosis == pytest.approx(float(drawn.excess_kurtosis[0]), abs=0.06)
    assert chance.skewness == pytest.approx(float(drawn.skewness[0]), abs=0.02)


@pytest.mark.parametrize(
    ("minority", "lowest", "highest"), [(0.02, 1.5, 2), (0.1, 1.5, 1.5), (0.25, 0.7, 1), (0.5, 0, 0)]
)
def test_auto_is_sharp_for_a_few_and_gentle_for_a_minority(minority, lowest, highest):
    """Two normal humps six deviations apart, in classes of 400; of halves no shape tells which is the minority."""
    labels = torch.arange(3).repeat_interleave(400)
    far = (torch.arange(1200) % 400) < 400 * minority
    values = torch.randn(1200, generator=torch.Generator().manual_seed(0)) + 6 * far
    shape = shape_of(standardized(values, labels, 3), labels, 3)
    assert lowest <= auto_sharpness(shape, labels.bincount()) <= highest


@pytest.mark.parametrize(
    ("kurtosis", "skewness", "expected"),
    [(-1, 0, 0), (0.5, 0, 0.5), (1.5, 0, 1.5), (7, 3, 1.5), (10, 3, 1.75), (50, 7, 2), (0.5, 0.5, 0.5), (0.5, 2, 1)],
)
def test_auto_by_the_shape_beyond_chance(kurtosis, skewness, expected):
    """In classes of a million, where chance has no error worth the name."""
    chance, sizes = chance_shape(4), torch.full((5,), 10**6)
    shape = Shape(*(torch.full((5,), value) for value in (kurtosis + chance[0], skewness + chance[1])))
    assert auto_sharpness(shape, sizes) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("classes", "width"), [(4, 16), (10, 64), (50, 64)])
def test_auto_is_next_to_nothing_without_a_bias(classes, width):
    features = torch.randn(60 * classes, width, generator=torch.Generator().manual_seed(1))
    report = Environments.split(features, torch.arange(60 * classes) % classes).report()
    assert report.sharpness < 0.1
    assert report.looks_biased.float().mean() < 0.2


def test_report_tells_a_biased_class():
    features, labels, _ = biased(conflicting=0.0)
    strays = torch.arange(8)  # of class 0, into the context of class 2
    features[strays] += features[labels == 2].mean(0) - features[labels == 0].mean(0)
    report = Environments.split(features, labels).report()
    assert report.size.tolist() == [200] * 4
    assert int(report.excess_kurtosis.argmax()) == 0
    assert report.looks_biased[0]
    assert int(report.in_context[0].argmax()) == 2
    first = str(report).splitlines()[2]
    assert first.split()[:2] == ["0", "200"]
    assert "2: " in first
    plain = Environments.split(torch.randn(800, 16), labels).report()
    assert plain.sharpness < 0.2 < report.sharpness


def test_a_large_minority_is_skewed_and_not_pointed():
    """A fifth of a class far in another's context: no long tail, but far from even."""
    features, labels, _ = biased(per_class=600, conflicting=0.0)
    fifth = torch.arange(130)  # of class 0
    features[fifth] += 4 * (features[labels == 2].mean(0) - features[labels == 0].mean(0))
    report = Environments.split(features, labels).report()
    chance = chance_shape(3)
    assert report.excess_kurtosis[0] < chance.excess_kurtosis + 1
    assert report.skewness[0] > chance.skewness + 0.7
    assert report.looks_biased[0]


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the examples extra")
    from equireg import weight_sheet

    features, labels, _ = biased(per_class=12)
    environments = Environments.split(features, labels)
    environments.report().picture(class_names=list("abcd")).savefig(tmp_path / "report.png")
    with pytest.raises(ValueError, match=r"picture: class_names must be of 4 classes, got \['a'\]"):
        environments.report().picture(class_names=["a"])
    images = TensorDataset(torch.rand(48, 3, 8, 8), labels)
    sheet = weight_sheet(environments, images, classes=[2, 0], count=3)
    shown = [axes for axes in sheet.axes if axes.images]
    assert len(shown) == 2 * 6
    weights = environments.weights()[24:36]
    ranked = (24 + weights.argsort(descending=True)).tolist()
    for axes, index in zip(shown[:6], ranked[:3] + ranked[-3:]):  # the largest weights, and the smallest
        assert (axes.images[0].get_array() == images[index][0].permute(1, 2, 0).numpy()).all()
        assert axes.get_title().split()[0] == f"{float(environments.weights()[index]):.2g}"
    softer = weight_sheet(environments, images, classes=[2], count=1, sharpness=0.3, cap=1.2)
    largest = float(environments.weights(sharpness=0.3, cap=1.2)[24:36].max())
    assert softer.axes[0].get_title().split()[0] == f"{largest:.2g}"
    sheet.savefig(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"


def test_auto_is_the_reports_sharpness():
    features, labels, _ = biased()
    environments = Environments.split(features, labels)
    expected = environments.weights(sharpness=environments.report().sharpness)
    assert torch.equal(environments.weights(sharpness="auto"), expected)
    even = Environments.split(torch.randn(800, 16), labels)
    assert (even.weights(sharpness="auto") - 1).abs().max() < 0.5


def test_sampler_draws_as_often_as_the_weights_say():
    features, labels, _ = biased(per_class=20)
    environments = Environments.split(features[:60], labels[:60], 4, num_samples=80)
    sampler = environments.sampler(60_000, generator=torch.Generator().manual_seed(0))
    drawn = torch.tensor(list(sampler)).bincount(minlength=80)
    assert (drawn[60:] == 0).all()
    torch.testing.assert_close(drawn[:60] / 1000, environments.weights(torch.arange(60)), atol=0.2, rtol=0.1)
    loader = DataLoader(TensorDataset(features, labels), batch_size=10, sampler=environments.sampler())
    assert sum(len(batch[1]) for batch in loader) == 60
    how = {"sharpness": 0.3, "cap": 1.2}
    softer = environments.sampler(60_000, generator=torch.Generator().manual_seed(0), **how)
    drawn, expected = (
        torch.tensor(list(softer)).bincount(minlength=80)[:60],
        environments.weights(torch.arange(60), **how),
    )
    torch.testing.assert_close(drawn / 1000, expected, atol=0.12, rtol=0.05)
    assert (environments.weights(torch.arange(60)) - expected).abs().max() > 0.5  # so that it can be told


def test_state_of_before_the_weights_still_loads():
    features, labels, _ = biased(per_class=10)
    environments = Environments.split(features, labels)
    old = {name: value for name, value in environments.state_dict().items() if name in {"bits", "labels"}}
    everything = torch.arange(4), torch.arange(40)
    for other in (Environments(), Environments(4, 40)):
        other.load_state_dict(old)
        assert torch.equal(other.similar(*everything), environments.similar(*everything))
        with pytest.raises(ValueError, match="in a state that has contexts, got no contexts"):
            other.weights()
    new = Environments()
    new.load_state_dict(environments.state_dict())
    assert torch.equal(new.weights(), environments.weights())
    assert torch.equal(copy.deepcopy(environments).weights(), environments.weights())


def test_neither_half_precision_nor_a_moving_average_changes_them():
    features, labels, _ = biased(per_class=10)
    environments = Environments.split(features, labels)
    expected = environments.weights().clone()
    assert torch.equal(copy.deepcopy(environments).half().weights(), expected)
    average = Environments(4, 40)  # made before fitting
    for mine, theirs in zip(average.state_dict().values(), environments.state_dict().values()):
        mine.copy_(theirs.lerp(mine, 0.9) if theirs.is_floating_point() else theirs)  # what timm's EMA does
    average.load_state_dict(average.state_dict())
    assert torch.equal(average.weights(), expected)


def test_loading_a_part_of_a_model_leaves_the_environments_alone():
    features, labels, _ = biased(per_class=10)
    irm = ClassWiseIRM(16, 4).fit_environments(features, labels)
    irm.load_state_dict({"mask.weight": torch.zeros(16)}, strict=False)
    assert irm.environments.fitted
    assert irm.environments.members(0)[0].tolist() == Environments.split(features, labels).members(0)[0].tolist()


def test_weights_are_the_users_own_and_finite():
    features, labels, _ = biased(per_class=10)
    environments = Environments.split(features, labels)
    before = environments.weights(torch.arange(5))
    environments.weights().mul_(2)
    assert torch.equal(environments.weights(torch.arange(5)), before)
    sharp = environments.weights(sharpness=1e4)  # NaN would have another mean
    for k in range(4):
        assert sharp[labels == k].mean().item() == pytest.approx(1)


def test_what_is_refused():
    features, labels, _ = biased(per_class=10)
    environments = Environments.split(features, labels, num_samples=50)
    cases = {
        r"sharpness must be finite and at least 0, got -1": {"sharpness": -1.0},
        r"sharpness must be 'auto' or a number, got 'often'": {"sharpness": "often"},
        r"cap must be finite and above 0, got 0": {"cap": 0},
        r"indices must be \[B\], got \[1, 1\]": {"indices": torch.tensor([[0]])},
        r"labels of indices must be .* got -1 at position 0": {"indices": torch.tensor([45])},
        r"indices must be given where samples took no part": {},
    }
    for message, options in cases.items():
        with pytest.raises((ValueError, TypeError), match=message):
            environments.weights(**options)
    with pytest.raises(ValueError, match=r"environments must be of two classes or more"):
        Environments.split(features[:10], labels[:10]).weights()
    with pytest.raises(ValueError, match="the environments must be fitted, got none"):
        Environments(4, 50).context()
    with pytest.raises(ValueError, match="whiten must be at most 16, the rank of the features, got 17"):
        Environments.split(features, labels, whiten=17)


@pytest.mark.parametrize("renew", ["load", "copy", "pickle"])
def test_a_compiled_step_forms_no_weights_after_resuming(renew, monkeypatch):
    features, labels, _ = biased()
    saved = ClassWiseIRM(features.shape[1], 4, sample_weights=True).fit_environments(features, labels)
    if renew == "load":
        irm = ClassWiseIRM(features.shape[1], 4, sample_weights=True)
        irm.load_state_dict(saved.state_dict())
    else:
        irm = copy.deepcopy(saved) if renew == "copy" else pickle.loads(pickle.dumps(saved))  # noqa: S301
    monkeypatch.setattr(Environments, "_all_weights", None)  # would raise
    batch = torch.arange(20)
    torch._dynamo.reset()
    compiled = torch.compile(irm, backend="eager", fullgraph=True)
    assert compiled(features[batch], labels[batch], batch).isfinite()


def test_weights_move_with_the_environments():
    features, labels, _ = biased()
    environments = Environments.split(features, labels)
    indices = torch.arange(5)
    environments.weights(indices)
    assert environments.half().weights(indices).dtype == torch.float32
    assert environments.to("meta").weights(indices.to("meta")).device.type == "meta"
