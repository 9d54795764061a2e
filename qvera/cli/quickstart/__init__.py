"""What `qvera quickstart` works with: a small real Llama, a task with held-out rows, and the recipe that joins them.

`prepare` puts base and task into the cache and says where; `Quickstart.overrides` are the ``--set`` values that point the
recipe there. recipes/quickstart.yaml names the default cache, so `qvera train recipes/quickstart.yaml` works as it
stands after `qvera quickstart --fetch-only`, unless QVERA_CACHE or XDG_CACHE_HOME moved the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qvera.cli.quickstart.base import fetch_quickstart_base
from qvera.cli.quickstart.task import HELDOUT_ROWS, TRAIN_ROWS, write_task
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.paths import cache_root

__all__ = ["Quickstart", "cache_root", "fetch_quickstart_base", "prepare", "recipe_path"]


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Where the quickstart's parts lie."""

    base: Path
    train: Path
    heldout: Path
    recipe: Path

    def overrides(self) -> list[str]:
        """``--set`` values that point the recipe at these files."""
        # A JSON string is a YAML string, whatever characters a path has.
        return [
            f"model.path={json.dumps(str(self.base))}",
            f"data.path={json.dumps(str(self.train))}",
            f"data.eval_path={json.dumps(str(self.heldout))}",
        ]


def recipe_path(name: str = "quickstart.yaml") -> Path:
    """A shipped recipe: from the installed package, or from recipes/ of the checkout it was installed from.

    Raises:
        InputError: there is no recipe of that name.
    """
    package = Path(__file__).resolve().parents[2]
    folders = [package / "recipes", package.parent / "recipes"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    shipped = sorted({path.relative_to(folder).as_posix() for folder in folders for path in folder.rglob("*.yaml")})
    raise InputError(f"{name}: not one of the recipes that come with qvera ({', '.join(shipped) or 'none found'}).")


def prepare(
    cache_dir: Path | None = None,
    *,
    train_rows: int = TRAIN_ROWS,
    heldout_rows: int = HELDOUT_ROWS,
    say: Callable[[str], None] = print,
) -> Quickstart:
    """Fetch the base where it is not in the cache yet, write the task's rows, and find the recipe.

    Args:
        cache_dir: instead of `cache_root()`.
        train_rows, heldout_rows: how many rows to generate.
        say: takes each progress line.

    Raises:
        InputError: something has to be installed, or the cache can't be written.
        RunFailed: the download, its check, or the conversion failed.
    """
    root = cache_dir if cache_dir is not None else cache_root()
    recipe = recipe_path()
    base = fetch_quickstart_base(root, say=say)
    try:
        train, heldout = write_task(root / "quickstart" / "orders", train_rows, heldout_rows)
    except OSError as error:
        raise RunFailed(f"{error.filename}: the quickstart's rows can't be written: {error.strerror}.") from None
    return Quickstart(base=base, train=train, heldout=heldout, recipe=recipe)
