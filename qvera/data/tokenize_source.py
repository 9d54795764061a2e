"""One source of a recipe, from its files to tables of tokenized rows.

It is read twice (to count, to tokenize), never held as a whole.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from qvera.config.schema import DataSection
from qvera.data.chat_template import ChatTemplate, resolve_template
from qvera.data.encoding import Encoder
from qvera.data.formats import RowFormat, detect_format
from qvera.data.rows import RowTable, write_table
from qvera.data.sources import CHUNK_ROWS, EVAL, TRAIN, chosen_rows, chunks_of, count_rows, hold_out, raw_rows
from qvera.data.tokenization import RowCounts, RowTokenizer, TokenizedChunk
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

_PROGRESS_ROWS = 2000
"""More rows than this get a progress bar."""
_MEASURED_SECONDS = 1.0
"""After this long in one process it is known how long the rest would take."""
_WORTH_SECONDS = 60.0
"""More processes are started where one alone would take this much longer: each imports its libraries and reads the
whole source (`bench/feeding.py`)."""


@dataclass(slots=True)
class TokenizedSource:
    """A source's tokenized rows.

    Attributes:
        format, unused_columns: of its raw rows, see `RowFormat`.
        template: the name of the template that was used.
        counts: what its rows lost.
        train, eval: the rows; ``eval`` is empty where none are held out.
        cache_entry: the name of the cache's entry that they were found in; None: they were tokenized now.
    """

    format: str
    unused_columns: list[str]
    template: str
    counts: RowCounts
    train: RowTable
    eval: RowTable
    cache_entry: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The training or the held-out rows of a source: where they are, how many there are, what they look like.

    Attributes:
        section: the source; its template is named, not ``auto``.
        name: `TRAIN` or `EVAL`.
        source_rows: rows of ``data.path``, see `chosen_rows`.
        rows: of them, those of this part.
    """

    section: DataSection
    name: str
    source_rows: int
    rows: int
    path: str
    row_format: RowFormat

    def tokenizer(self, encoder: Encoder, template: ChatTemplate) -> RowTokenizer:
        """What tokenizes these rows."""
        return RowTokenizer(self.section, encoder, template, self.row_format)

    def tokenize(self, tokenizer: RowTokenizer, first: int, step: int = 1) -> Iterator[TokenizedChunk]:
        """The part's chunks ``first``, ``first + step``, ...

        in order; after an empty row the others are only checked.
        """
        only_check = False
        raw = chunks_of(chosen_rows(self.section, self.name, self.source_rows))
        for rows in itertools.islice(raw, first, None, step):
            chunk = tokenizer.tokenize_chunk(rows, only_check)
            only_check = only_check or bool(chunk.empty_rows)
            yield chunk


def tokenize_source(
    section: DataSection, encoder: Encoder, directory: Path | None, console: Console | None
) -> TokenizedSource:
    """Read, check, render and tokenize one source.

    Args:
        section: the source, with an empty ``mixture``.
        directory: where the tables ``train.arrow`` and ``eval.arrow`` go; None: memory.

    Raises:
        InputError: anything wrong with the recipe's ``data``, a file or a row.
    """
    count = count_rows(section, section.path)
    first = next(raw_rows(section, section.path))
    row_format = detect_format(first, section.format, section.columns)
    template = resolve_template(section.template, encoder.tokenizer, row_format.name)
    # `auto` goes by the training rows, in every pass and every process
    section = section.replace(template=template.name)
    eval_format = row_format
    if section.eval_path is not None:
        if section.eval_path == section.path:
            raise InputError(
                f"data.eval_path: {section.path} is data.path too, so nothing would be held out. Name another file, or "
                "set data.eval_fraction instead."
            )
        held = count_rows(section, section.eval_path)
        eval_format = detect_format(next(raw_rows(section, section.eval_path)), section.format, section.columns)
        train_rows = count
    else:
        if section.eval_fraction > 0 and count < 2:
            raise InputError(
                f"data.eval_fraction: {first.source} is the only row, so none can be held out. Add rows, or set "
                "data.eval_path, or remove data.eval_fraction."
            )
        held = int(hold_out(count, section.eval_fraction, section.seed).sum())
        train_rows = count - held
    tokenized = TokenizedSource(row_format.name, row_format.unused, template.name, RowCounts(), RowTable(), RowTable())
    train = Part(section, TRAIN, count, train_rows, section.path, row_format)
    held_out_rows, path = min(held, section.eval_limit or held), section.eval_path or section.path
    held_out = Part(section, EVAL, count, held_out_rows, path, eval_format)
    for part, purpose in ((train, "training"), (held_out, "held-out")):
        if not part.rows:
            continue
        table, counts = _tokenize(part, encoder, template, directory, console)
        if not len(table):
            raise InputError(f"{part.path}: no {purpose} row is left: {_why_none(section, part.rows)}")
        tokenized.counts.add(counts)
        setattr(tokenized, part.name, table)
    return tokenized


