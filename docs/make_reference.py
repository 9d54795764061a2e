"""Write docs/recipe.md from the dataclasses in qvera/recipe.py: ``python docs/make_reference.py``. A test keeps it true."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_HEAD = """\
# The recipe, key by key

Made from `qvera/recipe.py` by `python docs/make_reference.py`. One YAML file, five sections; only `model.path` and
`data.path` have no default. `model: some/path` is short for `model: {path: some/path}`. `--set section.key=value` on the
command line overrides a key. Unknown keys, wrong types and values out of range are refused, all at once.
"""


def reference() -> str:
    """The whole page, from the sections' docstrings, fields, defaults and the strings below them."""
    tree = ast.parse((ROOT / "qvera" / "recipe.py").read_text(encoding="utf-8"))
    parts = [_HEAD]
    for node in tree.body:
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Section")):
            continue
        name = node.name.removesuffix("Section").lower()
        parts.append(f"## {name}\n\n{_flow(ast.get_docstring(node) or '')}\n")
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign):
                continue
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " " + _flow(str(following.value.value))
            parts.append(f"- `{ast.unparse(field.target)}` ({_default(field)}).{text}")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _default(field: ast.AnnAssign) -> str:
    if field.value is None:
        return "required"
    text = ast.unparse(field.value)
    if text.startswith("field("):
        text = {"field(default_factory=dict)": "{}", "field(default_factory=lambda: ['auto'])": "['auto']"}[text]
    return f"default `{text}`"


def _flow(text: str) -> str:
    return " ".join(textwrap.dedent(text).replace("``", "`").split())


if __name__ == "__main__":
    (ROOT / "docs" / "recipe.md").write_text(reference(), encoding="utf-8")
