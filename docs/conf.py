"""Sphinx: the pages of this folder as a site, `make docs`."""

import re

import fused_arcface
from fused_arcface.margins.registry import REGISTRY

project = "fused_arcface"
author = "fused_arcface contributors"
copyright = author
release = version = fused_arcface.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fused_arcface {release}"

nitpicky = False
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, which types cannot

_MARGINS = "<!-- a class for each margin of the registry; conf.py -->"
_FILE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)]*)?\)")


def _repository_links(app, docname, source):
    """Leave links to files of the repository, which are no pages of the site, as their paths."""
    source[0] = _FILE.sub(r"\1 (`\2`)", source[0])


def _margins(app, docname, source):
    """Put the margins of the registry into the API reference."""
    classes = "".join(f".. autoclass:: fused_arcface.{entry.name}\n" for entry in REGISTRY)
    source[0] = source[0].replace(_MARGINS, f"```{{eval-rst}}\n{classes}```")


def setup(app):
    """Register the changes of a page before it is parsed."""
    app.connect("source-read", _repository_links)
    app.connect("source-read", _margins)
