"""The page of ``qvera preview``: what a recipe would train on, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qvera.data import DataStats, Example
from qvera.evaluation.report.charts import length_figure
from qvera.evaluation.report.markup import document, esc, fact_list, section
from qvera.utils.atomic import replace_text
from qvera.utils.formatting import count, percent

Decode = Callable[[Sequence[int]], str]


def write_preview(
    path: Path,
    title: str,
    source: str,
    stats: DataStats,
    warnings: Sequence[str],
    rows: Sequence[Example],
    decode: Decode,
) -> None:
    """Write the page: counts, the histogram of lengths, and ``rows`` token by token with the trained ones marked.

    Args:
        title: the recipe's name.
        source: where the data came from.
        warnings: what a person should know about the data, a sentence each.
        decode: token ids → text, special tokens included.
    """
    replace_text(path, preview(title, source, stats, warnings, rows, decode))


def preview(
    title: str, source: str, stats: DataStats, warnings: Sequence[str], rows: Sequence[Example], decode: Decode
) -> str:
    """The page as HTML; see `write_preview`."""
    mixture = stats.sources if len(stats.sources) > 1 else []
    only = None if mixture else stats.sources[0]
    facts = fact_list(
        [
            ("Rows to train on", count(stats.train_rows)),
            *(
                (
                    source.path,
                    f"{count(source.taken)} ({count(source.rows)} rows, weight {source.weight:g})<br>{esc(source.layout)}",
                )
                for source in mixture
            ),
            ("Rows held out", count(stats.eval_rows) if stats.eval_rows else ""),
            ("Tokens", f"{count(stats.tokens)}, the longest row {count(stats.longest_tokens)}"),
            ("Tokens trained", f"{count(stats.trained_tokens)} ({percent(stats.trained_tokens / stats.tokens)})"),
            ("Rows cut to length", f"{count(stats.truncated_rows)}, {count(stats.truncated_tokens)} tokens cut off"),
            ("Rows split", f"{count(stats.split_rows)} into {count(stats.split_parts)}" if stats.split_rows else ""),
            ("Rows dropped", count(stats.dropped_rows)),
            ("Format", esc(only.format) if only else ""),
            ("Template", esc(only.template_text) if only else ""),
        ]
    )
    notices = "".join(f"<p>{esc(line)}</p>" for line in warnings)
    head = (
        f'<header><p class="eyebrow"><b>qvera</b> preview</p><h1>{esc(title)}</h1><p class="soft">{esc(source)}</p></header>'
        + (f'<div class="notice">{notices}</div>' if notices else "")
    )
    figure = length_figure(stats.histogram_edges, stats.histogram_counts)
    legend = (
        '<p class="caption">Every token as the model reads it. <mark>Marked</mark>: trained, a target of the loss.</p>'
    )
    body = (
        head
        + section("Data", f'<div class="columns"><div>{facts}</div>{figure}</div>')
        + section("The first rows", legend, *(_row(row, decode) for row in rows))
    )
    return document(f"{title} · preview · qvera", body, "Written by qvera preview. Nothing was trained.")


def _row(row: Example, decode: Decode) -> str:
    said = f"{count(len(row.input_ids))} tokens, {count(row.trained_tokens)} trained"
    return (
        f'<article class="sample"><h3>{esc(row.source)} <span class="caption">{said}</span></h3>'
        f'<pre dir="auto">{marked(row, decode)}</pre></article>\n'
    )


def marked(row: Example, decode: Decode) -> str:
    """A row as HTML, each run of trained tokens in a ``mark``."""
    changes = np.flatnonzero(np.diff(row.trained)) + 1
    html, trained = [], bool(row.trained[0])
    for run in np.split(row.input_ids, changes):
        text = esc(decode(run.tolist()))
        html.append(f"<mark>{text}</mark>" if trained else text)
        trained = not trained
    return "".join(html)
