"""The pages of a run that trained many adapters: report.html with a table of all, and report/NAME.html for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from qvera.evaluation.report.charts import Chart, Line, line_chart
from qvera.evaluation.report.pages import render
from qvera.evaluation.report.read import get_text, series
from qvera.evaluation.report.read_many import AdapterEntry, ManyRun
from qvera.evaluation.report.run_page import loss_chart, run_context, small_chart
from qvera.evaluation.report.smoothing import thin
from qvera.utils.formatting import count, significant, size, text_or_dash

PAGES = "report"
"""The directory of the adapters' pages, beside report.html."""

_OVERVIEW_ADAPTERS = 10
"""Below this number the table shows at a glance what a curve over adapters would."""
_SHOWN_NAMES = 5
"""The notice of a flag names at most this many adapters; the table has all."""


def page_file(entry: AdapterEntry) -> str:
    """The file name of an adapter's page; "" where run.json names no directory."""
    return f"{entry.directory}.html" if entry.directory else ""


def _href(entry: AdapterEntry) -> str:
    return f"{PAGES}/{quote(page_file(entry))}" if page_file(entry) else ""


def many_page(
    many: ManyRun,
    shown: Sequence[AdapterEntry] | None = None,
    href: Callable[[AdapterEntry], str] = _href,
    **more: object,
) -> str:
    """The page of the whole run as HTML.

    Args:
        shown: the adapters that the table has; None: all of them.
        href: where the page of an adapter is.
        more: for the template.
    """
    scored = any(entry.loss_before is not None or entry.loss_after is not None for entry in many.entries)
    before, after = many.median("loss_before"), many.median("loss_after")
    run = many.run
    seconds, ended = run.totals["seconds"], sum(entry.status in ("done", "stopped_early") for entry in many.entries)
    return render(
        "many.html",
        statuses=[(f"{text[0].upper()}{text[1:]}", count(number)) for text, number in many.statuses().items()],
        adapters=len(many.entries),
        rows=[(entry, href(entry), _cells(entry, scored)) for entry in (many.entries if shown is None else shown)],
        scored=scored,
        flags=[
            (flag, len(named), [(entry.name, href(entry)) for entry in named[:_SHOWN_NAMES]])
            for flag, named in many.flags().items()
        ],
        median=None if before is None or after is None else (significant(before), significant(after)),
        an_hour=None if not seconds or not ended else ended * 3600 / seconds,
        overview=_overview(many.entries),
        round_charts=_round_charts(run.train),
        **run_context(run),
        **more,
    )


def adapter_page(many: ManyRun, entry: AdapterEntry, run_href: str = "../report.html", **more: object) -> str:
    """The page of one adapter as HTML: its curve and its facts.

    ``run_href`` leads to the run; ``more`` is for the template.
    """
    run = many.adapter_run(entry)
    return render(
        "adapter.html",
        run=run,
        run_name=many.run.name,
        run_href=run_href,
        entry=entry,
        notices=_notices(entry),
        losses=[
            (title, text_or_dash(first, significant), text_or_dash(last, significant))
            for title, first, last in (
                ("Held-out loss", entry.loss_before, entry.loss_after),
                ("Training loss", entry.train_loss_first, entry.train_loss_last),
            )
            if first is not None or last is not None
        ],
        loss_chart=loss_chart(run),
        charts=[
            small_chart(run, "Learning rate", "learning rate", "learning_rate"),
            small_chart(run, "Gradient norm", "gradient norm", "grad_norm", "before clipping"),
        ],
        **more,
    )


def _notices(entry: AdapterEntry) -> list[str]:
    """What a person should know of one adapter, a sentence each."""
    reason = get_text(entry.tree, "reason")
    sentences = [*entry.flags, *([f"stopped: {reason}"] if reason else [])]
    return [f"{text[0].upper()}{text[1:].rstrip('.')}." for text in sentences if text]


def _cells(entry: AdapterEntry, scored: bool) -> list[str]:
    """The numbers of an adapter's row, exactly or with four digits, so that a browser can sort by them."""
    counts = [text_or_dash(value, "{:,.0f}".format) for value in (entry.rows, entry.eval_rows, entry.steps)]
    losses = [entry.loss_before, entry.loss_after] if scored else []
    losses += [entry.train_loss_first, entry.train_loss_last]
    return counts + [text_or_dash(loss, lambda value: significant(value, 4)) for loss in losses]


def _overview(entries: Sequence[AdapterEntry]) -> Chart | None:
    """Held-out losses before and after training, adapters from the lowest to the highest; None for a few of them."""
    losses = sorted(
        (entry.loss_after, entry.loss_before)
        for entry in entries
        if entry.loss_after is not None and entry.loss_before is not None
    )
    if len(losses) < _OVERVIEW_ADAPTERS:
        return None
    places = [(float(place), *pair) for place, pair in enumerate(losses, start=1)]
    lines = [
        Line("before", thin([(place, before) for place, _, before in places]), "dashed"),
        Line("after", thin([(place, after) for place, after, _ in places])),
    ]
    legend = [(line.style, line.label) for line in lines]
    note = "adapters by their loss after training"
    return line_chart("Held-out loss", lines, note=note, legend=legend, height=200, may_be_log=True, x_name="adapter")


def _round_charts(rounds: Sequence[dict[str, Any]]) -> list[Chart]:
    """Adapters in flight, rows, throughput and memory by round, as far as the run recorded them."""

    def line(label: str, key: str, text: Any, style: Any = "main") -> Line:
        return Line(label, thin(series(rounds, key)), style, text)

    memory = [line("in use", "memory_bytes", size), line("peak", "peak_bytes", size, "dashed")]
    legend = [(each.style, each.label) for each in memory]
    charts = [
        line_chart("Adapters in flight", [line("adapters", "adapters", count)], from_zero=True, x_name="round"),
        line_chart("Rows a round", [line("rows", "rows", count)], from_zero=True, x_name="round"),
        line_chart(
            "Throughput",
            [line("tokens/s", "tokens_per_second", count)],
            note="tokens a second",
            kind="count",
            from_zero=True,
            x_name="round",
        ),
        line_chart("Memory", memory, legend=legend, kind="bytes", from_zero=True, x_name="round"),
    ]
    return [chart for chart in charts if chart is not None]
