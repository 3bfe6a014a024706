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
