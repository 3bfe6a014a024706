"""What is written when the package is built or installed.

``equireg/__init__.pyi``: the public names, for type checkers. ``equireg/__init__.py`` finds them by importing the
modules; this file reads the same ``__all__`` without importing any, so a build needs no PyTorch.

The description on a package index: the README. If the environment variable ``EQUIREG_REPOSITORY`` has the repository's
address, its links and pictures lead there, as an index has no other files; without it the README is taken as it is.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

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


def absolute(text: str, repository: str) -> str:
    """Markdown whose links to files lead to the repository, and whose pictures come from there."""

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/HEAD/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(((?!#|\w+:)[^)\s]+)\)", link, text)


class DescriptionHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = os.environ.get("EQUIREG_REPOSITORY", "").rstrip("/")
        metadata |= {"readme": {"content-type": "text/markdown", "text": text}, "urls": {}}
        if repository:
            metadata["readme"]["text"] = absolute(text, repository)
            changes = f"{repository}/blob/HEAD/CHANGELOG.md"
            metadata["urls"] = {"Repository": repository, "Changelog": changes, "Issues": f"{repository}/issues"}
