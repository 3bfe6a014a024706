"""The pretraining examples: the runs of each differ in the method only."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs the examples extra")
pytest.importorskip("lightly", reason="needs the examples extra")
pytest.importorskip("matplotlib", reason="needs the examples extra")

ROOT = Path(__file__).parent.parent


def module_of(stem):
    """The example, imported."""
    spec = importlib.util.spec_from_file_location(f"{stem}_pretrain", ROOT / "examples" / f"{stem}_pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(**changes):
    shared = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "seed": 3}
    return argparse.Namespace(**{**shared, **changes})


@pytest.fixture
def images():
    return torch.randint(256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_ser_of_weight_0_is_its_control(images):
    example = module_of("ser")
    (control, _), (same, _), (with_loss, _) = (
        example.train(name, images, ser_options(weight=weight, ratio=0.5))
        for name, weight in (("views alone", 1.0), ("SER", 0.0), ("SER", 1.0))
    )
    assert equal(control, same)
    assert not equal(control, with_loss)


def ser_options(**changes):
    return options(**{"layers": "one", "base_loss": "joint", "temperature": 0.3, **changes})


@pytest.mark.parametrize(("base_loss", "expected"), [("joint", [8]), ("separate", [6, 2])])
def test_ser_has_one_base_loss(base_loss, expected, images, monkeypatch):
    """Over all images of the batch, turned or not; or one over each part."""
    example, sizes = module_of("ser"), []

    class Counted(example.NTXentLoss):
        def forward(self, first, second):
            sizes.append((len(first), len(second)))
            return super().forward(first, second)

    monkeypatch.setattr(example, "NTXentLoss", Counted)
    for name in ("SimCLR", "SER"):
        example.train(name, images, ser_options(weight=0.5, ratio=0.25, base_loss=base_loss, layers="all"))
    assert sizes == 4 * [(8, 8)] + 4 * [(size, size) for size in expected]


def test_reconstruction_trains_on_the_same_views(images, monkeypatch):
    """And the second view is another crop than the first, transformed."""
    example, seen = module_of("reconstruction"), []
    plain = example.tokens_of
    monkeypatch.setattr(example, "tokens_of", lambda vit, views: (seen.append(views), plain(vit, views))[1])
    for with_head in (False, True):
        example.train(with_head, images / 255, options(weight=1.0, reconstruct="se2", num_images=3, head_dim=256))
    without, with_reconstruction = seen[:8], seen[8:]
    assert all(torch.equal(a, b) for a, b in zip(without, with_reconstruction, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(without[::2], without[1::2]))


METHODS = ("augself", "cross-attention", "equimod", "essl", "sie", "stl")


@pytest.mark.parametrize("method", METHODS)
def test_baselines_of_weight_0_are_simclr(method, images):
    """On the same views; with its weight the method reaches the block that it reads, and those before it."""
    example = module_of("baselines")
    assert sorted(example.METHODS) == list(METHODS)

    def trained(name, weight):
        return example.train(name, images[:8], options(method=method, weight=weight, epochs=1))

    base = trained("SimCLR", 1.0)
    assert equal(base, trained("last block", 0.0))
    for name in example.BLOCKS:
        assert not equal(base.blocks[0], trained(name, 1.0).blocks[0])


def test_baselines_give_each_method_what_was_done(images, monkeypatch):
    """E-SSL's turns are those of the images; STL's other half is turned as the first; the rest is told the angle."""
    example, images = module_of("baselines"), images[:8] / 255
    turned, _, angle = example.turning(images)
    encode = lambda x: x.flatten(1)  # noqa: E731

    def given(method):
        seen = []
        example.regularizer(method, lambda *args: seen.extend(args), encode, images, turned, angle)
        return seen

    quarters, turns = given("essl")
    for row, k, image in zip(quarters, turns.tolist(), images[::4].repeat(4, 1, 1, 1)):
        assert torch.equal(row.view_as(image), image.rot90(k, (1, 2)))
    assert turns.bincount().tolist() == [2, 2, 2, 2]
    first, first_turned, others, others_turned = (x.view(4, 3, 32, 32) for x in given("stl"))
    torch.testing.assert_close(first_turned, example.turning.transform(first, angle[:4]))
    torch.testing.assert_close(others_turned, example.turning.transform(others, angle[:4]))
    assert torch.equal(torch.cat([first, others]), images)
    parameters = given("sie")[2]
    torch.testing.assert_close(torch.atan2(parameters[:, 1], parameters[:, 0]).rad2deg(), angle[:, 0])
    _, _, there, back = given("augself")
    assert torch.equal(there["angle"], parameters)
    torch.testing.assert_close(back["angle"], torch.cat([parameters[:, :1], -parameters[:, 1:]], 1))
    assert torch.equal(given("cross-attention")[2], images)


def ipirm_options(**changes):
    return options(**{"weight": 0.2, "keep": 0, "mix": 0.0, "global_penalty": False, "dummy_scales": "one", **changes})


def test_ipirm_as_released(images, monkeypatch):
    """A scale of each logit, mixed within the groups of the newest partition alone."""
    example, seen = module_of("ipirm"), []

    class Watched(example.IPIRMLoss):
        def parts(self, z1, z2, indices, mix):
            groups = self.partitions.partitions[1:, indices]
            seen.append((len(groups), self.dummy_scales, bool((groups[:, mix[0]] == groups).all())))
            return super().parts(z1, z2, indices, mix)

    monkeypatch.setattr(example, "IPIRMLoss", Watched)
    released = ipirm_options(mix=1.0, keep=1, dummy_scales="logits", update_every=1)
    example.train(example.RANDOM, images / 255, released)
    assert seen == 4 * [(1, "logits", True)]


def test_ipirm_without_partitions_is_simclr(images, monkeypatch):
    """Its loss of weight 0 and lightly's agree in every step, on the same views."""
    example = module_of("ipirm")
    calls = []
    monkeypatch.setattr(example, "find_partition", lambda *arguments: calls.append(torch.rand(3)))
    (_, base), (_, found) = (
        example.train(name, images / 255, ipirm_options(weight=0.0, update_every=1))
        for name in ("SimCLR", "found partitions")
    )
    assert len(calls) == 2
    assert len(base) == 4
    (contrast, slopes), (of_base, nothing) = zip(*found), zip(*base)
    assert contrast == pytest.approx(of_base, rel=1e-3)
    assert set(slopes) == set(nothing) == {0.0}


