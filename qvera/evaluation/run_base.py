"""The base of a run, found from any directory."""

from __future__ import annotations

import os
from pathlib import Path

from qvera.config.schema import Recipe
from qvera.utils.files import try_read_json
from qvera.utils.paths import ADAPTER_CONFIG, resolve_path


def with_base_found(recipe: Recipe, adapter: Path) -> Recipe:
    """The recipe of a run, with a ``model.path`` that leads to its base.

    A run keeps the path as its recipe had it, which may be relative to the directory that it was trained from. The
    adapter's config has the whole path.

    Args:
        adapter: the directory of its adapter, or of one of them.
    """
    path = Path(resolve_path(recipe.model.path))
    known = (try_read_json(adapter / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
    if path.is_dir() or not isinstance(known, str) or not os.path.isabs(known) or not Path(known).is_dir():
        return recipe
    if Path(known).parts[-len(path.parts) :] != path.parts:  # an id of the hub, which somebody has put there since
        return recipe
    return recipe.replace(model=recipe.model.replace(path=known))
