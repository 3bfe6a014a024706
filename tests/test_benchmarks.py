"""The benchmarks run, and their page says what their record says."""

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch

from equireg.similarity import cards, gram
from tests.benchmarks import gpu, gpu_choice, gpu_targets, irm_flops, page, pictures, record
from tests.benchmarks.measure import QUICK, SIZES_LIMIT, compare, medians

DOCS = Path(__file__).parent.parent / "docs"
MEASURED = {"seconds", "megabytes", "flops", "verdict", "not_measured"}
# On a CPU FlexAttention has no gradient, and the triton backend no kernel.
MAY_BE_LEFT_OUT = {"FlexAttention", "pair_lse, triton", "patch_nt_xent, triton", "soft_info_nce, triton"}

NEEDED = {"ser_flops": ("timm", "lightly"), "reconstruction": ("timm",)}


@pytest.fixture(autouse=True)
def _compile_limit():
    """The benchmarks raise the number of sizes that torch.compile takes; the other tests keep theirs."""
    with torch._dynamo.config.patch(**{SIZES_LIMIT: getattr(torch._dynamo.config, SIZES_LIMIT)}):
        yield


@pytest.mark.filterwarnings("ignore")  # of the libraries that are compared
@pytest.mark.parametrize("name", record.TITLES)
def test_benchmark_runs(name):
    """At tiny sizes; what it compares it first checks to compute the same."""
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    rows = list(importlib.import_module(f"tests.benchmarks.{name}").benchmark(QUICK))
    assert rows
    for row in rows:
        assert MEASURED & set(row), row
        left_out = row.get("not_measured")
        of_a_target = row["work"].startswith("Targets")  # of sizes that are not tiny
        assert (
            left_out in (None, "not installed") or of_a_target or row["version"].split(" with ")[0] in MAY_BE_LEFT_OUT
        ), row
        assert page.line(row)


def test_parameters_and_products_of_class_wise_irm():
    """Closed: a mask of 512, two linear maps of which the first has no bias, and a BatchNorm between."""
    plain, added, *_ = irm_flops.benchmark(QUICK)
    assert plain["parameters"] == 11_176_512  # the paper: 11.180 M, and with EqInv 11.510 M
    assert added["parameters"] - plain["parameters"] == 512 + 512 * 512 + 2 * 512 + 512 * 128 + 128
    assert added["flops"] - plain["flops"] == 2 * (512 * 512 + 512 * 128)
    x = torch.randn(6, 4, requires_grad=True)
    assert irm_flops.counted(lambda: gram(x).sum().backward()) == 2 * 2 * 6 * 6 * 4


def test_page_says_what_the_record_says():
    """Neither is edited by hand: ``python -m tests.benchmarks --no-run`` writes the tables from the record."""
    text = (DOCS / "benchmarks.md").read_text()
    assert page.written(text, record.load(DOCS / "benchmarks.json"), DOCS) == text


def group(version="ours", seconds=0.5, **others):
    rows = [
        {
            "work": "SER loss, small",
            "version": "dense",
            "size": size,
            "unit": "images",
            "seconds": size,
            "megabytes": 9.0,
        }
        for size in (1, 2, 4)
    ]
    rows.append({"work": "SER loss, small", "version": version, "size": 2, "unit": "images", "seconds": seconds})
    rows.append({"work": "SER loss, small", "version": "none", "size": 4, "unit": "images", "not_measured": "no room"})
    return {"benchmark": "ser", "device": "cpu", "machine": "a machine", "date": "a day", "rows": rows, **others}


def test_new_measurement_replaces_its_own_alone(tmp_path):
    first = [group(), group(benchmark="grid"), group(device="cuda")]
    path = tmp_path / "benchmarks.json"
    record.save(record.updated(first, group(seconds=0.25, date="later")), path)
    found = {(part["benchmark"], part["device"]): part for part in record.load(path)}
    assert found["grid", "cpu"] == first[1]
    assert found["ser", "cuda"] == first[2]
    assert found["ser", "cpu"] == group(seconds=0.25, date="later")
    assert [part["benchmark"] for part in record.load(path)] == ["ser", "ser", "grid"]


def test_tables_and_picture(tmp_path):
    assert pictures.draw(group(), tmp_path) == tmp_path / "ser-cost.png"
    text = page.results([group(note="beside another program")], tmp_path)
    assert "![SER loss: cost against size, both axes logarithmic](ser-cost.png)" in text
    assert "a machine; a day; beside another program." in text
    assert "| time | 1 images | 2 images | 4 images |" in text
    assert "| ours | – | 500 ms (4.00×) | – |" in text
    assert "Not measured: none with 4 images (no room)." in text
    assert "Not measured on a GPU yet." in text


def test_versions_run_in_turns_and_one_that_fails_is_named():
    calls = []

    def fail():
        raise RuntimeError("no kernel\nhere")

    medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, turn_seconds=0)
    assert calls == ["a", "b", "a", "b"]
    rows = list(compare("work", {"a": lambda: None, "b": fail}, QUICK, may_fail=(RuntimeError,), size=3))
    assert rows[1] == {"work": "work", "version": "b", "size": 3, "not_measured": "no kernel"}
    assert rows[0]["seconds"] < 1
    with pytest.raises(RuntimeError, match="no kernel"):
        list(compare("work", {"b": fail}, QUICK))


