"""Opens Tinker's API over a served base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qvera.serve.tinker.database import Database
from qvera.serve.tinker.tenancy import BaseFacts, Tinker, TinkerSettings
from qvera.training.tenants import Tenants, TenantSettings
from qvera.training.token_rows import limits_of
from qvera.utils.atomic import disk_errors
from qvera.utils.paths import resolve_path

if TYPE_CHECKING:
    from qvera.serve.engine import Engine
    from qvera.serve.opening import Served


@contextlib.contextmanager
def open_tinker(directory: Path, served: Served, engine: Engine, max_rank: int) -> Iterator[Tinker]:
    """Tinker's API over an engine, whose background work its ``tenants`` become. The engine must end first.

    What a server before this one has promised is done. Raises InputError for a base that can't be trained.
    """
    base, path = served.opened.base, Path(resolve_path(served.opened.target.section.path))
    row_tokens, vocabulary, _ = limits_of(base.model)
    facts = BaseFacts(
        served.base_name,
        frozenset({*served.store.base_names, *([str(path.resolve())] if path.is_dir() else [])}),
        str(path.resolve()) if path.is_dir() else str(path),
        base.model.config.architectures[0],
        vocabulary,
        row_tokens,
    )
    with disk_errors(str(directory), "Choose another --training-dir."):
        directory.mkdir(exist_ok=True)
    tenants = Tenants(base, TenantSettings(directory / "paged", most_lora_rank=max_rank), engine.wake)
    with (
        contextlib.closing(Database(directory / "tinker.sqlite")) as database,
        Tinker(directory, database, tenants, facts, TinkerSettings(max_rank=max_rank)) as tinker,
    ):
        yield tinker
