"""`qvera cache` and `qvera quantize`: what qvera keeps on disk between runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qvera.cli.common import Json, argument, flag, option, print_json, progress
from qvera.utils import formatting
from qvera.utils.errors import InputError, Interrupted, RunFailed
from qvera.utils.files import cache_root

if TYPE_CHECKING:
    from qvera.utils.cache_dir import CacheEntry, DiskCache


def _kinds() -> tuple[DiskCache, ...]:
    from qvera.config import plugins
    from qvera.data.cache import ROWS
    from qvera.models.quantized_record import BASES

    return BASES, ROWS, *plugins.load_all("qvera.caches")


def _entries() -> list[CacheEntry]:
    return [entry for kind in _kinds() for entry in kind.listed()]


def _require_known(names: list[str], entries: list[CacheEntry]) -> None:
    for name in names:
        if not name or not any(entry.name.startswith(name) for entry in entries):
            raise InputError(f"{name!r}: nothing of that name is in the cache; `qvera cache ls` lists what is.")


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
        print_json(rows)
        return
    for row in rows:
        print(f"{row['name']:<32}{formatting.size(row['size_bytes']):>10}  {row['source'] or 'unfinished'}")
    total = sum(row["size_bytes"] for row in rows)
    print(f"{len(rows)} in {cache_root()}, {formatting.size(total)}")


Names = Annotated[list[str] | None, argument("NAME", "As ls shows them, or their beginning.")]


def rm(
    names: Names = None,
    everything: Annotated[bool, flag("--all", "Everything.")] = False,
    unfinished: Annotated[bool, flag("--unfinished", "What was interrupted.")] = False,
) -> None:
    """Delete some of it.

    Example:
        qvera cache rm --unfinished
    """
    names, entries = names or [], _entries()
    chosen = names + [e.name for e in entries if everything or (unfinished and not e.finished)]
    if not (names or everything or unfinished):
        raise InputError("give a name that `qvera cache ls` shows, or use --unfinished or --all.")
    _require_known(names, entries)
    for name in dict.fromkeys(chosen):
        try:
            kind = next(e.kind for e in entries if e.name.startswith(name))
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
    _require_known(names or [], finished)
    chosen = [e for e in finished if not names or any(e.name.startswith(n) for n in names)]
    for entry in chosen:
        problem = entry.kind.problem_of(entry.directory)
        if problem is not None:
            raise RunFailed(f"{problem}. `qvera cache rm {entry.name}` removes it; the next use makes it again.")
        print(f"{entry.name}  as written")


def quantize(
    model: Annotated[str, argument("MODEL", "A directory with safetensors, or a hub id.")],
    out: Annotated[Path | None, argument("OUT", "New or empty (default: the cache).")] = None,
    quantization: Annotated[Literal["nf4", "fp4"], typer.Option(help="The 4-bit type.")] = "nf4",
    revision: Annotated[str | None, option("NAME", "Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[bool, flag("--trust-remote-code", "Run the model's Python code.")] = False,
    verify: Annotated[bool, flag("--verify", "Hash all files again, not only sizes and times.")] = False,
) -> None:
    """Write the 4-bit copy of a 16-bit model.

    OUT is a checkpoint in bitsandbytes' serialized format; transformers loads it. Without OUT it goes into the cache,
    where `qvera train` would put it on first use. If it is stopped, the same command continues from the finished
    shards.

    Example:
        qvera quantize meta-llama/Llama-2-7b-hf
    """
    from qvera.config.sections import ModelSection
    from qvera.models.hub import base_directory
    from qvera.models.loader import rounded_note
    from qvera.models.quantize_checkpoint import cached_base, quantized_copy
    from qvera.models.quantized_record import read_record
    from qvera.utils import accelerator
    from qvera.utils.signals import StopRequests

    section = ModelSection(
        path=model, revision=revision, trust_remote_code=trust_remote_code, quantization=quantization
    )
    began = time.perf_counter()
    with StopRequests() as stop, progress(f"quantizing {model}", text=formatting.size) as show:

        def report(stage: str, done: int, total: int, what: str) -> None:
            show(done, total, f"{stage} {model}", what)
            if stop.asked:
                raise Interrupted(f"{stop.asked}: stopped. The same command goes on from the finished shards.")

        options: dict[str, Any] = {"device": accelerator.current_device(), "verify": verify, "progress": report}
        if out is None:
            target = cached_base(section, **options)
            record = read_record(target)
            assert record is not None  # cached_base has looked at it
        else:
            target, record = out, quantized_copy(section, out, **options)
    if (note := rounded_note(base_directory(section), quantization)) is not None:
        print(note)
    size = sum(file["bytes"] for file in record["files"].values())
    source = sum(file["bytes"] for file in record["source"]["files"].values())
    seconds = time.perf_counter() - began
    print(f"{formatting.size(source)} → {formatting.size(size)} in {target}, {seconds:.0f} s")
