"""What the trainers write and read back: damaged, hostile, linked and strangely named files."""

import ast
import contextlib
import errno
import io
import os
import pickle
import random
import stat
import sys
import zipfile
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("tqdm", reason="needs the examples extra")
sys.path.insert(0, str(EXAMPLES))
from training import run_folder, sealed_files, shown_names  # noqa: E402
from training.sealed_files import Damaged, load_safely, save_atomically, write_atomically  # noqa: E402

sys.path.remove(str(EXAMPLES))

CONTENT = {"step": 3, "weights": torch.arange(64.0), "options": {"name": "é", "rate": 0.1, "none": None}, "rows": [1]}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_atomically(path, CONTENT)
    return path


def test_it_comes_back(saved):
    found = load_safely(saved)
    assert found.keys() == CONTENT.keys()
    assert torch.equal(found["weights"], CONTENT["weights"])
    assert torch.load(saved, weights_only=True)["options"] == CONTENT["options"]  # as any other file of torch.save


def test_truncations_and_flipped_bits_are_found(saved, tmp_path):  # T4
    """At every 1% of the length, and of 1000 bits; torch.load by itself takes most of the latter."""
    data, path = saved.read_bytes(), tmp_path / "damaged.pt"
    for percent in range(100):
        path.write_bytes(data[: len(data) * percent // 100])
        with pytest.raises(Damaged, match=r"damaged.pt is damaged: \d+ bytes that do not fit the seal"):
            load_safely(path)
    draw, unseen = random.Random(0), 0  # noqa: S311
    for bit in draw.sample(range(8 * len(data)), 1000):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(Damaged, match="damaged"):
            load_safely(path)
        if bit % 20 == 0:
            with contextlib.suppress(Exception):  # of many types
                torch.load(path, weights_only=True)
                unseen += 1
    assert unseen > 10


def make_run(folder, resume=True, **options):
    return run_folder.Run(folder, {"lr": 0.1, **options}, resume=resume, main=True, files="a")


def two_checkpoints(folder):
    with make_run(folder, resume=False) as run:
        for step in (1, 2):
            run.log({"step": step, "loss": 1.0})
            run.save(step, weights=torch.full((4,), float(step)))
    return folder / "checkpoint.pt", folder / "checkpoint.previous.pt"


@pytest.mark.parametrize("damage", ["flip", "empty", "missing"])
def test_it_goes_on_from_the_one_before(damage, tmp_path, capsys):  # T4
    last, previous = two_checkpoints(tmp_path)
    if damage == "missing":
        last.unlink()
    else:
        data = bytearray(last.read_bytes())
        data[100] ^= 4
        last.write_bytes(data if damage == "flip" else b"")
    with make_run(tmp_path) as run:
        assert run.checkpoint["step"] == 1
        assert [row["step"] for row in run.log_rows()] == [1]
        assert f"going on from the checkpoint before: {previous}, after step 1" in capsys.readouterr().err
        run.save(2, weights=torch.zeros(4))  # which must not push out the only sound one for the damaged one
        assert load_safely(previous)["step"] == 1 if damage == "missing" else not last.is_symlink()
    assert load_safely(last)["step"] == 2
    assert load_safely(previous)["step"] == 1
    assert (tmp_path / "checkpoint.damaged.pt").exists() == (damage != "missing")


def test_no_sound_checkpoint(tmp_path):  # T4
    for path in two_checkpoints(tmp_path):
        path.write_bytes(b"\0" * 100)
    with pytest.raises(Damaged, match="checkpoint.previous.pt is damaged.*no sound checkpoint; begin anew without"):
        make_run(tmp_path)


def test_a_new_training_forgets_the_one_before_it(tmp_path):
    """Its checkpoint is never that of another training, and --resume does not take the other's results for its own."""
    last, previous = two_checkpoints(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with make_run(tmp_path, resume=False) as run:
        assert not (tmp_path / "results.json").exists()
        run.save(1, weights=torch.zeros(4))
        assert not previous.exists()
    assert load_safely(last)["step"] == 1


def test_other_versions(tmp_path, capsys):  # T7
    last, _ = two_checkpoints(tmp_path)
    save_atomically(last, {**load_safely(last), "format": 2})
    with pytest.raises(ValueError, match="checkpoint.pt must be a checkpoint of format 1, got 2; by another version"):
        make_run(tmp_path)
    save_atomically(last, [1])
    with pytest.raises(ValueError, match="of format 1, got None"):
        make_run(tmp_path)
    last, _ = two_checkpoints(tmp_path)
    save_atomically(last, {**load_safely(last), "torch": "2.0.0"})
    with make_run(tmp_path):
        assert "trained so far by torch 2.0.0" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):  # T3
    """/dev/full in the place of the new file."""
    real = os.fdopen

    def full(descriptor, mode):
        os.close(descriptor)
        return open("/dev/full", mode)

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match=rf"No space left on device: the 100000 bytes of {saved} cannot") as found:
        write_atomically(saved, b"x" * 100_000)
    assert found.value.errno == errno.ENOSPC
    monkeypatch.setattr(os, "fdopen", real)
    assert load_safely(saved)["step"] == 3
    assert os.listdir(saved.parent) == [saved.name]


# ------------------------------------------------------------------------------------------------------- hostile files


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def sealed(path, write):
    """A file as an attacker makes it who knows the seal."""
    buffer = io.BytesIO()
    write(buffer)
    buffer.seek(-2, os.SEEK_END)
    buffer.write(sealed_files.SEAL_BYTES.to_bytes(2, "little") + sealed_files.SEAL)
    buffer.write(sealed_files.hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    path.write_bytes(buffer.getbuffer())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_never_run(legacy, tmp_path):  # S1
    path, target = tmp_path / "checkpoint.pt", tmp_path / "made"
    hostile = {"weights": Hostile(str(target))}
    torch.save(hostile, path, _use_new_zipfile_serialization=not legacy)
    if not legacy:
        sealed(tmp_path / "sealed.pt", lambda buffer: torch.save(hostile, buffer))
        with pytest.raises(Damaged, match="posix.mkdir"):
            load_safely(tmp_path / "sealed.pt")
    for sealed_too in (True, False):
        with pytest.raises(Damaged, match="is damaged"):
            load_safely(path, sealed=sealed_too)
    assert not target.exists()
    with open(path, "rb") as file:  # it would have done so
        torch.load(file, weights_only=False)
    assert target.exists()


def test_old_torch_is_refused(saved, monkeypatch):  # S2
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(RuntimeError, match=r"torch must be 2.6 or newer to read .*, got 2.5.1"):
        load_safely(saved)


@pytest.mark.parametrize("thing", [Path("/home/me"), os, {1, 2}, torch.nn.Linear(1, 1), pickle.PickleBuffer(b"")])
def test_only_plain_values_are_saved(thing, tmp_path):  # S3
    """At the save, and not when it is needed."""
    with pytest.raises(TypeError, match=r"content\['a'\]\[0\] must be a tensor or a plain value, got <class"):
        save_atomically(tmp_path / "a.pt", {"a": [thing]})
    assert not os.listdir(tmp_path)


def test_bombs_are_not_unpacked(tmp_path):  # S4
    path = tmp_path / "bomb.pt"

    def compressed(buffer):
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data/0", bytes(10**8))

    sealed(path, compressed)
    assert path.stat().st_size < 10**6
    with pytest.raises(Damaged, match="compressed"):
        load_safely(path)

    def overlapping(buffer):
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data/0", bytes(10**5))
            archive.filelist = archive.filelist * 1000

    sealed(path, overlapping)
    with pytest.raises(Damaged, match="entries are larger than the file"):
        load_safely(path)


def test_sizes_and_kinds_of_files(saved, tmp_path):  # S4
    size = saved.stat().st_size
    with pytest.raises(ValueError, match=rf"must have at most {size - 1} bytes, got {size}"):
        load_safely(saved, limit=size - 1)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="path must be a file"):
            load_safely(path)


def test_links_are_not_followed(tmp_path):  # S6
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    folder = tmp_path / "run"
    last, _ = two_checkpoints(folder)
    for name in ("log.jsonl", "options.json", "lock"):
        (folder / name).unlink()
    for name in ("log.jsonl", "options.json"):
        (folder / name).symlink_to(outside)
    with make_run(folder, resume=False) as run:
        (folder / "log.jsonl").unlink()
        (folder / "log.jsonl").symlink_to(outside)
        run.log({"step": 1})
        last.unlink()
        last.symlink_to(outside)
        run.save(1)
    assert outside.read_text() == "untouched"
    assert not last.is_symlink()
    assert not (folder / "options.json").is_symlink()
    last.unlink()
    last.symlink_to(outside)
    with pytest.raises(ValueError, match="must be a file of this folder, got a link to"):
        make_run(folder)
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        make_run(folder)
    assert outside.read_text() == "untouched"


def test_modes_of_files(tmp_path, monkeypatch):  # S13
    seen, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append(sorted(tmp_path.iterdir())), real(descriptor)))
    opened, really = [], os.open
    monkeypatch.setattr(os, "open", lambda *arguments: (opened.append(arguments), really(*arguments))[1])
    before = os.umask(0o027)
    try:
        for _ in range(2):
            write_atomically(tmp_path / "a", b"secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    temporary = [arguments for arguments in opened if str(arguments[0]).endswith(".tmp")]
    assert len({arguments[0] for arguments in temporary}) == 2  # never the same name
    for path, flags, mode in temporary:
        assert Path(path).parent == tmp_path
        assert flags & os.O_EXCL
        assert flags & os.O_NOFOLLOW
        assert mode == 0o600


# --------------------------------------------------------------------------------------------------------- names

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=http://example.com/x onerror='a()'>",
    "\"quoted' & more",
    "$\\frac$ and $x",
    "\\$y$",
    "line\nbreak\ttab",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe",
    "=cmd()|'/c calc'!A0",
    "+1",
    "-1",
    "@a",
    "\t=1",
    "![i](http://example.com/i.png) [l](javascript:a()) `c` | b | *a* _b_ # h",
    "caf\udce9",  # Latin-1 on a disk where names are UTF-8
    "\0",
    "",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_are_shown(name):  # S8, S9, S12
    line = shown_names.visible(name)
    assert line.isprintable()
    line.encode()  # it is text

    markdown = shown_names.as_markdown(name)
    assert not set("<>\"'") & set(markdown)
    for mark in "`*_[]()!|$#:":
        assert markdown.count(mark) == markdown.count("\\" + mark) + html_entities(markdown).count(mark), mark


def html_entities(text):
    return "".join(part.split(";")[0] for part in text.split("&")[1:])


def test_names_in_a_picture(tmp_path):  # S9
    """As a formula some of them would raise, and others lose characters."""
    pytest.importorskip("matplotlib", reason="needs the examples extra")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    FigureCanvasAgg(figure)
    for name in HOSTILE:
        text = figure.text(0, 0, shown_names.visible(name), parse_math=False)
        shown, formula = text._preprocess_math(text.get_text())
        assert not formula
        assert shown == shown_names.visible(name)
    figure.canvas.draw()
    figure.text(0, 0, "$\\frac$")
    with pytest.raises(ValueError, match="frac"):
        figure.canvas.draw()


REFUSED = ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "a\0", "a\n", "CON", "con.txt", "lpt1", "x" * 300, "a.", "a "]
REFUSED += [" a", "c:", "a*", "\x1b[m", "caf\udce9", "é" * 150]


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_names_that_no_folder_gets(name):  # S5
    with pytest.raises(
        ValueError, match="safe_name: name must be one that a folder can have on every system, got"
    ) as e:
        shown_names.safe_name(name)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 1000


