"""The run directory: its lock, whether a run may be written there, run.json, metrics.jsonl; and other trackers."""

import contextlib
import datetime
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from rich.console import Console

from qvera.config.fields import take_old_keys
from qvera.config.schema import Recipe, load_recipe
from qvera.evaluation.report.read import get, is_replaced, status_of
from qvera.evaluation.report.run_page import write_report
from qvera.utils.errors import InputError, QveraError, RunFailed
from qvera.utils.files import (
    ADAPTER_WEIGHTS,
    ADAPTERS,
    RUN_OWNER,
    RUN_PROGRESS,
    disk_errors,
    existing_parent,
    flush,
    plain_json,
    replace_text,
    runs_in,
    try_read_json,
)
from qvera.utils.formatting import first_of, size

_LOCK = ".qvera_run.lock"


@contextlib.contextmanager
def run_lock(run_dir: Path, wait_seconds: float = 0.0, what: str = "training.output_dir") -> Iterator[None]:
    """Hold a directory that trainings are written into, so that no second process writes there.

    The system releases the lock of a process that died. A network file system whose locks are local to each host
    (Lustre with ``localflock``) keeps only processes of one host apart. Directories made for the lock are removed where
    nothing was written. ``what``, the key or option that names the directory, is for messages.

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
        owner.write_text(json.dumps({**this_process(), "started": started}), encoding="utf-8")
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
        # while the lock is held, since the next holder makes these files anew
        with contextlib.suppress(OSError):  # a disk that became read-only; a lock file that nobody holds does no harm
            for file in (owner, run_dir / RUN_PROGRESS, run_dir / _LOCK):
                file.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def check_run_dir(run_dir: Path, recipe: Recipe, resume: bool) -> bool:
    """Refuse a directory that does not fit what was asked for; nothing is written.

    Returns whether to go on with the run there: if ``resume`` says so, or if the run was interrupted after it had begun
    to train. A run that was interrupted before that may begin again.

    Raises:
        InputError: it holds a run or a run's files (without ``resume``); it holds no run, one of another recipe, or
            another adapter than its run wrote (with it).
    """
    existing = run_dir / "recipe.yaml"
    info = try_read_json(run_dir / "run.json") or {}
    status = status_of(info)
    if not resume and existing.exists() and status == "interrupted":
        metrics, kept = run_dir / "metrics.jsonl", run_dir / "checkpoints"
        if not kept.exists() and not (metrics.exists() and metrics.stat().st_size):
            return False
        resume = True
    if existing.exists() and not any((run_dir / name).exists() for name in ("metrics.jsonl", "run.json")):
        raise InputError(
            f"{existing}: is no run's, and a run there would write over it. Choose another training.output_dir."
        )
    # before --resume is advised, which takes no other recipe
    begun = load_recipe(existing, of_a_run=True).to_dict() if existing.exists() else {}
    # rows may have moved: they are compared by their hash once they are read (`Run.check`)
    places = ("data.path", "data.eval_path") if resume and get(info, "data", "sha256") else ()
    if changed := changed_keys(begun, recipe, (*LENGTH, *places)):
        raise InputError(
            f"{run_dir}: was started with another recipe; {', '.join(changed)} changed. Go on with the run's own by "
            f"`qvera train {existing} --resume`, or start a new run in another training.output_dir."
        )
    if not resume and existing.exists():
        holder = try_read_json(run_dir / RUN_OWNER) if status == "running" else None
        add = "Add"
        if holder:
            add = f"Process {holder.get('pid')} on {holder.get('host')} trains it: wait for it. If that is gone, add"
        raise InputError(
            f"{run_dir}: already holds a run. {add} --resume to go on with it, or choose another training.output_dir."
        )
    if runs := [run.name for run in runs_in(run_dir)]:
        raise InputError(
            f"{run_dir}: holds the runs {first_of(runs)}, and this run's files would lie among them. Choose one "
            f"of its own, such as {run_dir / 'NAME'}."
        )
    if resume and not existing.exists():
        beside = first_of([*map(str, runs_in(run_dir.parent))])
        there = f", or go on with a run that is there: {beside}" if beside else ""
        raise InputError(f"{run_dir}: holds no run to resume (no recipe.yaml). Leave --resume out to begin it{there}.")
    if resume and is_replaced(get(info, "adapter", "sha256"), run_dir / "adapter" / ADAPTER_WEIGHTS):
        raise InputError(
            f"{run_dir / 'adapter'}: another adapter is there now than this run wrote, and a run that goes on writes "
            "its own there. Move it elsewhere. To train on from it, start a new run with adapter.init_from."
        )
    # Look for files with the names that a run gives. Empty ones don't count: a run that died at once leaves an empty
    # metrics.jsonl.
    adapter = ADAPTERS if recipe.data.has_adapters else "adapter"
    # config.json: the directory of a model, such as the base's own
    names = [
        adapter,
        "config.json",
        "metrics.jsonl",
        "run.json",
        "report.html",
        "checkpoints/step-*",
        "checkpoints/round-*",
    ]
    written = [path for name in names for path in sorted(run_dir.glob(name))]
    holds = [any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0 for path in written]
    others = [path.relative_to(run_dir) for path, is_full in zip(written, holds, strict=True) if is_full]
    if not resume and others:
        raise InputError(
            f"{run_dir}: holds {first_of(others)} and no recipe.yaml. It is no run, and one would write over that. "
            "Choose another training.output_dir, or move them away."
        )
    return resume


def require_writable(run_dir: Path, what: str = "training.output_dir") -> None:
    """Raise InputError where nothing could be written into this directory, which need not exist yet."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir}: is a file; a run needs a directory ({what}).")
    if run_dir.is_symlink() and not run_dir.exists():
        raise InputError(f"{run_dir}: is a link to {run_dir.readlink()}, which is not there ({what}).")
    parent = existing_parent(run_dir)
    try:  # to make one: permission bits say yes to root even where nothing can be made
        os.rmdir(tempfile.mkdtemp(prefix=".qvera-", dir=parent))
    except OSError as error:
        raise InputError(
            f"{run_dir}: nothing can be written in {parent} ({error.strerror}). Choose another {what}."
        ) from None


