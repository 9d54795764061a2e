"""The run directory: its lock, whether a run may be written there, and run.json."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from qvera.config.schema import Recipe, load_recipe
from qvera.evaluation.report.read import status_of
from qvera.evaluation.report.run_page import write_report
from qvera.utils.errors import InputError, QveraError, RunFailed
from qvera.utils.files import (
    ADAPTERS,
    RUN_OWNER,
    RUN_PROGRESS,
    disk_errors,
    existing_parent,
    plain_json,
    replace_text,
    try_read_json,
)
from qvera.utils.formatting import first_of

if TYPE_CHECKING:
    from rich.console import Console

_LOCK = ".qvera_run.lock"


def run_directory(output_dir: str | None, recipe_path: Path | None) -> Path:
    """``training.output_dir``, or ``runs/`` and the recipe's file name."""
    if output_dir is not None:
        return Path(os.path.expanduser(output_dir))
    return Path("runs") / (recipe_path.stem if recipe_path is not None else "run")


@contextlib.contextmanager
def run_lock(run_dir: Path, host: str, wait_seconds: float = 0.0, what: str = "training.output_dir") -> Iterator[None]:
    """Hold a directory that trainings are written into, so that no second process writes there.

    The system releases the lock of a process that died. A network file system whose locks are local to each host
    (Lustre with ``localflock``) keeps only processes of one host apart. Directories made for the lock are removed where
    nothing was written. ``host`` and ``what``, the key or option that names the directory, are for messages.

    Raises:
        InputError: another process trains there, or nothing can be written there.
    """
    require_writable(run_dir, what)
    made = [place for place in (run_dir, *run_dir.parents) if not place.exists()]
    owner, lock = run_dir / RUN_OWNER, FileLock(run_dir / _LOCK, timeout=wait_seconds)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        owner.write_text(json.dumps({"host": host, "pid": os.getpid(), "started": started}), encoding="utf-8")
    except Timeout:
        holder = try_read_json(owner) or {}  # empty: it has the lock and is about to write who it is
        who = f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('started')})"
        raise InputError(
            f"{run_dir}: {who if holder else 'another process'} trains in this directory. Wait for it or stop it, or "
            f"choose another {what}."
        ) from None
    except OSError as error:
        lock.release()
        raise InputError(f"{run_dir}: can't be written ({error.strerror or error}).") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a disk that became read-only; a lock file that nobody holds does no harm
            for file in (owner, run_dir / RUN_PROGRESS, run_dir / _LOCK):
                file.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def check_run_dir(run_dir: Path, recipe: Recipe, resume: bool) -> bool:
    """Refuse a directory that does not fit what was asked for; nothing is written.

    Returns whether the run there is gone on with: if ``resume`` says so, or if it was interrupted after it had begun to
    train. One that was interrupted before that may begin again.

    Raises:
        InputError: it can't be written; it holds a run or a run's files (without ``resume``); it holds no run, or one
            of another recipe (with it).
    """
    require_writable(run_dir)
    existing = run_dir / "recipe.yaml"
    if not resume and existing.exists() and status_of(try_read_json(run_dir / "run.json") or {}) == "interrupted":
        metrics, kept = run_dir / "metrics.jsonl", run_dir / "checkpoints"
        if not kept.exists() and not (metrics.exists() and metrics.stat().st_size):
            return False
        resume = True
    if not resume and existing.exists():
        raise InputError(
            f"{run_dir}: already holds a run. Add --resume to go on with it, or choose another training.output_dir."
        )
    if resume and not existing.exists():
        raise InputError(f"{run_dir}: holds no run to resume (no recipe.yaml).")
    # what has a name that a run gives, and is not empty: a run that died at once leaves an empty metrics.jsonl
    adapter = ADAPTERS if recipe.data.has_adapters else "adapter"
    names = [adapter, "metrics.jsonl", "run.json", "report.html", "checkpoints/step-*", "checkpoints/round-*"]
    written = [path for name in names for path in sorted(run_dir.glob(name))]
    holds = [any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0 for path in written]
    others = [path.relative_to(run_dir) for path, is_full in zip(written, holds, strict=True) if is_full]
    if not resume and others:
        raise InputError(
            f"{run_dir}: holds {first_of(others)} and no recipe.yaml. It is no run, and one would write over that. "
            "Choose another training.output_dir, or move them away."
        )
    if resume and (changed := changed_keys(load_recipe(existing, of_a_run=True).to_dict(), recipe, LENGTH)):
        raise InputError(
            f"{run_dir}: was started with another recipe; {', '.join(changed)} changed. Undo that, or start a new run "
            "in another training.output_dir."
        )
    return resume


