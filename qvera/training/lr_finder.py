"""The learning-rate range test (Smith, arXiv 1506.01186): a short training whose rate grows until the loss diverges.

It runs the recipe's own model, rows, batches, adapter, optimizer and clipping through the training loop's step; only the schedule
is another one. It writes two files, and nothing that would pass for a run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from qvera.config.schema import RangeTest, Recipe
from qvera.distributed.init import in_group
from qvera.models.loader import Base
from qvera.training.logging import Progress
from qvera.training.lr_curve import RULE, Found, Watched, read_curve
from qvera.training.lr_page import write_ramp
from qvera.training.optim import build_ramp
from qvera.training.rank_checks import same_everywhere
from qvera.training.run_dir import Progressed, plain, writable
from qvera.training.setup import configured, load, read_rows, ready_device, spreading, start_engine
from qvera.training.train_step import train_step
from qvera.utils import memory
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError, RunFailed

POINTS, PAGE = "lr-range.jsonl", "lr-range.html"


def find_lr(
    recipe: Recipe,
    out: Path,
    ramp: RangeTest | None = None,
    *,
    console: Console | None = None,
    base: Base | None = None,
) -> Found | None:
    """Run the test and write ``lr-range.jsonl`` and ``lr-range.html`` into ``out``.

    Args:
        out: a directory, made where it is not there; a run may be in it, and stays as it is.
        base: an already loaded base.

    Returns:
        What was found; None in a process that is not the first of several.

    Raises:
        InputError: as `trainer.train`.
        RunFailed: the very first loss was not finite.
    """
    ramp = ramp or RangeTest()
    with in_group() as group:
        console = (console or Console(stderr=True)) if group.first else Console(quiet=True)
        zero = configured(recipe, base, group)
        same_everywhere(recipe, group, console)
        group.on_first(lambda: writable(out))
        device = ready_device(recipe, group)
        datasets = read_rows(recipe, base, console, group)
        points: list[dict[str, Any]] = []
        watched, diverged = Watched(), None
        with memory.PeakWatch(device) as watch, spreading(zero, recipe, out, group) as spread:
            ready = load(recipe, datasets, zero, device, base, console, group, spread)
            schedule = build_ramp(recipe.training, ready.optimizer, ramp)
            engine = start_engine(ready, recipe, out, datasets, schedule, ramp.steps, False, console, group)
            ready.model.train()
            done = Progressed()
            with Progress(console, ramp.steps, 0) as bar:
                while done.step < ramp.steps and diverged is None:
                    rate = float(schedule.get_last_lr()[0])
                    try:
                        record = train_step(ready.model, engine, datasets, ready.batches, recipe, done, watch, group)
                    except (
                        RunFailed
                    ):  # not finite: what a range test is looking for, unless nothing has been stepped yet
                        if not points:
                            raise
                        points.append({"step": done.step + 1, "learning_rate": rate, "loss": None})
                        diverged = rate
                        break
                    points.append({key: record.get(key) for key in _KEPT})
                    bar.update(record)
                    if watched.diverged(record["loss"]):  # the same on all ranks, as the loss is
                        diverged = rate
        if not group.first:
            return None
        losses, suggestion, steepest = read_curve(points)
        for point, loss in zip(points, losses, strict=False):
            point["smoothed_loss"] = loss
        found = Found(points, suggestion, steepest, diverged)
        _write(out, recipe, ramp, found)
        return found


_KEPT = ("step", "learning_rate", "loss", "grad_norm", "trained_tokens", "input_tokens", "step_seconds")


def _write(out: Path, recipe: Recipe, ramp: RangeTest, found: Found) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / POINTS, "".join(json.dumps(plain(point)) + "\n" for point in found.points))
        title = Path(recipe.model.path).name or recipe.model.path
        facts = {"learning_rate": recipe.training.learning_rate, "rule": RULE, "data": recipe.data.path, "ramp": ramp}
        write_ramp(out / PAGE, title, out.name, found, facts)
    except OSError as error:
        raise InputError(
            f"{out}: can't be written ({error.strerror or error}). Choose another training.output_dir."
        ) from None
