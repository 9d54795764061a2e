"""The page of ``qvera preview``: what a recipe would train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qvera.evaluation.report.charts import length_histogram
from qvera.evaluation.report.page import render
from qvera.utils.atomic import replace_text
from qvera.utils.formatting import count, percent

if TYPE_CHECKING:
    from qvera.data import DataStats, Example

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
    """Write the page in one rename: counts, lengths, and ``rows`` token by token with the trained ones marked.

    Args:
        path: Where to write it.
        title: The recipe's name.
        source: Where the data comes from.
        stats: Counts of the data set.
        warnings: What a person should know about the data, a sentence each.
        rows: Shown as the model reads them.
        decode: Token ids → text, special tokens included.
    """
    page = render(
        "preview.html",
        title=title,
        source=source,
        facts=_facts(stats),
        warnings=warnings,
        lengths=length_histogram(stats.histogram_edges, stats.histogram_counts),
        rows=[(row.source, len(row.input_ids), row.trained_tokens, marked_text(row, decode)) for row in rows],
    )
    replace_text(path, page)


def _facts(stats: DataStats) -> list[tuple[str, str]]:
    mixture = stats.sources if len(stats.sources) > 1 else []
    alone = None if mixture else stats.sources[0]
    share = percent(stats.trained_tokens / stats.tokens)
    sources = [
        (each.path, f"{count(each.taken)} ({count(each.rows)} rows, weight {each.weight:g}). {each.layout}")
        for each in mixture
    ]
    return [
        ("Rows to train on", count(stats.train_rows)),
        *sources,
        ("Rows held out", count(stats.eval_rows) if stats.eval_rows else ""),
        ("Tokens", f"{count(stats.tokens)}, the longest row {count(stats.longest_tokens)}"),
        ("Tokens trained", f"{count(stats.trained_tokens)} ({share})"),
        ("Rows cut to length", f"{count(stats.truncated_rows)}, {count(stats.truncated_tokens)} tokens cut off"),
        ("Rows split", f"{count(stats.split_rows)} into {count(stats.split_parts)}" if stats.split_rows else ""),
        ("Rows dropped", count(stats.dropped_rows)),
        ("Format", alone.format if alone else ""),
        ("Template", alone.template_text if alone else ""),
    ]


def marked_text(row: Example, decode: Decode) -> list[tuple[str, bool]]:
    """A row as stretches of text, each with whether its tokens are trained."""
    edges = [0, *(np.flatnonzero(np.diff(row.trained)) + 1).tolist(), len(row.input_ids)]
    return [(decode(row.input_ids[start:end].tolist()), bool(row.trained[start])) for start, end in pairwise(edges)]
