import copy
import io
import os
import pickle
import re
import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from equireg import ImageFiles, WithIndex
from tests.image_trees import make_images


def read(path):
    """The pixels [3, H, W] of the only image of a set."""
    image, label = ImageFiles([path], [0], ["a"])[0]
    assert image.mode == "RGB"
    assert label == 0
    return pil_to_tensor(image)


def picture(mode, size, data):
    image = Image.new(mode, size)
    image.putdata(data)
    return image


def pixels(*rows):
    """Rows of pixels as [3, H, W]."""
    return torch.tensor(rows, dtype=torch.uint8).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------- every kind of file, T12


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def near(found, expected, limit):
    return (found.double() - torch.as_tensor(expected).double()).abs().max() <= limit


@pytest.mark.parametrize("ending", ["png", "bmp", "ppm", "tiff", "webp", "gif"])
def test_lossless_kinds(tmp_path, ending):  # T12
    colors = [RED, GREEN, BLUE, WHITE, (0, 0, 0), (255, 255, 0)]
    picture("RGB", (3, 2), colors).save(tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert torch.equal(read(tmp_path / f"a.{ending}"), pixels(colors[:3], colors[3:]))


def test_jpeg_whatever_its_name(tmp_path):  # T12
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "a", format="JPEG", quality=95)
    os.link(tmp_path / "a", tmp_path / "a.png")
    for name in ("a", "a.png"):
        assert near(read(tmp_path / name), torch.tensor([200, 100, 50])[:, None, None], 3)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_gray_of_16_bits_is_divided_by_257(tmp_path, ending):  # T12
    values = torch.arange(65536)
    image = Image.frombytes("I;16", (256, 256), b"".join(struct.pack("<H", value) for value in range(65536)))
    image.save(tmp_path / f"a.{ending}")
    expected = (values.double() / 257).round().to(torch.uint8).reshape(256, 256).expand(3, -1, -1)
    assert torch.equal(read(tmp_path / f"a.{ending}"), expected)


@pytest.mark.parametrize(
    ("mode", "values", "ending", "expected"),
    [
        ("L", [7, 250], "png", [7, 250]),
        ("1", [0, 255], "png", [0, 255]),
        ("LA", [(0, 255), (0, 0)], "png", [0, 255]),  # transparent: white
        ("F", [0.0, 0.5, 1.0, 7.0], "tiff", [0, 128, 255, 255]),
    ],
)
def test_gray(tmp_path, mode, values, ending, expected):  # T12
    picture(mode, (len(values), 1), values).save(tmp_path / f"a.{ending}")
    assert torch.equal(read(tmp_path / f"a.{ending}"), pixels([(value,) * 3 for value in expected]))


