"""Which form ``pair_lse`` takes where none is asked for: by the environment, a table of measurements, the size."""

import json
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from equireg import pair_lse, patch_nt_xent
from equireg.similarity import cards, choice
from equireg.similarity.cards import Measured, Tuned, of_nearest_card
from equireg.similarity.choice import nearest
from equireg.similarity.dense import Pairs, Problem
from equireg.similarity.triton import tiles
from equireg.similarity.triton.tiles import Tile, tile_of

A100, H100, H200 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"
CARDS = {A100: (8, 0), H100: (9, 0), H200: (9, 0)}
ROWS = [
    {"learns": "features", "precision": "bf16", "width": 256, "backend": "chunked"},
    {"learns": "features", "precision": "bf16", "width": 64, "backend": "triton"},
    {"learns": "weights", "precision": "bf16", "width": 128, "backend": "triton"},
    {"learns": "weights", "precision": "tf32", "width": 128, "backend": "triton"},
]


def table(*names):
    return tuple(Measured(name, CARDS[name], "a day", **row) for name in names for row in ROWS)


def tuned(name, stages=4):
    return Tuned(name, CARDS[name], "a day", "forward", 2, 256, (128, 64, 64, 8, stages))


@pytest.fixture(autouse=True)
def _nothing_told_yet(monkeypatch):
    monkeypatch.setattr(choice, "_told", set())
    monkeypatch.delenv("EQUIREG_BACKEND", raising=False)