# keys that may differ in a run that goes on, and why
_FREE = {
    "model": ("stream",),  # the numbers are the same
    "data": ("tokenize_processes", "max_row_characters"),  # the rows are the same
    # gradient_checkpointing: but for rounding in long batches (docs/memory.md), and it may be what a run needs to go on
    "training": ("output_dir", "save_steps", "save_total_limit", "report_to", "gradient_checkpointing", "on_oom"),
}
_FREE_SECTIONS = ("export", "deepspeed")  # a checkpoint goes on under any ZeRO stage, and without one


KEPT = "Checkpoints are kept; mend that and go on with --resume."
"""What a message about a full disk ends with."""
LENGTH = ("training.max_steps", "training.num_train_epochs")
"""The keys that may grow in a run that goes on (`Run.check_length`)."""


def changed_keys(before: dict[str, Any], recipe: Recipe, may_change: Sequence[str] = ()) -> list[str]:
    """Return keys that change what a step computes and differ between an earlier recipe (`Recipe.to_dict`) and this.

    A key that only one of them has is no difference: it was written by another version.
    """
    changed = []
    before = take_old_keys(plain_json(before), "", of_a_run=True)
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
    """Return how run.json and the lock name the process that writes, for `status_of` and people."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def mark_ended(run_dir: Path, status: str) -> None:
    """Put the status into a run.json that this process has left ``running``."""
    found = try_read_json(run_dir / "run.json") or {}
    # one that another process wrote, such as that of an earlier run, is left alone
    if found.get("status") == "running" and this_process().items() <= found.get("processes", {}).items():
        with contextlib.suppress(RunFailed):  # the disk is full, which has its own error
            write_run_json(run_dir, {**found, "status": status})


def write_run_json(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write run.json, when a run begins and when it ends. RunFailed where the disk is full or read-only."""
    with disk_errors(str(run_dir / "run.json"), KEPT):
        replace_text(run_dir / "run.json", json.dumps(plain_json(summary), indent=1, ensure_ascii=False))


