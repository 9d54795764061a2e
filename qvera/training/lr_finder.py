"""The learning-rate range test (Smith, arXiv 1506.01186): a short training whose rate grows until the loss diverges.

It takes the training loop's own steps on the recipe's model, rows, adapter and optimizer; only the schedule differs. It
writes two files, and nothing that looks like a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.config.schema import RangeTest, Recipe
from qvera.distributed.init import in_group
from qvera.evaluation.report.smoothing import smooth
from qvera.models.loader import Base
from qvera.training.logging import ProgressBar
from qvera.training.lr_page import write_page
from qvera.training.optim import build_range_test
from qvera.training.run_dir import plain_json, require_writable
from qvera.training.session import TrainingSession
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError, RunFailed

if TYPE_CHECKING:
    from rich.console import Console

POINTS, PAGE = "lr-range.jsonl", "lr-range.html"

MIN_POINTS = 20
"""Losses that a suggestion needs: with fewer, the noise of one batch decides where the lowest is."""

RULE = "the rate at the lowest smoothed loss, for the peak of a schedule with warmup and decay"
"""Chosen after two recipes with SmolLM2-135M at rank 256: it gave 0.046 where 0.03 was the best rate tried (quickstart)
and 0.07 where 0.1 was (E2E). The steepest fall, another common rule, gave 0.008 and 0.014. Then checked on a third
recipe (Alpaca, rank 96): 0.07 where 0.05 was the best of four; the steepest fall gave 0.0014."""

_DIVERGED = 2.0
"""A loss has diverged where its running mean is this many times its lowest, and above where it began."""

_RECORD_KEYS = ("step", "learning_rate", "loss", "grad_norm", "trained_tokens", "input_tokens", "step_seconds")


@dataclass(frozen=True)
class RangeTestResult:
    """The curve of a range test and what it suggests.

    Attributes:
        points: one record a step: ``step``, ``learning_rate``, ``loss`` (before that step; None where not finite),
            ``smoothed_loss``, ``grad_norm``, ``trained_tokens``, ``input_tokens``, ``step_seconds``.
        suggestion: a rate by `RULE`, or None.
        steepest: the rate at which the loss fell fastest, below which a run wastes steps; None without a suggestion.
        diverged: the rate at which the test was stopped; None where it ran to its end.
        reason: why there is no suggestion; None where there is one.
    """

    points: list[dict[str, Any]]
    suggestion: float | None
    steepest: float | None
    diverged: float | None
    reason: str | None = None


def find_lr(
    recipe: Recipe,
    out: Path,
    ramp: RangeTest | None = None,
    *,
    console: Console | None = None,
    base: Base | None = None,
) -> RangeTestResult | None:
    """Run the test and write ``lr-range.jsonl`` and ``lr-range.html`` into ``out``.

    Args:
        recipe: of the run that the rate is for.
        out: a directory, made where it is not there; a run in it is left as it is.
        ramp: the rates and the number of steps.
        console: for progress; default: standard error.
        base: an already loaded base.

    Returns:
        The result; None in a process that is not the first of several.

    Raises:
        InputError: as `trainer.train`.
        RunFailed: the very first loss was not finite.
    """
    ramp = ramp or RangeTest()
    with in_group() as group, TrainingSession(recipe, out, group, console, base) as session:
        group.on_first(lambda: require_writable(out))
        session.load_data()
        session.load_model()
        session.build_engine(build_range_test(recipe.training, session.optimizer, ramp), ramp.steps)
        points, diverged = _take_steps(session, ramp)
        if not group.first:
            return None
        losses, suggestion, steepest, reason = read_curve(points)
        for point, loss in zip(points, losses, strict=False):
            point["smoothed_loss"] = loss
        result = RangeTestResult(points, suggestion, steepest, diverged, reason)
        _write(out, recipe, ramp, result)
        return result


def _take_steps(session: TrainingSession, ramp: RangeTest) -> tuple[list[dict[str, Any]], float | None]:
    """The records of the steps, and the rate at which the loss diverged."""
    points: list[dict[str, Any]] = []
    watch = DivergenceWatch(ramp.steps)
    session.model.train()
    with ProgressBar(session.console, ramp.steps, 0) as progress:
        while session.state.step < ramp.steps:
            rate = float(session.schedule.get_last_lr()[0])
            try:
                record = session.train_step()
            except RunFailed:  # a loss that is not finite ends the test, unless no step has been taken yet
                if not points:
                    raise
                points.append({"step": session.state.step + 1, "learning_rate": rate, "loss": None})
                return points, rate
            points.append({key: record.get(key) for key in _RECORD_KEYS})
            progress.update(record)
            if watch.diverged(record["loss"]):  # the same on all ranks, as the loss is
                return points, rate
    return points, None


class DivergenceWatch:
    """Says when the loss has diverged: its running mean is above where it began and above twice its lowest.

    Both are needed: a loss that has fallen far may double by the noise of one batch, and one that barely falls is soon
    above its start. The mean covers about a twentieth of the test, at most five steps, so that a short test is not
    stopped late.
    """

    def __init__(self, steps: int) -> None:
        self.memory = 1.0 - 1.0 / min(max(steps / 20, 1.0), 5.0)
        self.sum = self.weight = 0.0
        self.first = self.lowest = math.inf

    def diverged(self, loss: float) -> bool:
        """Take in one step's loss."""
        if not math.isfinite(loss):
            return True
        self.sum = self.memory * self.sum + (1 - self.memory) * loss
        self.weight = self.memory * self.weight + (1 - self.memory)
        mean = self.sum / self.weight  # without the pull of the zero it began with
        if self.first == math.inf:
            self.first = mean
        self.lowest = min(self.lowest, mean)
        return mean > self.first and mean > _DIVERGED * self.lowest


