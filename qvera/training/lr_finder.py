"""The learning-rate range test (Smith, arXiv 1506.01186): a short training whose rate grows until the loss diverges.

The steps are the training loop's own; only the schedule differs. It writes two files, and nothing that looks like a
run.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qvera.adapters.methods import measured_rate
from qvera.config.schema import Recipe
from qvera.config.sections import LrRange
from qvera.evaluation.report.charts import Chart, Line, line_chart, smooth
from qvera.evaluation.report.pages import render
from qvera.evaluation.report.read import Point, get_number
from qvera.training.loop import AloneLoop
from qvera.training.optim import current_rate
from qvera.training.run_dir import step_facts
from qvera.training.session import TrainingSession
from qvera.utils.errors import InputError, NotFinite
from qvera.utils.files import plain_json, replace_text
from qvera.utils.formatting import duration

POINTS, PAGE = "lr-range.jsonl", "lr-range.html"

MIN_POINTS = 20  # the losses that a suggestion needs: with fewer, the noise of one batch decides where the lowest is

RULE = "the rate at the lowest smoothed loss, for the peak of a schedule with warmup and decay"
"""Chosen after two recipes with SmolLM2-135M at rank 256: it gave 0.046 where 0.03 was the best rate tried (quickstart)
and 0.07 where 0.1 was (E2E). The steepest fall, another common rule, gave 0.008 and 0.014. Then checked on a third
recipe (Alpaca, rank 96): 0.07 where 0.05 was the best of four; the steepest fall gave 0.014."""

_DIVERGED = 2.0  # the running mean of a loss that has diverged is this many times its lowest, and above its start

_RECORD_KEYS = ("step", "learning_rate", "loss", "grad_norm", "trained_tokens", "input_tokens", "step_seconds")


@dataclass(frozen=True)
class RangeTestResult:
    """The curve of a range test and the rate that it suggests.

    ``points``: a record of each step with `_RECORD_KEYS` and ``smoothed_loss``. ``loss`` is None where not finite.
    """

    points: list[dict[str, Any]]
    suggestion: float | None  # a rate by `RULE`, or None
    steepest: float | None  # where the loss fell fastest, below which a run wastes steps; None without a suggestion
    diverged: float | None  # the rate at which the test was stopped; None where it ran to its end
    reason: str | None = None  # why there is no suggestion; None where there is one
    known: float | None = None  # the method's best on other rows, for the base's hidden size (`measured_rate`)


def take_range_test(session: TrainingSession, ramp: LrRange) -> RangeTestResult | None:
    """Load rows and model of the session, take the steps and write the curve (`trainer.find_lr`)."""
    if ramp.steps < MIN_POINTS:
        session.warn(f"--lr-steps: {ramp.steps} steps draw a curve; to suggest a rate takes {MIN_POINTS} or more.")
    session.load_data()
    session.load_model()
    loop = AloneLoop(session, ramp)
    loop.start()
    points, diverged = _take_steps(loop, ramp)
    if not session.group.first:
        return None
    hidden_size = getattr(loop.model.config.get_text_config(), "hidden_size", None)
    known = measured_rate(session.recipe.adapter.method, hidden_size) if hidden_size else None
    result, out = replace(read_curve(points, diverged), known=known), session.run_dir
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / POINTS, "".join(json.dumps(plain_json(point)) + "\n" for point in result.points))
        replace_text(out / PAGE, range_page(out.name, session.recipe, ramp, result))
    except OSError as error:
        raise InputError(
            f"{out}: can't be written ({error.strerror or error}). Choose another training.output_dir."
        ) from None
    return result


def _take_steps(loop: AloneLoop, ramp: LrRange) -> tuple[list[dict[str, Any]], float | None]:
    points: list[dict[str, Any]] = []
    loop.model.train()
    with loop.session.phase(f"testing {ramp.steps} learning rates, a step each", ramp.steps) as show:
        while loop.state.step < ramp.steps:
            rate = current_rate(loop.schedule)
            try:
                record = loop.train_step()
            except NotFinite:  # the end that is looked for, unless no step has been taken yet
                if not points:
                    raise
                points.append({"step": loop.state.step + 1, "learning_rate": rate, "loss": None})
                return points, rate
            if record["kind"] != "train":
                continue
            points.append({key: record.get(key) for key in _RECORD_KEYS})
            show(len(points), facts=f"rate {rate_text(rate)}, {step_facts(record)}")
            if has_diverged([point["loss"] for point in points], ramp.steps):  # the same on all ranks, as the loss is
                return points, rate
    return points, None


def has_diverged(losses: Sequence[float], steps: int) -> bool:
    """Whether the running mean of the losses is above where it began and above twice its lowest.

    Both are needed: one batch may double a loss that has fallen far, and a loss that barely falls is soon above its
    start. The mean covers a twentieth of ``steps``, at most five losses, so that a short test is not stopped late.
    """
    if not math.isfinite(losses[-1]):
        return True
    memory = 1.0 - 1.0 / min(max(steps / 20, 1.0), 5.0)
    means, total, weight = [], 0.0, 0.0
    for loss in losses:
        total = memory * total + (1 - memory) * loss
        weight = memory * weight + (1 - memory)
        means.append(total / weight)  # without the pull of the zero it began with
    return means[-1] > means[0] and means[-1] > _DIVERGED * min(means)


def read_curve(points: list[dict[str, Any]], diverged: float | None = None) -> RangeTestResult:
    """Read the suggestion from the points before the first loss that is not finite, and give them ``smoothed_loss``.

    Smoothing is centred, so that it does not lag. The end of the curve has less to smooth with, so one of the last two
    points is suggested only where its own loss is the lowest. The steepest fall is the slope of a line through five
    neighbours, before the lowest loss.
    """
    finite = [point for point in points if point["loss"] is not None]
    raw = [point["loss"] for point in finite]
    rates = [math.log(point["learning_rate"]) for point in finite]
    curve = smooth(list(zip(rates, raw, strict=True)), width=len(points) / 30)
    losses = [float(loss) for _, loss in curve if loss is not None]
    for point, loss in zip(finite, losses, strict=True):
        point["smoothed_loss"] = loss
    if len(losses) < MIN_POINTS:
        reason = f"{len(losses)} losses before the test ended, and {MIN_POINTS} are needed. Raise --lr-steps"
        return RangeTestResult(points, None, None, diverged, reason)
    candidates = [at for at in range(len(losses)) if at < len(losses) - 2 or raw[at] == min(raw)]
    lowest = min(candidates, key=losses.__getitem__)
    slopes = {
        at: float(np.polyfit(rates[at - 2 : at + 3], losses[at - 2 : at + 3], 1)[0])
        for at in range(2, min(lowest + 1, len(losses) - 2))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    if steepest is None or slopes[steepest] >= 0:
        reason = "the loss never fell. Start lower with --lr-from, or raise --lr-steps"
        return RangeTestResult(points, None, None, diverged, reason)
    return RangeTestResult(points, math.exp(rates[lowest]), math.exp(rates[steepest]), diverged)


def range_page(name: str, recipe: Recipe, ramp: LrRange, result: RangeTestResult) -> str:
    """Return the HTML page: loss over the rate, suggestion, divergence. ``name``: the output directory's."""
    ended = (
        f"{rate_text(result.diverged)} (step {len(result.points)} of {ramp.steps})"
        if result.diverged is not None
        else f"not up to {rate_text(ramp.end)}; a higher --lr-to would show where"
    )
    facts = [
        ("Steepest fall at", rate_text(result.steepest) if result.steepest is not None else ""),
        ("Diverged at", ended),
        ("The recipe says", rate_text(recipe.training.learning_rate)),
        ("Ramp", f"{rate_text(ramp.start)} to {rate_text(ramp.end)}, {ramp.steps} steps"),
        ("Rows from", recipe.data.path),
        ("Time", duration(sum(get_number(point, "step_seconds") or 0.0 for point in result.points))),
    ]
    line = Line("gradient norm", _curve(result, "grad_norm"))
    norm = line_chart("Gradient norm", [line], note="before clipping", may_be_log=True, x_name="learning rate")
    return render(
        "learning_rates.html",
        title=Path(recipe.model.path).name or recipe.model.path,
        name=name,
        suggestion=None if result.suggestion is None else rate_text(result.suggestion),
        rule=RULE,
        reason=result.reason,
        facts=facts,
        charts=[chart for chart in (_loss_chart(result), norm) if chart is not None],
    )


