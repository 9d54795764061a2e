"""The page of a learning-rate range test: loss over the rate, with the suggested rate and where the loss diverged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.evaluation.report.charts import Chart, Line, line_chart
from qvera.evaluation.report.page import render
from qvera.evaluation.report.read import get_number
from qvera.evaluation.report.smoothing import Point
from qvera.utils.atomic import replace_text
from qvera.utils.formatting import duration

if TYPE_CHECKING:
    from qvera.training.lr_finder import RangeTestResult


def write_page(path: Path, title: str, name: str, result: RangeTestResult, facts: dict[str, Any]) -> None:
    """Write the page in one rename; see `range_page`."""
    replace_text(path, range_page(title, name, result, facts))


def range_page(title: str, name: str, result: RangeTestResult, facts: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        title: The model's name.
        name: The output directory's name.
        result: The curve and what was read from it.
        facts: ``rule`` of the suggestion, the recipe's own ``learning_rate``, ``data``, and the ``ramp``.
    """
    ramp = facts["ramp"]
    ended = (
        f"{rate_text(result.diverged)} (step {len(result.points)} of {ramp.steps})"
        if result.diverged is not None
        else f"not up to {rate_text(ramp.end)}; a higher --lr-to would show where"
    )
    table = [
        ("Steepest fall at", rate_text(result.steepest) if result.steepest is not None else ""),
        ("Diverged at", ended),
        ("The recipe says", rate_text(facts["learning_rate"])),
        ("Ramp", f"{rate_text(ramp.start)} to {rate_text(ramp.end)}, {ramp.steps} steps"),
        ("Rows from", facts["data"]),
        ("Time", duration(sum(get_number(point, "step_seconds") or 0.0 for point in result.points))),
    ]
    norm = line_chart(
        "Gradient norm",
        [Line("gradient norm", _curve(result, "grad_norm"))],
        note="before clipping",
        may_be_log=True,
        x_name="learning rate",
        x_log=True,
    )
    return render(
        "learning_rates.html",
        title=title,
        name=name,
        suggestion=None if result.suggestion is None else rate_text(result.suggestion),
        rule=facts["rule"],
        reason=result.reason,
        facts=table,
        charts=[chart for chart in (_loss_chart(result), norm) if chart is not None],
    )


def rate_text(rate: float) -> str:
    """A learning rate: 0.0123, 0.02, 4.1e-5."""
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
        x_log=True,
    )


def _curve(result: RangeTestResult, key: str) -> list[Point]:
    return [(point["learning_rate"], get_number(point, key)) for point in result.points]
