"""Plug-in regularizers that make vision models learn more from less data.

A module (a file, not a folder) lists its public names in ``__all__``; all of them can be imported from ``equireg``.
"""

import importlib
import pkgutil

__version__ = "0.1.0"
__all__: list[str] = []

# Left out are modules of one underscore, and those that need a package of their own: who wants these imports them.
_OPTIONAL = {"integrations", "triton"}

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    _parts = _module.name.split(".")[1:]
    if not _module.ispkg and _OPTIONAL.isdisjoint(_parts) and not any(_part.startswith("_") for _part in _parts):
        _names = importlib.import_module(_module.name)
        for _name in getattr(_names, "__all__", ()):
            globals()[_name] = getattr(_names, _name)
            __all__.append(_name)
__all__.sort()
