"""The page of one run: report.html in its directory."""

from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from qvera.evaluation.report.answer_diff import Sample, make_sample
from qvera.evaluation.report.charts import Chart, Line, length_histogram, line_chart, stacked_bars
from qvera.evaluation.report.pages import render
from qvera.evaluation.report.read import Run, changed_settings, get, get_number, get_text, series
from qvera.evaluation.report.rewards import MARGIN, reward_charts
from qvera.evaluation.report.smoothing import MAX_POINTS, loss_curves, thin
from qvera.utils.formatting import count, percent, significant, size

_MEMORY_KINDS = (
    ("p1", "interpreter, libraries, rows", ("runtime",)),
    ("p2", "base", ("base",)),
    ("p3", "projections, vectors, optimizer", ("projections", "vectors")),
    ("p4", "checkpoints", ("checkpoints",)),
    ("p5", "transient", ("transient",)),
    ("p6", "loss", ("loss",)),
    ("p7", "answers", ("answers",)),
)
_HEADLINES = (
    ("exact_match", "Exact match", percent),
    (MARGIN, "Reward margin", significant),
    ("accuracy", "Accuracy", percent),
    ("pearson", "Pearson correlation", significant),
    ("loss", "Loss", significant),
)
"""Scores by which a run is known, the first that it has."""
_MOMENTS = {"backward": "Backward pass", "loss": "Loss", "answers": "Answers"}


def run_page(run: Run, **more: object) -> str:
    """The page as HTML, sections in the order that a reader wants. ``more`` is for the template."""
    return render(
        "run.html", score=_score(run), loss_chart=loss_chart(run), charts=_small_charts(run), **run_context(run), **more
    )


def run_context(run: Run) -> dict[str, Any]:
    """What the page of any run shows beside its scores and curves."""
    # the peak of the tile and the mapped weights, which the plan counts too: the page has one measured peak only
    planned = run.number("plan", "measured", "total_bytes") is not None
    peak_bytes = run.totals["peak_bytes"]
    measured_bytes = peak_bytes + run.mapped_bytes if peak_bytes and planned else None
    edges, counts = (_numbers(get(run.info, "data", "length_histogram", key)) for key in ("edges", "counts"))
    targets, versions = get(run.info, "adapter", "targets"), get(run.info, "versions")
    return {
        "run": run,
        "model": _model_name(run),
        "memory_chart": _memory_chart(run, measured_bytes),
        "measured_bytes": measured_bytes,
        "samples": _samples(run),
        "method": run.text("adapter", "title") or run.text("adapter", "method") or "VeRA",  # older runs name none
        "targets": ", ".join(map(str, targets)) if isinstance(targets, list) else run.text("adapter", "targets"),
        "lengths": length_histogram(edges, counts),
        "settings": changed_settings(run.recipe).items(),
        "versions": list(versions.items()) if isinstance(versions, dict) else [],
    }


def _model_name(run: Run) -> str:
    path = run.setting("model", "path")
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return name or run.text("model", "architecture") or "A run"


def _score(run: Run) -> tuple[str, str, str] | None:
    """The headline: what is measured, before and after; "" for a side that is not known."""
    before, after = get(run.info, "result", "eval_before"), get(run.info, "result", "eval_after")
    for key, name, text in _HEADLINES:
        first, last = get_number(before, key), get_number(after, key)
        if last is not None:
            # answers are slow to write: exact match may be over fewer rows than the loss
            rows = get_number(after, f"{key}_rows") or get_number(after, "rows") or get_number(before, "rows")
            on = f"{count(rows)} held-out rows" if rows else "held-out rows"
            return f"{name} on {on}", "" if first is None else text(first), text(last)
    points = [(step, loss) for step, loss in run.held_out_losses if loss is not None]
    if points and points[-1][0] > 0:
        (start, first_loss), (end, last_loss) = points[0], points[-1]
        if len(points) == 1:
            return f"Held-out loss at step {end:,.0f}", "", significant(last_loss)
        return f"Held-out loss, step {start:,.0f} to step {end:,.0f}", significant(first_loss), significant(last_loss)
    losses = run.values("loss")
    first = run.number("result", "train_loss_first") or (losses[0] if losses else None)
    last = run.number("result", "train_loss_last") or (losses[-1] if losses else None)
    if last is not None:
        several = run.totals["steps"] != 1
        steps = "first and last step" if several else "one step"
        before_text = significant(first) if first is not None and several else ""
        return f"Training loss, {steps} (no held-out score)", before_text, significant(last)
    return ("Held-out loss before training", "", significant(points[0][1])) if points else None