def require_writable(run_dir: Path, what: str = "training.output_dir") -> None:
    """Raise InputError where nothing could be written into this directory, which need not exist yet."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir}: is a file; a run needs a directory ({what}).")
    parent = existing_parent(run_dir)
    try:  # by doing it: permission bits say yes to root even where nothing can be made
        os.rmdir(tempfile.mkdtemp(prefix=".qvera-", dir=parent))
    except OSError as error:
        raise InputError(
            f"{run_dir}: nothing can be written in {parent} ({error.strerror}). Choose another {what}."
        ) from None


_FREE = {
    "model": ("stream",),  # the numbers are the same
    "data": ("tokenize_processes", "max_row_characters"),  # the rows are the same
    # gradient_checkpointing: but for rounding in long batches (docs/memory.md), and it may be what a run needs to go on
    "training": ("output_dir", "save_steps", "save_total_limit", "report_to", "gradient_checkpointing", "on_oom"),
}
_FREE_SECTIONS = ("export", "deepspeed")  # a checkpoint goes on under any ZeRO stage, and without one


LENGTH = ("training.max_steps", "training.num_train_epochs")
"""They may grow in a run that goes on (`Run.check_length`)."""


def changed_keys(before: dict[str, Any], recipe: Recipe, may_change: Sequence[str] = ()) -> list[str]:
    """Keys that change what a step computes and differ between an earlier recipe (`Recipe.to_dict`) and this one.

    A key that only one of them has is no difference: it was written by another version.
    """
    changed = []
    before = plain_json(before)
    for section, now in plain_json(recipe.to_dict()).items():
        then = before.get(section)
        if section in _FREE_SECTIONS or section not in before:
            continue
        if not isinstance(now, dict) or not isinstance(then, dict):
            changed += [section] if then != now else []
            continue
        keys = [k for k in now if k in then and k not in _FREE.get(section, ())]
        changed += [f"{section}.{key}" for key in keys if then[key] != now[key]]
    return [key for key in changed if key not in may_change]


def this_process() -> dict[str, Any]:
    """What run.json says of the process that writes it, for `status_of`."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def mark_ended(run_dir: Path, status: str) -> None:
    """Put the status into a run.json that this process has left ``running``."""
    found = try_read_json(run_dir / "run.json") or {}
    if found.get("status") == "running" and this_process().items() <= found.get("processes", {}).items():
        with contextlib.suppress(RunFailed):  # the disk is full, which has its own error
            write_run_json(run_dir, {**found, "status": status})


def write_run_json(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write run.json, when a run begins and when it ends. RunFailed where the disk is full or read-only."""
    with disk_errors(str(run_dir / "run.json"), "Checkpoints are kept; mend that and go on with --resume."):
        replace_text(run_dir / "run.json", json.dumps(plain_json(summary), indent=1, ensure_ascii=False))


def write_run(run_dir: Path, summary: dict[str, Any], console: Console) -> None:
    """Write run.json and the report page. RunFailed where the disk is full or read-only."""
    summary["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_run_json(run_dir, summary)
    try:
        write_report(run_dir)
    except QveraError as error:  # the page can be made again; the run is what counts
        console.print(f"[yellow]No report was written: {error}")
