"""Plug-in regularizers that make vision models learn more from less data.

A module (a file, not a folder) lists its public names in ``__all__``; all of them can be imported from ``equireg``.
Type checkers and editors read the same list in ``__init__.pyi``, which ``hatch_build.py`` writes when the package is
installed.
"""

from importlib import import_module as _import_module
from pkgutil import walk_packages as _walk_packages
from typing import Any as _Any

__version__ = "0.1.0"

# Left out are modules of one underscore, and those that need a package of their own: who wants these imports them.
_OPTIONAL = {"integrations", "triton"}

_public: dict[str, _Any] = {}
for _module in _walk_packages(__path__, f"{__name__}."):
    _parts = _module.name.split(".")[1:]
    if not _module.ispkg and _OPTIONAL.isdisjoint(_parts) and not any(_part.startswith("_") for _part in _parts):
        _names = _import_module(_module.name)
        _public |= {_name: getattr(_names, _name) for _name in getattr(_names, "__all__", ())}
globals().update(_public)
__all__ = sorted(_public)
