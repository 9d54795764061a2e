"""What a recipe says that the defaults do not."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from qvera.config.schema import Recipe


def changed_settings(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """(section.key, value) for each key of an effective recipe whose value is not the default, in the recipe's order.

    A key that this version does not know counts as changed: the recipe may be a later version's.
    """
    sections = get_type_hints(Recipe)
    beside = {f.name: f for f in dataclasses.fields(Recipe)}
    changed: list[tuple[str, Any]] = []
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            if section in beside and keys == _default(beside[section]):
                continue
            changed.append((str(section), keys))
            continue
        section_class = sections.get(str(section))
        known = {f.name: f for f in dataclasses.fields(section_class)} if section_class else {}
        for key, value in keys.items():
            if key not in known or value != _default(known[key]):
                changed.append((f"{section}.{key}", value))
    return changed


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