def on(card, capability, monkeypatch, **given):
    """The form on a card that is not here, by tensors that say they are on it and hold nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(choice, "refusal", lambda *_: given.get("refused"))
    with FakeTensorMode():
        x = torch.empty(given.get("rows", 1000), given.get("width", 256), device="cuda", dtype=given["dtype"])
        backend = choice.chosen(x.requires_grad_(given["learns"]), x)
        return choice.measured(backend, Problem(x, None, x.sum(), Pairs("all", None, None, None, None)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"learns": True}, "chunked"),
        ({"learns": True, "width": 128}, "chunked"),  # as near to 64, and the first
        ({"learns": True, "width": 100}, "triton"),
        ({"learns": False}, "triton"),
        ({"learns": False, "dtype": torch.float16}, "triton"),
        ({"learns": False, "dtype": torch.float32}, "chunked"),  # of full precision nothing was measured
        ({"learns": False, "dtype": torch.float64}, "chunked"),
        ({"learns": False, "refused": "no room"}, "chunked"),
        ({"learns": False, "rows": 100}, "dense"),
    ],
)
def test_the_table_chooses_by_what_learns_precision_and_width(given, expected, monkeypatch):
    monkeypatch.setattr(choice, "TABLE", table(H200))
    assert on(H200, (9, 0), monkeypatch, **{"dtype": torch.bfloat16, **given}) == expected


def test_rounded_products_of_float32(monkeypatch):
    monkeypatch.setattr(choice, "TABLE", table(H200))
    for setting in ("high", "medium"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert on(H200, (9, 0), monkeypatch, dtype=torch.float32, learns=False) == "triton"


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        (H100, (9, 0), H100),
        ("NVIDIA H100 PCIe", (9, 0), H100),
        ("NVIDIA GH200 480GB", (9, 0), H100),
        ("NVIDIA L40S", (8, 9), A100),
        ("NVIDIA B200", (10, 0), H100),
        ("Tesla T4", (7, 5), A100),
    ],
)
def test_the_nearest_card(name, capability, expected):
    found = of_nearest_card(table(H200, A100, H100), name, capability)
    assert len(found) == len(ROWS)
    assert {row.card for row in found} == {expected}


def test_nearest_width_and_what_was_not_measured():
    rows = table(H200)
    assert nearest(rows, "features", "bf16", 16).width == 64
    assert nearest(rows, "features", "bf16", 512).width == 256
    assert nearest(rows, "features", "fp32", 64) is None


def test_without_a_measurement_the_kernels_are_never_chosen(monkeypatch):
    monkeypatch.setattr(choice, "TABLE", ())
    for dtype in (torch.bfloat16, torch.float32):
        assert on(H200, (9, 0), monkeypatch, dtype=dtype, learns=False) == "chunked"


def test_the_file_that_comes_with_the_package(tmp_path):
    """It is read when the package is imported, and so is a file of the same form, as it may be empty."""
    path = tmp_path / "choice.json"
    tile = {"role": "forward", "size": 2, "width": 256, "tile": [128, 64, 64, 8, 4]}
    card = {"card": H200, "capability": [9, 0], "date": "a day", "torch": "2.11", "rows": ROWS, "tiles": [tile]}
    path.write_text(json.dumps([card]))
    assert cards.read(path) == (table(H200), (tuned(H200),))
    for row in (*choice.TABLE, *table(H200)):
        assert row.learns in ("features", "weights", "contrast")
        assert row.precision in ("bf16", "tf32", "fp32")
        assert row.backend in ("chunked", "triton")
    for row in (*tiles.TUNED, tuned(H200)):
        assert (row.role, row.size) in tiles.TILES
        assert Tile(*row.tile)


@pytest.mark.parametrize(
    ("name", "capability", "stages"),
    [(H200, (9, 0), 5), (H100, (9, 0), 4), ("NVIDIA H100 PCIe", (9, 0), 4), (A100, (8, 0), 3), ("L40S", (8, 9), 3)],
)
def test_tiles_are_those_timed_on_a_card_of_the_same_capability(name, capability, stages, monkeypatch):
    """On any other they might not fit on the chip: there, as for what was not timed, the static table's serves."""
    monkeypatch.setattr(tiles, "TUNED", (tuned(H200, 5), tuned(H100, 4)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert tile_of("forward", 2, 200, gpu) == Tile(128, 64, 64, 8, stages)
    assert tile_of("forward", 2, 200, torch.device("cpu")) == tile_of("forward", 2, 200) == Tile(128, 64, 64, 8, 3)
    for role, width in (("forward", 128), ("features", 256), ("weights", 256)):
        assert tile_of(role, 2, width, gpu) == tile_of(role, 2, width)


def test_the_kernels_take_the_tile_of_the_device(monkeypatch):
    asked = []
    monkeypatch.setattr(tiles, "_tuned", lambda device: asked.append(device) or ())
    x = torch.randn(20, 16)
    assert tiles.cut("forward", x, x)[0] == tile_of("forward", 4, 16)
    assert asked == [x.device, None]


@pytest.mark.parametrize(
    ("dtype", "precision", "few", "expected"),
    [
        (torch.bfloat16, "highest", True, "triton"),  # bf16 is of the tokens
        (torch.float16, "highest", False, "triton"),
        (torch.float32, "medium", True, "triton"),
        (torch.float32, "high", True, "at once"),  # measured, and slower
        (torch.float32, "high", False, "chunked"),
        (torch.float32, "highest", True, "at once"),  # not measured
        (torch.float64, "highest", False, "chunked"),
    ],
)
def test_the_table_chooses_the_form_of_the_contrast(dtype, precision, few, expected, monkeypatch):
    """By rows of its own: what is fastest for the features of ``pair_lse`` says nothing about it."""
    rows = [("contrast", "bf16", "triton"), ("contrast", "tf32", "chunked"), ("features", "fp32", "triton")]
    monkeypatch.setattr(choice, "TABLE", tuple(Measured(H200, (9, 0), "a day", a, b, 256, c) for a, b, c in rows))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(choice, "refusal", lambda *_: None)
    with FakeTensorMode():
        x = torch.empty(0, 256, device="cuda", dtype=dtype)
    assert choice.of_contrast(x, few) == expected
    monkeypatch.setattr(choice, "refusal", lambda *_: "no Triton")
    assert choice.of_contrast(x, few) == ("at once" if few else "chunked")
    monkeypatch.setattr(choice, "TABLE", ())
    assert choice.of_contrast(x, few) == ("at once" if few else "chunked")
    assert choice.of_contrast(torch.empty(0, 256, dtype=torch.bfloat16), few) == ("at once" if few else "chunked")


@pytest.mark.parametrize("asked", ["dense", "chunked", "triton"])
def test_the_environment_overrides(asked, monkeypatch):
    """Size and table, but not the argument; and in the SER loss its own form."""
    monkeypatch.setenv("EQUIREG_BACKEND", asked)
    monkeypatch.setattr(choice, "TABLE", table(H200))
    assert on(H200, (9, 0), monkeypatch, dtype=torch.bfloat16, learns=True, rows=10) == asked
    x, calls = torch.randn(6, 4), []
    streamed = pair_lse(x, x, 1.0, backend="chunked")
    monkeypatch.setattr("equireg.similarity.operator.streamed", lambda _, backend: calls.append(backend) or streamed)
    pair_lse(x, x, 1.0)
    pair_lse(x, x, 1.0, backend="dense")
    patch_nt_xent(x.view(3, 2, 4), x.view(3, 2, 4))
    assert calls == ([] if asked == "dense" else [asked, asked])


def test_an_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("EQUIREG_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"EQUIREG_BACKEND must be one of .*'triton', got 'cuda'"):
        pair_lse(torch.ones(2, 2), torch.ones(2, 2), 1.0)


def test_the_operator_takes_what_was_measured(monkeypatch):
    """In both passes, and compiled; here the table is asked for a CPU."""
    monkeypatch.setattr(choice, "TABLE", table(H200))
    monkeypatch.setattr(choice, "chosen", lambda x, y: choice.FEATURES)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "precision_of", lambda x: "bf16")
    asked = []
    monkeypatch.setattr(choice, "refusal", lambda x, *_: asked.append(x.shape[1]) or "no kernel on a CPU")
    torch._dynamo.reset()
    for width in (64, 256):
        x = torch.randn(40, width, requires_grad=True)
        expected = torch.autograd.grad(pair_lse(x, x, 1.0, backend="dense")[0].sum(), x)
        for function in (pair_lse, torch.compile(pair_lse, fullgraph=True, backend="aot_eager")):
            found = torch.autograd.grad(function(x, x, 1.0)[0].sum(), x)
            torch.testing.assert_close(found, expected)
    assert asked == [64] * 4  # of width 256 the table names no kernel


@pytest.mark.parametrize("asked", ["", "chunked"])
def test_the_environment_while_compiling(asked, monkeypatch):
    monkeypatch.setenv("EQUIREG_BACKEND", asked)
    torch._dynamo.reset()
    x = torch.randn(6, 4)
    found = torch.compile(lambda x: pair_lse(x, x, 2.0), fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, pair_lse(x, x, 2.0, backend="dense"))


def test_each_kind_is_told_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="equireg")
    monkeypatch.setattr(choice, "TABLE", table(H100))
    small, large = torch.randn(3, 4), torch.randn(300, 4)
    for _ in range(2):
        for x in (small, large, large.double()):
            pair_lse(x, x, 1.0)
        on(H200, (9, 0), monkeypatch, dtype=torch.bfloat16, learns=False)
        patch_nt_xent(small.view(3, 1, 4), small.view(3, 1, 4))
    told = [record.getMessage() for record in caplog.records if record.name == "equireg"]
    assert told == [
        "pair_lse: dense on cpu for torch.float32 (the matrix is small)",
        "pair_lse: chunked on cpu for torch.float32 (the matrix is large)",
        "pair_lse: chunked on cpu for torch.float64 (the matrix is large)",
        "pair_lse: triton on cuda for torch.bfloat16 (measured on NVIDIA H100 80GB HBM3, a day: weights, D = 128)",
        "mean_contrast: at once on cpu for torch.float32 (its tiles are few)",
    ]
