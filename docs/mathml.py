"""Formulas as MathML, written when the site is built: no page needs a script from elsewhere to show them.

A Sphinx extension around latex2mathml. Browsers draw MathML Core; what of TeX it lacks is said in its terms here.
``_static/math.woff`` has the sizes and the italics, as a browser on Linux may find no font for formulas.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
ElementTree.register_namespace("", NAMESPACE[1:-1])
LIMITS = {"∑", "max", "min", "argmax", "argmin"}  # and those of \operatorname*
BELOW = {NAMESPACE + "msub": NAMESPACE + "munder", NAMESPACE + "msubsup": NAMESPACE + "munderover"}


def mathml(node: nodes.Element, display: str) -> str:
    """The formula as a ``<math>`` element; a warning where a macro is unknown, which would stand there as it is."""
    latex = node.astext()
    # Brackets of a given size are drawn at that of the line; as a pair they take the size of what they hold.
    latex = re.sub(r"\\[bB]igg?[lr]?\s*([(\[])", r"\\left\1", latex)
    latex = re.sub(r"\\[bB]igg?[lr]?\s*([)\]])", r"\\right\1", latex)
    if r"\\" in latex:  # several lines, as Sphinx and MathJax take them
        latex = rf"\begin{{split}}{latex}\end{{split}}"
    element = convert(latex, display=display)
    unknown = re.search(r"\\[A-Za-z]+", element)
    if unknown:
        logger.warning("latex2mathml does not know %s", unknown.group(), location=node)
    formula = ElementTree.fromstring(element)  # noqa: S314  # our own
    for row in formula.iter():
        _spaced(row)
    return ElementTree.tostring(formula, encoding="unicode")


def _spaced(row: ElementTree.Element) -> None:
    """Limits below their operator, and the names of functions as far from their neighbours as in TeX."""
    parts = list(row)
    for place, part in enumerate(parts):
        name = part[0] if part.tag in {*BELOW, NAMESPACE + "msup"} else part
        text = name.text or ""
        if text in {"⟨", "⟩"}:
            name.tag = NAMESPACE + "mo"
            name.set("stretchy", "false")
        if part.tag in BELOW and (text in LIMITS or name.get("movablelimits")):
            part.tag = BELOW[part.tag]
            name.set("movablelimits", "true")  # beside it within a line
        if not (text.isalpha() and len(text) > 1 and name.tag in {NAMESPACE + "mo", NAMESPACE + "mi"}):
            continue
        name.tag = NAMESPACE + "mo"
        follows = parts[place - 1].tag != NAMESPACE + "mo" if place else False
        opens = place + 1 == len(parts) or (parts[place + 1].text or "") in {"(", "["}
        name.set("lspace", "0.167em" if follows else "0em")
        name.set("rspace", "0em" if opens else "0.167em")


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{mathml(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