def test_ipirm_looks_before_the_first_epoch(images, monkeypatch):
    """In every run but SimCLR's; random groups and found ones join alike."""
    example, held = module_of("ipirm"), {}
    updater = example.PartitionUpdater
    monkeypatch.setattr(example, "PartitionUpdater", lambda *a, **k: held.setdefault(len(held), updater(*a, **k)))
    losses = [
        [contrast for contrast, _ in example.train(run, images / 255, ipirm_options(update_every=2))[1]]
        for run in example.RUNS
    ]
    assert [len(found.partitions) for found in held.values()] == [1, 2, 2]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-3)  # the terms of a partition are not in the curve
    assert losses[2][0] == pytest.approx(losses[0][0], rel=1e-3)
    assert all(partition.unique().tolist() == [0, 1] for found in held.values() for partition in found.partitions[1:])


def test_mae_sees_only_what_is_not_hidden(images):
    """Its predictions are of the hidden patches, and do not change with their pixels; those of a whole image would."""
    example = module_of("mae")
    vit = example.timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8, dynamic_img_size=True)
    mae, views = example.MAE(vit, 0.75).eval(), images[:4] / 255
    torch.manual_seed(0)
    predicted, pixels, places = mae(views)
    assert predicted.shape == pixels.shape == (4, 12, 192)
    assert all(len(set(row)) == 12 and set(row) <= set(range(16)) for row in places.tolist())
    rows, columns = places // 4 * 8, places % 4 * 8
    for image, row in enumerate(places.tolist()):
        for number in range(len(row)):
            y, x = rows[image, number], columns[image, number]
            patch = views[image, :, y : y + 8, x : x + 8]
            assert torch.equal(pixels[image, number], patch.permute(1, 2, 0).flatten())
            patch.zero_()  # in the image
    torch.manual_seed(0)
    assert torch.equal(mae(views)[0], predicted)
    views[:] = 0
    torch.manual_seed(0)
    assert not torch.equal(mae(views)[0], predicted)


def test_mae_learns_all_that_it_keeps(images):
    """Of the encoder nothing stays as it was but the fixed positions; its keys are those of timm."""
    example = module_of("mae")
    torch.manual_seed(0)
    vit = example.timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8, dynamic_img_size=True)
    mae = example.MAE(vit, 0.75)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    losses = example.train(mae, images, options(epochs=3))
    after = vit.state_dict()
    assert {name for name in after if torch.equal(after[name], before[name])} == {"pos_embed"}
    assert losses[-1] < losses[0]
    example.timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8).load_state_dict(after)
