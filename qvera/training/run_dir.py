"""The run directory: its lock, whether a run may be written there, and run.json."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from qvera.adapters.files.save_load import adapter_facts
from qvera.config.load import load_recipe
from qvera.config.schema import Recipe
from qvera.data import data_sha256
from qvera.evaluation.report.run_page import write_report
from qvera.training import checkpoint
from qvera.training.failures import has_finite_loss
from qvera.training.logging import read_records
from qvera.utils import accelerator, memory
from qvera.utils.atomic import disk_errors, replace_text
from qvera.utils.errors import InputError, QveraError
from qvera.utils.files import existing_parent, plain_json, try_read_json
from qvera.utils.formatting import first_of
from qvera.utils.paths import ADAPTERS, RUN_OWNER

if TYPE_CHECKING:
    from rich.console import Console

    from qvera.data import Datasets
    from qvera.models.loader import Base
    from qvera.training.many import ManyTrainer
    from qvera.training.roster import AdapterRun
    from qvera.training.session import TrainingSession

_LOCK = ".qvera_run.lock"
GOT_WORSE = "got worse"  # the held-out loss is higher after training than before
TOO_FEW_ROWS = "too few rows"  # than one optimizer step takes
REPEATED = "held-out rows repeat training rows"  # token for token, of the same adapter


def run_directory(recipe: Recipe, recipe_path: Path | None) -> Path:
    """``training.output_dir``, or ``runs/`` and the recipe's file name."""
    if recipe.training.output_dir is not None:
        return Path(os.path.expanduser(recipe.training.output_dir))
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
            for file in (owner, run_dir / _LOCK):
                file.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def check_run_dir(run_dir: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse a directory that does not fit what was asked for; nothing is written.

    Raises:
        InputError: it can't be written; it holds a run or a run's files (without ``resume``); it holds no run, or one
            of another recipe (with it).
    """
    require_writable(run_dir)
    existing = run_dir / "recipe.yaml"
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
    if resume and (changed := changed_keys(load_recipe(existing, of_a_run=True).to_dict(), recipe)):
        raise InputError(
            f"{run_dir}: was started with another recipe; {', '.join(changed)} changed. Undo that, or start a new run "
            "in another training.output_dir."
        )


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
    "data": ("tokenize_processes",),  # the rows are the same
    # gradient_checkpointing: but for rounding in long batches (docs/memory.md), and it may be what a run needs to go on
    "training": ("output_dir", "save_steps", "save_total_limit", "report_to", "gradient_checkpointing", "on_oom"),
}
_FREE_SECTIONS = ("export", "deepspeed")  # a checkpoint goes on under any ZeRO stage, and without one


def changed_keys(before: dict[str, Any], recipe: Recipe) -> list[str]:
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
    return changed


def inputs_of(datasets: Datasets, base: Base) -> dict[str, Any]:
    """What a step depends on besides the recipe: SHA-256 of the rows, fingerprint of the base."""
    return {"rows": data_sha256(datasets), "base": base.facts.get("fingerprint")}


def require_same_inputs(path: Path, saved: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
    """Raise InputError where the checkpoint at ``path`` is of other rows or another base.

    ``saved``: its `inputs_of`; None: of an earlier version, which kept none. ``inputs``: those of now.
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

    ``warn`` gets a sentence about each one passed over. InputError where there are some and none can be used.
    """

    def use(path: Path) -> checkpoint.Checkpoint:
        saved = checkpoint.load(path)
        if changed := changed_keys(saved.state.get("recipe") or {}, recipe):
            raise InputError(f"{path}: is of another run; {', '.join(changed)} differ from this recipe.")
        try:
            checkpoint.TrainState(**saved.state["progressed"])
            saved.state["schedule"], saved.state["optimizer_scalars"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: was written by another version of qvera ({error}).") from None
        return saved

    directory = run_dir / "checkpoints"
    newest: checkpoint.Checkpoint | None = checkpoint.newest(directory, warn, use)
    if newest is None:
        require_none_saved(run_dir, directory, run_dir / "metrics.jsonl", "step")
    return newest


def require_none_saved(run_dir: Path, directory: Path, records: Path, unit: str) -> None:
    """Raise InputError where a run without a usable checkpoint has saved some: it must not begin again.

    ``directory``: of its checkpoints. ``records``: its metrics.jsonl. ``unit``: numbers both, ``step`` or ``round``.
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
    """Write run.json, when a run begins and when it ends. RunFailed where the disk is full or read-only."""
    with disk_errors(str(run_dir / "run.json"), "Checkpoints are kept; mend that and go on with --resume."):
        replace_text(run_dir / "run.json", json.dumps(plain_json(run), indent=1, ensure_ascii=False))


def write_run(run_dir: Path, run: dict[str, Any], console: Console) -> None:
    """Write run.json and the report page. RunFailed where the disk is full or read-only."""
    run["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_run_json(run_dir, run)
    try:
        write_report(run_dir)
    except QveraError as error:  # the page can be made again; the run is what counts
        console.print(f"[yellow]No report was written: {error}")


def begun_run(session: TrainingSession, started: str) -> dict[str, Any]:
    """The contents of run.json while the run goes; ``started``: when, in ISO format."""
    return {
        "format": 1,
        "status": "running",
        "started": started,
        "planned_steps": session.steps,
        "model": session.base.facts,
        "adapter": {**adapter_facts(session.model), "file_bytes": None},
        "data": {**session.datasets.stats.to_dict(), "sha256": session.inputs["rows"]},
        "versions": memory.versions(),
        "device": memory.device_name(session.device),
        "plan": None if session.plan is None else session.plan.to_dict(),
        "gradient_checkpointing": session.checkpointing,
        "processes": {"count": session.group.world_size, "deepspeed": session.recipe.deepspeed},
    }


def begun_samples(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of run.json while there are only answers from before training."""
    return [
        {"prompt": answer["prompt"], "reference": answer["reference"], "before": answer["answer"]} for answer in answers
    ]


def add_result(
    run: dict[str, Any],
    session: TrainingSession,
    status: str,
    after: dict[str, Any] | None,
    samples: Sequence[dict[str, Any]],
    extra: dict[str, Any],
) -> None:
    """Add the results to the run.json of a run (`begun_run`). All ranks call this together.

    ``status``: ``done``, ``interrupted`` or ``failed``. ``after``: as `Trainer.score` returns it. ``samples``: the
    answers after training. ``extra``: what the hooks add to the result.
    """
    state = session.state
    run["status"] = status
    run["result"] = {
        "steps": state.step,
        "planned_steps": session.steps,
        "epochs": state.step / session.batches.per_epoch,
        "train_loss_first": state.train_loss_first,
        "train_loss_last": state.train_loss_last,
        "eval_before": state.before,
        "eval_after": after,
        "best_step": state.best_step,
        "stopped_early": state.stopped_early,
        "skipped_steps": state.skipped_steps,
        "halvings": state.halvings,
        "seconds": state.train_seconds,
        "tokens_per_second": state.input_tokens / state.train_seconds if state.train_seconds else None,
        **measurements(run, session),
        **extra,
    }
    run["samples"] = [
        {**before, "after": after["answer"]}
        for before, after in zip(begun_samples(state.samples_before), samples, strict=False)
    ]


def measurements(run: dict[str, Any], session: TrainingSession) -> dict[str, Any]:
    """Peak memory, for the result in run.json; also added to its plan and processes. All ranks call this together."""
    watch = session.watch
    mapped_bytes = 0 if accelerator.is_accelerator(session.device) else memory.mapped_weights_bytes()
    run["processes"]["ranks"] = session.group.gather({"host": session.group.host, "peak_bytes": watch.peak_bytes})
    if session.plan is not None:
        run["plan"]["measured"] = session.plan.measured(watch.peak_bytes, mapped_bytes, watch.peak_tensor_bytes)
    return {"peak_bytes": watch.peak_bytes, "mapped_bytes": mapped_bytes}


def adapter_result(run: AdapterRun, recipe: Recipe) -> dict[str, Any]:
    """An adapter's entry in run.json; its status is ``unfinished`` while it is still to be trained."""
    state = run.state
    flags = []
    before, after = state.before, run.after
    if before is not None and after is not None and has_finite_loss(before) and after["loss"] > before["loss"]:
        flags.append(GOT_WORSE)
    if len(run.rows.train) < recipe.training.global_batch_size:
        flags.append(TOO_FEW_ROWS)
    if run.rows.repeated_rows:
        flags.append(REPEATED)
    return {
        "name": run.name,
        "directory": run.directory,
        "status": run.status if run.has_left else "unfinished",
        "rows": len(run.rows.train),
        "eval_rows": len(run.rows.eval),
        "steps": state.step,
        "planned_steps": run.steps,
        "best_step": state.best_step,
        "train_loss_first": state.train_loss_first,
        "train_loss_last": state.train_loss_last,
        "eval_before": state.before,
        "eval_after": run.after,
        "flags": flags,
        **({} if run.reason is None else {"reason": run.reason}),
    }


def without_rows(name: str) -> dict[str, Any]:
    """The entry of an adapter whose rows were all dropped or cut away."""
    empty = ("best_step", "train_loss_first", "train_loss_last", "eval_before", "eval_after")
    counts = ("rows", "eval_rows", "steps", "planned_steps")
    entry = {"name": name, "directory": None, "status": "no_rows"}
    return {**entry, **dict.fromkeys(counts, 0), **dict.fromkeys(empty), "flags": []}


def add_results(run: dict[str, Any], trainer: ManyTrainer, status: str, entries: Sequence[dict[str, Any]]) -> None:
    """Add the results of many adapters to run.json. All ranks call this together.

    ``status``: as in `add_result`. ``entries``: of all adapters, in the order of the data.
    """
    rounds, seconds, tokens = zip(
        *trainer.group.gather([trainer.round, trainer.totals.seconds, trainer.totals.input_tokens]), strict=True
    )
    longest = max(seconds)
    run["status"] = status
    run["adapters"] = list(entries)
    run["result"] = {
        "rounds": max(rounds),
        "steps": sum(entry["steps"] for entry in entries),
        "planned_steps": sum(entry["planned_steps"] for entry in entries),
        "seconds": longest,
        "tokens_per_second": sum(tokens) / longest if longest else None,
        **measurements(run, trainer),
    }
    run["samples"] = []
