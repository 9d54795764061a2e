"""Settings of a recipe under flat keys, and which of them are not the defaults."""

from __future__ import annotations

from qvera.config.schema import parse_recipe


def flat_settings(recipe: dict[str, object]) -> dict[str, object]:
    """``section.key`` → value, in the recipe's order."""
    return {
        f"{name}.{key}" if isinstance(keys, dict) else str(name): value
        for name, keys in recipe.items()
        for key, value in (keys.items() if isinstance(keys, dict) else [("", keys)])
    }


def default_settings() -> dict[str, object]:
    """``section.key`` → default of every setting that has one."""
    tree = parse_recipe({"model": {"path": "-"}, "data": {"path": "-"}}, "the defaults").to_dict()
    return {key: value for key, value in flat_settings(tree).items() if key not in ("model.path", "data.path")}


def changed_settings(recipe: dict[str, object]) -> dict[str, object]:
    """``section.key`` → value of each setting of an effective recipe that is not the default, in the recipe's order.

    A key that this version does not know counts as changed: the recipe may be a later version's.
    """
    defaults = default_settings()
    return {key: value for key, value in flat_settings(recipe).items() if key not in defaults or value != defaults[key]}
