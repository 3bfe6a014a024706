"""Peak memory in the shape of the SER loss, with twice as many images each time, until the dense form fails.

On a GPU what PyTorch's allocator hands out. On a CPU the bytes of the largest tensor, and of too large a one none.
"""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from equireg import pair_lse, patch_nt_xent
from equireg.similarity import choice
from equireg.similarity.streamed import tiles
from equireg.similarity.triton import launch
from equireg.similarity.triton import tiles as triton_tiles
from tests.benchmarks.gpu import step
from tests.benchmarks.gpu_shapes import ser
from tests.benchmarks.measure import Settings, peak
from tests.gpu.devices import every_device
from tests.gpu.inside import Inside

DENSE, STREAMED = "dense eager", "pair_lse, chunked"


class Room(Inside):
    """The bytes of the largest tensor that is made; a larger one than there is room for is refused."""

    largest, room = 0, 2**18

    def seen(self, function, given, made):
        self.largest = max([self.largest, *(part.numel() * part.element_size() for part in made)])
        if self.largest > self.room:
            raise torch.OutOfMemoryError("a tensor larger than the room")


def megabytes(run, device):
    """At the peak of a run; None where it fails."""
    try:
        if device == "cuda":
            return peak(lambda: None, run, device)
        with Room() as room:
            run()
        return room.largest / 2**20
    except torch.OutOfMemoryError:
        return None
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def step_of(shape, name, images):
    step(shape.versions[name], shape.inputs(images, torch.float32))


@every_device
def test_memory_of_the_streamed_form_grows_with_the_images(device, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 32)
    monkeypatch.setattr(tiles, "COLS", 32)
    shape = ser(Settings(device=device, quick=device == "cpu"))
    found = {name: {} for name in (DENSE, STREAMED)}
    images, most = (2, 64) if device == "cpu" else (8, 4096)
    while images <= most and None not in found[DENSE].values():
        for name, curve in found.items():
            run = partial(step_of, shape, name, images)
            curve[images] = megabytes(run, device)
            print(f"{name}, {images} images: {'fails' if curve[images] is None else f'{curve[images]:,.2f} MB'}")
        images *= 2
    last = max(found[DENSE])
    assert found[DENSE][last] is None
    assert found[STREAMED][last] is not None
    assert found[STREAMED][last // 2] < found[DENSE][last // 2] / 4
    assert found[STREAMED][last] < 2.5 * found[STREAMED][last // 2]


class Living(Inside):
    """The bytes of all tensors at the time when they are the most, on a GPU that is not there."""

    def __init__(self):
        super().__init__()
        self.living, self.most = {}, 0

    def seen(self, function, given, made):
        for storage in (part.untyped_storage() for part in (*given, *made)):
            reference = StorageWeakRef(storage)
            self.living.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.living = {key: held for key, held in self.living.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.living.values()))


@pytest.mark.parametrize("form", ["at once", "triton"])
def test_the_loss_at_the_size_of_its_target_needs_at_most_200_megabytes(form, monkeypatch):
    """Of bf16, with its inputs; its gradients are formed in the forward pass. Kernels add no memory of their own."""
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "of_contrast", lambda *_: form)
    monkeypatch.setattr(launch, "refusal", lambda *_: None)
    monkeypatch.setattr(launch._Sides, "launch", lambda *_, **__: None)
    monkeypatch.setattr(triton_tiles, "TUNED", ())
    monkeypatch.setattr(triton_tiles, "_processors", lambda device: 132)
    with FakeTensorMode(allow_non_fake_inputs=True):
        views = [torch.empty(64, 196, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        with Living() as memory:
            patch_nt_xent(*views)
    assert 100 < memory.most / 2**20 < 200


def test_room_is_looked_for_inside_operators():
    x = torch.randn(300, 4)
    with Room() as room, pytest.raises(torch.OutOfMemoryError):
        pair_lse(x, x, 1.0, backend="chunked")
    assert room.largest == 4 * 300 * 300