def png(width, height, depth, color_type, data):
    """The file, written by hand."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)), (b"IDAT", data)]
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_color_of_16_bits(tmp_path):  # T12
    row = b"\0" + struct.pack(">HHH", 0xFFFF, 0x80FF, 0x0100)
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, zlib.compress(row)))
    assert torch.equal(read(tmp_path / "a.png"), pixels([(0xFF, 0x80, 0x01)]))


def test_cmyk(tmp_path):  # T12
    inks = [(0, 0, 0, 0), (255, 255, 255, 255), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 128)]
    picture("CMYK", (6, 1), inks).save(tmp_path / "a.tiff")
    rgb = [tuple(round((255 - ink) * (255 - k) / 255) for ink in (c, m, y)) for c, m, y, k in inks]
    assert near(read(tmp_path / "a.tiff"), pixels(rgb), 1)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)  # red, stored inverted
    assert near(read(tmp_path / "a.jpg"), torch.tensor(RED)[:, None, None], 6)


@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_transparency_is_laid_over_white(tmp_path, ending):  # T12
    colors = [(10, 20, 30, 255), (10, 20, 30, 0), (200, 0, 100, 51)]
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    picture("RGBA", (3, 1), colors).save(tmp_path / f"a.{ending}", **options)
    over = [tuple(round((v * a + 255 * (255 - a)) / 255) for v in rgb) for *rgb, a in colors]
    assert near(read(tmp_path / f"a.{ending}"), pixels(over), 1)


def test_palettes(tmp_path):  # T12
    palette = picture("P", (3, 1), [0, 1, 2])
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.save(tmp_path / "p.png")
    assert torch.equal(read(tmp_path / "p.png"), pixels([RED, GREEN, BLUE]))
    palette.save(tmp_path / "one.png", transparency=1)
    palette.save(tmp_path / "bytes.png", transparency=b"\xff\x00\xff")
    palette.save(tmp_path / "one.gif", transparency=1)
    for name in ("one.png", "bytes.png", "one.gif"):
        assert torch.equal(read(tmp_path / name), pixels([RED, WHITE, BLUE])), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_turned_upright(tmp_path, orientation):  # T12
    """By the standard: where the visual top and left are, e.g. 6: row 0 is the right side, column 0 the top."""
    stored = torch.randint(256, (3, 3, 5), dtype=torch.uint8)
    upright = {
        1: stored,
        2: stored.flip(2),
        3: stored.flip(1, 2),
        4: stored.flip(1),
        5: stored.transpose(1, 2),
        6: stored.transpose(1, 2).flip(2),
        7: stored.transpose(1, 2).flip(1, 2),
        8: stored.transpose(1, 2).flip(1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture("RGB", (5, 3), [tuple(p) for p in stored.flatten(1).T.tolist()])
    for ending in ("png", "tiff"):
        image.save(tmp_path / f"a.{ending}", exif=exif)
        assert torch.equal(read(tmp_path / f"a.{ending}"), upright)


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_the_first_of_several_images(tmp_path, ending):  # T12
    frames = [Image.new("RGB", (2, 2), color) for color in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    assert near(read(tmp_path / f"a.{ending}"), torch.tensor(RED)[:, None, None], 3)


# --------------------------------------------------------------------------------------------------------- broken files


def broken_files(folder):
    """Unreadable in each way, and one that is whole."""
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(stream, "JPEG")
    whole = stream.getvalue()
    contents = {
        "empty.jpg": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "head.png": b"\x89PNG\r\n\x1a\n",
        "page.jpg": b"<!DOCTYPE html><html>404</html>",
        "drawing.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # would start a PostScript interpreter
        "whole.jpg": whole,
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "folder.jpg").mkdir()
    return [folder / name for name in (*contents, "folder.jpg", "missing.jpg")]


REASONS = {
    "empty.jpg": "no image of a known kind",
    "cut.jpg": "truncated",
    "page.jpg": "known kind",
    "drawing.jpg": "known kind",
    "missing.jpg": "No such",
}


def test_broken_files_raise_with_their_path_and_the_reason(tmp_path):  # T12
    paths = broken_files(tmp_path)
    files = ImageFiles(paths, [0] * len(paths), ["a"])
    for index, path in enumerate(paths):
        if path.name == "whole.jpg":
            assert files[index][0].size == (64, 64)
            continue
        reason = REASONS.get(path.name, "")
        with pytest.raises(ValueError, match=f"ImageFiles: file '{re.escape(str(path))}' must be an image.*{reason}"):
            files[index]


def test_broken_files_are_skipped_and_counted(tmp_path):  # T12
    paths = broken_files(tmp_path)
    labels = torch.arange(len(paths))
    names = [path.name for path in paths]
    contexts = {"contexts": labels % 2, "context_names": ["x", "y"]}
    files = ImageFiles(paths, labels, names, **contexts, broken="skip", progress=False)
    assert [os.path.basename(path) for path in files.paths] == ["whole.jpg"]
    assert (files.labels.tolist(), files.targets, files.contexts.tolist()) == ([5], [5], [1])
    assert [path for path, _ in files.skipped] == [str(path) for path in paths if path.name != "whole.jpg"]
    assert all(path in reason for path, reason in files.skipped)
    assert "7 files skipped" in repr(files)
    assert files.take([0]).skipped == files.skipped


@pytest.mark.parametrize("cap", [7, 0.875, None, 6, 0, 0.8])
def test_max_broken_is_a_count_or_a_share(tmp_path, cap):  # T12
    paths = broken_files(tmp_path)
    options = {"broken": "skip", "max_broken": cap, "progress": False}
    if cap in (7, 0.875, None):
        assert len(ImageFiles(paths, [0] * 8, ["a"], **options)) == 1
        return
    with pytest.raises(ValueError, match=rf"8 files of which at most max_broken={cap} are broken, got 7.*empty\.jpg"):
        ImageFiles(paths, [0] * 8, ["a"], **options)


def test_a_lack_of_file_handles_is_no_broken_file(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(24, "Too many open files")

    make_images(tmp_path, "a.png")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        ImageFiles([tmp_path / "a.png"], [0], ["a"], broken="skip", progress=False)


WHOLE = {}
for _kind in ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP"):
    _stream = io.BytesIO()
    Image.effect_noise((24, 24), 50).convert("RGB").save(_stream, _kind)
    WHOLE[_kind] = _stream.getvalue()


@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_any_damage_gives_an_image_or_an_error_with_the_path(tmp_path_factory, kind, data):  # T12
    damaged = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(0, 20))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    path = tmp_path_factory.mktemp("damage") / "a.jpg"
    path.write_bytes(bytes(damaged))
    try:
        image, _ = ImageFiles([path], [0], ["a"], max_pixels=10**6)[0]
    except ValueError as error:
        assert repr(str(path)) in str(error)  # noqa: PT017
    else:
        assert image.mode == "RGB"


# --------------------------------------------------------------------------------------------------- huge images, T13


def test_pixel_cap(tmp_path, monkeypatch):  # T13
    make_images(tmp_path, "a.png", size=(30, 20))
    assert ImageFiles([tmp_path / "a.png"], [0], ["a"], max_pixels=600)[0][0].size == (30, 20)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # refused without decoding
    with pytest.raises(ValueError, match=r"a\.png' must be of at most max_pixels=599 pixels, got 30 x 20"):
        ImageFiles([tmp_path / "a.png"], [0], ["a"], max_pixels=599)[0]


@pytest.mark.parametrize("side", [9_500, 60_000])  # more than Pillow warns of, and more than it opens
def test_decompression_bombs_are_refused_with_their_path(tmp_path, side):  # T13
    (tmp_path / "bomb.png").write_bytes(png(side, side, 1, 0, b""))
    files = ImageFiles([tmp_path / "bomb.png"], [0], ["a"])
    with pytest.raises(ValueError, match=r"bomb\.png.*(Decompression|decompression|max_pixels)"):
        files[0]
    skipping = ImageFiles([tmp_path / "bomb.png"], [0], ["a"], broken="skip", progress=False)
    assert len(skipping.skipped) == 1


# ------------------------------------------------------------------------------------------------------- the data set


def test_items_and_attributes(tmp_path):
    make_images(tmp_path, "a.png", "b.png", "c.png")
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    contexts = {"contexts": [2, 0, 1], "context_names": ["p", "q", "r"]}
    files = ImageFiles(paths, [1, 0, -1], ["x", "y"], **contexts, transform=lambda image: image.size)
    assert [files[n] for n in range(3)] == [((6, 4), 1), ((6, 4), 0), ((6, 4), -1)]
    assert files[-1] == files[2]
    assert list(files) == [files[n] for n in range(3)]  # iteration ends
    assert (files.paths, files.targets, files.classes) == (paths, [1, 0, -1], ["x", "y"])
    assert files.labels.dtype == files.contexts.dtype == torch.int64
    assert repr(files) == "ImageFiles(3 images, 2 classes, 3 contexts)"
    files.transform = None
    assert files[0][0].mode == "RGB"
    with pytest.raises(IndexError, match=r"index must be in 0 \.\. 2, got 3"):
        files[3]


def test_take():
    files = ImageFiles(list("abc"), [1, 0, 1], ["x", "y"], contexts=[0, 1, 1], context_names=["p", "q"], transform=str)
    taken = files.take(torch.tensor([2, 0, 2]))
    assert (taken.paths, taken.targets, taken.contexts.tolist()) == (["c", "a", "c"], [1, 1, 1], [1, 0, 1])
    assert (taken.classes, taken.context_names, taken.transform) == (files.classes, files.context_names, str)
    assert files.paths == ["a", "b", "c"]
    assert len(files.take([])) == 0
    with pytest.raises(ValueError, match=r"ImageFiles\.take: indices must be in 0 \.\. 2 .*, got 3 at position 1"):
        files.take([0, 3])
    with pytest.raises(ValueError, match="got -1"):
        files.take([-1])
    for mask in (files.labels == 1, [True, False, True], [0.0, 1.0]):  # not places
        with pytest.raises(TypeError, match="take: indices must be a tensor of whole numbers, got torch"):
            files.take(mask)


def test_through_workers(tmp_path):  # T12: pytorch/vision #485
    """In order, and an error names the path."""
    names = [f"{number}.png" for number in range(7)]
    for number, name in enumerate(names):
        make_images(tmp_path, name, color=(number, 0, 0))
    files = ImageFiles([tmp_path / name for name in names], range(7), names, transform=pil_to_tensor)
    batches = DataLoader(WithIndex(files), batch_size=3, num_workers=2)
    for images, labels, indices in batches:
        assert images[:, 0, 0, 0].tolist() == labels.tolist() == indices.tolist()
    (tmp_path / "5.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"5\.png"):
        list(batches)


def test_pickle_and_copy(tmp_path):
    files = ImageFiles([tmp_path / "a\udcff.png"], [0], ["x"], contexts=[0], context_names=["p"])
    for other in (pickle.loads(pickle.dumps(files)), copy.deepcopy(files)):  # noqa: S301
        assert other.paths == files.paths
        assert (other.targets, other.contexts.tolist(), other.skipped) == ([0], [0], [])


def test_file_names_of_any_bytes(tmp_path):  # S12
    name = b"\xff\xfe im age\n'\"<b>.png"
    path = os.path.join(os.fsencode(tmp_path), name)
    Image.new("RGB", (1, 1), RED).save(os.fsdecode(path), format="PNG")
    for given_path in (path, os.fsdecode(path)):
        assert torch.equal(read(given_path), pixels([RED]))
    os.truncate(path, 3)
    with pytest.raises(ValueError, match="must be an image") as raised:
        read(path)
    str(raised.value).encode("utf-8")  # can be printed anywhere
    files = ImageFiles([path], [0], ["a"], broken="skip", progress=False)
    files.skipped[0][1].encode("utf-8")
    repr(files).encode("utf-8")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [0]}, ValueError, r"labels must be \[2\], one for each path, got \[1\]"),
        ({"labels": [0, 2]}, ValueError, r"labels must be in -1 \.\. 1 \(classes\), got 2 at position 1"),
        ({"labels": [0, -2]}, ValueError, "labels .* got -2 at position 1"),
        ({"labels": [0.5, 1.0]}, TypeError, "labels must be a tensor of whole numbers, got torch.float32"),
        ({"labels": ["a", "b"]}, TypeError, "labels must be whole numbers"),
        ({"contexts": [0, 0]}, ValueError, "contexts must be given together with context_names"),
        ({"contexts": [0, 1], "context_names": ["p"]}, ValueError, r"contexts must be in 0 \.\. 0 .*, got 1"),
        ({"classes": 5}, TypeError, "classes must be a list of names, got int 5"),
        ({"context_names": "ab", "contexts": [0, 1]}, TypeError, "context_names must be a list of names, got str 'ab'"),
        ({"broken": "ignore"}, ValueError, "broken must be one of 'raise', 'skip', got 'ignore'"),
        ({"max_broken": 1.5}, ValueError, r"max_broken must be in 0 \.\. 1, got 1\.5"),
        ({"max_broken": -1}, ValueError, "max_broken must be at least 0, got -1"),
        ({"max_pixels": 0}, ValueError, "max_pixels must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"paths": ["a", "b"], "labels": [0, 1], "classes": ["x", "y"], **change}
    with pytest.raises(error, match="ImageFiles: " + message):
        ImageFiles(**arguments)


def test_real_images(real_images):
    """Every file of a real folder is read, as Pillow itself has it."""
    paths = sorted((real_images / "imagenet-samples").glob("*.jpg"))
    files = ImageFiles(paths, [0] * len(paths), ["any"], broken="skip", progress=False)
    assert len(files) == len(paths) > 100
    assert files.skipped == []
    for index in range(0, len(paths), 20):
        with Image.open(paths[index]) as image:
            assert torch.equal(pil_to_tensor(files[index][0]), pil_to_tensor(image.convert("RGB")))
