"""How Sphinx makes a site of these documents, with a search, and with the reference of commands and code.

`make docs` writes it to var/site.
"""

import re

from pipeline import __version__

project = "Futwork lead pipeline"
release = version = __version__
copyright = ""  # noqa: A001 - Sphinx' name
show_authors = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinxcontrib.mermaid"]
exclude_patterns = ["images"]

myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
suppress_warnings = ["myst.xref_missing"]  # links to files beside the site, such as CHANGELOG.md, are kept as they are

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}

highlight_language = "none"  # for blocks that do not name theirs
smartquotes = False  # they would spoil the dashes and quotes of commands

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def _from_markdown(_app, _what, _name, _object, _options, lines):
    """Let docstrings, which are written as Markdown, read well: code in backticks, tables as they stand."""
    text = "\n".join(lines)
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)(?=(\w)?)", lambda code: f"``{code[1]}``" + ("\\ " if code[2] else ""), text)
    lines[:] = re.sub(r"(?m)(?:^\|.*\|\n?)+", lambda table: _as_it_stands(table[0]), text).split("\n")


def _examples_as_code(_app, _context, lines):
    """Show the examples in a command's help, which come as blocks of lines, as code."""
    text = re.sub(
        r"(?m)(?:^\|.*\n?)+", lambda block: _as_it_stands(re.sub(r"(?m)^\| ?", "", block[0])), "\n".join(lines)
    )
    lines[:] = text.split("\n")


def _as_it_stands(block):
    return "::\n\n" + re.sub(r"(?m)^(?=.)", "   ", block) + "\n"


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _from_markdown)
    app.connect("sphinx-click-process-description", _examples_as_code)
