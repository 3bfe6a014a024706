"""The pages of the API, written when the site is built: one for each room of the package, and each module beside them.

A Sphinx extension. A new public name, module or room needs no edit here. Modules that need a package of their own
(``integrations/``) have a page together: there names are imported from the module.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from sphinx.application import Sphinx

import equireg

# The page in words, where it is not docs/<place>.md.
IN_WORDS = {
    "backbones": "guides/any_backbone",
    "data": "guides/data",
    "features": "guides/measuring",
    "inference": "distillation",
    "probes": "guides/measuring",
}


def page(place: str, names: list[str]) -> str:
    """Of ``equireg.<place>``: what it is, the page that explains it in words, and its public names."""
    about = inspect.getdoc(import_module(f"equireg.{place}")) or ""
    lines = [place, "=" * len(place), "", about.partition("\n")[0], ""]
    words = IN_WORDS.get(place, place)
    if (Path(__file__).parent / f"{words}.md").exists():
        lines += [f"In words: :doc:`/{words}`.", ""]
    lines += [".. currentmodule:: equireg", ""]
    for name in names:
        lines += [f".. auto{'class' if inspect.isclass(getattr(equireg, name)) else 'function'}:: {name}"]
    return "\n".join([*lines, ""])


def page_of_modules(place: str) -> str:
    """Of a room whose modules are imported by themselves."""
    room = import_module(f"equireg.{place}")
    lines = [place, "=" * len(place), "", inspect.getdoc(room) or "", ""]
    for module in iter_modules(room.__path__, f"{room.__name__}."):
        lines += [module.name, "-" * len(module.name), "", f".. automodule:: {module.name}", ""]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """The pages, as ``<place>.rst``, instead of those of an earlier build."""
    places: dict[str, list[str]] = {}
    for name in sorted(equireg.__all__, key=lambda name: (getattr(equireg, name).__module__, name)):
        places.setdefault(getattr(equireg, name).__module__.split(".")[1], []).append(name)
    pages = {place: page(place, names) for place, names in places.items()}
    pages["integrations"] = page_of_modules("integrations")
    for old in set(folder.glob("*.rst")) - {folder / f"{place}.rst" for place in pages}:
        old.unlink()
    for place, text in pages.items():
        (folder / f"{place}.rst").write_text(text, encoding="utf-8")


def _write(app: Sphinx) -> None:
    if (folder := Path(app.srcdir, "api")).is_dir():
        write(folder)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