def test_past_its_time_a_benchmark_says_what_is_left():
    seconds = iter(range(100))

    def rows(name):
        yield from ({"work": name, "version": version, "seconds": 1.0} for version in "ab")

    parts = [(name, rows(name)) for name in ("first", "second", "third")]
    found = list(gpu.within(4, parts, clock=lambda: next(seconds)))
    assert [(row["work"], row["version"]) for row in found] == [
        ("first", "a"),
        ("first", "b"),
        ("second", "a"),
        ("second, what is left", "all"),
        ("third, what is left", "all"),
    ]
    assert found[-1]["not_measured"] == "the 4 seconds of this benchmark were spent"
    assert "Not measured: all (the 4 seconds" in page.results([group(benchmark="gpu", rows=found)], DOCS)
    assert len(list(gpu.within(9, [("first", rows("first")), ("second", rows("second"))], clock=lambda: 0))) == 4


def test_a_part_that_fails_leaves_the_others(capsys):
    def failing():
        yield {"work": "first", "version": "a", "seconds": 1.0}
        raise RuntimeError("an illegal access")

    found = list(gpu.within(9, [("first", failing()), ("second", iter([{"work": "second"}]))]))
    reason = {"version": "all", "not_measured": "an illegal access"}
    assert found[1:] == [{"work": "first, what is left", **reason}, {"work": "second"}]
    assert "an illegal access" in capsys.readouterr().err


def timed(version, size, seconds, learns="features", width=256, precision="bf16", **others):
    kind = {"learns": learns, "precision": precision, "width": width, "unit": "images"}
    return {"work": "a work", "version": version, "size": size, "seconds": seconds, **kind, **others}


def test_the_file_of_the_automatic_choice(tmp_path):
    """For each kind the form that is faster at every size; another card's rows stay, its own are replaced."""
    chunked, kernels = "pair_lse, chunked", "pair_lse, triton"
    slower = [timed(kernels, 512, 1.0), timed(chunked, 512, 1.02)]  # within the noise
    small = [timed(kernels, 64, 0.1), timed(chunked, 64, 1.0)]
    faster = [timed(kernels, 9, 1.0, "weights", 128), timed(chunked, 9, 2.0, "weights", 128)]
    contrast = [
        timed(f"patch_nt_xent, {form}", 64, 1.0 + (form != "triton"), "contrast") for form in ("triton", "chunked")
    ]
    others = [{"work": "", "version": kernels, "seconds": 0.1}, timed(kernels, 512, 1.0, "weights", 64)]
    tiles = [
        {"work": "", "version": f"{kernels} with", "role": "forward", "width": 256, "tile": tile, "seconds": seconds}
        for tile, seconds in (([128, 64, 64, 8, 3], 2.0), ([128, 128, 64, 8, 4], 1.0), ([64, 64, 64, 8, 3], 3.0))
    ]
    rows = [*small, *slower, *faster, *contrast, *others, *tiles, {**tiles[0], "seconds": 5.0, "role": "weights"}]
    path = tmp_path / "choice.json"
    path.write_text("[]\n")
    for name, date in (("B", "a day"), ("A", "a day"), ("B", "later")):
        gpu_choice.write(rows, {"card": name, "capability": [9, 0], "date": date}, path)
    gpu_choice.write([], {"card": "A", "capability": [9, 0], "date": "a day"}, path)  # of a run that found nothing
    found, timed_tiles = cards.read(path)
    assert [(entry.card, entry.date, entry.learns, entry.width, entry.backend) for entry in found] == [
        (card, date, *row)
        for card, date in (("A", "a day"), ("B", "later"))
        for row in (("features", 256, "chunked"), ("weights", 128, "triton"), ("contrast", 256, "triton"))
    ]
    best = [("forward", 2, 256, (128, 128, 64, 8, 4)), ("weights", 2, 256, (128, 64, 64, 8, 3))]
    assert [(tile.card, tile.date, *tile[3:]) for tile in timed_tiles] == [
        (card, date, *tile) for card, date in (("A", "a day"), ("B", "later")) for tile in best
    ]
    assert gpu_choice.PATH.exists()


@pytest.mark.parametrize(
    ("card", "milliseconds", "verdict"),
    [
        ("NVIDIA H200", 1.5, "1.5 ms, at most 1.5 ms: reached"),
        ("NVIDIA H200", 1.6, "1.6 ms, at most 1.5 ms: missed"),
        ("NVIDIA H100 80GB HBM3", 1.6, "1.6 ms, at most 2 ms: reached"),
        ("NVIDIA GH200 480GB", 1.6, "1.6 ms, no limit is set for NVIDIA GH200 480GB"),
    ],
)
def test_targets_stand_beside_what_was_measured(card, milliseconds, verdict):
    """Of the faster form, at the size that they are set for; and a missed one is a row like any other."""
    form = partial(timed, learns="contrast")
    rows = [
        form("patch_nt_xent, chunked", 64, 5e-3, megabytes=100.0),
        form("patch_nt_xent, triton", 64, 1e-3 * milliseconds, megabytes=250.0),
        form("the bare products", 64, 1e-3),
        form("patch_nt_xent, triton", 512, 1e-6),
        form("patch_nt_xent, triton", 64, 1e-6, precision="tf32"),
        *({"work": f"{gpu_targets.STEP}512", "version": name, "seconds": s} for name, s in (("a", 1.0), ("b", 1.005))),
    ]
    found = list(gpu_targets.targets(rows, card))
    assert [row["verdict"] for row in found] == [
        verdict,
        f"{milliseconds:g}×, at most 1.4×: missed",
        "250 MB, at most 200 MB: missed",
        "1.005×, at most 1.01×: reached",
    ]
    assert f"- time of the loss: {verdict}." in page.results([group(benchmark="gpu", rows=found)], DOCS)
    assert page.line(found[0]).endswith(verdict)
    nothing = list(gpu_targets.targets(rows[3:4], card))
    assert {row["not_measured"] for row in nothing} == {"this run has no figure for it"}