def write_run(run_dir: Path, summary: dict[str, Any], console: Console) -> None:
    """Write run.json and the report page. RunFailed where the disk is full or read-only."""
    summary["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_run_json(run_dir, summary)
    try:
        write_report(run_dir)
    except QveraError as error:  # the page can be made again; the run is what counts
        console.print(f"[yellow]No report was written: {error}")


def metrics_path(run_dir: Path, rank: int) -> Path:
    """Return the file of a process that writes its own records. When a run ends, the first one's has all of them."""
    return run_dir / (f"metrics.rank-{rank:05d}.jsonl" if rank else "metrics.jsonl")


def join_records(run_dir: Path, processes: int) -> None:
    """Put the records of all processes into metrics.jsonl. RunFailed where the disk is full; nothing is lost."""
    first, *others = [metrics_path(run_dir, rank) for rank in range(processes)]
    with disk_errors(str(first), KEPT):
        for path in [path for path in others if path.exists()]:
            texts = [file.read_text(encoding="utf-8") for file in (first, path)]
            # each line once: a process that was killed here before may have joined them, and not removed the file
            replace_text(first, "".join(dict.fromkeys("".join(texts).splitlines(keepends=True))))
            path.unlink()


def read_records(path: Path, unit: str = "step") -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl that have a ``unit``. A line that a killed run left half is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get(unit), int):
            yield record


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each step once per kind, also after interruptions."""

    def __init__(self, path: Path, last_step: int, unit: str = "step", rank: int = 0, again: str | None = None) -> None:
        """Open for appending; records after ``last_step`` are dropped, since those steps are run again.

        ``unit``: numbers the records, ``step`` or ``round``. ``rank``: of this process; records with another rank are
        kept. ``again``: a kind of record of ``last_step`` that is dropped too.
        """
        self.path = path

        # the run may go on from an older checkpoint than the newest, with many later records in the file
        def is_kept(record: dict[str, Any]) -> bool:
            is_behind = record[unit] < last_step + (again is None or record.get("kind") != again)
            return is_behind or record.get("rank", 0) != rank

        lines = [json.dumps(record) for record in read_records(path, unit) if is_kept(record)]
        with disk_errors(str(path), KEPT):
            replace_text(path, "".join(f"{line}\n" for line in lines))

    def write(self, *records: dict[str, Any]) -> None:
        """Append records. RunFailed where the disk is full or read-only."""
        with disk_errors(str(self.path), KEPT), open(self.path, "a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(plain_json(record)) + "\n" for record in records))

    def flush(self) -> None:
        """Flush to the disk before a checkpoint: a power cut may not take records of steps that are not run again."""
        with disk_errors(str(self.path), KEPT):
            flush(self.path)


def repeat_line(record: dict[str, Any]) -> str | None:
    """Return the console's line about a step that is taken again; None for another record."""
    if record["kind"] == "skipped":
        scale = f"{record['loss_scale']:,.0f}"
        return (
            f"step {record['step']}: the gradient overflowed in float16 at a loss scale of {scale}. It is taken again "
            "with half of it."
        )
    if record["kind"] == "out_of_memory":
        from qvera.utils.memory import Shortage  # which imports torch

        shortage = Shortage(record["asked_bytes"], record["free_bytes"])
        unit = "rows" if "pass_rows" in record else "tokens"
        return (
            f"step {record['step']}: memory ran out ({shortage}). It is taken again with at most "
            f"{record[f'pass_{unit}']:,} {unit} in a pass, and so are later ones."
        )
    return None


def step_facts(record: dict[str, Any]) -> str:
    """Return the text that stands behind the count of steps: loss, speed, memory."""
    reward = f"reward {record['reward']:.4f}, " if "reward" in record else ""
    speed = f"{record['tokens_per_second']:,.0f} tokens/s, {size(record['memory_bytes'])}"
    return f"{reward}loss {record['loss']:.4f}, {speed}"


class Trackers:
    """Trackers besides metrics.jsonl, named as in transformers and accelerate. Accelerate's classes do the work."""

    def __init__(self, names: list[str], run_dir: Path, config: dict[str, Any]) -> None:
        """Check the names; nothing is opened yet. InputError where a tracker is not known or not installed."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        auto = ["tensorboard"] if "auto" in names and find_spec("tensorboard") is not None else []
        wanted = [name for name in names if name not in ("auto", "none")] + auto
        known = {str(kind): cls for kind, cls in LOGGER_TYPE_TO_CLASS.items()}
        for name in wanted:
            if name not in known:
                raise InputError(
                    f"training.report_to: there is no reporter {name!r}; known: {', '.join(sorted(known))}, auto, none."
                )
            if find_spec(name) is None:
                raise InputError(f"training.report_to: {name} is not installed; install it or remove it from the list.")
        self.run_dir, self.config = run_dir, config
        self.classes = [known[name] for name in wanted]
        self.open: list[Any] = []

    def __enter__(self) -> Self:
        if self.classes:
            from accelerate import PartialState

            os.environ.setdefault("ACCELERATE_USE_CPU", "false")
            PartialState()  # accelerate's trackers ask it which process they are in
        for cls in self.classes:
            directory = {"logging_dir": str(self.run_dir)} if cls.requires_logging_directory else {}
            name = "tensorboard" if cls.name == "tensorboard" else self.run_dir.name
            tracker = cls(name, **directory)
            if hasattr(tracker, "start"):  # accelerate 1.12 and later open a tracker in a step of its own
                tracker.start()
            sections = {s: keys if isinstance(keys, dict) else {"": keys} for s, keys in self.config.items()}
            flat = {f"{s}.{k}".rstrip("."): str(v) for s, keys in sections.items() for k, v in keys.items()}
            tracker.store_init_configuration(flat)
            self.open.append(tracker)
        return self

    def log(self, record: dict[str, Any]) -> None:
        """Hand a record of metrics.jsonl to every tracker."""
        values = {f"{record['kind']}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
        for tracker in self.open:
            tracker.log(values, step=record["step"])

    def __exit__(self, *_: object) -> None:
        for tracker in self.open:
            tracker.finish()