def _why_none(section: DataSection, rows: int) -> str:
    """What became of all ``rows`` of a source, and what to do about it."""
    limit = section.max_length
    if section.too_long == "drop":  # which leaves out no row for anything else
        return (
            f"all {rows} are longer than data.max_length ({limit}), and data.too_long is drop. Raise data.max_length, "
            f"or "
            "shorten them by data.max_source_length and data.max_target_length, or set data.too_long to cut-end, "
            "cut-start or split."
        )
    return (
        f"none of all {rows} has a trained token within data.max_length ({limit}). Raise it, or set "
        "data.max_source_length below it, or change data.too_long."
    )


def _tokenize(
    part: Part, encoder: Encoder, template: ChatTemplate, directory: Path | None, console: Console | None
) -> tuple[RowTable, RowCounts]:
    from rich.console import Console
    from rich.progress import Progress

    tokenizer = part.tokenizer(encoder, template)
    counts, empty_rows = RowCounts(), list[str]()
    console = console or Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=part.rows <= _PROGRESS_ROWS)

    def batches() -> Iterator[pa.RecordBatch]:
        chunks = _chunks(part, tokenizer, directory, console)
        with progress, contextlib.closing(chunks):
            task = progress.add_task(f"Tokenizing {part.path}", total=part.rows)
            for chunk in chunks:
                empty_rows.extend(chunk.empty_rows)
                if chunk.error and (chunk.malformed or not empty_rows):
                    raise InputError(chunk.error)
                if not empty_rows:
                    counts.add(chunk.counts)
                    yield chunk.batch
                progress.advance(task, chunk.rows)
        if empty_rows:
            raise InputError(tokenizer.empty_rows_message(empty_rows))

    table = write_table(batches(), None if directory is None else directory / f"{part.name}.arrow")
    return table, counts


def _chunks(part: Part, tokenizer: RowTokenizer, directory: Path | None, console: Console) -> Generator[TokenizedChunk]:
    """All chunks in order, from this process or (where the recipe says so or it is worth it) from several."""
    from qvera.data import tokenize_parallel

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(part.section.tokenize_processes or cores, -(-part.rows // CHUNK_ROWS))
    done = 0
    if part.section.tokenize_processes is None:
        begun = time.perf_counter()
        measured = processes == 1
        for chunk in part.tokenize(tokenizer, 0):
            yield chunk
            done += 1
            seconds = time.perf_counter() - begun
            if not measured and seconds > _MEASURED_SECONDS:
                measured = True
                if seconds * (part.rows / (done * CHUNK_ROWS) - 1) > _WORTH_SECONDS:
                    break
        else:
            return
    if processes > 1:
        try:
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                for chunk in tokenize_parallel.chunks(
                    part, tokenizer.encoder.tokenizer, done, processes, Path(scratch)
                ):
                    yield chunk
                    done += 1
            return
        except tokenize_parallel.WorkerFailed:
            text = "One process tokenizes all rows: others could not be started, or could not load this tokenizer."
            console.print(text, style="yellow", markup=False)
    yield from part.tokenize(tokenizer, done)
