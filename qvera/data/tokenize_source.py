"""One source of a recipe, from its files to tables of tokenized rows: read twice (to count, to tokenize), never held as a whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvera.config.schema import DataSection
from qvera.data import tokenize_parallel
from qvera.data.chat_template import ChatTemplate, resolve_template
from qvera.data.encoding import Encoder
from qvera.data.formats import RowFormat, detect_format
from qvera.data.row_selection import CHUNK_ROWS, EVAL, TRAIN, chosen_rows, chunks_of, count_rows, hold_out, raw_rows
from qvera.data.row_tables import RowTable, RowWriter, record_batch
from qvera.data.tokenization import Counts, RowTokenizer
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

_PROGRESS_ROWS = 2000
_MEASURED_SECONDS = 1.0
"""After this long in one process it is known how long the rest would take."""
_WORTH_SECONDS = 60.0
"""Further processes are started where one alone would take this much longer: each takes some 10 s of a core to import its libraries
(on a machine with other work a minute, `bench/feeding.py`), and reads the whole source."""


@dataclass(slots=True)
class Made:
    """A source's rows.

    Attributes:
        format, unused: of its raw rows, see `RowFormat`.
        template: the name of the template that was used.
        train, eval: its tokenized rows; ``eval`` is empty where none are held out.
        found: the name of the cache's entry that they were found in; None: they were tokenized now.
    """

    format: str
    unused: list[str]
    template: str
    counts: Counts
    train: RowTable
    eval: RowTable
    found: str | None = None


def make(section: DataSection, encoder: Encoder, directory: Path | None, console: Console | None) -> Made:
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
    if section.eval_path is not None:
        if section.eval_path == section.path:
            raise InputError(
                f"data.eval_path: {section.path} is data.path too, so nothing would be held out. Name another file, or "
                "set data.eval_fraction instead."
            )
        found = count_rows(section, section.eval_path)
        eval_format = detect_format(next(raw_rows(section, section.eval_path)), section.format, section.columns)
        counts = count, min(found, section.eval_limit or found)
    else:
        if section.eval_fraction > 0 and count < 2:
            raise InputError(
                f"data.eval_fraction: {first.source} is the only row, so none can be held out. Add rows, or set "
                "data.eval_path, or remove data.eval_fraction."
            )
        held = int(hold_out(count, section.eval_fraction, section.seed).sum())
        eval_format = row_format
        counts = count - held, min(held, section.eval_limit or held)
    made = Made(row_format.name, row_format.unused, template.name, Counts(), _empty(), _empty())
    for part, rows, used, path, purpose in (
        (TRAIN, counts[0], row_format, section.path, "training"),
        (EVAL, counts[1], eval_format, section.eval_path or section.path, "held-out"),
    ):
        if not rows:
            continue
        table, lost = _tokenize(_Pass(section, part, count, rows, path, used), encoder, template, directory, console)
        if not len(table):
            raise InputError(f"{path}: no {purpose} row is left: {_why_none(section, rows)}")
        made.counts.add(lost)
        setattr(made, part, table)
    return made


def _why_none(section: DataSection, rows: int) -> str:
    """What became of all ``rows`` of a source, and what to do about it."""
    limit = section.max_length
    if section.too_long == "drop":  # which leaves out no row for anything else
        return (
            f"all {rows} are longer than data.max_length ({limit}), and data.too_long is drop. Raise data.max_length, or "
            "shorten them by data.max_source_length and data.max_target_length, or set data.too_long to cut-end, "
            "cut-start or split."
        )
    return (
        f"none of all {rows} has a trained token within data.max_length ({limit}). Raise it, or set "
        "data.max_source_length below it, or change data.too_long."
    )


def _empty() -> RowTable:
    return RowWriter(None).close()


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over raw rows: which part of which source, how many of them, and what they look like."""

    section: DataSection
    part: str
    count: int
    rows: int
    path: str
    row_format: RowFormat


def _tokenize(
    job: _Pass, encoder: Encoder, template: ChatTemplate, directory: Path | None, console: Console | None
) -> tuple[RowTable, Counts]:
    tokenizer = RowTokenizer(job.section, encoder, template, job.row_format)
    counts, hollow = Counts(), list[str]()
    writer = RowWriter(None if directory is None else directory / f"{job.part}.arrow")
    try:
        with _progress(job, console) as advance:
            chunks = chunks_of(chosen_rows(job.section, job.part, job.count))
            begun, done, processes = time.perf_counter(), 0, _processes(job)
            elsewhere = job.section.tokenize_processes is not None and processes > 1
            while True:
                if elsewhere:
                    with tempfile.TemporaryDirectory(dir=directory) as scratch:
                        spread = tokenize_parallel.tokenize(
                            job.section,
                            job.part,
                            job.count,
                            job.row_format,
                            encoder.tokenizer,
                            done,
                            processes,
                            Path(scratch),
                            advance,
                        )
                        if spread is not None:
                            hollow += spread.take_into(writer, counts, hollow)
                            break
                    _say_alone(console)
                    elsewhere, processes = False, 1
                chunk = next(chunks, None)
                if chunk is None:
                    break
                full, nothing = tokenizer.parse(chunk)
                hollow += nothing
                if not hollow:  # otherwise only the rest of the list of such rows is of interest
                    examples, lost = tokenizer.encode(full)
                    writer.add(record_batch(examples))
                    counts.add(lost)
                done += 1
                advance(len(chunk))
                seconds = time.perf_counter() - begun
                if processes > 1 and seconds > _MEASURED_SECONDS:
                    left = seconds * (job.rows / (done * CHUNK_ROWS) - 1)
                    elsewhere, processes = left > _WORTH_SECONDS, processes if left > _WORTH_SECONDS else 1
        if hollow:
            raise InputError(tokenizer.hollow_message(hollow))
        return writer.close(), counts
    except BaseException:
        writer.abandon()
        raise


def _say_alone(console: Console | None) -> None:
    from rich.console import Console

    text = "One process tokenizes all rows: others could not be started, or could not be given this tokenizer whole."
    (console or Console(stderr=True)).print(text, style="yellow", markup=False)


def _processes(job: _Pass) -> int:
    """Processes at most: the recipe's, else one for each core; never more than there are chunks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(job.section.tokenize_processes or cores, -(-job.rows // CHUNK_ROWS))


@contextlib.contextmanager
def _progress(job: _Pass, console: Console | None) -> Iterator[Callable[[int], None]]:
    """A bar for a long pass."""
    if job.rows <= _PROGRESS_ROWS:
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("Tokenizing {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task(job.path, total=job.rows)
        yield lambda rows: progress.update(task, advance=rows)