def rate_text(rate: float) -> str:
    """Return a learning rate as text: 0.0123, 0.02, 4.1e-5."""
    return f"{rate:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _loss_chart(result: RangeTestResult) -> Chart | None:
    smoothed = _curve(result, "smoothed_loss")
    lines = [Line("loss", _curve(result, "loss"), "faint"), Line("smoothed", smoothed)]
    legend = [("faint", "loss of each step"), ("main", "smoothed")]
    known = [(x, y) for x, y in smoothed if y is not None]
    if result.suggestion is not None:
        rate = result.suggestion
        lines.append(Line("suggested", [min(known, key=lambda point: abs(point[0] - rate))], "held-out"))
        legend.append(("held-out", f"suggested, {rate_text(rate)}"))
    # a loss that has diverged would press everything else flat
    first, lowest = (known[0][1], min(y for _, y in known)) if known else (0.0, 0.0)
    return line_chart(
        "Loss",
        lines,
        note="nats a trained token",
        legend=legend,
        height=300,
        top=max(first * 1.1, first + 0.5 * (first - lowest)) if known else None,
        best=result.suggestion,
        x_name="learning rate",
    )


def _curve(result: RangeTestResult, key: str) -> list[Point]:
    return [(point["learning_rate"], get_number(point, key)) for point in result.points]
