"""The pages of a run: report.html, and report/NAME.html for each of several adapters."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from qvera.evaluation.report.charts import (
    MAX_POINTS,
    Chart,
    Line,
    length_histogram,
    line_chart,
    loss_curves,
    stacked_bars,
    thin,
)
from qvera.evaluation.report.pages import Sample, make_sample, render
from qvera.evaluation.report.read import (
    AdapterEntry,
    ManyRun,
    Run,
    changed_settings,
    get,
    get_number,
    get_text,
    read_many,
    read_run,
    series,
    trained_many,
)
from qvera.utils.atomic import disk_errors, replace_text
from qvera.utils.formatting import count, percent, significant, size, text_or_dash
from qvera.utils.paths import ADAPTER_WEIGHTS, ADAPTERS

_MEMORY_KINDS = (
    ("p1", "interpreter, libraries, rows", ("runtime",)),
    ("p2", "base", ("base",)),
    ("p3", "projections, vectors, optimizer", ("projections", "vectors")),
    ("p4", "checkpoints", ("checkpoints",)),
    ("p5", "transient", ("transient",)),
    ("p6", "loss", ("loss",)),
    ("p7", "answers", ("answers",)),
)
_MARGIN, _ACCURACY = "rewards/margins", "rewards/accuracies"
_HEADLINES = (
    ("exact_match", "Exact match", percent),
    (_MARGIN, "Reward margin", significant),
    ("accuracy", "Accuracy", percent),
    ("pearson", "Pearson correlation", significant),
    ("loss", "Loss", significant),
)
"""Scores for the headline; the first that a run has is shown."""
_MOMENTS = {"backward": "Backward pass", "loss": "Loss", "answers": "Answers"}
_PAGES = "report"
"""The directory of the adapters' pages, beside report.html."""
_OVERVIEW_ADAPTERS = 10
"""With fewer adapters, the table shows at a glance what a curve would."""
_SHOWN_NAMES = 5
"""A notice names at most this many adapters; the table has all."""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path; for several adapters also a page each.

    recipe.yaml, metrics.jsonl and run.json may be missing or cut off: a killed run has a report too.

    Raises:
        InputError: the directory does not exist, or holds none of the three files.
        RunFailed: a page could not be written.
    """
    root = Path(run_dir)
    run, target = read_run(root, metrics=False), root / "report.html"
    with disk_errors(str(target), "The run's own files are untouched; mend that and write the report again."):
        if not trained_many(run.info, run.recipe):
            replace_text(target, run_page(read_run(root)))
            return target
        many = read_many(root)
        (root / _PAGES).mkdir(exist_ok=True)
        for entry in many.entries:
            if entry.directory:
                page = root / _PAGES / f"{entry.directory}.html"
                if not _is_newer(page, root / ADAPTERS / entry.directory / ADAPTER_WEIGHTS):
                    page.write_text(adapter_page(many, entry), encoding="utf-8")  # not flushed: it can be made again
        replace_text(target, many_page(many))
    return target


def _is_newer(page: Path, weights: Path) -> bool:
    """Whether a page is newer than the vectors. An interrupted run of ten thousand adapters need not write it again."""
    try:
        return page.stat().st_mtime_ns > weights.stat().st_mtime_ns
    except OSError:
        return False


def run_page(run: Run, **more: object) -> str:
    """The page of a run as HTML. ``more`` is for the template."""
    charts = [*_reward_charts(run), *_small_charts(run)]
    return render("run.html", score=_score(run), loss_chart=_loss_chart(run), charts=charts, **_context(run), **more)


def _context(run: Run) -> dict[str, Any]:
    # the peak of the tile and the mapped weights, which the plan counts too: the page has one measured peak only
    planned = run.number("plan", "measured", "total_bytes") is not None
    peak_bytes = run.totals["peak_bytes"]
    measured_bytes = peak_bytes + run.mapped_bytes if peak_bytes and planned else None
    edges, counts = (_numbers(get(run.info, "data", "length_histogram", key)) for key in ("edges", "counts"))
    targets, versions = get(run.info, "adapter", "targets"), get(run.info, "versions")
    path = run.setting("model", "path")
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return {
        "run": run,
        "model": name or run.text("model", "architecture") or "A run",
        "memory_chart": _memory_chart(run, measured_bytes),
        "measured_bytes": measured_bytes,
        "samples": _samples(run),
        "method": run.text("adapter", "title") or run.text("adapter", "method") or "VeRA",  # older runs name none
        "targets": ", ".join(map(str, targets)) if isinstance(targets, list) else run.text("adapter", "targets"),
        "lengths": length_histogram(edges, counts),
        "settings": changed_settings(run.recipe).items(),
        "versions": list(versions.items()) if isinstance(versions, dict) else [],
    }


def _numbers(values: object) -> list[float]:
    numbers = [get_number(value) for value in values] if isinstance(values, list) else []
    return [] if None in numbers else [value for value in numbers if value is not None]


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
    points = [(step, loss) for step, loss in run.held_out() if loss is not None]
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


def _loss_chart(run: Run) -> Chart | None:
    raw, smoothed = loss_curves(series(run.train, "loss"))
    lines = [Line("training loss" + _thinned(run), raw, "main" if smoothed is raw else "faint")]
    if smoothed is not raw:
        lines.append(Line("smoothed", smoothed))
    lines.append(Line("held-out loss", run.held_out(), "held-out"))
    lines = [line for line in lines if line.values]
    legend: list[tuple[str, str]] = [(line.style, line.label) for line in lines]
    best = run.best_step if lines and lines[-1].style == "held-out" else None
    if best is not None:
        legend.append(("best", f"lowest held-out, step {best:,}"))
    note = "of a row" if get(run.info, "data", "labels") else "nats a trained token"
    note = "of a pair or answer" if any(_MARGIN in row for row in run.train[:1]) else note
    return line_chart("Loss", lines, note=note, legend=legend, height=300, may_be_log=True, best=best)


def _thinned(run: Run) -> str:
    """Added to the label of a curve whose points are means."""
    steps = -(-len(run.train) // MAX_POINTS)
    return f", means of {steps} steps" if steps > 1 else ""


def _line(
    rows: Sequence[dict[str, Any]], label: str, key: str, text: Callable[[float], str], style: Any = "main"
) -> Line:
    return Line(label, thin(series(rows, key)), style, text)


def _rate_and_norm(run: Run) -> list[Chart | None]:
    rate = _line(run.train, "learning rate" + _thinned(run), "learning_rate", significant)
    norm = _line(run.train, "gradient norm" + _thinned(run), "grad_norm", significant)
    return [
        line_chart("Learning rate", [rate], from_zero=True),
        line_chart("Gradient norm", [norm], note="before clipping", from_zero=True),
    ]


def _speed_and_memory(lines: Sequence[Line], x_name: str) -> list[Chart | None]:
    speed, *memory = lines
    legend = [(line.style, line.label) for line in memory]
    return [
        line_chart("Throughput", [speed], note="tokens a second", kind="count", from_zero=True, x_name=x_name),
        line_chart("Memory", memory, legend=legend, kind="bytes", from_zero=True, x_name=x_name),
    ]


def _small_charts(run: Run) -> list[Chart]:
    speed = _line(run.train, "tokens/s" + _thinned(run), "tokens_per_second", count)
    memory = [
        _line(run.train, "in use" + _thinned(run), "memory_bytes", size),
        _line(run.train, "peak", "peak_bytes", size, "dashed"),
    ]
    charts = [*_rate_and_norm(run), *_speed_and_memory([speed, *(line for line in memory if line.values)], "step")]
    return [chart for chart in charts if chart is not None]


def _reward_charts(run: Run) -> list[Chart]:
    """For a run on preferences: margin, rewards and accuracy."""
    rows = run.train
    margin = [_line(rows, "margin", _MARGIN, significant), Line("held-out margin", run.held_out(_MARGIN), "held-out")]
    rewards = [
        _line(rows, "chosen", "rewards/chosen", significant, "dashed"),
        _line(rows, "rejected", "rewards/rejected", significant, "faint"),
    ]
    accuracy = [
        _line(rows, "training", _ACCURACY, percent),
        Line("held out", run.held_out(_ACCURACY), "held-out", percent),
    ]
    charts = []
    for title, lines, note in (
        ("Reward margin", margin, "chosen less rejected"),
        ("Rewards", rewards, "β log of the ratio to the reference"),
        ("Reward accuracy", accuracy, "chosen above rejected"),
    ):
        known = [line for line in lines if line.values]
        charts.append(line_chart(title, known, note=note, legend=[(line.style, line.label) for line in known]))
    return [chart for chart in charts if chart is not None]


def _memory_chart(run: Run, measured_bytes: float | None) -> Chart | None:
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


def _href(entry: AdapterEntry) -> str:
    return f"{_PAGES}/{quote(entry.directory)}.html" if entry.directory else ""


def many_page(
    many: ManyRun,
    shown: Sequence[AdapterEntry] | None = None,
    href: Callable[[AdapterEntry], str] = _href,
    **more: object,
) -> str:
    """The page of a run of several adapters. ``shown``: those in the table; ``more`` is for the template."""
    run, entries = many.run, many.entries
    scored = any(entry.loss_before is not None or entry.loss_after is not None for entry in entries)
    losses = sorted(  # of the adapters that have a held-out loss both before and after training
        (entry.loss_after, entry.loss_before)
        for entry in entries
        if entry.loss_after is not None and entry.loss_before is not None
    )
    flags: dict[str, list[AdapterEntry]] = {}
    for entry in entries:
        for flag in [*([entry.status_text] if entry.ended_badly else []), *entry.flags]:
            flags.setdefault(flag, []).append(entry)
    statuses = Counter(entry.status_text for entry in entries).most_common()
    seconds, ended = run.totals["seconds"], sum(entry.status in ("done", "stopped_early") for entry in entries)
    return render(
        "many.html",
        statuses=[(f"{text[0].upper()}{text[1:]}", count(number)) for text, number in statuses],
        adapters=len(entries),
        rows=[(entry, href(entry), _cells(entry, scored)) for entry in (entries if shown is None else shown)],
        scored=scored,
        flags=[
            (flag, len(named), [(entry.name, href(entry)) for entry in named[:_SHOWN_NAMES]])
            for flag, named in flags.items()
        ],
        median=[significant(statistics.median(side)) for side in reversed(list(zip(*losses, strict=True)))],
        an_hour=None if not seconds or not ended else ended * 3600 / seconds,
        overview=_overview(losses),
        round_charts=_round_charts(run.train),
        **_context(run),
        **more,
    )


def _cells(entry: AdapterEntry, scored: bool) -> list[str]:
    """Numbers exactly or with four digits, so that a browser can sort by them."""
    counts = [text_or_dash(value, "{:,.0f}".format) for value in (entry.rows, entry.eval_rows, entry.steps)]
    losses = [entry.loss_before, entry.loss_after] if scored else []
    losses += [entry.train_loss_first, entry.train_loss_last]
    return counts + [text_or_dash(loss, lambda value: significant(value, 4)) for loss in losses]


def _overview(losses: Sequence[tuple[float, float]]) -> Chart | None:
    """Held-out losses before and after training, adapters sorted by loss; None for a few adapters."""
    if len(losses) < _OVERVIEW_ADAPTERS:
        return None
    after, before = ([(float(place), loss) for place, loss in enumerate(side, 1)] for side in zip(*losses, strict=True))
    lines = [Line("before", thin(before), "dashed"), Line("after", thin(after))]
    legend = [(line.style, line.label) for line in lines]
    note = "adapters by their loss after training"
    return line_chart("Held-out loss", lines, note=note, legend=legend, height=200, may_be_log=True, x_name="adapter")


def _round_charts(rounds: Sequence[dict[str, Any]]) -> list[Chart]:
    lines = [
        _line(rounds, "tokens/s", "tokens_per_second", count),
        _line(rounds, "in use", "memory_bytes", size),
        _line(rounds, "peak", "peak_bytes", size, "dashed"),
    ]
    adapters, rows = (_line(rounds, key, key, count) for key in ("adapters", "rows"))
    charts = [
        line_chart("Adapters in flight", [adapters], from_zero=True, x_name="round"),
        line_chart("Rows a round", [rows], from_zero=True, x_name="round"),
        *_speed_and_memory(lines, "round"),
    ]
    return [chart for chart in charts if chart is not None]


def adapter_page(many: ManyRun, entry: AdapterEntry, run_href: str = "../report.html", **more: object) -> str:
    """The page of one adapter. ``run_href`` leads to the run; ``more`` is for the template."""
    run = many.adapter_run(entry)
    reason = get_text(entry.tree, "reason")
    sentences = [*entry.flags, *([f"stopped: {reason}"] if reason else [])]
    losses = (
        ("Held-out loss", entry.loss_before, entry.loss_after),
        ("Training loss", entry.train_loss_first, entry.train_loss_last),
    )
    return render(
        "adapter.html",
        run=run,
        run_name=many.run.name,
        run_href=run_href,
        entry=entry,
        notices=[f"{text[0].upper()}{text[1:].rstrip('.')}." for text in sentences if text],
        losses=[
            (title, text_or_dash(first, significant), text_or_dash(last, significant))
            for title, first, last in losses
            if first is not None or last is not None
        ],
        loss_chart=_loss_chart(run),
        charts=_rate_and_norm(run),
        **more,
    )
