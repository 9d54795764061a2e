"""One source of a recipe: what identifies its content, which rows are held out, and tables of its tokenized rows.

It is read twice (to count, to tokenize), never held as a whole. Several processes may tokenize: each reads the source
itself and takes every n-th chunk of its rows. They are programs of their own, not forks or spawns: a fork would not
copy the trainer's threads, and a spawn would run the caller's ``__main__`` again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa

from qvera.config.schema import DataSection
from qvera.data.encoding import Encoder
from qvera.data.hub import load_hub
from qvera.data.image_rows import ImageEncoder
from qvera.data.row_format import PREFERENCES
from qvera.data.row_kinds import row_tokenizer, template_of
from qvera.data.rows import Rows, write_table
from qvera.data.source_rows import choose_rows, raw_rows, source_files, source_paths, survey
from qvera.data.tokenization import RowCounts, RowTokenizer, TokenizedChunk
from qvera.utils.cache_dir import HashIndex
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

TRAIN, EVAL = "train", "eval"
CHUNK_ROWS = 256
"""Raw rows that are tokenized together."""
_PROGRESS_ROWS = 2000
"""More rows than this get a progress bar."""
_MEASURED_SECONDS = 1.0
"""After this long in one process it is known how long the rest would take."""
_WORTH_SECONDS = 60.0
"""More processes are started where one alone would take this much longer: each imports its libraries and reads the
whole source (`bench/feeding.py`)."""
_PROGRAM = (
    "import sys; out, sys.stdout = sys.stdout.buffer, sys.stderr; "
    "from qvera.data.tokenize_source import work; work(sys.argv[1], int(sys.argv[2]), out)"
)
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "USE_TORCH": "0"}
"""A process's: one core each, and transformers without torch, whose import takes ten times as long as all the rest."""


def source_bytes(section: DataSection) -> int | None:
    """Bytes of the local files that a source is read from; None where some of it is a hub dataset."""
    files = [source_files(section, path) for path, _ in source_paths(section)]
    return None if None in files else sum(file.stat().st_size for found in files for file in found or [])


def source_content(section: DataSection, hashes: HashIndex) -> list[list[str]] | None:
    """What identifies a source's content: names and SHA-256 of its files, or the fingerprint of a hub dataset.

    None where nothing tells one content from another.
    """
    content: list[list[str]] = []
    for path, split in source_paths(section):
        files = source_files(section, path)
        if files is not None:
            sha256_of = hashes.hashed(files, hashes.known(files), None)
            content += [[str(file), sha256_of[file]] for file in files]
            continue
        dataset = load_hub(path, split, section.config_name, section.revision)
        fingerprint = getattr(dataset, "_fingerprint", None)
        if fingerprint is None:
            return None
        content.append([path, str(fingerprint)])
    return content


