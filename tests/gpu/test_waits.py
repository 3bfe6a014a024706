"""No public loss waits for the device, so that a step can be captured and the CPU runs ahead of the GPU."""

import pytest
import torch

from equireg.similarity import choice
from tests.gpu.devices import needs_a_gpu
from tests.gpu.waits import BY_DESIGN, forward_on_a_fake_gpu, step_that_may_not_wait
from tests.records import RECORDS
from tests.records.record import outputs
from tests.records.running import every_record

pytestmark = [  # PyTorch's own, of autocast for a device that is not there, and of the search for waits
    pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]
every_way = pytest.mark.parametrize("streamed", [False, True])


def waits(run, record, streamed, monkeypatch):
    """Runs the loss of the record; what it raised, or None."""
    if streamed:
        if not record.streams:
            pytest.skip("it has no other form for larger batches")
        monkeypatch.setattr(choice, "_DENSE_ENTRIES", 0)
    monkeypatch.delenv("EQUIREG_CHECKS", raising=False)
    if run is forward_on_a_fake_gpu:
        monkeypatch.setattr(choice, "TABLE", ())  # or it would ask what the card is called
    loss, args = record.build(torch.float32), record.sample(torch.float32)
    try:
        result = run(loss, args)
    except Exception as error:
        if record.name not in BY_DESIGN:
            raise
        return error
    assert record.name not in BY_DESIGN, "it no longer waits: take it out of BY_DESIGN"
    return outputs(result)


@every_record
@every_way
def test_no_value_is_needed_on_the_cpu(record, streamed, monkeypatch):
    found = waits(forward_on_a_fake_gpu, record, streamed, monkeypatch)
    assert isinstance(found, Exception) or all(part.device.type == "cuda" for part in found)


@pytest.mark.gpu
@needs_a_gpu
@every_record
@every_way
def test_no_step_waits(record, streamed, monkeypatch):
    """As ``torch.cuda.set_sync_debug_mode("error")`` finds, in the backward pass too."""
    waits(lambda loss, args: step_that_may_not_wait(loss, args)[0], record, streamed, monkeypatch)


def of_values(x):
    return x * float(x.sum())


def of_a_mask(x):
    return x[x > 0].sum()


def of_a_list(x):
    return x[[0, 2]].sum()


def of_the_cpu(x):
    return x + torch.ones(len(x)).to(x.device)


@pytest.mark.parametrize("loss", [of_values, of_a_mask, of_a_list, of_the_cpu])
def test_what_waits_is_found(loss):
    with pytest.raises((RuntimeError, NotImplementedError)):
        forward_on_a_fake_gpu(loss, (torch.ones(3),))


def test_what_waits_by_design_has_a_record():
    assert set(BY_DESIGN) <= {record.name for record in RECORDS}
