"""A recipe's file: YAML without a key twice, and what ``--set`` changes in it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from qvera.config.schema import Recipe, parse_recipe
from qvera.utils.errors import InputError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a recipe must not."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        InputError: the file can't be read, is not YAML, or is not a valid recipe.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: no such recipe file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as a recipe (UTF-8 YAML): {error}") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    for override in overrides or []:
        tree = _override(tree, override)
    return parse_recipe(tree, str(path))


def _override(tree: Any, override: str) -> Any:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise InputError(f"--set {override}: expected section.key=value, for example --set training.max_steps=100.")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML: {error}") from None
    tree = dict(tree) if isinstance(tree, dict) else {}
    node = tree
    for depth, part in enumerate(parts[:-1]):
        child = node.get(part)
        if depth == 0 and part == "model" and isinstance(child, str):
            child = {"path": child}
        node[part] = dict(child) if isinstance(child, dict) else {}
        node = node[part]
    node[parts[-1]] = value
    return tree
