"""Sphinx settings of the book. `dyrate_lib.book` lays the sources out in a folder and runs Sphinx there.

Nothing in a page may ask the network for anything: the theme's scripts and styles lie in the book, maths becomes MathML here.
"""

import re

from docutils import nodes
from latex2mathml.converter import convert

from dyrate_lib import __version__

project = "dyrate"
author = "the dyrate maintainers"
copyright = "the dyrate maintainers, MIT licence"  # noqa: A001 (Sphinx's name for it)
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["parts/*", "README.md"]
language = "en"
smartquotes = False  # what stands in records and tables stays as it is

html_theme = "furo"
html_title = "dyrate"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_show_sphinx = False
html_copy_source = False
html_show_search_summary = False  # read by a request, which a browser refuses for files on disk
html_math_renderer = "mathml"
html_last_updated_fmt = None
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b5394",
        "color-brand-content": "#0b5394",
        "color-brand-visited": "#5b3a8c",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7cb8f2",
        "color-brand-content": "#7cb8f2",
        "color-brand-visited": "#bb9bf0",
    },
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"

nb_execution_mode = "off"  # shown as committed; `make test` is what runs them
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_render_image_options = {"alt": "Figure of the notebook; the text below it says what it shows."}
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "attrs_inline", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "ref.python"]  # an error class is known under two names

default_role = "literal"  # docstrings set code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_include_init_with_doc = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"


# ------------------------------------------------------------------------------------------------------------- maths


def _inline(translator, node):
    translator.body.append(f'<span class="math">{convert(node.astext())}</span>')
    raise nodes.SkipNode


def _block(translator, node):
    ids = f' id="{node["ids"][0]}"' if node.get("ids") else ""
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    translator.body.append(f'<div class="math"{ids}>{convert(node.astext(), display="block")}{number}</div>')
    raise nodes.SkipNode


# -------------------------------------------------------------------------------------------------------- docstrings

_CODE = re.compile(r"(``.*?``|`[^`]*`)")
_SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields|Attributes|Note|Example)s?:\s*$")
_FIELD = re.compile(r"([A-Za-z_*][\w.*]*(?:(?:, |/)[A-Za-z_*][\w.*]*)*(?: \[[^\]]*\])?): (?=\S)")


def _prose(app, what, name, obj, options, lines):
    """Docstrings are plain prose: `name: text` lines become a list, hanging lines join the line before, stars and bars are
    themselves. Sections that napoleon knows, and indented examples, stay as they are."""
    out, paragraph = [], []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        out += [*_paragraph(paragraph), ""]
        paragraph = []
    lines[:] = out


def _paragraph(paragraph):
    if not paragraph or paragraph[0][0] == " " or _SECTION.match(paragraph[0]) or paragraph[0].startswith((":", "..")):
        return [_plain(line) for line in paragraph]
    logical = []
    for line in paragraph:
        if logical and (line[0] == " " or not _FIELD.match(line)):
            logical[-1] += " " + line.strip()
        else:
            logical.append(line)
    prose = [_plain(line) for line in logical if not _FIELD.match(line)]
    fields = [_FIELD.match(line) for line in logical if _FIELD.match(line)]
    listed = [f"- ``{field[1]}``: {_plain(field.string[field.end():])}" for field in fields]
    return prose + ([""] if prose and listed else []) + listed


def _plain(line):
    """Without reStructuredText: stars, bars and trailing underscores mean themselves, outside code."""
    if line.lstrip().startswith((":", "..")):
        return line
    parts = _CODE.split(line)
    parts[::2] = [re.sub(r"(?<!\\)([*|]|_\b)", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    app.connect("autodoc-process-docstring", _prose, priority=100)  # before napoleon adds markup of its own
    return {"parallel_read_safe": True, "parallel_write_safe": True}
