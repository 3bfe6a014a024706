"""The callbacks under Lightning's own Trainer."""

import copy
import inspect
import os
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from equireg import ClassWiseIRM, Environments, IPIRMLoss, PartitionUpdater, WithIndex, adjusted_similarity
from tests.processes import in_processes

lightning = pytest.importorskip("pytorch_lightning", reason="needs the dev extra")
from pytorch_lightning.callbacks import ModelCheckpoint  # noqa: E402
from pytorch_lightning.strategies import SingleDeviceStrategy  # noqa: E402

from equireg.integrations import lightning as callbacks_module  # noqa: E402
from equireg.integrations.lightning import FindPartitions, FitEnvironments, WarmUpWeight  # noqa: E402

# Lightning warns of few workers, short epochs, and a checkpoint folder that is not empty.
pytestmark = pytest.mark.filterwarnings("default")
N, C, D = 48, 3, 16


class Counted(DataLoader):
    """Counts how often it is gone through."""

    rounds = 0

    def __iter__(self):
        self.rounds += 1
        return super().__iter__()


def labelled():
    generator = torch.Generator().manual_seed(1)
    return WithIndex(TensorDataset(torch.rand(N, 8, generator=generator), torch.arange(N) % C))


def backbone():
    return nn.Sequential(nn.Linear(8, D), nn.BatchNorm1d(D), nn.ReLU())


