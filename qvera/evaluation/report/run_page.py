"""The page of one run: report.html in its directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath

from qvera.evaluation.report.answer_diff import Sample, make_sample
from qvera.evaluation.report.charts import Chart, Line, length_histogram, line_chart, stacked_bars
from qvera.evaluation.report.pages import render
from qvera.evaluation.report.read import Run, changed_settings, get, get_number, get_text, series
from qvera.evaluation.report.smoothing import MAX_POINTS, loss_curves, thin
from qvera.utils.formatting import count, duration, percent, significant, size, text_or_dash

_MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "exact_match": ("Exact match", percent),
    "loss": ("Loss", significant),
    "perplexity": ("Perplexity", significant),
}
_MEMORY_KINDS = (
    ("p1", "interpreter, libraries, rows", ("runtime",)),
    ("p2", "base", ("base",)),
    ("p3", "projections, vectors, optimizer", ("projections", "vectors")),
    ("p4", "checkpoints", ("checkpoints",)),
    ("p5", "transient", ("transient",)),
    ("p6", "loss", ("loss",)),
    ("p7", "answers", ("answers",)),
)
_MOMENTS = {"backward": "Backward pass", "loss": "Loss", "answers": "Answers"}


def run_page(run: Run) -> str:
    """The page as HTML, sections in the order that a reader wants."""
    memory_chart, memory_text = _memory(run)
    edges, counts = (_numbers(get(run.info, "data", "length_histogram", key)) for key in ("edges", "counts"))
    targets, versions = get(run.info, "adapter", "targets"), get(run.info, "versions")
    return render(
        "run.html",
        run=run,
        model=_model_name(run),
        adapter=_adapter_sentence(run),
        notices=_notices(run),
        score=_score(run),
        before_after=_before_after(run),
        loss_chart=_loss_chart(run),
        charts=_small_charts(run),
        evaluations=_evaluations(run),
        memory_chart=memory_chart,
        memory_text=memory_text,
        samples=_samples(run),
        data_path=get_text(run.recipe, "data", "path"),
        targets=", ".join(map(str, targets)) if isinstance(targets, list) else run.text("adapter", "targets"),
        lengths=length_histogram(edges, counts),
        settings=changed_settings(run.recipe).items(),
        versions=list(versions.items()) if isinstance(versions, dict) else [],
    )


def _model_name(run: Run) -> str:
    path = run.setting("model", "path")
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return name or run.text("model", "architecture") or "A run"


def _adapter_sentence(run: Run) -> str:
    """VeRA of rank 256 on 210 linear layers over an NF4 base, trained on rows.jsonl."""

    def setting(key: str) -> float | None:
        return run.number("adapter", key) or get_number(run.recipe, "adapter", key)

    rank, groups, modules = setting("rank"), setting("b_groups") or 1, run.number("adapter", "adapted_modules")
    words = [f"VeRA of rank {count(rank)}" if rank else "A VeRA adapter"]
    vectors = [f"{count(groups)} b vectors"] if groups > 1 else []
    if True in (get(run.info, "adapter", "input_scale"), get(run.recipe, "adapter", "input_scale")):
        vectors.append("an input scale")
    if vectors:
        words.append(f"with {' and '.join(vectors)} per layer")
    if modules:
        words.append(f"on {count(modules)} linear layers")
    quantization = run.setting("model", "quantization")
    if quantization == "none":
        words.append("over an unquantized base")
    elif quantization:
        words.append(f"over {'an' if quantization[0] in 'aefin' else 'a'} {quantization.upper()} base")
    data = get_text(run.recipe, "data", "path")
    return " ".join(words) + (f", trained on {PurePosixPath(data).name or data}." if data else ".")


def _notices(run: Run) -> list[str]:
    after = f" after step {count(run.steps)}" if run.steps else ""
    states = {
        "done": [],
        "interrupted": [f"Interrupted{after}, and saved. `qvera train RECIPE --resume` goes on from there."],
        "failed": [f"This run failed{after}. Its last good checkpoint is kept in checkpoints/."],
    }
    unknown = [f"This run has not finished: it was killed or is still going{after}."]
    return states.get(run.text("status"), unknown) + run.notes


def _score(run: Run) -> tuple[str, str, str] | None:
    """The headline: what is measured, before and after; "" for a side that is not known."""
    before, after = get(run.info, "result", "eval_before"), get(run.info, "result", "eval_after")
    for key in ("exact_match", "loss"):
        name, text = _MEASURES[key]
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
        several = run.steps != 1
        steps = "first and last step" if several else "one step"
        before_text = significant(first) if first is not None and several else ""
        return f"Training loss, {steps} (no held-out score)", before_text, significant(last)
    return ("Held-out loss before training", "", significant(points[0][1])) if points else None


def _before_after(run: Run) -> list[tuple[str, list[str]]]:
    """Rows of the table of held-out scores before and after training."""
    rows = []
    for key, (name, text) in _MEASURES.items():
        values = [run.number("result", when, key) for when in ("eval_before", "eval_after")]
        if any(value is not None for value in values):
            rows.append((name, [text_or_dash(value, text) for value in values]))
    return rows


def _loss_chart(run: Run) -> Chart | None:
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
    note = "nats a trained token"
    return line_chart("Loss", lines, note=note, legend=legend, height=300, may_be_log=True, best=best)


def _thinned(run: Run) -> str:
    """What the label of a curve adds where its points are means."""
    steps = -(-len(run.train) // MAX_POINTS)
    return f", means of {steps} steps" if steps > 1 else ""


def _small_charts(run: Run) -> list[Chart]:
    """Learning rate, gradient norm, throughput and memory, as far as the run recorded them."""

    def line(label: str, key: str, text: Callable[[float], str] = significant) -> Line:
        return Line(label + _thinned(run), thin(series(run.train, key)), format=text)

    peak = Line("peak", thin(series(run.train, "peak_bytes")), "dashed", size)
    memory = [each for each in (line("in use", "memory_bytes", size), peak) if each.values]
    legend = [(each.style, each.label) for each in memory]
    norm, speed = line("gradient norm", "grad_norm"), line("tokens/s", "tokens_per_second", count)
    charts = [
        line_chart("Learning rate", [line("learning rate", "learning_rate")], from_zero=True),
        line_chart("Gradient norm", [norm], note="before clipping", from_zero=True),
        line_chart("Throughput", [speed], note="tokens a second", kind="count", from_zero=True),
        line_chart("Memory", memory, legend=legend, kind="bytes", from_zero=True),
    ]
    return [chart for chart in charts if chart is not None]


def _evaluations(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Titles and rows of the table of evaluations during training."""
    columns = {key: _MEASURES[key] for key in ("loss", "perplexity", "exact_match")}
    columns |= {"rows": ("Rows", count), "seconds": ("Time", duration)}
    columns = {key: column for key, column in columns.items() if any(key in row for row in run.evals)}
    rows = []
    for row in run.evals:
        values = [(get_number(row, key), text) for key, (_, text) in columns.items()]
        best = " (best)" if row["step"] == run.best_step else ""
        rows.append((f"{row['step']:,.0f}{best}", [text_or_dash(value, text) for value, text in values]))
    return ["Step", *(title for title, _ in columns.values())], rows


