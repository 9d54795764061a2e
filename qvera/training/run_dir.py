"""The run directory: its lock, whether a run may be written there, and run.json with the report at the end."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from qvera.config.load import load_recipe
from qvera.config.schema import Recipe
from qvera.data import data_sha256
from qvera.evaluation.report.run_page import write_report
from qvera.training import checkpoint
from qvera.training.logging import read_records
from qvera.utils.atomic import disk_errors, replace_text
from qvera.utils.errors import InputError, QveraError
from qvera.utils.files import existing_parent, plain_json, try_read_json
from qvera.utils.formatting import first_of
from qvera.utils.paths import ADAPTERS, RUN_OWNER

if TYPE_CHECKING:
    from rich.console import Console

    from qvera.data import Datasets
    from qvera.models.loader import Base

_LOCK = ".qvera_run.lock"


def run_directory(recipe: Recipe, recipe_path: Path | None) -> Path:
    """``training.output_dir``, or ``runs/`` and the recipe's file name."""
    if recipe.training.output_dir is not None:
        return Path(os.path.expanduser(recipe.training.output_dir))
    return Path("runs") / (recipe_path.stem if recipe_path is not None else "run")


@contextlib.contextmanager
def run_lock(run_dir: Path, host: str, wait_seconds: float = 0.0, what: str = "training.output_dir") -> Iterator[None]:
    """Hold a directory that trainings are written into for this process, so that no second one does.

    The system releases the lock of a process that died. A network file system whose locks are local to each host
    (Lustre with ``localflock``) keeps only processes of one host apart. Directories made for the lock are removed where
    nothing was written.

    Args:
        host: this machine's name, for the message that another process gets.
        wait_seconds: how long to wait for a process that is about to end.
        what: the key or option that names the directory, for messages.

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
        found = try_read_json(owner) or {}  # empty: it has the lock and is about to write who it is
        who = f"process {found.get('pid')} on {found.get('host')} (since {found.get('started')})"
        raise InputError(
            f"{run_dir}: {who if found else 'another process'} trains in this directory. Wait for it or stop it, or "
            f"choose another {what}."
        ) from None
    except OSError as error:
        lock.release()
        raise InputError(f"{run_dir}: can't be written ({error.strerror or error}).") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a disk that became read-only; a lock file that nobody holds does no harm
            for file in (owner, run_dir / _LOCK):
                file.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def check_run_dir(run_dir: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse a directory that does not fit what was asked for; nothing is written.

    Raises:
        InputError: nothing can be written there; it holds a run or files by the names of a run's (without ``resume``),
            no run (with it), or one of another recipe.
    """
    require_writable(run_dir)
    existing = run_dir / "recipe.yaml"
    if not resume and existing.exists():
        raise InputError(
            f"{run_dir}: already holds a run. Add --resume to go on with it, or choose another training.output_dir."
        )
    if resume and not existing.exists():
        raise InputError(f"{run_dir}: holds no run to resume (no recipe.yaml).")
    if not resume and (others := _written_by_a_run(run_dir, recipe)):
        raise InputError(
            f"{run_dir}: holds {first_of(others)} and no recipe.yaml. It is no run, and one would write over that. "
            "Choose another training.output_dir, or move them away."
        )
    if resume and (changed := changed_keys(load_recipe(existing, of_a_run=True).to_dict(), recipe)):
        raise InputError(
            f"{run_dir}: was started with another recipe; {', '.join(changed)} changed. Undo that, or start a new run "
            "in another training.output_dir."
        )


def _written_by_a_run(run_dir: Path, recipe: Recipe) -> list[Path]:
    """What has a name that a run gives, and is not empty: a run that died at once leaves an empty metrics.jsonl."""
    adapter = ADAPTERS if recipe.data.has_adapters else "adapter"
    written = [adapter, "metrics.jsonl", "run.json", "report.html", "checkpoints/step-*", "checkpoints/round-*"]
    found = [path for name in written for path in sorted(run_dir.glob(name))]
    holds = [any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0 for path in found]
    return [path.relative_to(run_dir) for path, is_full in zip(found, holds, strict=True) if is_full]


def require_writable(run_dir: Path, what: str = "training.output_dir") -> None:
    """Raises InputError where nothing could be written into this directory, which need not exist yet."""
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
    "data": ("tokenize_processes",),  # the rows are the same
    # gradient_checkpointing: but for rounding in long batches (docs/memory.md), and it may be what a run needs to go on
    "training": ("output_dir", "save_steps", "save_total_limit", "report_to", "gradient_checkpointing", "on_oom"),
}
_FREE_SECTIONS = ("export", "deepspeed")  # a checkpoint goes on under any ZeRO stage, and without one


