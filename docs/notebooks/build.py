"""Runs the notebooks and writes them with what they show:  python docs/notebooks/build.py [NAME ...]

``NAME.py`` is the source, in jupytext's percent format, and the only file to edit. ``NAME.ipynb``
has its cells and their outputs; ``NAME.png`` is its first picture, small, for the gallery. Nothing
that changes from run to run is kept. It needs the extras ``docs`` and ``examples``.
"""

import base64
import io
import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path != Path(__file__))


def cells_of(name: str) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs; its cells are named by place, not at random."""
    notebook = jupytext.read(HERE / f"{name}.py")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel})
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place}"
        cell.metadata.pop("lines_to_next_cell", None)
    return notebook


def small(picture: str, side: int) -> bytes:
    """A PNG of at most 128 colours, and no larger than ``side``."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as opened:
        image = opened.convert("RGB")
    image.thumbnail((side, side))
    image.quantize(128).save(file, "PNG", optimize=True)
    return file.getvalue()


def build(name: str) -> None:
    notebook = cells_of(name)
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata.pop("language_info", None)  # the release of Python
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "image/png" in output.get("data", {})]
    (HERE / f"{name}.png").write_bytes(small(shown[0]["image/png"], 320))
    for data in shown:
        data["image/png"] = base64.b64encode(small(data["image/png"], 1200)).decode()
    nbformat.write(notebook, HERE / f"{name}.ipynb")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # sums do not depend on the number of cores
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # no bars are shown
    for name in sys.argv[1:] or NAMES:
        build(name)
