"""The pages of a run: report.html, and report/NAME.html for each of several adapters."""

import contextlib
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import quote

from qvera.evaluation.report.charts import (
    MAX_POINTS,
    Chart,
    Line,
    length_chart,
    line_chart,
    loss_curves,
    stacked_bars,
    thin,
)
from qvera.evaluation.report.pages import make_sample, render
from qvera.evaluation.report.read import (
    AdapterEntry,
    ManyRun,
    RunFiles,
    by_remark,
    changed_settings,
    get,
    get_number,
    get_text,
    read_many,
    read_run,
    series,
    trained_many,
)
from qvera.utils.files import ADAPTER_WEIGHTS, ADAPTERS, disk_errors, replace_text
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
_MARGIN, _ACCURACY = "rewards/margins", "rewards/accuracies"
_HEADLINES = (
    ("exact_match", "Exact match", percent),
    (_MARGIN, "Reward margin", significant),
    ("reward", "Reward", significant),
    ("accuracy", "Accuracy", percent),
    ("pearson", "Pearson correlation", significant),
    ("loss", "Loss", significant),
)
"""Scores for the headline; the first that a run has is shown."""
_MOMENTS = {"backward": "Backward pass", "loss": "Loss", "answers": "Answers", "images": "Images"}
_PAGES = "report"  # the directory of the adapters' pages, beside report.html
_OVERVIEW_ADAPTERS = 10  # with fewer adapters, the table shows at a glance what a curve would
_SHOWN_NAMES = 5  # a notice names at most this many adapters; the table has all


class _Spec(NamedTuple):
    """A chart of the numbers in metrics.jsonl: each curve has a label, a key, the text of a value, and a style."""

    title: str
    note: str
    curves: tuple[tuple[str, str, Callable[[float], str], Any], ...]
    kind: str = "number"


