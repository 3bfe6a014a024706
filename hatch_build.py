"""Writes ``equireg/__init__.pyi`` when the package is built or installed: the public names, for type checkers.

``equireg/__init__.py`` finds them by importing the modules; this file reads the same ``__all__`` without importing any,
so a build needs no PyTorch.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STUB = "equireg/__init__.pyi"


def assigned(path: Path, name: str) -> Any:
    """What a module sets ``name`` to; an empty tuple if it does not."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    return ()


def public_names(package: Path) -> dict[str, list[str]]:
    """The names in ``__all__`` of each public module, by the module's full name."""
    optional = assigned(package / "__init__.py", "_OPTIONAL")
    modules = {path.relative_to(package).with_suffix("").parts: path for path in sorted(package.rglob("*.py"))}
    return {
        ".".join((package.name, *parts)): assigned(path, "__all__")
        for parts, path in modules.items()
        if optional.isdisjoint(parts) and not any(part.startswith("_") for part in parts)
    }


def stub(package: Path) -> str:
    """The text of ``__init__.pyi``."""
    modules = public_names(package)
    lines = ["# Written by hatch_build.py from the __all__ of the modules.", ""]
    lines += [f"from {module} import {name} as {name}" for module, names in modules.items() for name in names]
    everything = sorted(name for names in modules.values() for name in names)
    return "\n".join([*lines, "", "__version__: str", f"__all__ = {everything}", ""])


class StubHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        target = Path(self.root, STUB)
        written = target.with_suffix(f".{os.getpid()}")
        written.write_text(stub(target.parent), encoding="utf-8")
        written.replace(target)  # whole at any moment, for who reads it meanwhile
        build_data["artifacts"].append(f"/{STUB}")  # although git ignores it
