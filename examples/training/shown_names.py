"""Names of classes, files and runs come from folders that others made: how they are shown and used without doing harm.

``visible`` for a terminal, a log or a picture (with ``parse_math=False``), ``as_markdown`` for a page, ``safe_name``
for a folder of that name.
"""

from __future__ import annotations

import html
import re

LONGEST = 200  # bytes; file systems end at 255, and endings are added
# What Windows keeps for itself, with any ending.
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789")}


def visible(name: object) -> str:
    r"""For a terminal, a log or a picture: on one line, with what cannot be seen or decoded written out.

    >>> print(visible("cat\n\x1b[31mred"))
    cat\n\x1b[31mred
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def as_markdown(name: object) -> str:
    r"""For a Markdown or HTML page: neither tags nor Markdown nor formulas, only the characters.

    >>> print(as_markdown("<b>a_b|c</b>"))
    &lt;b&gt;a\_b\|c&lt;/b&gt;
    """
    escaped = re.sub(r"([\\`*_{}\[\]()#!|$~^:])", r"\\\1", visible(name))
    return re.sub("[&<>\"']", lambda mark: html.escape(mark[0]), escaped)


def safe_name(name: str) -> str:
    """The name itself, if a file or folder can be called so on every system and lies in its folder.

    Raises:
        ValueError: it is empty or longer than 200 bytes, a way elsewhere (``..``, ``/``, ``\\``, ``:``), kept by
            Windows (``CON``), or has characters that cannot be seen or that ``<>"|?*`` are.

    >>> safe_name("polar bear")
    'polar bear'
    """
    bad = [c for c in name if not c.isprintable() or c in '/\\:<>"|?*']
    reserved = name.split(".")[0].rstrip().upper() in RESERVED
    length = len(name.encode(errors="surrogatepass"))
    if bad or reserved or not name or name[-1] in ". " or name[0] == " " or length > LONGEST:
        shown = visible(name) if len(name) <= LONGEST else f"{visible(name[:LONGEST])}... ({length} bytes)"
        raise ValueError(f"safe_name: name must be one that a folder can have on every system, got {shown!r}")
    return name