_RATE_AND_NORM = (
    _Spec("Learning rate", "", (("learning rate", "learning_rate", significant, "main"),)),
    _Spec("Gradient norm", "before clipping", (("gradient norm", "grad_norm", significant, "main"),)),
)
_SPEED_AND_MEMORY = (
    _Spec("Throughput", "tokens a second", (("tokens/s", "tokens_per_second", count, "main"),), "count"),
    _Spec("Memory", "", (("in use", "memory_bytes", size, "main"), ("peak", "peak_bytes", size, "dashed")), "bytes"),
)
_ROUNDS = (
    _Spec("Adapters in flight", "", (("adapters", "adapters", count, "main"),)),
    _Spec("Rows a round", "", (("rows", "rows", count, "main"),)),
    *_SPEED_AND_MEMORY,
)
_REWARDS = (
    _Spec(
        "Reward",
        "mean of the answers",
        (("reward", "reward", significant, "main"), ("held out, greedy", "reward", significant, "held-out")),
    ),
    _Spec(
        "Spread of rewards",
        "within the answers to a prompt",
        (
            ("deviation", "reward_deviation", significant, "main"),
            ("share of prompts without any", "equal_groups", percent, "faint"),
        ),
    ),
    _Spec("Answer length", "tokens", (("mean", "answer_tokens", count, "main"),), "count"),
    _Spec("Divergence from the base", "nats a token", (("estimate", "kl", significant, "main"),)),
    _Spec(
        "Reward margin",
        "chosen less rejected",
        (("margin", _MARGIN, significant, "main"), ("held-out margin", _MARGIN, significant, "held-out")),
    ),
    _Spec(
        "Rewards",
        "β log of the ratio to the reference",
        (("chosen", "rewards/chosen", significant, "dashed"), ("rejected", "rewards/rejected", significant, "faint")),
    ),
    _Spec(
        "Reward accuracy",
        "chosen above rejected",
        (("training", _ACCURACY, percent, "main"), ("held out", _ACCURACY, percent, "held-out")),
    ),
)


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path; for several adapters also a page each.

    recipe.yaml, metrics.jsonl and run.json may be missing or cut off: a killed run has a report too.

    InputError: the directory does not exist, or holds none of the three files.
    RunFailed: a page could not be written.
    """
    root = Path(run_dir)
    run, target = read_run(root, metrics=False), root / "report.html"
    with disk_errors(str(target), f"The run's own files are untouched: `qvera ui {root}` shows them."):
        if not trained_many(run.info, run.recipe):
            replace_text(target, run_page(read_run(root)))
            return target
        many = read_many(root)
        (root / _PAGES).mkdir(exist_ok=True)
        for entry in many.entries:
            page = root / _PAGES / f"{entry.directory}.html"
            weights = root / ADAPTERS / entry.directory / ADAPTER_WEIGHTS
            with contextlib.suppress(OSError):
                # an interrupted run of ten thousand adapters need not write again what is newer than the vectors
                if page.stat().st_mtime_ns > weights.stat().st_mtime_ns:
                    continue
            if entry.directory:
                page.write_text(adapter_page(many, entry), encoding="utf-8")  # not flushed: it can be made again
        replace_text(target, many_page(many))
    return target


def run_page(run: RunFiles, **more: object) -> str:
    """The page of a run as HTML. ``more`` is for the template."""
    thinned = _thinned(run)
    charts = _charts(run, _REWARDS, from_zero=False) + _charts(run, _RATE_AND_NORM + _SPEED_AND_MEMORY, thinned)
    return render("run.html", score=_score(run), loss_chart=_loss_chart(run), charts=charts, **_context(run), **more)


def _context(run: RunFiles) -> dict[str, Any]:
    # the peak of the tile and the mapped weights, which the plan counts too: the page has one measured peak only
    planned = run.number("plan", "measured", "total_bytes") is not None
    peak_bytes = run.totals["peak_bytes"]
    measured_bytes = peak_bytes + run.mapped_bytes if peak_bytes and planned else None
    histogram: list[list[float]] = []
    for key in ("edges", "counts"):
        values = get(run.info, "data", "length_histogram", key)
        numbers = [get_number(value) for value in values] if isinstance(values, list) else []
        histogram.append([] if None in numbers else [value for value in numbers if value is not None])
    samples, listed = [], get(run.info, "samples")
    for sample in listed if isinstance(listed, list) else ():
        if isinstance(sample, dict):  # while a run goes, there are those from before
            sides = [(when.capitalize(), get_text(sample, when), "") for when in ("before", "after") if when in sample]
            reference = get_text(sample, "reference")
            images = sample.get("images")
            shown = list(map(str, images)) if isinstance(images, list) else []
            prompt, references = get_text(sample, "prompt"), [reference] if reference else []
            samples.append(make_sample("Prompt", prompt, sides, references, shown))
    targets, versions = get(run.info, "adapter", "targets"), get(run.info, "versions")
    path = run.setting("model", "path")
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return {
        "run": run,
        "model": name or run.text("model", "architecture") or "A run",
        "memory_chart": _memory_chart(run, measured_bytes),
        "measured_bytes": measured_bytes,
        "samples": samples,
        "method": run.text("adapter", "title") or run.text("adapter", "method") or "VeRA",  # older runs name none
        "targets": ", ".join(map(str, targets)) if isinstance(targets, list) else run.text("adapter", "targets"),
        "lengths": length_chart(*histogram),
        "settings": changed_settings(run.recipe).items(),
        "versions": list(versions.items()) if isinstance(versions, dict) else [],
    }


def _score(run: RunFiles) -> tuple[str, str, str] | None:
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


def _loss_chart(run: RunFiles) -> Chart | None:
    raw, smoothed = loss_curves(series(run.train, "loss"))
    lines = [Line("training loss" + _thinned(run), raw, "main" if smoothed is raw else "faint")]
    if smoothed is not raw:
        lines.append(Line("smoothed", smoothed))
    lines.append(Line("held-out loss", run.held_out(), "held-out"))
    lines = [line for line in lines if line.values]
    legend: list[tuple[str, str]] = [(line.style, line.label) for line in lines]
    best = run.best_step if lines and lines[-1].style == "held-out" else None
    if best is not None:
        legend.append(
            ("best", f"{'lowest held-out' if run.best_by == 'loss' else f'best {run.best_by}'}, step {best:,}")
        )
    note = "of a row" if get(run.info, "data", "labels") else "nats a trained token"
    note = "of a pair or answer" if any(_MARGIN in row for row in run.train[:1]) else note
    note = "of a policy; held out: the reward, negative" if any("reward" in row for row in run.train[:1]) else note
    return line_chart("Loss", lines, note=note, legend=legend, height=300, may_be_log=True, best=best)


def _thinned(run: RunFiles) -> str:
    """Added to the label of a curve whose points are means."""
    steps = -(-len(run.train) // MAX_POINTS)
    return f", means of {steps} steps" if steps > 1 else ""


def _charts(
    run: RunFiles, specs: Sequence[_Spec], thinned: str = "", *, x_name: str = "step", from_zero: bool = True
) -> list[Chart]:
    charts = []
    for title, note, curves, kind in specs:
        lines = []
        for label, key, text, style in curves:
            points = run.held_out(key) if style == "held-out" else thin(series(run.train, key))
            lines.append(Line(label + (thinned if style == "main" else ""), points, style, text))
        lines = [line for line in lines if line.values]
        legend = [(line.style, line.label) for line in lines] if len(curves) > 1 else []
        charts.append(line_chart(title, lines, note=note, legend=legend, kind=kind, from_zero=from_zero, x_name=x_name))
    return [chart for chart in charts if chart is not None]


def _memory_chart(run: RunFiles, measured_bytes: float | None) -> Chart | None:
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


def many_page(
    many: ManyRun,
    shown: Sequence[AdapterEntry] | None = None,
    href: Callable[[AdapterEntry], str] = lambda entry: (
        f"{_PAGES}/{quote(entry.directory)}.html" if entry.directory else ""
    ),
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
    statuses = Counter(entry.status_text for entry in entries).most_common()
    overview = None
    if len(losses) >= _OVERVIEW_ADAPTERS:  # adapters sorted by loss
        after, before = ([(float(n), loss) for n, loss in enumerate(side, 1)] for side in zip(*losses, strict=True))
        lines = [Line("before", thin(before), "dashed"), Line("after", thin(after))]
        overview = line_chart(
            "Held-out loss",
            lines,
            note="adapters by their loss after training",
            legend=[(line.style, line.label) for line in lines],
            height=200,
            may_be_log=True,
            x_name="adapter",
        )
    seconds, ended = run.totals["seconds"], sum(entry.status in ("done", "stopped_early") for entry in entries)
    return render(
        "many.html",
        statuses=[(f"{text[0].upper()}{text[1:]}", count(number)) for text, number in statuses],
        adapters=len(entries),
        rows=[(entry, href(entry)) for entry in (entries if shown is None else shown)],
        scored=scored,
        flags=[
            (flag, len(named), [(entry.name, href(entry)) for entry in named[:_SHOWN_NAMES]])
            for flag, named in by_remark(entries).items()
        ],
        median=[significant(statistics.median(side)) for side in reversed(list(zip(*losses, strict=True)))],
        an_hour=None if not seconds or not ended else ended * 3600 / seconds,
        overview=overview,
        round_charts=_charts(run, _ROUNDS, x_name="round"),
        **_context(run),
        **more,
    )


def adapter_page(many: ManyRun, entry: AdapterEntry, run_href: str = "../report.html", **more: object) -> str:
    """The page of one adapter. ``run_href`` leads to the run; ``more`` is for the template."""
    run = many.adapter_run(entry)
    reason = get_text(entry.tree, "reason")
    sentences = [*entry.flags, *([f"stopped: {reason}"] if reason else [])]
    return render(
        "adapter.html",
        run=run,
        run_name=many.run.name,
        run_href=run_href,
        entry=entry,
        notices=[f"{text[0].upper()}{text[1:].rstrip('.')}." for text in sentences if text],
        loss_chart=_loss_chart(run),
        charts=_charts(run, _RATE_AND_NORM, _thinned(run)),
        **more,
    )