def loss_chart(run: Run) -> Chart | None:
    """Training loss, every step faint and smoothed, with held-out loss on it."""
    raw, smoothed = loss_curves(series(run.train, "loss"))
    lines = [Line("training loss" + _thinned(run), raw, "main" if smoothed is raw else "faint")]
    if smoothed is not raw:
        lines.append(Line("smoothed", smoothed))
    lines.append(Line("held-out loss", run.held_out_losses, "held-out"))
    lines = [line for line in lines if line.values]
    legend: list[tuple[str, str]] = [(line.style, line.label) for line in lines]
    best = run.best_step if lines and lines[-1].style == "held-out" else None
    if best is not None:
        legend.append(("best", f"lowest held-out, step {best:,}"))
    note = "of a row" if get(run.info, "data", "labels") else "nats a trained token"
    note = "of a pair or answer" if any(MARGIN in row for row in run.train[:1]) else note
    return line_chart("Loss", lines, note=note, legend=legend, height=300, may_be_log=True, best=best)


def _thinned(run: Run) -> str:
    """What the label of a curve adds where its points are means."""
    steps = -(-len(run.train) // MAX_POINTS)
    return f", means of {steps} steps" if steps > 1 else ""


def small_chart(run: Run, title: str, label: str, key: str, note: str = "") -> Chart | None:
    """One number of every step, from zero up."""
    return line_chart(title, [_line(run, label, key)], note=note, from_zero=True)


def _line(run: Run, label: str, key: str, text: Callable[[float], str] = significant) -> Line:
    return Line(label + _thinned(run), thin(series(run.train, key)), format=text)


def _small_charts(run: Run) -> list[Chart]:
    """Learning rate, gradient norm, throughput and memory, as far as the run recorded them."""
    peak = Line("peak", thin(series(run.train, "peak_bytes")), "dashed", size)
    memory = [each for each in (_line(run, "in use", "memory_bytes", size), peak) if each.values]
    legend = [(each.style, each.label) for each in memory]
    speed = _line(run, "tokens/s", "tokens_per_second", count)
    charts = [
        small_chart(run, "Learning rate", "learning rate", "learning_rate"),
        small_chart(run, "Gradient norm", "gradient norm", "grad_norm", "before clipping"),
        line_chart("Throughput", [speed], note="tokens a second", kind="count", from_zero=True),
        line_chart("Memory", memory, legend=legend, kind="bytes", from_zero=True),
    ]
    return [*reward_charts(run), *(chart for chart in charts if chart is not None)]


def _memory_chart(run: Run, measured_bytes: float | None) -> Chart | None:
    """Bars of the planned memory by moment with a line at the measured peak."""
    moments = get(run.info, "plan", "memory", "moments")
    rows: dict[str, list[tuple[str, str, float]]] = {}
    for name, parts in moments.items() if isinstance(moments, dict) else ():
        if isinstance(parts, list):
            sizes = [(get_text(part, "kind"), get_number(part, "bytes") or 0.0) for part in parts]
            rows[_MOMENTS.get(str(name), str(name))] = [
                (css, label, sum(part_bytes for kind, part_bytes in sizes if kind in kinds and part_bytes > 0))
                for css, label, kinds in _MEMORY_KINDS
            ]
    shown = {css for parts in rows.values() for css, _, part_bytes in parts if part_bytes}
    legend = [(f"swatch {css}", label) for css, label, _ in _MEMORY_KINDS if css in shown]
    if measured_bytes:
        legend.append(("dashed", "measured peak"))
    return stacked_bars("Planned memory, by moment", rows, legend=legend, mark_bytes=measured_bytes)


def _samples(run: Run) -> list[Sample]:
    samples = get(run.info, "samples")
    made = []
    for sample in samples if isinstance(samples, list) else ():
        if isinstance(sample, dict):
            # while a run goes, there are those from before
            answers = [
                (when.capitalize(), get_text(sample, when), "") for when in ("before", "after") if when in sample
            ]
            reference = get_text(sample, "reference")
            made.append(make_sample("Prompt", get_text(sample, "prompt"), answers, [reference] if reference else []))
    return made


def _numbers(values: object) -> list[float]:
    """A list of finite numbers; [] for anything else."""
    found = [get_number(value) for value in values] if isinstance(values, list) else []
    return [] if None in found else [value for value in found if value is not None]