def read_curve(points: Sequence[dict[str, Any]]) -> tuple[list[float], float | None, float | None, str | None]:
    """Read the suggestion from the points before the first loss that is not finite.

    The smoothed loss is centred, so that it does not lag. At the end of the curve there is less to smooth with: one of
    the last two points is suggested only where the loss itself is lowest at it. The steepest fall is that of a line
    through five neighbours, before the lowest loss.

    Returns:
        Smoothed losses, the suggested rate, the rate of the steepest fall, and why there is no suggestion.
    """
    finite = [point for point in points if point["loss"] is not None]
    raw = [point["loss"] for point in finite]
    rates = [math.log(point["learning_rate"]) for point in finite]
    curve = [y for _, y in smooth(list(zip(rates, raw, strict=True)), width=len(points) / 30)]
    losses = [y for y in curve if y is not None]
    if len(losses) < MIN_POINTS:
        reason = f"{len(losses)} losses before the test ended, and {MIN_POINTS} are needed. Raise --lr-steps"
        return losses, None, None, reason
    candidates = [at for at in range(len(losses)) if at < len(losses) - 2 or raw[at] == min(raw)]
    lowest = min(candidates, key=losses.__getitem__)
    slopes = {
        at: _slope(rates[at - 2 : at + 3], losses[at - 2 : at + 3]) for at in range(2, min(lowest + 1, len(losses) - 2))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    if steepest is None or slopes[steepest] >= 0:
        return losses, None, None, "the loss never fell. Start lower with --lr-from, or raise --lr-steps"
    return losses, math.exp(rates[lowest]), math.exp(rates[steepest]), None


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line of least squares."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def _write(out: Path, recipe: Recipe, ramp: RangeTest, result: RangeTestResult) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / POINTS, "".join(json.dumps(plain_json(point)) + "\n" for point in result.points))
        title = Path(recipe.model.path).name or recipe.model.path
        facts = {"learning_rate": recipe.training.learning_rate, "rule": RULE, "data": recipe.data.path, "ramp": ramp}
        write_page(out / PAGE, title, out.name, result, facts)
    except OSError as error:
        raise InputError(
            f"{out}: can't be written ({error.strerror or error}). Choose another training.output_dir."
        ) from None
