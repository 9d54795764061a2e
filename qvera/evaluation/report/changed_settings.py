"""What a recipe says that the defaults do not."""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from qvera.config.schema import Recipe


def changed_settings(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """(section.key, value) for each key of an effective recipe whose value is not the default, in the recipe's order.

    A key that this version does not know counts as changed: the recipe may be a later version's.
    """
    beside = Recipe.model_fields
    changed: list[tuple[str, Any]] = []
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            if section in beside and keys == _default(beside[section]):
                continue
            changed.append((str(section), keys))
            continue
        section_class = beside[section].annotation if section in beside else None
        known = getattr(section_class, "model_fields", {})
        for key, value in keys.items():
            if key not in known or value != _default(known[key]):
                changed.append((f"{section}.{key}", value))
    return changed


def _default(field: FieldInfo) -> object:
    return field.get_default(call_default_factory=True)
