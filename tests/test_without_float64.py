"""A device without float64, such as Apple's: nothing that lies there is taken to it, before it is on the CPU."""

import pytest
import torch
from torch.utils._pytree import tree_map

import equireg
from equireg.similarity import dense
from tests.gpu.inside import Inside
from tests.records.running import every_record, step


class Here(torch.Tensor):
    """A tensor on such a device, played by the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, args, kwargs or {})
        return tree_map(checked, result)


def checked(x):
    assert not isinstance(x, Here) or x.dtype != torch.float64
    return x


def there(x):
    return x.detach().as_subclass(Here).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


@pytest.fixture(autouse=True)
def the_cpu_has_none(monkeypatch):
    monkeypatch.setattr(dense, "WITHOUT_FLOAT64", {"cpu"})


@every_record
def test_losses(record):
    record.build(torch.float32)(*tree_map(there, record.sample(torch.float32)))


class NoneInside(Inside):
    """Looks into the package's own operators too, and at the backward pass. Single numbers may be on the CPU."""

    def seen(self, function, given, made):
        assert not any(x.dtype == torch.float64 and x.dim() for x in made), function


@every_record
def test_operators_and_backward_passes(record):
    loss, args = record.build(torch.float32), record.sample(torch.float32)
    with NoneInside():
        step(loss, args)


def test_partitions_and_margins():
    equireg.PartitionUpdater(24, max_passes=2).update(there(torch.randn(24, 4)), there(torch.randn(24, 4)))
    overhaul = equireg.OverhaulDistillation([3], [4])
    overhaul.fit_margins([[there(torch.randn(2, 4, 5, 5))]])
    overhaul.use_batch_norm([torch.nn.BatchNorm2d(4)])


def test_probes_and_ensembles():
    x, y = there(torch.randn(200, 6)), there(torch.arange(200) % 4)
    for probe in (equireg.knn_accuracy, equireg.linear_probe):
        probe(x, y, x, y)
    equireg.linear_probe(x, y, x, y, hidden_dim=8, epochs=1, progress=False)
    equireg.within_class_variance(x, y)
    equireg.transformation_r2(x, x, there(torch.randn(200, 2)), epochs=1, progress=False)
    equireg.fit_ensemble_weights([x.softmax(1), x.square().softmax(1)], y)
    images = there(torch.rand(40, 3, 24, 24))
    equireg.homography_probe(lambda part: part.mean((2, 3)), [images], 16, epochs=1, progress=False)
