import os
import re
import time

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from equireg import read_domains, read_image_folder, read_nico, read_vipriors
from tests.image_trees import make_cells, make_images

READERS = [read_image_folder, read_vipriors, read_nico, read_domains]


def names(files, parts=2):
    """The paths without what lies above."""
    return ["/".join(path.split(os.sep)[-parts:]) for path in files.paths]


# ----------------------------------------------------------------------------------------------- folders that fail, T11


@pytest.mark.parametrize("read", READERS)
def test_roots_that_are_no_folders(tmp_path, monkeypatch, read):  # T11
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a").touch()
    for root, error, message in [
        ("none", FileNotFoundError, f"root .*{re.escape(str(tmp_path))}/none"),
        (tmp_path / "empty", (ValueError, FileNotFoundError), f".*'{re.escape(str(tmp_path))}/empty'"),
        (tmp_path / "a", ValueError, "root must be a folder that can be read, got '.*a'"),
        ("a\0b", ValueError, ".*null byte"),
        (3, TypeError, "root must be the path of a folder, got int"),
    ]:
        with pytest.raises(error, match=f"{read.__name__}: {message}"):
            read(root)


def test_one_class(tmp_path):  # T11
    make_images(tmp_path, "train/a/1.png", "val/a/1.png", "val/b/1.png", "nico/cat/snow/1.png", "nico/cat/grass/1.png")
    for read, root, message in [
        (read_image_folder, tmp_path / "train", f"'{tmp_path}/train' with one folder, 'a', alone"),
        (read_vipriors, tmp_path, "'a', alone"),
        (read_nico, tmp_path / "nico", "'cat', alone"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(root)
    assert len(read_image_folder(tmp_path / "train", class_list=["a"])) == 1  # asked for by name


@pytest.mark.parametrize("read", READERS)
def test_no_permission(tmp_path, read):  # T11
    make_images(tmp_path, "train/a/1.png", "train/b/1.png")
    read_image_folder(tmp_path / "train")
    tmp_path.chmod(0)
    superuser = os.geteuid() == 0  # who may read everything
    try:
        if superuser:
            os.seteuid(65534)
        with pytest.raises(ValueError, match=f"{read.__name__}: root must .*'{tmp_path}': Permission denied"):
            read(tmp_path)
    finally:
        if superuser:
            os.seteuid(0)
        tmp_path.chmod(0o700)


def test_classes_without_whole_images(tmp_path):  # T11, T12
    make_images(tmp_path, "a/1.png", "c/1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=f"folder '{tmp_path}/b' must be one with images in it, got none"):
        read_image_folder(tmp_path)
    (tmp_path / "b" / "1.png").touch()
    with pytest.raises(ValueError, match=r"class 'b' must be one with images .* 1 files skipped .*b/1\.png"):
        read_image_folder(tmp_path, broken="skip", progress=False)


def test_options_reach_the_images(tmp_path):
    make_images(tmp_path, "a/1.png", "b/1.png", "b/2.png")
    (tmp_path / "a" / "0.png").touch()
    files = read_image_folder(tmp_path, transform=lambda im: im.size, broken="skip", max_broken=1, progress=False)
    assert (files[0], files.targets) == (((6, 4), 0), [0, 1, 1])
    assert [os.path.basename(path) for path, _ in files.skipped] == ["0.png"]
    with pytest.raises(ValueError, match="max_broken=0"):
        read_image_folder(tmp_path, broken="skip", max_broken=0, progress=False)
    with pytest.raises(ValueError, match="max_pixels=23"):
        read_image_folder(tmp_path, max_pixels=23)[1]


# -------------------------------------------------------------------------------------------------------- which files


def test_as_torchvision_has_it(tmp_path, real_images):
    make_images(tmp_path, "b/2.png", "b/10.JPG", "a/x.webp", "a/deeper/y.png", "a/Z.jpeg")
    for folder in (tmp_path, real_images / "cifar10" / "test"):
        mine, theirs = read_image_folder(folder), ImageFolder(str(folder))
        assert list(zip(mine.paths, mine.targets)) == theirs.samples
        assert mine.classes == theirs.classes


def test_hidden_files_and_others_are_left_out(tmp_path):  # T12: misnamed images are found by their first bytes
    make_images(tmp_path, "a/1.png", "b/1.png", ".git/1.png", "a/.thumb.png")
    (tmp_path / "a" / "._1.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        Image.new("RGB", (2, 2)).save(tmp_path / "b" / f"image of {kind}", format=kind)
    os.mkfifo(tmp_path / "b" / "pipe.png")  # reading it would wait for ever
    files = read_image_folder(tmp_path)
    assert files.classes == ["a", "b"]
    assert names(files) == ["a/1.png", "b/1.png", *(f"b/image of {k}" for k in ("GIF", "JPEG", "PNG", "TIFF", "WEBP"))]
    assert all(files[n][0].mode == "RGB" for n in range(len(files)))


def test_names_of_any_bytes(tmp_path):  # S12
    odd = [b"\xff\xfe", b"a b", b"line\nbreak", b"'\"<script>", b"-rf", "ü".encode(), b"CON", b"x" * 255]
    for name in odd:
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        Image.new("RGB", (1, 1)).save(os.fsdecode(os.path.join(folder, name[:200] + b".png")))
    files = read_image_folder(tmp_path)
    assert files.classes == sorted(os.fsdecode(name) for name in odd)
    assert files.targets == list(range(len(odd)))
    assert all(files[n][0].mode == "RGB" for n in range(len(files)))
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\nCON\n")
    assert read_image_folder(tmp_path, class_list=tmp_path / "list.txt").classes == [os.fsdecode(b"\xff\xfe"), "CON"]
    with pytest.raises(FileNotFoundError) as raised:
        read_image_folder(tmp_path / os.fsdecode(b"\xff\xfe") / "none")
    str(raised.value).encode("utf-8")  # can be printed anywhere
    assert read_image_folder(os.fsencode(tmp_path)).paths == files.paths


def test_links_that_leave_the_root(tmp_path):  # S6
    make_images(tmp_path, "outside/1.png", "root/a/1.png", "root/b/1.png")
    root = tmp_path / "root"
    (root / "b" / "2.png").symlink_to(root / "a" / "1.png")  # stays inside
    assert len(read_image_folder(root)) == 3
    for link, target in ((root / "c", tmp_path / "outside"), (root / "a" / "3.png", tmp_path / "outside" / "1.png")):
        link.symlink_to(target)
        message = f"link '{link}' must be one inside of root.*'{target}' outside of '{root}'"
        with pytest.raises(ValueError, match=message):
            read_image_folder(root)
        assert len(read_image_folder(root, follow_links=True)) == 4
        link.unlink()
    (root / "d").symlink_to(tmp_path / "root-beside")  # a name that begins as the root's
    with pytest.raises(ValueError, match="outside of"):
        read_image_folder(root)


@pytest.mark.parametrize("read", [read_vipriors, read_nico, read_domains])
def test_links_in_the_other_readers(tmp_path, read):  # S6
    make_cells(tmp_path, {("outside", name): 9 for name in ("x", "y")})
    make_cells(tmp_path / "root", {(a, b): 9 for a in ("train", "val") for b in ("x", "y")})
    (tmp_path / "root" / "test").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{read.__name__}: link '.*test' must be one inside of root"):
        read(tmp_path / "root")
    assert len(read(tmp_path / "root", follow_links=True)) > 0


def test_other_links(tmp_path):  # S6, T12
    """A root that is a link was named by the person; circles end; a dangling link is a broken image."""
    make_images(tmp_path, "real/a/1.png", "real/b/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names(read_image_folder(tmp_path / "link")) == ["a/1.png", "b/1.png"]
    (tmp_path / "real" / "a" / "2.png").symlink_to(tmp_path / "real" / "none.png")
    with pytest.raises(ValueError, match=r"a/2\.png'"):
        read_image_folder(tmp_path / "real")[1]
    (tmp_path / "real" / "a" / "up").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "a" / "self").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "real" / "around").symlink_to(tmp_path / "real" / "around")
    assert 3 <= len(read_image_folder(tmp_path / "real")) < 12


def test_indexing_is_fast(tmp_path):
    """50,000 files take well under two seconds; here 5,000, a tenth of that, in the processor's time."""
    make_cells(tmp_path, {("train", name): 2500 for name in "ab"})
    start = time.process_time()
    files = read_image_folder(tmp_path / "train")
    assert time.process_time() - start < 0.2
    assert len(files) == 5_000


# --------------------------------------------------------------------------------------------------------- class lists


def test_class_list_gives_the_order(tmp_path):
    make_images(tmp_path, "n1/1.png", "n2/1.png", "n3/1.png", "n3/2.png")
    (tmp_path / "list.txt").write_bytes("\ufeffn3\tgoldfish\r\nn1\r\n\r\n".encode())
    for class_list in (["n3", "n1"], tmp_path / "list.txt", str(tmp_path / "list.txt")):
        files = read_image_folder(tmp_path, class_list=class_list)
        assert (files.classes, files.targets) == (["n3", "n1"], [0, 0, 1])
        assert names(files) == ["n3/1.png", "n3/2.png", "n1/1.png"]


@pytest.mark.parametrize("name", ["../outside", "..", ".", "/etc", "a/b", "a\0b", "", "a/.."])
def test_class_lists_cannot_leave_the_root(tmp_path, name):  # S5
    make_images(tmp_path, "root/a/1.png", "root/a/b/1.png", "outside/1.png")
    message = f"class_list must be a list of the plain names of folders.*{re.escape(repr(name))}"
    with pytest.raises(ValueError, match=message):
        read_image_folder(tmp_path / "root", class_list=["a", name])


def test_other_wrong_class_lists(tmp_path):
    make_images(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "empty.txt").write_text("\n\n")
    missing = ["a", *(f"m{n}" for n in range(6))]
    for wrong, error, message in [
        (missing, FileNotFoundError, rf"'{tmp_path}' without 6 of 7: 'm0', 'm1', 'm2', 'm3', 'm4', \.\.\."),
        (tmp_path / "no", FileNotFoundError, f"class_list must be a file that exists, got '{tmp_path}/no'"),
        (["a", "x" * 300], FileNotFoundError, "'" + "x" * 300),  # S5
        (["a", "b", "a"], ValueError, "names each class once, got 'a'"),
        ([], ValueError, "one class or more, got none"),
        (tmp_path / "empty.txt", ValueError, "one class or more, got none"),
        (["a", 3], TypeError, "names, got a int in it"),
        (tmp_path, ValueError, "class_list must be a text file that can be read"),
    ]:
        with pytest.raises(error, match=message):
            read_image_folder(tmp_path, class_list=wrong)


# ------------------------------------------------------------------------------------------------------------- VIPriors


def challenge(root):
    """What the challenge's script makes: labelled train and val, and test/imgs without labels."""
    for wnid in ("n01", "n02", "n03"):
        make_images(root, *(f"imagenet_50/train/{wnid}/{wnid}_{n}.JPEG" for n in range(4)))
        make_images(root, *(f"imagenet_50/val/{wnid}/{wnid}_{n + 100}.JPEG" for n in range(4)))
    make_images(root, *(f"imagenet_50/test/imgs/img_{n}.JPEG" for n in range(12)))
    return root


def test_the_challenge_s_folders(tmp_path):
    challenge(tmp_path)
    for root in (tmp_path, tmp_path / "imagenet_50"):
        train, val, test = (read_vipriors(root, split) for split in ("train", "val", "test"))
        assert (len(train), len(val), len(test)) == (12, 12, 12)
        assert train.classes == val.classes == test.classes == ["n01", "n02", "n03"]
        assert train.targets == val.targets == [0] * 4 + [1] * 4 + [2] * 4
        assert test.targets == [-1] * 12
        assert names(test, 1) == [f"img_{n}.JPEG" for n in range(12)]  # not img_1, img_10, img_11, img_2
        assert not set(train.paths) & set(val.paths)
        assert test[3][0].mode == "RGB"


def test_labelled_test_images(tmp_path):
    challenge(tmp_path)
    make_images(tmp_path, *(f"imagenet_50/testgt/{wnid}/1.JPEG" for wnid in ("n01", "n02", "n03")))
    assert read_vipriors(tmp_path, "test").targets == [0, 1, 2]


def test_shots_cut_training_only(tmp_path):  # T12: they count whole images where broken ones are skipped
    challenge(tmp_path)
    numbers = [os.path.basename(path)[:-5] for path in read_vipriors(tmp_path, shots=2).paths]
    assert numbers == ["n01_0", "n01_1", "n02_0", "n02_1", "n03_0", "n03_1"]
    assert [len(read_vipriors(tmp_path, split, shots=2)) for split in ("val", "test")] == [12, 12]
    with pytest.raises(ValueError, match="shots must be at most 4, the samples of class 'n01', got 5"):
        read_vipriors(tmp_path, shots=5)
    (tmp_path / "imagenet_50" / "train" / "n02" / "n02_0.JPEG").write_bytes(b"")
    files = read_vipriors(tmp_path, shots=2, broken="skip", progress=False)
    assert [os.path.basename(path)[:-5] for path in files.paths[2:4]] == ["n02_1", "n02_2"]
    assert (len(files), len(files.skipped)) == (6, 1)


def test_wrong_splits(tmp_path):
    """With other classes, labels would silently mean something else."""
    make_images(tmp_path, "train/a/1.png", "train/b/1.png")
    with pytest.raises(FileNotFoundError, match=f"root must have a folder 'val', got '{tmp_path}' without"):
        read_vipriors(tmp_path, "val")
    with pytest.raises(ValueError, match="split must be one of 'train', 'val', 'test', got 'valid'"):
        read_vipriors(tmp_path, "valid")
    make_images(tmp_path, "val/a/1.png", "val/b/1.png", "val/c/1.png")
    with pytest.raises(ValueError, match="folder '.*val' must be one with the classes of train, got 'c' in one of"):
        read_vipriors(tmp_path, "val")


@pytest.mark.parametrize(("shots", "count"), [(10, 500), (20, 1000), (50, 2500), (None, 2500)])
def test_real_vipriors(real_images, shots, count):
    folder = real_images / "tiny-vipriors64"
    train = read_vipriors(folder, shots=shots)
    val, test = (read_vipriors(folder, split, shots=shots) for split in ("val", "test"))
    assert (len(train), len(val), len(test)) == (count, 2500, 2500)
    assert torch.equal(train.labels.bincount(), torch.full((50,), count // 50))
    everything = ImageFolder(str(folder / "train"))
    first = [path for path, _ in everything.samples if int(os.path.basename(path)[:3]) < (shots or 50)]
    assert train.paths == first
    assert read_image_folder(folder / "train", class_list=folder / "classes.txt").classes == train.classes
    assert train[count - 1][0].size == (64, 64)
