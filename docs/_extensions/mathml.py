"""Formulas as MathML, made at build time: pages need neither a network nor a script to show them.

`latex2mathml` converts. What it does not know it prints as raw TeX, so that is a warning here, and
with it an error of `make docs`.
"""

from __future__ import annotations

from html import unescape
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from docutils import nodes
from latex2mathml.converter import convert_to_element
from sphinx.application import Sphinx
from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.util.typing import ExtensionMetadata
    from sphinx.writers.html5 import HTML5Translator

_LOGGER = logging.getLogger(__name__)
NORMS = {"|", "\u2016"}
# A macron, a horizontal bar, and what fonts for mathematics can draw at any length.
BARS, OVERLINE = {"\u00af", "\u2015"}, "\u203e"


def _mathml(node: nodes.Element, display: str) -> str:
    source = node.astext()
    root = convert_to_element(source, display=display)
    for element in root.iter():
        element.text = unescape(element.text or "") or None
    # Bars are overlines close to what they are over, which grow; latex2mathml takes dashes.
    for over in root.iter("mover"):
        bar = over[-1]
        if bar.text in BARS:
            bar.text, bar.attrib = OVERLINE, {"stretchy": "true"}
            over.set("accent", "true")
    # Bars around something are no relations, which browsers leave room beside.
    for sign in root.iter("mo"):
        if sign.text in NORMS:
            sign.attrib.update(lspace="0", rspace="0")
    made = ET.tostring(root, encoding="unicode")
    if "\\" in made:
        _LOGGER.warning("cannot convert all of %r", source, location=node)
    return made


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(f'<span class="math">{_mathml(node, "inline")}</span>')
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{_mathml(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