def changed_keys(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """Keys in which an earlier recipe (`Recipe.to_dict`) differs from this one and that change what a step computes.

    A key that one of them lacks is no difference: it was written by another version.
    """
    found = []
    before = plain_json(before)
    for section, now in plain_json(recipe.to_dict()).items():
        then = before.get(section)
        if section in _FREE_SECTIONS or section not in before:
            continue
        if not isinstance(now, dict) or not isinstance(then, dict):
            found += [section] if then != now else []
            continue
        keys = [k for k in now if k in then and k not in _FREE.get(section, ())]
        found += [f"{section}.{key}" for key in keys if then[key] != now[key]]
    return found


def inputs_of(datasets: Datasets, base: Base) -> dict[str, Any]:
    """What the later steps of a training depend on besides its recipe: the rows, and the base's weights."""
    return {"rows": data_sha256(datasets), "base": base.facts.get("fingerprint")}


def require_same_inputs(path: Path, saved: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of other rows or another base.

    Args:
        path: of the checkpoint.
        saved: the `inputs_of` that it was saved with; None: of an earlier version, which kept none.
        inputs: those of now.

    Raises:
        InputError: they differ.
    """
    what = {"rows": "rows (data.path)", "base": "weights of the base (model.path)"}
    known = {key: value for key, value in (saved or {}).items() if value is not None and inputs.get(key) is not None}
    if changed := [name for key, name in what.items() if key in known and known[key] != inputs[key]]:
        raise InputError(
            f"{path}: was saved with other {' and other '.join(changed)} than are there now, so the run would not "
            "become what it would have. Put them back, or start a new run in another training.output_dir."
        )


def newest_checkpoint(run_dir: Path, recipe: Recipe, warn: Callable[[str], None]) -> checkpoint.Checkpoint | None:
    """The newest checkpoint of this run that verifies; None where the run ended before its first one.

    ``warn`` is called with a sentence about each checkpoint passed over.

    Raises:
        InputError: the run has saved checkpoints, and none of them can be used.
    """

    def use(path: Path) -> checkpoint.Checkpoint:
        one = checkpoint.load(path)
        if changed := changed_keys(one.state.get("recipe") or {}, recipe):
            raise InputError(f"{path}: is of another run; {', '.join(changed)} differ from this recipe.")
        try:
            checkpoint.TrainState(**one.state["progressed"])
            one.state["schedule"], one.state["optimizer_scalars"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: was written by another version of qvera ({error}).") from None
        return one

    directory = run_dir / "checkpoints"
    newest: checkpoint.Checkpoint | None = checkpoint.newest(directory, warn, use)
    if newest is None:
        require_none_saved(run_dir, directory, run_dir / "metrics.jsonl", "step")
    return newest


def require_none_saved(run_dir: Path, directory: Path, records: Path, unit: str) -> None:
    """Refuse to begin a run again that has saved checkpoints; it has none that can be used.

    Args:
        directory: of its checkpoints.
        records: its metrics.jsonl.
        unit: what checkpoints and records are numbered by: ``step`` or ``round``.

    Raises:
        InputError: it has saved some.
    """
    taken = max((record[unit] for record in read_records(records, unit)), default=0)
    # the step that is saved is recorded first, so a run killed in its first save has recorded that many steps
    saved = taken > load_recipe(run_dir / "recipe.yaml", of_a_run=True).training.save_steps
    if saved or checkpoint.directories(directory):
        raise InputError(
            f"{directory}: holds no checkpoint that can be used, and the run has taken {taken} {unit}s. Put a whole "
            f"checkpoint back. To begin again at {unit} 0, delete {run_dir} or choose another training.output_dir."
        )


def write_run_json(run_dir: Path, run: dict[str, Any]) -> None:
    """Write run.json: when a run begins, so that others see what it is made of, and when it ends.

    Raises:
        RunFailed: the disk is full or read-only.
    """
    with disk_errors(str(run_dir / "run.json"), "Checkpoints are kept; mend that and go on with --resume."):
        replace_text(run_dir / "run.json", json.dumps(plain_json(run), indent=1, ensure_ascii=False))


def write_run(run_dir: Path, run: dict[str, Any], console: Console) -> None:
    """Write run.json and the report page.

    Raises:
        RunFailed: the disk is full or read-only.
    """
    run["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_run_json(run_dir, run)
    try:
        write_report(run_dir)
    except QveraError as error:  # the page can be made again; the run is what counts
        console.print(f"[yellow]No report was written: {error}")
