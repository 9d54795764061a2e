"""The learning-rate range test (Smith, arXiv 1506.01186): a short training whose rate grows until the loss diverges.

It runs the recipe's own model, rows, batches, adapter, optimizer and clipping through the training loop's step; only the schedule
is another one. It writes two files, and nothing that would pass for a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from . import measure
from .alike import same_everywhere
from .errors import InputError, RunFailed
from .metrics import Progress
from .model import Base
from .optimize import build_ramp
from .ranks import in_group
from .ready import configured, load, read_rows, ready_device, spreading, start_engine
from .recipe import RangeTest, Recipe
from .report.charts import smooth
from .report.ramp import write_ramp
from .rundir import Progressed, plain, writable
from .step import train_step
from .unfinished import replace_text

POINTS, PAGE = "lr-range.jsonl", "lr-range.html"

_MEMORY = 0.8
"""Weight of the past in the running mean that the loss is watched by: about five steps."""

_DIVERGED = 2.0
"""Times its lowest that the running mean has to reach, besides being above where it began."""

RULE = "the rate at the lowest smoothed loss, for the peak of a schedule with warmup and decay"
"""Held against rates that whole runs of 50 to 68 steps had picked (SmolLM2-135M, r=256): 0.046 where 0.03 was picked (quickstart),
0.07 where 0.1 was the best of 0.03, 0.1 and 0.2 (E2E). The steepest fall, another common rule, came to 0.008 and 0.014. The rule
was chosen after these two were seen, and has not been held against a third."""


@dataclass(frozen=True)
class Found:
    """What a range test came to.

    Attributes:
        points: one record a step: ``step``, ``learning_rate``, ``loss`` (before that step; None where not finite),
            ``smoothed_loss``, ``grad_norm``, ``trained_tokens``, ``input_tokens``, ``step_seconds``.
        suggestion: a rate by `RULE`; None where the loss never fell.
        steepest: the rate at which the loss fell fastest, below which a run wastes steps; None likewise.
        diverged: the rate at which the test was stopped; None where it ran to its end.
    """

    points: list[dict[str, Any]]
    suggestion: float | None
    steepest: float | None
    diverged: float | None


class Watched:
    """Says when the loss has diverged: its running mean is above where it began and above twice its lowest.

    Both are needed: a loss that has fallen far may double by the noise of one batch, and one that barely falls is soon above its
    start.
    """

    def __init__(self) -> None:
        self.sum = self.weight = 0.0
        self.first = self.lowest = math.inf

    def diverged(self, loss: float) -> bool:
        """Take in one step's loss."""
        if not math.isfinite(loss):
            return True
        self.sum = _MEMORY * self.sum + (1 - _MEMORY) * loss
        self.weight = _MEMORY * self.weight + (1 - _MEMORY)
        mean = self.sum / self.weight  # without the pull of the zero it began with
        if self.first == math.inf:
            self.first = mean
        self.lowest = min(self.lowest, mean)
        return mean > self.first and mean > _DIVERGED * self.lowest


def read_curve(points: Sequence[dict[str, Any]]) -> tuple[list[float], float | None, float | None]:
    """Smoothed losses (of the points before the first that is not finite), the suggested rate, and the rate of the steepest fall.

    The smoothed loss is centred, so that it is not late; the steepest fall is that of a line through five neighbours, before the
    lowest loss.
    """
    finite = [point for point in points if point["loss"] is not None]
    rates = [math.log(point["learning_rate"]) for point in finite]
    curve = [y for _, y in smooth([(x, p["loss"]) for x, p in zip(rates, finite, strict=True)], width=len(points) / 30)]
    losses = [y for y in curve if y is not None]
    if len(losses) < 5:
        return losses, None, None
    lowest = min(range(len(losses)), key=losses.__getitem__)
    slopes = {
        at: _slope(rates[at - 2 : at + 3], losses[at - 2 : at + 3]) for at in range(2, min(lowest + 1, len(losses) - 2))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    if steepest is None or slopes[steepest] >= 0:
        return losses, None, None
    return losses, math.exp(rates[lowest]), math.exp(rates[steepest])


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line of least squares."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


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
        with measure.PeakWatch(device) as watch, spreading(zero, recipe, out, group) as spread:
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
