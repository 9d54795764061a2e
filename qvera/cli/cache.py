"""List, verify and remove what qvera keeps in its cache."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvera.cli.common import Json
from qvera.utils import formatting
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.paths import cache_root

if TYPE_CHECKING:
    from qvera.utils.cache_dir import CacheEntry, DiskCache


def _kinds() -> tuple[DiskCache, ...]:
    """The kinds of entries: quantized bases, tokenized rows, and what plug-ins keep."""
    from qvera.config import plugins
    from qvera.data.cache import ROWS
    from qvera.models.quantized_record import BASES

    return BASES, ROWS, *plugins.load_all("qvera.caches")


def _entries() -> list[CacheEntry]:
    return [entry for kind in _kinds() for entry in kind.listed()]


def ls(as_json: Json = False) -> None:
    """List what is in the cache, and how large it is.

    Example:
        qvera cache ls
    """
    bases, rows_cache, *_ = _kinds()
    rows: list[dict[str, Any]] = []
    for entry in _entries():
        record = entry.record or {}
        row: dict[str, Any] = {"name": entry.name, "finished": entry.finished, "size_bytes": entry.size_bytes}
        row["directory"] = str(entry.directory)
        if entry.kind is bases:
            source = record.get("source", {})
            row |= {"source": source.get("path"), "revision": source.get("revision")}
            row["settings"] = record.get("settings", {})
        else:
            row["source"] = record.get("source")
            if entry.kind is rows_cache:
                row["rows"] = record.get("rows")
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']:<32}{formatting.size(row['size_bytes']):>10}  {row['source'] or 'unfinished'}")
    total = sum(row["size_bytes"] for row in rows)
    print(f"{len(rows)} in {cache_root()}, {formatting.size(total)}")


Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="As ls shows them, or their beginning.")]


def rm(
    names: Names = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="What was interrupted.")] = False,
) -> None:
    """Delete some of it.

    Example:
        qvera cache rm --unfinished
    """
    names, entries = names or [], _entries()
    chosen = names + [e.name for e in entries if everything or (unfinished and not e.finished)]
    if not (names or everything or unfinished):
        raise InputError("give a name that `qvera cache ls` shows, or use --unfinished or --all.")
    for name in dict.fromkeys(chosen):
        try:
            kind = next((e.kind for e in entries if name and e.name.startswith(name)), _kinds()[0])
            print(f"{name}  removed, {formatting.size(kind.remove(name))}")
        except InputError as error:
            if name in names:
                raise
            print(f"{name}  kept: {error}")  # another process is writing it


def verify(names: Names = None) -> None:
    """Hash the files again and compare.

    Example:
        qvera cache verify
    """
    finished = [entry for entry in _entries() if entry.finished]
    for name in names or ():
        if not any(entry.name.startswith(name) for entry in finished):
            raise InputError(f"{name}: nothing of that name is in the cache; `qvera cache ls` lists what is.")
    chosen = [e for e in finished if not names or any(e.name.startswith(n) for n in names)]
    for entry in chosen:
        problem = entry.kind.problem_of(entry.directory)
        if problem is not None:
            raise RunFailed(f"{problem}. `qvera cache rm {entry.name}` removes it; the next use makes it again.")
        print(f"{entry.name}  as written")
