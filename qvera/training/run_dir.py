"""The run directory: may it be written, what is known of a run, and run.json with the report at the end."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qvera.adapters.save_load import adapter_facts
from qvera.config.load import load_recipe
from qvera.config.schema import Recipe
from qvera.data import Datasets
from qvera.evaluation.report import write_report
from qvera.models.loader import Base
from qvera.training import memory_check
from qvera.training.checkpoint import Checkpoint
from qvera.utils import memory
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError, QveraError


@dataclasses.dataclass
class Progressed:
    """Everything a later step depends on besides vectors, optimizer and random state; saved in each checkpoint."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    train_seconds: float = 0.0
    input_tokens: int = 0
    before: dict[str, Any] | None = None
    samples_before: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def run_directory(recipe: Recipe, recipe_path: Path | None) -> Path:
    """``training.output_dir``, or ``runs/`` and the recipe's file name."""
    if recipe.training.output_dir is not None:
        return Path(os.path.expanduser(recipe.training.output_dir))
    return Path("runs") / (recipe_path.stem if recipe_path is not None else "run")


def check_run_dir(run_dir: Path, recipe: Recipe, resume: bool, dry_run: bool) -> None:
    """Refuse a directory that a run can't be written to; nothing is written.

    Raises:
        InputError: it holds a run (without ``resume``), none (with it), one of another recipe, or can't be written.
    """
    if dry_run:
        return
    existing = run_dir / "recipe.yaml"
    if existing.exists() and not resume:
        raise InputError(
            f"{run_dir}: already holds a run. Add --resume to go on with it, or choose another training.output_dir."
        )
    if resume and not existing.exists():
        raise InputError(f"{run_dir}: holds no run to resume (no recipe.yaml).")
    if resume:
        changed = changed_keys(load_recipe(existing).to_dict(), recipe)
        if changed:
            raise InputError(
                f"{run_dir}: was started with another recipe; {', '.join(changed)} changed. Undo that, or start a new run in "
                "another training.output_dir."
            )
    writable(run_dir)


def writable(run_dir: Path) -> None:
    """Raises InputError where nothing could be written into this directory, which need not be there yet."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir}: is a file; a run needs a directory (training.output_dir).")
    parent = run_dir
    while not parent.exists():
        parent = parent.parent
    try:  # by doing it: permission bits say yes to root even where nothing can be made
        os.rmdir(tempfile.mkdtemp(prefix=".qvera-", dir=parent))
    except OSError as error:
        raise InputError(
            f"{run_dir}: nothing can be written in {parent} ({error.strerror}). Choose another training.output_dir."
        ) from None


_FREE = {
    "data": ("tokenize_processes",),  # the rows are the same
    "training": ("output_dir", "save_steps", "save_total_limit", "report_to"),
}
_FREE_SECTIONS = ("export", "deepspeed")  # a checkpoint goes on under any ZeRO stage, and without one


def changed_keys(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """Keys in which a recipe (as `Recipe.to_dict` gave it) differs from this one, but for those that don't change what a step
    computes. A key that one of them lacks is no difference: it was written by another version.
    """
    found = []
    before = plain(before)
    for section, now in plain(recipe.to_dict()).items():
        then = before.get(section)
        if section in _FREE_SECTIONS or not isinstance(now, dict) or not isinstance(then, dict):
            continue
        keys = [k for k in now if k in then and k not in _FREE.get(section, ())]
        found += [f"{section}.{key}" for key in keys if then[key] != now[key]]
    return found


def check_same_run(found: Checkpoint, recipe: Recipe) -> None:
    """Refuse a checkpoint that another recipe made, or whose state this version does not know.

    Raises:
        InputError: says which keys differ.
    """
    changed = changed_keys(found.state.get("recipe") or {}, recipe)
    if changed:
        raise InputError(f"{found.path}: is of another run; {', '.join(changed)} differ from this recipe.")
    try:
        Progressed(**found.state["progressed"])
        found.state["schedule"], found.state["optimizer_scalars"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{found.path}: was written by another version of qvera ({error}).") from None


def run_facts(base: Base, model: Any, datasets: Datasets, device: torch.device, started: str) -> dict[str, Any]:
    """The part of run.json that is known before the first step, read from the live objects."""
    return {
        "format": 1,
        "status": "running",
        "started": started,
        "model": base.facts,
        "adapter": {**adapter_facts(model), "file_bytes": None},
        "data": datasets.stats.to_dict(),
        "versions": memory.versions(),
        "device": memory.device_name(device),
    }


def finish(
    run_dir: Path,
    run: dict[str, Any],
    done: Progressed,
    steps: int,
    per_epoch: int,
    watch: memory.PeakWatch,
    after: dict[str, Any] | None,
    samples: list[dict[str, Any]],
    console: Console,
) -> None:
    """Write run.json and the report page."""
    run["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run["result"] = {
        "steps": done.step,
        "planned_steps": steps,
        "epochs": done.step / per_epoch,
        "train_loss_first": done.train_loss_first,
        "train_loss_last": done.train_loss_last,
        "eval_before": done.before,
        "eval_after": after,
        "best_step": done.best_step,
        "stopped_early": done.stopped_early,
        "seconds": done.train_seconds,
        "tokens_per_second": done.input_tokens / done.train_seconds if done.train_seconds else None,
        "peak_bytes": watch.peak_bytes,
        "mapped_bytes": 0 if watch.device.type == "cuda" else memory.mapped_weights_bytes(),
    }
    if run.get("plan"):
        run["plan"]["measured"] = memory_check.measured(run["plan"], watch)
    run["samples"] = [
        {"prompt": a["prompt"], "reference": a["reference"], "before": b["answer"], "after": a["answer"]}
        for b, a in zip(done.samples_before, samples, strict=False)
    ]
    replace_text(run_dir / "run.json", json.dumps(plain(run), indent=1, ensure_ascii=False))
    try:
        write_report(run_dir)
    except QveraError as error:  # the page can be made again; the run is what counts
        console.print(f"[yellow]No report was written: {error}")


def plain(value: Any) -> Any:
    """A JSON value without NaN (which other parsers refuse): not-a-number becomes null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
