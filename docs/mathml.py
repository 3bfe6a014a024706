"""Formulas as MathML, written when the site is built: no page needs a script from elsewhere to show them.

A Sphinx extension around latex2mathml.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(node: nodes.Element, display: str) -> str:
    """The formula as a ``<math>`` element; a warning where a macro is unknown, which would stand there as it is."""
    latex = node.astext()
    if r"\\" in latex:  # several lines, as Sphinx and MathJax take them
        latex = rf"\begin{{split}}{latex}\end{{split}}"
    element = convert(latex, display=display)
    unknown = re.search(r"\\[A-Za-z]+", element)
    if unknown:
        logger.warning("latex2mathml does not know %s", unknown.group(), location=node)
    return element


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{mathml(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
