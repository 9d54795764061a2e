"""Write docs/recipe.md and docs/recipe.schema.json from the recipe's JSON schema: ``python docs/make_reference.py``.

A test compares both files with what this script writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qvera.config.schema import json_schema

ROOT = Path(__file__).resolve().parent.parent
_HEAD = """\
# The recipe, key by key

A recipe is one YAML file with five sections and two keys beside them. Only `model.path` and `data.path` have no default;
`model: some/path` is short for `model: {path: some/path}`. This page is written by `python docs/make_reference.py` from
`qvera/config/sections.py`.

**Editors.** An editor with a YAML language server completes keys and marks mistakes where a recipe begins with
`# yaml-language-server: $schema=PATH_OF_THE_SCHEMA`. `qvera init` writes that line, and the JSON schema into the cache. For a
recipe of your own, `qvera schema > recipe.schema.json` writes it. It has the keys of installed plug-ins too.

**Overrides.** `--set section.key=value` on the command line replaces one key. The value is YAML; a text is taken whole.

**Paths.** A relative path starts at the directory in which you run the command, not at the recipe's. `~` is your home
directory. `..` in a path works as in a shell. A finished run finds its base again from any directory.

**Mistakes.** Unknown keys, wrong types, values out of range and keys that contradict each other are errors. They are reported
all at once, each with its line.

**System prompt.** `data.system` is used for training, and by `qvera eval`, `qvera generate` and `qvera chat` on the trained run.

**Learning rate.** The default is the paper's, for 7B models. A model of 135M parameters needs 0.03 to 0.1. `qvera train RECIPE
--find-lr` tries a range of rates and suggests one.

**YAML.** The file is UTF-8, with or without a byte order mark, with Unix or Windows line ends. Anchors, aliases and merge keys
(`<<: *name`) work. There is no extra key for shared values: put the anchor on the first key that uses one. A key that is
written twice is an error. `010` and `1:30`, which YAML 1.1 reads as 8 and 90, are text: a key that takes a number refuses them.
"""
_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "object": "mapping of names to names",
    "null": "`null`",
}
_ONLY_BY_MISTAKE = (2**31, 2**50, 3e38, -3e38, 1e6)
"""Bounds that nobody meets; the reference does not name them."""


def reference() -> str:
    """Return docs/recipe.md."""
    schema: dict[str, Any] = json_schema()
    parts, loose = [_HEAD], []
    for name, key in schema["properties"].items():
        section = _definition(key, schema)
        if section is None:
            loose.append(_line(name, key, schema))
            continue
        parts.append(f"## {name}\n\n{_flow(section['description'])}\n")
        parts += [_line(key, value, schema, section) for key, value in section["properties"].items()] + [""]
    return "\n".join([*parts, "## beside the sections\n", *loose]) + "\n"


def schema_file() -> str:
    """Return docs/recipe.schema.json, the schema of the recipes in recipes/."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _line(name: str, key: dict, schema: dict, section: dict | None = None) -> str:
    default = "required" if section and name in section.get("required", ()) else f"default `{_yaml(key['default'])}`"
    return f"- `{name}` ({_type(key, schema)}; {default}). {_flow(key['description'])}"


def _type(key: dict, schema: dict) -> str:
    if "anyOf" in key:
        return " or ".join(_type(one, schema) for one in key["anyOf"])
    if "enum" in key or "const" in key:
        return ", ".join(f"`{value}`" for value in key.get("enum", [key.get("const")]))
    if key.get("type") == "array":
        items = key["items"]
        return "list of mappings" if "$ref" in items else f"list of {_TYPES[items['type']]}s".replace("texts", "names")
    words = _TYPES[key["type"]]
    signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {_bound(key[name])}" for name, sign in signs if key.get(name) not in (None, *_ONLY_BY_MISTAKE)]
    return " ".join([words, " and ".join(bounds)]).strip()


def _bound(value: float) -> str:
    return "2^64" if value == 2**64 else f"{value:g}"


def _definition(key: dict, schema: dict) -> dict | None:
    """Return the section that a key of the recipe refers to."""
    for one in (key, *key.get("anyOf", ())):
        if "$ref" in one:
            return schema["$defs"][one["$ref"].rpartition("/")[2]]
    return None


def _yaml(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _flow(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


if __name__ == "__main__":
    (ROOT / "docs" / "recipe.md").write_text(reference(), encoding="utf-8")
    (ROOT / "docs" / "recipe.schema.json").write_text(schema_file(), encoding="utf-8")
