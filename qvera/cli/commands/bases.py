"""Quantized bases, kept rows, and what a directory holds: quantize, cache, info."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from qvera.cli.commands.common import console, quiet_libraries
from qvera.config.schema import ModelSection
from qvera.data.cache import ROWS
from qvera.evaluation.run_info import describe
from qvera.models.loader import pick_device
from qvera.models.quantize_checkpoint import read_record
from qvera.models.quantized_cache import BASES, cached_base, quantized_copy
from qvera.utils import formatting
from qvera.utils.cache_dir import StageProgress
from qvera.utils.errors import InputError, Interrupted, RunFailed
from qvera.utils.paths import cache_root
from qvera.utils.signals import StopRequests

KINDS = (BASES, ROWS)


def quantize(args: argparse.Namespace) -> None:
    """Qvera quantize"""
    quiet_libraries()
    given = {
        key: getattr(args, key)
        for key in ("quantization", "double_quant", "quant_storage", "revision", "trust_remote_code")
    }
    section = ModelSection(path=args.model, **{key: value for key, value in given.items() if value is not None})
    began = time.perf_counter()
    with StopRequests() as stop, _byte_progress() as show:

        def progress(stage: str, done: int, total: int, what: str) -> None:
            show(stage, done, total, what)
            if stop.asked:
                raise Interrupted(
                    f"{stop.asked}: stopped; finished shards are kept, the same command goes on from them."
                )

        options: dict[str, Any] = {"device": pick_device(), "verify": args.verify, "progress": progress}
        if args.out is None:
            out = cached_base(section, **options)
            record = read_record(out)
            assert record is not None  # cached_base has looked at it
        else:
            out, record = args.out, quantized_copy(section, args.out, **options)
    size = sum(file["bytes"] for file in record["files"].values())
    source = sum(file["bytes"] for file in record["source"]["files"].values())
    print(f"{formatting.size(source)} → {formatting.size(size)} in {out}, {time.perf_counter() - began:.0f} s")


@contextlib.contextmanager
def _byte_progress() -> Iterator[StageProgress]:
    """A bar in bytes for each stage, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, what: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(
                    stage.capitalize() if stage != "waiting" else f"Waiting: {what}", total=total
                )
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def cache(args: argparse.Namespace) -> None:
    """Qvera cache"""
    if args.action == "ls":
        _cache_ls(args)
        return
    entries = [entry for kind in KINDS for entry in kind.listed()]
    names = list(args.names)
    if args.action == "verify":
        chosen = [e for e in entries if e.finished and (not names or any(e.name.startswith(n) for n in names))]
        if names and not chosen:
            raise InputError(
                f"{', '.join(names)}: nothing of that name is in the cache; `qvera cache ls` shows what is."
            )
        for entry in chosen:
            problem = entry.kind.problem_of(entry.directory)
            if problem is not None:
                raise RunFailed(f"{problem}. `qvera cache rm {entry.name}` removes it; the next use makes it again.")
            print(f"{entry.name}  as written")
        return
    names += [e.name for e in entries if args.all or (args.unfinished and not e.finished)]
    if not (names or args.all or args.unfinished):
        raise InputError(
            "qvera cache rm: name a quantized base or kept rows, or say --unfinished or --all; `qvera cache ls` shows them."
        )
    for name in dict.fromkeys(names):
        try:
            kind = next((e.kind for e in entries if name and e.name.startswith(name)), BASES)
            print(f"{name}  removed, {formatting.size(kind.remove(name))}")
        except InputError as error:
            if name in args.names:
                raise
            print(f"{name}  kept: {error}")  # being made right now


def _cache_ls(args: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for entry in BASES.listed():
        source = entry.record["source"] if entry.record else {}
        settings = entry.record["settings"] if entry.record else {}
        rows.append(
            {
                "name": entry.name, "finished": entry.finished, "size_bytes": entry.size_bytes, "source": source.get("path"),
                "revision": source.get("revision"), "settings": settings, "directory": str(entry.directory),
            }
        )  # fmt: skip
    for found in ROWS.listed():
        record = found.record or {}
        rows.append(
            {
                "name": found.name, "finished": found.finished, "size_bytes": found.size_bytes, "source": record.get("source"),
                "rows": record.get("rows"), "directory": str(found.directory),
            }
        )  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']:<32}{formatting.size(row['size_bytes']):>10}  {row['source'] or 'unfinished'}")
    total = sum(row["size_bytes"] for row in rows)
    print(f"{len(rows)} in {cache_root()}, {formatting.size(total)}")


def info(args: argparse.Namespace) -> None:
    """Qvera info"""
    facts = describe(args.path)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif name.endswith("_bytes"):
            value = f"{value:,} ({formatting.size(value)})"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        print(f"{name:<22}{value}")
