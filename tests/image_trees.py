"""Small folders of images for the tests of the readers."""

import os
from pathlib import Path

from PIL import Image


def make_images(root, *names, size=(6, 4), color=(200, 100, 50)):
    """An image file of one colour for every path below ``root``."""
    for name in names:
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
    return Path(root)


def make_cells(root, cells):
    """``root/<a>/<b>/<number>.png`` for ``cells[a, b]`` numbers; empty files, which only readers that skip open."""
    for (first, second), count in cells.items():
        folder = Path(root) / first / second
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            os.close(os.open(folder / f"{number:03}.png", os.O_CREAT))
    return Path(root)


def make_voc(root, name, image, objects, folder="images"):
    """``root/<folder>/<name>.png`` and ``root/Annotations/<name>.xml``, of (class, x1, y1, x2, y2, difficult)."""
    lines = [
        f"<object><name>{kind}</name><pose>Frontal</pose><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
        f"<xmax>2</xmax><ymax>2</ymax></bndbox></part><difficult>{int(difficult)}</difficult><bndbox><xmax>{x2}</xmax>"
        f"<xmin>{x1}</xmin><ymax>{y2}</ymax><ymin>{y1}</ymin></bndbox></object>"
        for kind, x1, y1, x2, y2, difficult in objects
    ]
    for path in (Path(root) / folder / f"{name}.png", Path(root) / "Annotations" / f"{name}.xml"):
        path.parent.mkdir(parents=True, exist_ok=True)
    image.save(Path(root) / folder / f"{name}.png")
    path.write_text("\n".join(["<annotation>", f"<filename>{name}.png</filename>", *lines, "</annotation>"]))
    return Path(root)
