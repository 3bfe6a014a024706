"""Names of classes, files and runs come from folders that others made: how they are shown and used without doing harm.

``visible`` for a terminal or a log, ``as_text`` for a plot, ``as_markdown`` for a page, ``as_csv`` for a table's cell,
``safe_name`` and ``path_in`` for a folder of that name. To be copied beside the examples that import it.
"""

from __future__ import annotations

import html
import re
import string
from pathlib import Path

LONGEST = 200  # bytes; file systems end at 255, and endings are added
# What Windows keeps for itself, with any ending.
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789")}


def visible(name: object) -> str:
    r"""For a terminal or a log: on one line, with control characters, undecodable bytes and such written out.

    >>> print(visible("cat\n\x1b[31mred"))
    cat\n\x1b[31mred
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def as_text(name: object) -> str:
    r"""For matplotlib, which otherwise reads what stands between two dollar signs as a formula.

    >>> print(as_text("$\\frac$"))
    \$\frac\$
    """
    return visible(name).replace("$", r"\$")


def as_markdown(name: object) -> str:
    r"""For a Markdown or HTML page: neither tags nor Markdown nor formulas, only the characters.

    >>> print(as_markdown("<b>a_b|c</b>"))
    &lt;b&gt;a\_b\|c&lt;\/b&gt;
    """
    marks = "".join(set(string.punctuation) - set("&<>\"'"))
    escaped = re.sub(f"([{re.escape(marks)}])", r"\\\1", visible(name))
    return re.sub("[&<>\"']", lambda mark: html.escape(mark[0]), escaped)


def as_html(name: object) -> str:
    """For the text or a quoted attribute of an HTML page.

    >>> print(as_html("<script>"))
    &lt;script&gt;
    """
    return html.escape(visible(name))


def as_csv(name: object) -> str:
    """For a cell that ``csv.writer`` writes: a spreadsheet takes what begins with one of these for a formula.

    >>> print(as_csv("=cmd()"))
    '=cmd()
    """
    cell = visible(name)
    return f"'{cell}" if cell.lstrip().startswith(("=", "+", "-", "@")) else cell


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


def path_in(folder: Path, name: str) -> Path:
    """The path of ``name`` in ``folder``, if no link there leads out of it.

    Raises:
        ValueError: see ``safe_name``; or the path leads elsewhere.
    """
    path = folder / safe_name(name)
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"path_in: {visible(path)} must lie in its folder, got a link to {visible(path.resolve())}")
    return path
