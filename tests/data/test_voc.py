import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import VOCDetection
from torchvision.transforms import v2

from equireg import BoxFiles, read_voc
from tests.image_trees import make_images, make_voc

QUIET = {"progress": False}
GRAY = Image.new("RGB", (20, 10), "gray")


def test_a_box_covers_the_pixels_of_its_object(tmp_path):
    """From the first pixel to the last one, counted from 1."""
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[2:7, 11:20] = 255
    make_voc(tmp_path, "a", Image.fromarray(pixels), [("cat", 12, 3, 20, 7, False)])
    image, target = read_voc(tmp_path, **QUIET)[0]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert np.asarray(image)[y1:y2, x1:x2].all()
    assert np.asarray(image).astype(bool).sum() == 3 * (x2 - x1) * (y2 - y1)


def test_objects_as_torchvision_reads_them(tmp_path):
    """Classes sorted, difficult ones flagged, parts of objects left out, images without objects kept."""
    make_voc(tmp_path, "b", GRAY, [("dog", 1, 1, 20, 10, True), ("cat", 3, 2, 9, 8, False)], folder="JPEGImages")
    make_voc(tmp_path, "a", GRAY, [], folder="JPEGImages")
    make_voc(tmp_path, "c/d", GRAY, [("cat", 2.5, 2, 4, 5, False)], folder="JPEGImages")
    files = read_voc(tmp_path, **QUIET)
    assert repr(files) == "BoxFiles(3 images, 3 boxes, 2 classes)"
    assert files.classes == ["cat", "dog"]
    assert [os.path.relpath(path, tmp_path / "JPEGImages") for path in files.paths] == ["a.png", "b.png", "c/d.png"]
    for name, (_, target) in zip(("a", "b", "c/d"), (files[0], files[1], files[-1])):
        root = ElementTree.parse(tmp_path / "Annotations" / f"{name}.xml").getroot()  # noqa: S314
        objects = VOCDetection.parse_voc_xml(root)["annotation"].get("object", [])
        assert [files.classes[label] for label in target["labels"]] == [thing["name"] for thing in objects]
        assert [*map(int, target["difficult"])] == [int(thing["difficult"]) for thing in objects]
        corners = [[float(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for thing in objects]
        assert target["boxes"].shape == (len(objects), 4)
        assert torch.equal(target["boxes"], torch.tensor(corners).view(-1, 4) - torch.tensor([1, 1, 0, 0]))


def test_a_split_in_its_order_and_classes_of_a_list(tmp_path):
    for name in ("a", "b", "c"):
        make_voc(tmp_path, name, GRAY, [("cat", 1, 1, 5, 5, False)])
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c  1\na -1\n\n")
    files = read_voc(tmp_path, "train", class_list=["dog", "cat"], **QUIET)
    assert [Path(path).stem for path in files.paths] == ["c", "a"]
    assert [target["labels"].tolist() for _, target in files] == [[1], [1]]
    make_voc(tmp_path, "d e", GRAY, [("cat", 1, 1, 5, 5, False)])
    (lists / "train.txt").write_text("d e\na 1\n")
    assert [Path(path).stem for path in read_voc(tmp_path, "train", **QUIET).paths] == ["d e", "a"]
    (lists / "train.txt").write_text("d\n")
    with pytest.raises(ValueError, match="^read_voc: file .*train.txt' must be a list of images in root, got 'd'"):
        read_voc(tmp_path, "train", **QUIET)
    with pytest.raises(FileNotFoundError, match="^read_voc: split must be the name of a list, got none at .*val.txt'"):
        read_voc(tmp_path, "val", **QUIET)


def test_corners_counted_from_zero(tmp_path):
    make_voc(tmp_path, "a", GRAY, [("cat", 0, 0, 20, 10, False)])
    assert read_voc(tmp_path, first_pixel=0, **QUIET)[0][1]["boxes"].tolist() == [[0, 0, 20, 10]]


def test_torchvision_resizes_and_flips_boxes_with_their_image(tmp_path):
    make_voc(tmp_path, "a", GRAY, [("cat", 3, 1, 6, 10, False)])
    transform = v2.Compose([v2.ToImage(), v2.Resize((20, 60)), v2.RandomHorizontalFlip(1.0)])
    files = read_voc(tmp_path, transform=transform, **QUIET)
    for _ in range(2):  # the file's own boxes stay as they are
        image, target = files[0]
        assert image.shape == (3, 20, 60)
        assert target["boxes"].tolist() == [[42, 0, 54, 20]]
    assert target["labels"].tolist() == [0]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 1, 5, 5), r"a box of .*a.xml' must be one whose first pixel is 1 or above.*, got \[0.0, 1.0, 5.0, 5.0\]"),
        ((6, 1, 5, 5), r"a box of .*a.xml' must be one whose first pixel is 1 or above, and the last one not before"),
        ((1, 1, "nan", 5), r"a box of .*a.xml' must be one whose first pixel"),
        (
            (1, 1, "", 5),
            r"an object of .*a.xml' must be one with a name and a bndbox of xmin, ymin, xmax, ymax, got",
        ),
    ],
)
def test_refuses_boxes(tmp_path, box, message):
    make_voc(tmp_path, "a", GRAY, [("cat", *box, False)])
    with pytest.raises(ValueError, match=f"^read_voc: {message}"):
        read_voc(tmp_path, **QUIET)


def test_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="^read_voc: root must be a folder that exists, got .*Annotations'"):
        read_voc(tmp_path, **QUIET)
    make_voc(tmp_path, "a", GRAY, [("cat", 1, 1, 21, 10, False)])
    with pytest.raises(ValueError, match=r"^BoxFiles: boxes of .*a.png' must be inside of the image of 20 x 10, got"):
        read_voc(tmp_path, **QUIET)[0]
    with pytest.raises(ValueError, match=r"^read_voc: an object of 'a.png' must be of a class in class_list, got"):
        read_voc(tmp_path, class_list=["dog"], **QUIET)
    with pytest.raises(ValueError, match="^read_voc: first_pixel must be one of 0, 1, got 2"):
        read_voc(tmp_path, first_pixel=2, **QUIET)
    with pytest.raises(IndexError, match="^BoxFiles: index must be in 0 .. 0, got 1"):
        read_voc(tmp_path, **QUIET)[1]
    make_images(tmp_path / "images", "b.png")
    with pytest.raises(FileNotFoundError, match=r"^read_voc: every image must have an annotation, got none at .*b"):
        read_voc(tmp_path, **QUIET)
    (tmp_path / "Annotations/b.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"^read_voc: file .*b\.xml' must be an annotation in XML, got no element"):
        read_voc(tmp_path, **QUIET)
    for name in ("a", "b"):
        (tmp_path / f"Annotations/{name}.xml").write_text("<annotation/>")
    with pytest.raises(ValueError, match="^read_voc: root must be a folder with at least one box in its annotations"):
        read_voc(tmp_path, **QUIET)
    with pytest.raises(ValueError, match="^BoxFiles: targets must be of 1 images, as paths are, got 0"):
        BoxFiles(["a"], [], ["cat"])