def _memory(run: Run) -> tuple[Chart | None, str]:
    """Bars of the planned memory by moment with a line at the measured peak, and both in a sentence."""
    # the peak of the tile above and the mapped weights, which the plan counts too: the page has one peak only
    planned = run.number("plan", "measured", "total_bytes") is not None
    measured = run.peak_bytes + run.mapped_bytes if run.peak_bytes and planned else None
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
    if measured:
        legend.append(("dashed", "measured peak"))
    chart = stacked_bars("Planned memory, by moment", rows, legend=legend, mark_bytes=measured)
    predicted = run.number("plan", "measured", "predicted_bytes")
    if not predicted or not measured:
        return chart, ""
    mapped, private = size(run.mapped_bytes), size(measured - run.mapped_bytes)
    split = f" ({private} and {mapped} of memory-mapped weights)" if run.mapped_bytes else ""
    error = f"{100 * (predicted / measured - 1):+.1f}".replace("-", "−")
    batch = run.text("plan", "batch", "source")
    planned_for = f" Planned for {batch}." if batch else ""
    return chart, (
        f"Predicted peak {size(predicted)}, measured {size(measured)}{split}: the plan was off by {error} "
        f"%.{planned_for}"
    )


def _samples(run: Run) -> list[Sample]:
    samples = get(run.info, "samples")
    made = []
    for sample in samples if isinstance(samples, list) else ():
        if isinstance(sample, dict):
            answers = [(when.capitalize(), get_text(sample, when), "") for when in ("before", "after")]
            reference = get_text(sample, "reference")
            made.append(make_sample("Prompt", get_text(sample, "prompt"), answers, [reference] if reference else []))
    return made


def _numbers(values: object) -> list[float]:
    """A list of finite numbers; [] for anything else."""
    found = [get_number(value) for value in values] if isinstance(values, list) else []
    return [] if None in found else [value for value in found if value is not None]
