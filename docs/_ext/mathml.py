"""Formulas as MathML. Sphinx would use MathJax, which the reader's browser must fetch.

Every current browser draws MathML by itself; docutils translates LaTeX into it. What docutils
cannot translate is a warning with the formula, hence an error in `make docs`.
"""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)


def translate(translator, node, block):
    """The MathML of one formula, or its LaTeX source and a warning."""
    source = node.astext()
    if block and "\\\\" in source and "\\begin" not in source:
        source = "\\begin{aligned}" + source + "\\end{aligned}"
    try:
        return tex2mathml(source, as_block=block)
    except Exception as error:
        logger.warning("no MathML for %r: %s", source, error, location=node)
        return f"<code>{translator.encode(source)}</code>"


def visit_inline(translator, node):
    """Write $x$."""
    translator.body.append(f'<span class="math">{translate(translator, node, block=False)}</span>')
    raise nodes.SkipNode


def visit_block(translator, node):
    """Write $$x$$; wide formulas scroll inside their own box, not with the page."""
    label = f' id="{node["ids"][0]}"' if node["ids"] else ""
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    formula = translate(translator, node, block=True)
    translator.body.append(f'<div class="math"{label}>{number}{formula}</div>\n')
    raise nodes.SkipNode


def setup(app):
    """Register the renderer; `html_math_renderer = "mathml"` chooses it."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
