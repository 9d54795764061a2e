"""Write docs/recipe.md from the dataclasses in qvera/config/schema.py: ``python docs/make_reference.py``. A test keeps it true."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_HEAD = """\
# The recipe, key by key

Made from `qvera/config/schema.py` by `python docs/make_reference.py`. One YAML file, five sections and one key beside them; only
`model.path` and `data.path` have no default. `model: some/path` is short for `model: {path: some/path}`. `--set
section.key=value` on the command line overrides a key. Unknown keys, wrong types and values out of range are refused, all at
once.
"""


def reference() -> str:
    """The whole page, from the sections' docstrings, fields, defaults and the strings below them."""
    tree = ast.parse((ROOT / "qvera" / "recipe.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    parts = [_HEAD]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Section"):
            parts.append(f"## {node.name.removesuffix('Section').lower()}\n\n{_flow(ast.get_docstring(node) or '')}\n")
            parents = [classes[base.id] for base in node.bases if isinstance(base, ast.Name)]
            parts += [line for each in [*parents, node] for line in _keys(each)] + [""]
    names = ("model", "data", "adapter", "training", "export")
    whole = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Recipe")
    parts += [
        "## beside the sections\n",
        *(line for line in _keys(whole) if not line.startswith(tuple(f"- `{name}`" for name in names))),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _keys(node: ast.ClassDef) -> list[str]:
    """A line for each field of a class: name, type, default, and the string below it."""
    lines = []
    for field, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " " + _flow(str(following.value.value))
        lines.append(f"- `{ast.unparse(field.target)}` ({_default(field)}).{text}")
    return lines


def _default(field: ast.AnnAssign) -> str:
    if field.value is None:
        return "required"
    text = ast.unparse(field.value)
    if text.endswith("Section)"):  # of the recipe itself
        return text
    if text.startswith("field("):
        text = {
            "field(default_factory=dict)": "{}",
            "field(default_factory=list)": "[]",
            "field(default_factory=lambda: ['auto'])": "['auto']",
        }[text]
    return f"default `{text}`"


def _flow(text: str) -> str:
    return " ".join(textwrap.dedent(text).replace("``", "`").split())


if __name__ == "__main__":
    (ROOT / "docs" / "recipe.md").write_text(reference(), encoding="utf-8")