def test_names_that_a_folder_gets(tmp_path):  # S5
    for name in ("polar bear", "n01440764", "a.b-c_d", "日本", "console", "..a", "x" * 200):
        assert shown_names.safe_name(name) == name
        (tmp_path / name).mkdir()


# --------------------------------------------------------------------------------------------- what no code here does


def calls_and_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield f"{node.func.id}()", node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield f".{node.func.attr}()", node


FORBIDDEN = {
    "pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "importlib",
    "runpy",
    "tarfile",
}  # S3
FORBIDDEN |= {"eval()", "exec()", "__import__()", "compile()", ".extractall()", ".extract()", ".unpack_archive()"}  # S7
FORBIDDEN |= {"subprocess", ".system()", ".popen()"}  # S10
FORBIDDEN |= {"requests", "urllib", "http", "socket"}  # S15
FORBIDDEN |= {"csv"}  # S9: a cell that begins with = would be a formula


@pytest.mark.parametrize(
    "path", sorted([*EXAMPLES.rglob("*.py"), *(EXAMPLES.parent / "equireg").rglob("*.py")]), ids=str
)
def test_what_no_code_does(path):  # S1, S3, S7, S10, S11, S15
    """No code is read from data: no pickles, no archives, no names looked up outside of tables."""
    for name, node in calls_and_names(path):
        assert name not in FORBIDDEN, f"line {node.lineno}"
        if name == ".load()" and ast.unparse(node.func) == "torch.load":
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert options["weights_only"] == "True", f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert all(option.arg != "shell" for option in node.keywords), f"line {node.lineno}"


def test_no_step_asks_what_time_it_is():  # T15
    """So a clock that jumps changes nothing; the bar alone shows times."""
    paths = list((EXAMPLES / "training").glob("*.py"))
    assert paths
    for path in paths:
        assert not {"time", "datetime"} & {part for part, _ in calls_and_names(path)}
