"""The page of ``qvera compare``: tables and curves of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qvera.evaluation.report.charts import Chart, Line, line_chart
from qvera.evaluation.report.compare import (
    COSTS,
    SCORES,
    Column,
    Comparison,
    score_columns,
    score_figures,
    table_cells,
    tokens_by_step,
)
from qvera.evaluation.report.page import render
from qvera.evaluation.report.read import Run, series
from qvera.evaluation.report.smoothing import Point, loss_curves
from qvera.utils.atomic import replace_text


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page of a comparison in one rename."""
    replace_text(path, compare_page(comparison))


def compare_page(comparison: Comparison) -> str:
    """The page as HTML."""

    def table(figures: Sequence[dict[str, float | None]], columns: Sequence[Column]) -> tuple[list[str], list[object]]:
        titles, rows = table_cells(figures, columns)
        return titles, list(zip(comparison.labels, rows, strict=True)) if titles else []

    evaluations = comparison.evaluations
    tables = {
        "Scores on held-out rows": table(comparison.figures, SCORES),
        "Scores by qvera eval": table(score_figures(evaluations), score_columns(evaluations)),
        "Cost": table(comparison.figures, COSTS),
    }
    charts = [_chart(comparison, held_out, unit) for unit in ("step", "token") for held_out in (True, False)]
    return render("compare.html", comparison=comparison, tables=tables, charts=list(filter(None, charts)))


def _chart(comparison: Comparison, held_out: bool, unit: str) -> Chart | None:
    """Losses of all runs over steps, or over the tokens that each had seen by then."""
    lines = []
    for index, (run, label) in enumerate(zip(comparison.runs, comparison.labels, strict=True)):
        points = run.held_out_losses if held_out else loss_curves(series(run.train, "loss"))[1]
        points = points if unit == "step" else _over_tokens(points, run)
        if any(y is not None for _, y in points):
            lines.append(Line(label, points, "held-out" if held_out else "main", colour=index + 1))
    title, ending = ("Held-out loss", "") if held_out else ("Training loss", ", smoothed")
    note = f"nats a token, by {'step' if unit == 'step' else 'tokens seen'}{ending}"
    return line_chart(title, lines, note=note, height=200, may_be_log=True, x_name=unit)


def _over_tokens(points: Sequence[Point], run: Run) -> list[Point]:
    """The same values at the tokens seen by their steps, without steps that metrics.jsonl does not know."""
    seen = {0.0: 0.0, **dict(tokens_by_step(run))}
    return [(seen[step], value) for step, value in points if step in seen]
