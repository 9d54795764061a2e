"""The preview before the first step: counts, lengths and example rows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from qvera.data.chat_template import NAMED_TEMPLATES
from qvera.data.dataset import Datasets, DataStats
from qvera.data.images import ImageProcessor
from qvera.data.rows import Example
from qvera.data.tokenization import decode
from qvera.utils.formatting import counted

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

_SHOWN_ROWS = 2
_SHOWN_TOKENS = 400
_BAR_WIDTH = 40
_REPEATED = re.compile(r"(<[^<>\s]+>)\1{3,}")
"""A special token several times, as of an image."""


def print_preflight(datasets: Datasets, processor: Any, console: Console, rows: int | None = None) -> None:
    """Print counts, a histogram of lengths, what was cut or dropped, and example rows (see `Datasets.first_rows`).

    Trained tokens stand in ⟦…⟧ too, so that a log file shows them. ``rows`` None: two, or one for each source if there
    are more.
    """
    stats = datasets.stats
    console.print(_summary(stats))
    for line in data_warnings(stats):
        console.print(Text(line, style="yellow"))
    if not isinstance(datasets.train.processor, ImageProcessor):  # whose images are all equally long
        console.print()
        console.print(Text("Training rows by length (tokens)", style="bold"))
        edges, highest = stats.histogram_edges, max(stats.histogram_counts, default=0)
        digits = len(f"{edges[-1]:,}")
        for low, high, count in zip(edges[:-1], edges[1:], stats.histogram_counts, strict=True):
            bar = "█" * max(round(_BAR_WIDTH * count / highest), 1 if count else 0)
            console.print(Text(f"{low:>{digits},} – {high - 1:>{digits},}  {bar:<{_BAR_WIDTH}}  {count:,}"))
    for example in datasets.first_rows(rows or max(_SHOWN_ROWS, len(stats.sources))):
        console.print()
        if example.is_labelled:
            console.print(Text.assemble((example.source, "bold"), "  label: ", (str(example.reference), "green")))
            if example.image is None:
                text = decode(processor, example.input_ids.tolist())
                console.print(Text(text if len(text) <= 1_600 else f"{text[:800]} … {text[-800:]}"))
            else:
                console.print("{} x {} pixels".format(*example.image.open().size))
            continue
        for image in example.images:
            console.print("image of {} x {} pixels".format(*image.open().size))
        for word, row in example.shown():
            console.print(Text.assemble((example.source, "bold"), f"  ⟦{word}⟧"))
            console.print(_mark_trained(row, processor))
    console.print()


def _summary(stats: DataStats) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    mean = stats.tokens / stats.train_rows
    rows = f"{stats.train_rows:,} to train on"
    if stats.eval_rows:
        rows += f", {stats.eval_rows:,} held out"
    table.add_row("Rows", rows)
    if stats.adapters is not None:
        table.add_row("Adapters", Text(stats.adapters.counts))
    if len(stats.sources) == 1:
        table.add_row("Format", stats.sources[0].layout)
    else:
        for source in stats.sources:
            text = f"{source.taken:,} from {source.path} ({source.rows:,} x {source.weight:g}): {source.layout}"
            table.add_row("  of these", Text(text))
    table.add_row("Tokens", f"{stats.tokens:,} (mean {mean:,.0f}, longest {stats.longest_tokens:,} a row)")
    if stats.labels is None:
        share = stats.trained_tokens / stats.tokens
        table.add_row("Trained", f"{stats.trained_tokens:,} tokens, {share:.1%}")
    else:
        table.add_row("Labels", Text(stats.targets_text))
    table.add_row("Truncated", f"{stats.truncated_rows:,} rows, {stats.truncated_tokens:,} tokens cut off")
    if stats.split_rows:
        table.add_row("Split", f"{stats.split_rows:,} rows into {stats.split_parts:,}")
    table.add_row("Dropped", f"{stats.dropped_rows:,} rows")
    if stats.cache_entries:
        table.add_row("Tokenized", f"before; found in the cache ({', '.join(stats.cache_entries)})")
    if stats.unused_columns:
        table.add_row("Not read", Text("columns " + ", ".join(stats.unused_columns)))
    return table


def data_warnings(stats: DataStats) -> list[str]:
    """Warnings about the rows, a sentence or two each."""
    lines = []
    if stats.default_templates:
        templates = " and ".join(dict.fromkeys(stats.default_templates))
        lines.append(
            f"The tokenizer has no chat template, so rows are written with the template {templates}. "
            f"Set data.template to choose one: {', '.join(NAMED_TEMPLATES)}."
        )
    if stats.truncated_rows:
        lines.append(
            f"Cut to length: {counted(stats.truncated_rows, 'row')} lost {counted(stats.truncated_tokens, 'token')}, "
            "of answers too. Raise data.max_length (or max_source_length, max_target_length), or see data.too_long."
        )
    for reason, sources in stats.dropped.items():
        shown = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
        lines.append(f"Dropped, {reason}: {shown}")
    if stats.adapters is not None:
        lines += stats.adapters.warnings()
    if stats.repeated_rows:
        whose = " of the same adapter" if stats.adapters is not None else ""
        lines.append(
            f"Held-out rows that are also training rows{whose}: {stats.repeated_rows:,}. Held-out scores will flatter."
        )
    if stats.labels is not None and stats.eval_rows > 1 and sum(map(bool, stats.eval_label_rows)) == 1:
        label = stats.labels.names[max(range(len(stats.eval_label_rows)), key=stats.eval_label_rows.__getitem__)]
        lines.append(
            f"All {stats.eval_rows:,} held-out rows have the label {label}, so their scores say little. "
            "data.eval_limit takes the first rows of a file; shuffle the file, or hold out more."
        )
    if stats.special_token_rows:
        lines.append(
            f"Rows whose text contains special tokens (such as </s>), which are read as those tokens: "
            f"{stats.special_token_rows:,}."
        )
    if stats.pads_with_eos:
        lines.append("The tokenizer has no pad token: batches are padded with eos, masked out of attention and loss.")
    return lines


def _mark_trained(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Trained tokens in ⟦…⟧ and green. In rows of more than 400 tokens the middle of long runs is left out."""
    changes = np.flatnonzero(np.diff(example.trained)) + 1
    runs = np.split(example.input_ids, changes)
    budget = max(_SHOWN_TOKENS // len(runs), 8)
    out = Text()
    trained = bool(example.trained[0])
    for run in runs:
        if len(run) > budget:
            half = budget // 2
            left_out = f" … {len(run) - 2 * half:,} tokens … "
            shown = decode(tokenizer, run[:half].tolist()) + left_out + decode(tokenizer, run[-half:].tolist())
        else:
            shown = decode(tokenizer, run.tolist())
        shown = _REPEATED.sub(lambda found: f"{found[1]} (x {len(found[0]) // len(found[1])})", shown)
        out.append(f"⟦{shown}⟧" if trained else shown, style="green" if trained else "dim")
        trained = not trained
    return out
