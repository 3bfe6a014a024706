"""Who learns from what: every variant of the loss, its gradients and its parts, against loops in float64."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from equireg import ClassWiseIRM, Environments, WithIndex
from tests import references
from tests.eqinv.test_class_wise_irm import Given

CLASSES, WIDTH = 3, 5


def batch(samples=9):
    labels = torch.arange(samples) % CLASSES
    return (
        torch.randn(samples, WIDTH).double(),
        labels,
        torch.rand(samples, samples) < 0.5,
        0.5 + torch.rand(samples).double(),
    )


def module_of(similar, weights, **options):
    irm = ClassWiseIRM(WIDTH, CLASSES, projection=nn.Linear(WIDTH, 4, bias=False), **options).double()
    irm.environments = Given(similar, weights)
    return irm


def loop(irm, features, labels, similar, weights):
    """The loss of METHODS: what trains nothing upstream gets detached features."""

    def embedded(x, projected=True):
        masked = irm.mask.weight.sigmoid() * x
        return masked @ irm.projection.weight.T if projected else masked

    z = embedded(features.detach() if irm.detach is True else features)
    by_penalty = features if irm.detach is False else features.detach()
    penalised = embedded(by_penalty, irm.penalty_on == "projection")
    settings = {name: getattr(irm, name) for name in ("temperature", "weight", "penalty", "denominator")}
    settings |= {"contrast": irm.contrast, "risk_weight": irm.risk_weight, "penalised": penalised}
    settings["weights"] = weights if irm.sample_weights else None
    return references.class_wise_irm(z, labels, similar, **settings)


VARIANTS = [
    {"detach": detach, "contrast": contrast, "penalty_on": penalty_on}
    for detach in ("penalty", True, False)
    for contrast in ("environments", "batch")
    for penalty_on in ("projection", "features")
]
VARIANTS += [
    {"penalty": "irmv1", "detach": "penalty"},
    {"denominator": "all", "risk_weight": 0.3, "temperature": 0.5},
    {"sample_weights": True},
    {"sample_weights": True, "contrast": "batch", "penalty": "irmv1", "penalty_on": "features", "denominator": "all"},
    {"weight": 0.0, "sample_weights": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_and_gradients_into_backbone_mask_and_projection(options):
    features, labels, similar, weights = batch()
    irm = module_of(similar, weights, **{"weight": 3.0, **options})
    found = []
    for compute in (lambda x: irm(x, labels, torch.arange(9)), lambda x: loop(irm, x, labels, similar, weights)):
        x = features.clone().requires_grad_()
        loss = compute(x)
        trained = [x, irm.mask.weight, irm.projection.weight]
        found.append([loss, *torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    assert bool(found[0][1].any()) == (irm.detach is not True)
    assert found[0][2].any()


def test_released_equals_the_authors_objective():
    """Cross entropy, SupCon on the whole batch at 0.1 / 0.07, the variance of the risks of the masked features."""
    features, labels, similar, _ = batch()
    irm = ClassWiseIRM.released(WIDTH, CLASSES, weight=7.0).double()
    irm.projection = nn.Linear(WIDTH, 4, bias=False).double()
    irm.environments = Given(similar, None)
    head = nn.Linear(WIDTH, CLASSES).double()
    x = features.clone().requires_grad_()
    loss = F.cross_entropy(head(irm.mask(x)), labels) + irm(x, labels, torch.arange(9))

    y = features.clone().requires_grad_()
    masked = irm.mask.weight.sigmoid() * y
    f = 10 * masked / masked.norm(dim=1, keepdim=True)
    logits = f @ head.weight.T + head.bias
    cross_entropy = -sum(logits[i].log_softmax(0)[labels[i]] for i in range(9)) / 9
    contrast = references.sup_con(f @ irm.projection.weight.T, labels, 0.1) * 0.1 / 0.07
    frozen = irm.mask.weight.sigmoid() * features
    risks = [[references.class_risk(frozen, labels, similar, k, e, 0.1, "all") for e in (0, 1)] for k in range(CLASSES)]
    expected = cross_entropy + contrast + 7 * sum((a - b) ** 2 / 2 for a, b in risks) / CLASSES

    torch.testing.assert_close(loss, expected)
    trained = (irm.mask.weight, irm.projection.weight, head.weight)
    mine = torch.autograd.grad(loss, (x, *trained))
    theirs = torch.autograd.grad(expected, (y, *trained))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"detach": False}, {"penalty_on": "features"}, {"detach": True}], ids=str)
def test_running_statistics_count_a_batch_once(options):
    features, labels, similar, weights = batch()
    irm = ClassWiseIRM(WIDTH, CLASSES, **options)
    irm.environments = Given(similar, weights)
    expected = copy.deepcopy(irm.projection)
    expected(irm.mask(features.float()))
    irm(features.float(), labels, torch.arange(9)).backward()
    for mine, theirs in zip(irm.projection.buffers(), expected.buffers()):
        torch.testing.assert_close(mine, theirs)


class MaskedHead:
    def __init__(self, irm):
        self.irm = irm

    def mask(self, module, inputs):
        return self.irm.mask(inputs[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "weight norm", "older weight norm", "hook", "mlp", "scale"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_folding_the_mask_into_the_head(kind, bias):
    irm = ClassWiseIRM(WIDTH, CLASSES)
    head = nn.Linear(WIDTH, 4, bias=bias)
    if kind == "weight norm":
        head = torch.nn.utils.parametrizations.weight_norm(head)
    if kind == "older weight norm":
        head = torch.nn.utils.weight_norm(head)
        head(torch.randn(6, WIDTH)).sum().backward()  # its weight is made by a hook, in the next call
        head.load_state_dict(torch.nn.utils.weight_norm(nn.Linear(WIDTH, 4, bias=bias)).state_dict())
    if kind == "hook":
        head.register_forward_hook(lambda module, inputs, output: 3 * output)
    if kind == "mlp":
        head = nn.Sequential(nn.Linear(WIDTH, 7, bias=bias), nn.ReLU(), nn.Linear(7, 4))
    if kind == "scale":
        irm.mask.scale = 10.0
    features = torch.randn(6, WIDTH)
    state = torch.get_rng_state()
    folded = irm.fold_into(head)
    assert torch.equal(torch.get_rng_state(), state)  # to validate after each epoch does not change the training
    assert (type(folded) is nn.Linear) == (kind in {"linear", "weight norm"})
    torch.testing.assert_close(folded(features), head(irm.mask(features)))
    if type(folded) is nn.Linear:
        assert set(folded.state_dict()) == {"weight", *["bias"] * bias}  # loads into a plain model
    if kind == "linear":  # and with this mask before it already, as EqInvTask puts it there
        head.register_forward_pre_hook(MaskedHead(irm).mask)
        assert torch.equal(irm.fold_into(head).weight, folded.weight)
        head.register_forward_hook(lambda module, inputs, output: 3 * output)  # and with another one
        torch.testing.assert_close(irm.fold_into(head)(features), 3 * folded(features))
    before = folded(features)
    nn.init.ones_(irm.mask.weight)
    torch.testing.assert_close(folded(features), before)  # parameters of its own
    with pytest.raises(ValueError, match="head must be of 5 features, got 6"):
        ClassWiseIRM(WIDTH, 2).fold_into(nn.Linear(6, 2))
    with pytest.raises(TypeError, match="head must be an nn.Module, got function"):
        irm.fold_into(lambda x: x)


def test_environments_of_full_size_from_the_start():
    features, labels = torch.randn(30, WIDTH), torch.arange(30) % CLASSES
    irm = ClassWiseIRM(WIDTH, CLASSES, num_samples=40)
    shapes = {name: value.shape for name, value in irm.state_dict().items()}
    assert shapes["environments.labels"] == (40,)
    average = torch.optim.swa_utils.AveragedModel(irm, use_buffers=True)  # made before fitting
    with pytest.raises(ValueError, match="indices must be None before fit_environments"):
        irm(features, labels, torch.arange(30))
    buffer = irm.environments.labels
    irm.fit_environments(features, labels)
    assert irm.environments.labels is buffer
    assert {name: value.shape for name, value in irm.state_dict().items()} == shapes
    average.update_parameters(irm)
    irm.fit_environments(features + torch.randn(30, WIDTH), labels)  # anew, as before a later epoch
    assert irm.environments.labels is buffer
    irm.fit_environments(features, labels)
    other = ClassWiseIRM(WIDTH, CLASSES, num_samples=40)
    other.load_state_dict(average.module.state_dict())
    assert other.environments.fitted
    assert torch.equal(other.environments.weights(torch.arange(30)), irm.environments.weights(torch.arange(30)))
    unfitted = ClassWiseIRM(WIDTH, CLASSES, num_samples=40)
    unfitted.load_state_dict(ClassWiseIRM(WIDTH, CLASSES, num_samples=40).state_dict())
    assert not unfitted.environments.fitted


def test_weight_can_be_set_later_and_is_checked():
    features, labels, similar, weights = batch()
    irm = module_of(similar, weights, weight=0.0)
    before = irm(features, labels, torch.arange(9))
    irm.weight = 5.0
    parts = irm.parts(features, labels, torch.arange(9))
    torch.testing.assert_close(parts.loss, before + 5 * parts.penalty.mean())
    with pytest.raises(ValueError, match="weight must be finite and at least 0, got -1"):
        irm.weight = -1.0
    assert irm.weight == 5.0


def backbone():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = backbone()

    def features(self, images):
        return self.net(images)


MODEL = Wrapped()  # as in a script: a function reaches it by its name


def run_by_name(images):
    return MODEL.net(images)


class Runner:
    def __init__(self, model):
        self.model = model

    def __call__(self, images):
        return self.model.net(images)


ENCODERS = {
    "module": lambda model: model.net,
    "forward": lambda model: model.net.forward,
    "method": lambda model: model.features,
    "lambda": lambda model: lambda images: model.net(images) * 1.0,
    "partial": lambda model: functools.partial(lambda net, images: net(images), model.net),
    "global": lambda model: lambda images: MODEL.net(images),
    "decorated": lambda model: torch.no_grad()(lambda images: model.net(images)),
    "helper": lambda model: lambda images: run_by_name(images),
    "default": lambda model: lambda images, net=model.net: net(images),
    "container": lambda model: lambda images, nets=(model.net,): nets[0](images),
    "object": lambda model: Runner(model),
    "nested": lambda model: lambda images: (lambda x: model.net(x))(images),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_of_any_form_runs_in_eval_mode_and_is_left_as_it_was(kind):
    torch.manual_seed(0)
    MODEL.load_state_dict(Wrapped().state_dict())
    MODEL.train()
    MODEL.net[3].eval()  # a module that was in eval mode stays there
    modes = [module.training for module in MODEL.modules()]
    images, labels = torch.randn(24, 3, 2, 2), torch.arange(24) % CLASSES
    loader = DataLoader(WithIndex(TensorDataset(images, labels)), batch_size=5, shuffle=True)
    expected = copy.deepcopy(MODEL).eval()
    state = copy.deepcopy(MODEL.state_dict())
    irm = ClassWiseIRM(WIDTH, CLASSES).fit_environments(loader, encoder=ENCODERS[kind](MODEL), progress=False)
    reference = Environments.split(expected.net(images), labels, CLASSES)
    assert torch.equal(irm.environments.bits, reference.bits)
    assert irm.environments._ranked_by is None  # a whole dataset's features are not kept alive
    assert [module.training for module in MODEL.modules()] == modes
    assert all(p.grad is None for p in MODEL.parameters())
    assert all(torch.equal(MODEL.state_dict()[name], value) for name, value in state.items())


def test_a_loader_that_leaves_samples_out_is_told_so_at_once():
    data = WithIndex(TensorDataset(torch.randn(24, 12), torch.arange(24) % CLASSES))
    loader = DataLoader(data, batch_size=7, drop_last=True)
    irm = ClassWiseIRM(WIDTH, CLASSES)
    with pytest.raises(ValueError, match=r"loader must be one that gives each of the 24 samples .* got 21 of them"):
        irm.fit_environments(loader, encoder=backbone(), progress=False)
    irm.fit_environments(loader, encoder=backbone(), num_samples=24, progress=False)
    assert irm.environments.num_samples == 24
