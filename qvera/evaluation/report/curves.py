"""The charts of a run: which numbers of metrics.jsonl go into which picture, and how each is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from qvera.evaluation.report.charts import Line, line_chart
from qvera.evaluation.report.points import MOST_POINTS, Point, smooth, thin
from qvera.evaluation.report.read import Run, number, pick
from qvera.utils.formatting import count, duration, significant, size


def series(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) of every row that has ``key``; a value that is no finite number, or no sensible one, is a gap."""
    return [(float(row["step"]), _drawable(number(row, key))) for row in rows if key in row]


def _drawable(value: float | None) -> float | None:
    """Nothing measured is beyond 1e100; an axis up to 1e308 would overflow."""
    return value if value is not None and abs(value) < 1e100 else None


def held_out_curve(run: Run) -> list[Point]:
    """Held-out loss by step: metrics.jsonl's, and run.json's before and after training where it lacks those steps."""
    points = dict(series(run.evals, "loss"))
    before = _drawable(number(run.info, "result", "eval_before", "loss"))
    after = _drawable(number(run.info, "result", "eval_after", "loss"))
    if before is not None:
        points.setdefault(0.0, before)
    # the vectors scored after training are the last ones, or the best ones where the recipe asks for those
    at = number(run.info, "result", "steps")
    if pick(run.recipe, "training", "load_best_model_at_end") is True:
        at = number(run.info, "result", "best_step") or at
    if after is not None and at and 0 < at < 1e12:
        points.setdefault(float(int(at)), after)
    return sorted(points.items())


def best_step(run: Run) -> int | None:
    """The step with the lowest held-out loss: run.json's, else the lowest in metrics.jsonl (of two or more)."""
    named = number(run.info, "result", "best_step")
    if named is not None and 0 <= named < 1e12:
        return int(named)
    losses = [(loss, step) for step, loss in series(run.evals, "loss") if loss is not None]
    return int(min(losses)[1]) if len(losses) > 1 else None


def loss_figure(run: Run) -> str:
    """Training loss, every step faint and smoothed, with held-out loss on it; "" where there is no loss at all."""
    raw = thin(series(run.train, "loss"))
    label = "training loss" + _thinned(run)
    held_out = held_out_curve(run)
    lines, legend = [], []
    if any(y is not None for _, y in raw):
        soft = smooth(raw, width=min(len(raw) / 30, 8) if len(raw) >= 10 else 0)
        lines.append(_line(label, raw, "faint" if len(raw) >= 10 else "main"))
        legend.append(("faint" if len(raw) >= 10 else "main", label))
        if len(raw) >= 10:
            lines.append(_line("smoothed", soft, "main"))
            legend.append(("main", "smoothed"))
    best = None
    if any(y is not None for _, y in held_out):
        lines.append(_line("held-out loss", held_out, "held-out"))
        legend.append(("held-out", "held-out loss"))
        best = best_step(run)
        if best is not None:
            legend.append(("best", f"lowest held-out, step {best:,}"))
    said = "; ".join(_said(line) for line in lines if line.label != "smoothed")
    chart = line_chart(lines, description=f"Loss by step. {said}.", height=300, may_be_log=True, best=best)
    return _figure("Loss", "nats a trained token", legend, chart)


def small_figures(run: Run) -> list[str]:
    """Learning rate, gradient norm, throughput and memory; those that the run recorded."""
    figures = [
        _simple(run, "Learning rate", "", "learning_rate", "learning rate"),
        _simple(run, "Gradient norm", "before clipping", "grad_norm", "gradient norm"),
        _simple(run, "Throughput", "tokens a second", "tokens_per_second", "tokens/s", kind="count", say=count),
    ]
    memory, peak = thin(series(run.train, "memory_bytes")), thin(series(run.train, "peak_bytes"))
    lines = [_line("in use" + _thinned(run), memory, "main", size), _line("peak", peak, "dashed", size)]
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    legend = [(line.style, line.label) for line in lines]
    description = "Memory by step. " + "; ".join(map(_said, lines)) + "."
    chart = line_chart(lines, description=description, kind="bytes", from_zero=True)
    figures.append(_figure("Memory", "", legend, chart))
    return [figure for figure in figures if figure]


def eval_table(run: Run) -> str:
    """Every evaluation during training as a table; "" where there was none."""
    if not run.evals:
        return ""
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("Loss", "loss", significant),
        ("Perplexity", "perplexity", significant),
        ("Exact match", "exact_match", lambda value: f"{100 * value:.1f} %"),
        ("Rows", "rows", count),
        ("Time", "seconds", duration),
    ]
    columns = [column for column in columns if any(column[1] in row for row in run.evals)]
    best = best_step(run)
    body = []
    for row in run.evals:
        values = [number(row, key) for _, key, _ in columns]
        cells = "".join(
            f"<td>{say(value) if value is not None else '–'}</td>"
            for (_, _, say), value in zip(columns, values, strict=True)
        )
        step = int(row["step"])
        body.append(f'<tr><th scope="row">{step:,}{" <b>best</b>" if step == best else ""}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{title}</th>' for title, _, _ in columns)
    return (
        f"<details><summary>{len(run.evals)} evaluation{'s' if len(run.evals) > 1 else ''} during training, as a table"
        f'</summary><div class="scroll"><table><thead><tr><th scope="col">Step</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></details>"
    )


def _line(label: str, points: list[Point], style: Any, say: Callable[[float], str] = significant) -> Line:
    return Line(label, points, style, [say(y) if y is not None else "not a finite number" for _, y in points])


def _thinned(run: Run) -> str:
    """What a curve of a long run has to add to its name: its points are means."""
    steps = -(-len(run.train) // MOST_POINTS)
    return f", means of {steps} steps" if steps > 1 else ""


def _said(line: Line) -> str:
    known = [(x, text) for (x, y), text in zip(line.points, line.texts, strict=True) if y is not None]
    (first, start), (last, end) = known[0], known[-1]
    if first == last:
        return f"{line.label} {start} at step {first:,.0f}"
    return f"{line.label} from {start} at step {first:,.0f} to {end} at step {last:,.0f}"


def _simple(
    run: Run,
    title: str,
    unit: str,
    key: str,
    label: str,
    kind: str = "number",
    say: Callable[[float], str] = significant,
) -> str:
    line = _line(label + _thinned(run), thin(series(run.train, key)), "main", say)
    if all(y is None for _, y in line.points):
        return ""
    chart = line_chart([line], description=f"{title} by step. {_said(line)}.", kind=kind, from_zero=True)
    return _figure(title, unit, [], chart)


def _figure(title: str, unit: str, legend: Sequence[tuple[str, str]], chart: str) -> str:
    if not chart:
        return ""
    keys = "".join(f'<span class="legend"><i class="{style}"></i>{escape(text)}</span>' for style, text in legend)
    log = ' <span class="caption">(log scale)</span>' if 'data-log="1"' in chart else ""
    unit = f'<span class="caption">{escape(unit)}</span>' if unit else ""
    return f"<figure><figcaption><h3>{escape(title)}</h3>{unit}{log}{keys}</figcaption>{chart}</figure>"