class Classifier(lightning.LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.backbone, self.head, self.irm = backbone(), nn.Linear(D, C), ClassWiseIRM(D, C, **options)
        self.weights, self.at_start = [], None

    def on_train_start(self):
        self.at_start = copy.deepcopy(self.backbone.state_dict())

    def training_step(self, batch, _):
        x, y, idx = batch
        f = self.backbone(x)
        self.weights.append(self.irm.weight)
        parts = self.irm.parts(f, y, idx)
        self.log_dict({"irm": parts.loss, "irm_penalty": parts.penalty.mean()})
        return F.cross_entropy(self.head(self.irm.mask(f)), y) + parts.loss

    def validation_step(self, batch, _):
        self.log("accuracy", (self.head(self.irm.mask(self.backbone(batch[0]))).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(callbacks, folder, epochs=1, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    keep = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"accelerator": "cpu", "enable_checkpointing": keep, **quiet, **options}
    return lightning.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=callbacks, **options)


def fit(model, callbacks, folder, epochs=1, *, ckpt_path=None, **options):
    train, val = (DataLoader(labelled(), batch_size=16) for _ in range(2))
    ran = trainer(callbacks, folder, epochs, **options)
    ran.fit(model, train, val, ckpt_path=ckpt_path, weights_only=False)
    return ran


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name], name


def expected(encoder):
    """Env#1 of each class, [C, N], one sample after the other, from features in eval mode."""
    x, y = labelled().dataset.tensors
    scores = adjusted_similarity(encoder.eval()(x), y, C).double()
    env1 = torch.zeros(C, N, dtype=torch.bool)
    for k in range(C):
        others = [n for n in range(N) if y[n] != k]
        ranked = sorted(others, key=lambda n: (-scores[k, n].item(), n))
        env1[k, ranked[: (len(others) + 1) // 2]] = True
    return env1 | (torch.arange(C)[:, None] == y)


@pytest.mark.parametrize("num_samples", [None, N])
def test_environments_of_the_model_on_its_device_in_eval_mode(num_samples, tmp_path):
    events = []

    class Recorded(SingleDeviceStrategy):
        def model_to_device(self):
            events.append("moved")
            super().model_to_device()

    def encoder(x):
        events.append("encoded")
        return model.backbone(x)

    model = Classifier(num_samples=num_samples)
    before = copy.deepcopy(model.backbone)
    loader = DataLoader(labelled(), batch_size=20)
    strategy = Recorded(device=torch.device("cpu"))
    fit(model, [FitEnvironments(model.irm, loader, encoder=encoder)], tmp_path, strategy=strategy)
    assert events == ["moved", "encoded", "encoded", "encoded"]
    same(model.at_start, before.state_dict())
    assert model.backbone.training
    assert torch.equal(model.irm.environments.similar(torch.arange(C), torch.arange(N)), expected(before))


def test_environments_alone_and_again_at_the_epoch(tmp_path):
    """``Environments`` without the loss, by the margin: at first none, then those of the model at epoch 2, and at 4."""
    states = []

    class Weighted(Classifier):
        def __init__(self):
            super().__init__()
            self.irm, self.environments = None, Environments(C, N)

        def on_train_batch_start(self, _, batch_idx):  # after the callbacks
            if batch_idx == 0:
                states.append((copy.deepcopy(self.backbone), copy.deepcopy(self.environments)))

        def training_step(self, batch, _):
            x, y, idx = batch
            losses = F.cross_entropy(self.head(self.backbone(x)), y, reduction="none")
            return (self.environments.weights(idx) * losses if self.environments.fitted else losses).mean()

        validation_step = None

    model, loader = Weighted(), Counted(labelled(), batch_size=20)
    where = {"encoder": model.backbone, "progress": False}  # a bar goes through the loader twice
    find = FitEnvironments(model.environments, loader, epochs=(2, 4), score="margin", **where)
    fit(model, [find], tmp_path, epochs=6, limit_val_batches=0)
    assert loader.rounds == 2
    assert [there.fitted for _, there in states] == [False, False, True, True, True, True]
    x, y = labelled().dataset.tensors
    for epoch, since in enumerate((None, None, 2, 2, 4, 4)):
        if since is not None:
            features = states[since][0].eval()(x).detach()
            same(states[epoch][1].state_dict(), Environments.split(features, y, score="margin").state_dict())


class Contrastive(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = backbone()
        self.irm = ClassWiseIRM(D, C, weight=4.0)
        self.criterion, self.weights = None, []

    def training_step(self, batch, _):
        x, y, idx = batch
        self.weights.append(self.criterion.weight)
        z1, z2 = self.encoder(x), self.encoder(x.flip(1))
        return self.criterion(z1, z2, idx) + self.irm(z1, y, idx)

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def contrastive():
    """A model, its callbacks, and the loaders of the two searches."""
    torch.manual_seed(3)
    model, updater = Contrastive(), PartitionUpdater(N, max_passes=3, starts=1)
    model.criterion = IPIRMLoss(updater, weight=0.4)
    x, y = labelled().dataset.tensors
    images = Counted(labelled(), batch_size=20)
    views = Counted(WithIndex([((x[n], x[n].flip(0)), int(y[n])) for n in range(N)]), batch_size=20)
    callbacks = [
        FitEnvironments(model.irm, images, encoder=model.encoder, epochs=(0, 3), progress=False),
        FindPartitions(updater, views, encoder=model.encoder, epochs=range(1, 9, 2), progress=False),
        WarmUpWeight(model.criterion, steps=7, start=2),
    ]
    return model, callbacks, (images, views)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The model of a run of five epochs that nothing interrupts."""
    model, callbacks, loaders = contrastive()
    fit(model, callbacks, tmp_path_factory.mktemp("whole"), epochs=5)
    assert [loader.rounds for loader in loaders] == [2, 2]
    assert [len(report.agreement) for report in callbacks[1].updater.reports] == [1, 2]  # before epochs 1 and 3
    assert model.weights == [0.4 * min(1, max(0, t - 1) / 7) for t in range(15)]
    return model


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("at_epoch_end", [True, False], ids=["saved at the end of an epoch", "after validation"])
def test_a_resumed_run_is_the_same_bit_for_bit(epochs, at_epoch_end, whole, tmp_path):
    first, callbacks, before = contrastive()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
    fit(first, [*callbacks, keep], tmp_path, epochs=epochs)
    again, callbacks, after = contrastive()
    fit(again, callbacks, tmp_path, epochs=5, ckpt_path=tmp_path / f"epoch={epochs - 1}.ckpt")
    same(whole.state_dict(), again.state_dict())
    assert [a.rounds + b.rounds for a, b in zip(before, after)] == [2, 2]
    assert whole.weights == first.weights + again.weights


def test_a_run_resumed_at_any_step_searches_once_for_each_epoch(tmp_path):
    first, callbacks, before = contrastive()
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(first, [*callbacks, keep], tmp_path, epochs=4)
    assert [loader.rounds for loader in before] == [2, 2]
    for step, rounds in ((5, [1, 1]), (9, [1, 1]), (11, [0, 0])):  # 9: the last step of an epoch
        again, callbacks, loaders = contrastive()
        fit(again, callbacks, tmp_path, epochs=4, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert [loader.rounds for loader in loaders] == rounds, step


def test_nothing_happens_outside_of_fitting(tmp_path):
    model, loader = Classifier(), Counted(labelled(), batch_size=20)
    find = FitEnvironments(model.irm, loader, encoder=model.backbone, progress=False)
    callbacks = [find, WarmUpWeight(model.irm, steps=9)]
    evaluated = trainer(callbacks, tmp_path)
    batches = DataLoader(labelled(), batch_size=16)
    evaluated.validate(model, batches, verbose=False)
    evaluated.test(model, batches, verbose=False)
    assert loader.rounds == 0
    assert model.irm.environments is None
    assert model.irm.weight == 10
    fit(model, callbacks, tmp_path, num_sanity_val_steps=2)
    assert loader.rounds == 1


def test_parts_are_logged_as_in_a_plain_loop(tmp_path):
    model, loader = Classifier(weight=2.0), DataLoader(labelled(), batch_size=16)
    plain = copy.deepcopy(model)
    ran = fit(model, [FitEnvironments(model.irm, loader, encoder=model.backbone)], tmp_path, limit_train_batches=1)
    plain.irm.fit_environments(loader, encoder=plain.backbone)
    x, y, idx = next(iter(loader))
    parts = plain.irm.parts(plain.backbone(x), y, idx)
    assert ran.callback_metrics["irm"] == parts.loss
    assert ran.callback_metrics["irm_penalty"] == parts.penalty.mean()


class Whole(Classifier):
    """The loss over the whole batch, and nothing that normalises over the part of a process."""

    def __init__(self):
        super().__init__(projection=nn.Linear(D, 4), num_samples=N, weight=2.0, gather_distributed=True)
        self.backbone, self.updater = nn.Sequential(nn.Linear(8, D), nn.ReLU()), PartitionUpdater(N, max_passes=3)


def fit_whole(folder, rank=0, world=1, **options):
    """Three epochs with all callbacks, in order: Lightning's own sampler would shuffle. Arrays outlive a process."""
    lightning.seed_everything(0, verbose=False)
    model, x = Whole(), labelled().dataset.tensors[0]
    views = DataLoader(WithIndex([((x[n], x[n].flip(0)), 0) for n in range(N)]), batch_size=20)
    callbacks = [
        FitEnvironments(model.irm, DataLoader(labelled(), batch_size=20), encoder=model.backbone, progress=False),
        FindPartitions(model.updater, views, encoder=model.backbone, epochs=(1, 2), progress=False),
        WarmUpWeight(model.irm, steps=5),
    ]
    part = DistributedSampler(labelled(), world, rank, shuffle=False)
    ran = trainer(callbacks, folder, epochs=3, use_distributed_sampler=False, devices=world, **options)
    ran.fit(model, DataLoader(labelled(), batch_size=16 // world, sampler=part))
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}, model.weights


def in_a_process(rank, folder):
    """As torchrun starts it: Lightning takes the processes that are there."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    return fit_whole(folder, rank, 2, strategy="ddp")


def test_two_processes_are_one(tmp_path):
    """Each takes every second sample of a batch, and the callbacks find the same in both."""
    one, weights = fit_whole(tmp_path)
    (first, first_weights), (second, second_weights) = in_processes(2, in_a_process, tmp_path, tmp_path)
    assert first_weights == second_weights == weights == [2.0 * min(1, (t + 1) / 5) for t in range(9)]
    assert first.keys() == second.keys() == one.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], name)
        if not name.startswith("updater"):  # a search may put a sample elsewhere where sums are rounded otherwise
            np.testing.assert_allclose(value, one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert first["updater.partitions"].shape == (3, N)


def test_what_is_refused():
    irm, loader = ClassWiseIRM(D, C), DataLoader(labelled())
    with pytest.raises(TypeError, match="environments must be a ClassWiseIRM or Environments, got Linear"):
        FitEnvironments(nn.Linear(2, 2), loader, encoder=nn.Identity())
    with pytest.raises(ValueError, match="FitEnvironments: environments must be of full size"):
        FitEnvironments(Environments(), loader, encoder=nn.Identity())
    with pytest.raises(TypeError, match=r"FitEnvironments: epochs must be several whole numbers, .* got int 5"):
        FitEnvironments(irm, loader, encoder=nn.Identity(), epochs=5)
    with pytest.raises(ValueError, match="FitEnvironments: epochs must be of one epoch at least"):
        FitEnvironments(irm, loader, encoder=nn.Identity(), epochs=())
    with pytest.raises(ValueError, match="FindPartitions: epochs must be at least 0, got -1"):
        FindPartitions(PartitionUpdater(4), loader, encoder=nn.Identity(), epochs=(-1,))
    with pytest.raises(TypeError, match="FindPartitions: updater must be a PartitionUpdater, got ClassWiseIRM"):
        FindPartitions(irm, loader, encoder=nn.Identity(), epochs=(0,))
    with pytest.raises(TypeError, match=r"WarmUpWeight: loss.weight must be a number, got Parameter"):
        WarmUpWeight(nn.Linear(2, 2), steps=4)
    with pytest.raises(ValueError, match="WarmUpWeight: steps must be at least 1, got 0"):
        WarmUpWeight(irm, steps=0)


def test_public_names():
    """They are not in ``equireg`` itself, so what its tests look for is looked for here."""
    inventory = (Path(__file__).parent.parent / "public_names.txt").read_text().split()
    module = callbacks_module.__name__
    names = [name.rpartition(".")[2] for name in inventory if name.startswith(f"{module}.")]
    assert names
    assert set(names) <= set(callbacks_module.__all__)
    for name in callbacks_module.__all__:
        callback = getattr(callbacks_module, name)
        assert ">>>" in callback.__doc__
        for method in vars(callback).values():
            if inspect.isfunction(method):
                typing.get_type_hints(method)
