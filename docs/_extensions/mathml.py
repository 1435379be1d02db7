"""Formulas as MathML, made at build time: pages need neither a network nor a script to show them.

`latex2mathml` converts. What it does not know it prints as raw TeX, so that is a warning here, and
with it an error of `make docs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.util.typing import ExtensionMetadata
    from sphinx.writers.html5 import HTML5Translator

_LOGGER = logging.getLogger(__name__)


def _mathml(node: nodes.Element, display: str) -> str:
    source = node.astext()
    # A bar over several letters is a macron, which grows; latex2mathml takes a dash.
    made: str = convert(source, display=display).replace(
        '<mo accent="true">&#x02015;</mo>', '<mo accent="true" stretchy="true">&#x000AF;</mo>'
    )
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