@dataclass(slots=True)
class TokenizedSource:
    """A source's tokenized rows.

    Attributes:
        format, unused_columns: of its raw rows, see `RowFormat`.
        template: the name of the template that was used.
        counts: what its rows lost.
        train, eval: the rows; ``eval`` is empty where none are held out.
        adapters: names of adapters in order of first appearance, those without a row that is left too; empty where rows
            name none.
        cache_entry: the name of the cache's entry that they were found in; None: they were tokenized now.
    """

    format: str
    unused_columns: list[str]
    template: str
    counts: RowCounts
    train: Rows
    eval: Rows
    adapters: list[str] = field(default_factory=list)
    cache_entry: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The training or the held-out rows of a source.

    Attributes:
        tokenizer: tokenizes them.
        name: `TRAIN` or `EVAL`.
        held_out: they are read from ``data.held_out_path``, not from ``data.path``.
        chosen: bool [raw rows]; which of them are of this part.
    """

    tokenizer: RowTokenizer
    name: str
    held_out: bool
    chosen: np.ndarray

    @property
    def rows(self) -> int:
        """How many there are."""
        return int(self.chosen.sum())

    def chunks(self, first: int, step: int = 1) -> Iterator[TokenizedChunk]:
        """The chunks ``first``, ``first + step``, ... in order, tokenized by this process."""
        rows = itertools.compress(raw_rows(self.tokenizer.section, self.held_out), self.chosen)
        chunks = iter(lambda: list(itertools.islice(rows, CHUNK_ROWS)), [])  # up to an empty one
        return map(self.tokenizer.tokenize_chunk, itertools.islice(chunks, first, None, step))


def tokenize_source(
    section: DataSection, encoder: Encoder | ImageEncoder, directory: Path, console: Console | None
) -> TokenizedSource:
    """Read, check, render and tokenize one source.

    Args:
        section: the source, with an empty ``mixture``.
        directory: where the tables ``train.arrow`` and ``eval.arrow`` go.

    Raises:
        InputError: anything wrong with the recipe's ``data``, a file or a row.
    """
    rows, eval_rows = survey(section), None
    if section.held_out_path is not None:
        if section.eval_path == section.path and section.eval_split is None:
            raise InputError(
                f"data.eval_path: {section.path} is data.path too, so nothing would be held out. Name another file, or "
                "set data.eval_fraction instead."
            )
        eval_rows = survey(section, held_out=True)
    elif section.eval_fraction > 0 and rows.count < 2 and not section.has_adapters:
        raise InputError(
            f"data.eval_fraction: {rows.first.source} is the only row, so none can be held out. Add rows, or set "
            "data.eval_path, or remove data.eval_fraction."
        )
    template = template_of(section, encoder, rows.format.name)  # of the held-out rows too
    unused = [name for name in rows.format.unused if name not in (section.task_column, section.adapter_column)]
    name = "" if template is None else template.name
    source = TokenizedSource(rows.format.name, unused, name, RowCounts(), Rows(), Rows(), rows.names)
    train, held = choose_rows(section, rows, eval_rows)
    part = Part(row_tokenizer(section, encoder, template, rows.format), TRAIN, False, train)
    source.train = _tokenize(part, directory, source, console)
    if held.any():
        tokenizer = row_tokenizer(section, encoder, template, (eval_rows or rows).format)
        part = Part(tokenizer, EVAL, eval_rows is not None, held)
        source.eval = _tokenize(part, directory, source, console)
    return source


def _why_none(section: DataSection, rows: int, dropped: Mapping[str, Sequence[str]]) -> str:
    """What became of all ``rows`` of a source, and what to do about it; ``dropped``: see `RowCounts`."""
    limit = section.max_length
    if section.format in PREFERENCES:
        reasons = ", ".join(f"{reason} ({len(sources)})" for reason, sources in dropped.items())
        return f"all {rows} are left out: {reasons}. Fix the rows, or raise data.max_length ({limit})."
    if section.too_long == "drop":  # which leaves out no row for anything else
        return (
            f"all {rows} are longer than data.max_length ({limit}), and data.too_long is drop. Raise data.max_length, "
            "or shorten them by data.max_source_length and data.max_target_length, or set data.too_long to cut-end, "
            "cut-start or split."
        )
    return (
        f"none of all {rows} has a trained token within data.max_length ({limit}). Raise it, or set "
        "data.max_source_length below it, or change data.too_long."
    )


def _tokenize(part: Part, directory: Path, source: TokenizedSource, console: Console | None) -> Rows:
    """A part's rows, in a file in ``directory``; what they lost is added to the counts of ``source``."""
    from rich.console import Console
    from rich.progress import Progress

    section = part.tokenizer.section
    path, count = section.held_out_path if part.held_out else section.path, part.rows
    empty_rows: list[str] = []
    console = console or Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=count <= _PROGRESS_ROWS)

    def batches() -> Iterator[pa.RecordBatch]:
        total = -(-count // CHUNK_ROWS)
        with progress, contextlib.closing(_chunks(part, console)) as chunks:
            for chunk in progress.track(chunks, total, description=f"Tokenizing {path}"):
                if chunk.error:
                    raise InputError(chunk.error)
                empty_rows.extend(chunk.empty_rows)
                if not empty_rows:
                    source.counts.add(chunk.counts)
                    yield chunk.batch
        if empty_rows:
            raise InputError(part.tokenizer.empty_rows_message(empty_rows))

    rows = write_table(batches(), directory / f"{part.name}.arrow")
    if not len(rows):
        purpose = "held-out" if part.name == EVAL else "training"
        raise InputError(f"{path}: no {purpose} row is left: {_why_none(section, count, source.counts.dropped)}")
    return rows


def _chunks(part: Part, console: Console) -> Generator[TokenizedChunk]:
    """All chunks in order, from this process or (where the recipe says so or it is worth it) from several."""
    cores = len(os.sched_getaffinity(0))
    asked = part.tokenizer.section.tokenize_processes
    rows = part.rows
    processes = min(asked or cores, -(-rows // CHUNK_ROWS))
    done, begun = 0, time.perf_counter()
    if asked is None:
        for chunk in part.chunks(0):
            yield chunk
            done += 1
            seconds = time.perf_counter() - begun
            rest = seconds * (rows / (done * CHUNK_ROWS) - 1)
            if processes > 1 and seconds > _MEASURED_SECONDS and rest > _WORTH_SECONDS:
                break
        else:
            return
    if processes > 1:
        try:
            for chunk in _chunks_by_processes(part, done, processes):
                yield chunk
                done += 1
            return
        except _ProcessFailed:
            text = "One process tokenizes all rows: others could not be started, or could not load this tokenizer."
            console.print(text, style="yellow", markup=False)
    yield from part.chunks(done)


class _ProcessFailed(Exception):
    """A process could not be started, or ended before its work was done."""


def _chunks_by_processes(part: Part, first: int, processes: int) -> Iterator[TokenizedChunk]:
    """All chunks of a part from number ``first`` on, in order: each process writes its own to its standard output.

    Raises:
        _ProcessFailed: after the chunks that were yielded, none can be had in this way.
    """
    with contextlib.ExitStack() as stack:
        try:
            job = stack.enter_context(tempfile.NamedTemporaryFile())
            pickle.dump((part, part.tokenizer.encoder.sha256(), first, processes), job)
            job.flush()
            outputs: list[IO[bytes]] = []
            for number in range(processes):
                process = stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, "-c", _PROGRAM, job.name, str(number)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        env={**os.environ, **_ENVIRONMENT},
                    )
                )
                stack.callback(process.kill)
                assert process.stdout is not None
                outputs.append(process.stdout)
            for number in range(-(-part.rows // CHUNK_ROWS) - first):
                yield pickle.load(outputs[number % processes])
        # the last two: Python's own start (a sitecustomize) printed something in front of the chunks
        except (OSError, EOFError, pickle.PickleError, TypeError, AttributeError, ValueError, LookupError) as error:
            raise _ProcessFailed(str(error)) from error


def work(job: str, number: int, out: IO[bytes]) -> None:
    """Write one process's chunks: ``first + number``, ``first + number + processes``, ..."""
    with open(job, "rb") as file:
        part, sha256, first, processes = pickle.load(file)
    if part.tokenizer.encoder.sha256() != sha256:
        raise SystemExit("the tokenizer is another one here")
    for chunk in part.chunks(first + number, processes):
        pickle.dump(chunk, out)
        out.flush()
