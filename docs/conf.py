"""Sphinx builds the documentation from this: ``make docs``. Warnings are errors there."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "qvera"
copyright = "the qvera authors"
release = installed_version("qvera")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
default_role = "code"  # single backquotes in docstrings
html_theme = "furo"
html_title = f"qvera {release}"
html_static_path: list[str] = []

myst_heading_anchors = 3  # links such as evaluation.md#the-learning-rate
suppress_warnings = ["myst.header"]  # an included file starts at its own level

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"


def _formulas(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Indented formulas and layouts in a docstring become literal blocks, and single backquotes code."""
    headings = ("Args:", "Returns:", "Raises:", "Attributes:", "Yields:", "Example:", "Note:")
    result: list[str] = []
    inside = False  # inside a section such as Args:, whose lines are indented anyway
    for index, line in enumerate(lines):
        if line and not line.startswith(" "):
            inside = line.strip() in headings
        starts_block = line.startswith("    ") and (index == 0 or not lines[index - 1].strip())
        if starts_block and not inside and not (result and result[-2:-1] == ["::"]):
            result += ["::", ""]
        result.append(line)
    lines[:] = result


def setup(app: object) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _formulas, priority=100)  # type: ignore[attr-defined]  # before napoleon
