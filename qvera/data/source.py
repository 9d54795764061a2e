"""One source of a recipe: its raw rows, which of them are held out, and tables of its tokenized rows.

A source is read twice, to count and to tokenize: which rows are held out depends on their number. It is never held as a
whole. The first pass takes a fiftieth of the time.

Several processes may tokenize. Each reads the source itself and takes every n-th chunk of rows. They are new programs,
because a fork would not copy the trainer's threads, and a spawn would run the caller's ``__main__`` again.
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
from array import array
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa

from qvera.config.sections import DataSection
from qvera.data.chat_template import ChatTemplate, resolve_template
from qvera.data.conversations import FORMATS, LABELLED, PREFERENCES, Conversation, RowFormat, parse_row
from qvera.data.detect import MissingColumn, UnaskedPreferences, UnknownFormat, detect_format, is_dolly
from qvera.data.images import ImageProcessor
from qvera.data.labelled import ImageEncoder, ImageReader, LabelledTokenizer
from qvera.data.readers import ACCEPTED, RawRow, adapter_files, load_hub, local_files, read_file, read_lines, read_rows
from qvera.data.rows import Rows, write_table
from qvera.data.sampler import random_order
from qvera.data.tokenization import Encoder, RowCounts, RowTokenizer, TokenizedChunk
from qvera.utils.adapter_names import escape_name
from qvera.utils.cores import core_ids
from qvera.utils.errors import InputError, did_you_mean
from qvera.utils.files import resolve_path
from qvera.utils.formatting import describe

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from qvera.utils.progress import Phase

    Processor: TypeAlias = PreTrainedTokenizerBase | ImageProcessor
    """The tokenizer or image processor that makes a model's input of rows."""

TRAIN, EVAL = "train", "eval"
CHUNK_ROWS = 256
"""Raw rows that are tokenized together."""
MEASURED_SECONDS = 1.0
"""After this long in one process, the time for the rest is estimated."""
WORTH_SECONDS = 60.0
"""More processes start only if one alone would take this much longer: each has to read the whole source."""
_PROGRAM = (
    "import sys; out, sys.stdout = sys.stdout.buffer, sys.stderr; "
    "from qvera.data.source import work; work(sys.argv[1], int(sys.argv[2]), out)"
)
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "USE_TORCH": "0"}
"""One core for each process, and transformers without torch, whose import takes ten times as long as all the rest."""


def has_columns(path: Path, columns: Collection[str]) -> bool:
    """Whether the first row of a file has these columns. Raises InputError as `read_rows`."""
    return next(read_rows(str(path))).fields.keys() >= set(columns)


def source_paths(section: DataSection) -> Iterator[tuple[str, str]]:
    """Path and split of all that a source reads, training rows first. The split counts for a hub dataset only."""
    yield section.path, section.split
    if section.held_out_path is not None:
        yield section.held_out_path, section.eval_split or section.split


def source_files(section: DataSection, path: str) -> list[Path] | None:
    """The files of ``data.path`` or ``data.eval_path``; None for a hub dataset.

    Raises InputError: nothing of that name, or a directory whose files can't be read as the recipe says.
    """
    return adapter_files(path) if section.adapter_files else local_files(path)


def hub_datasets(section: DataSection) -> list[str]:
    """Return the paths in a recipe's ``data`` that name hub datasets; raises as `source_files`."""
    files = {path: source_files(section, path) for path, _ in source_paths(section)}
    files |= {part.path: local_files(part.path) for part in section.mixture}
    return [path for path, found in files.items() if found is None]


def with_label_names(section: DataSection) -> DataSection:
    """Give the source a hub dataset's own names for its integer labels, unless it has names already.

    Names that are numbers, as MNIST's, are not used: an integer label would be mistaken for one of them. Raises
    InputError: a dataset can't be loaded, or training rows, held-out rows and given names do not agree.
    """
    if section.format not in LABELLED or section.regression is True:
        return section
    columns = [section.columns["label"]] if "label" in section.columns else ["label", "labels"]
    found = []
    for path, split in source_paths(section):
        if local_files(path) is None:
            dataset = load_hub(path, split, section.config_name, section.revision)
            named = (getattr(dataset.features.get(column), "names", None) for column in columns)  # of a ClassLabel
            found.append((path, list(next(filter(None, named), []))))
    # Without names of the recipe, those of the training rows count, if these come from a hub dataset.
    names, given = section.label_names, "data.label_names or the trained model"
    if not names:
        if not found or found[0][0] != section.path:
            return section
        (given, names), *found = found
    for path, own in found:
        # wholly other names than the recipe's are fine; the same ones in another order are not
        is_renamed = bool(section.label_names) and sorted(own) != sorted(names)
        if own and names and own != names and not is_renamed:
            raise InputError(
                f"{path}: calls its classes {', '.join(own)}, and {given} calls them {', '.join(names)}: an integer "
                "label would mean two things. Take rows with the same classes in the same order, or whose labels are "
                "names."
            )
    if section.label_names:
        return section
    return section.replace(label_names=[] if any(map(str.isdecimal, names)) else names)


def raw_rows(section: DataSection, held_out: bool = False) -> Iterator[RawRow]:
    """Yield the raw rows of a source, each with its ``owner``.

    ``held_out``: read ``data.held_out_path``, not ``data.path``.

    Raises InputError: a file or a row can't be read, or a row does not name its owner.
    """
    rows: Iterator[RawRow]
    most = section.max_row_characters
    path, split = list(source_paths(section))[held_out]
    key, name = ("eval_split", "held-out rows in data.eval_path") if held_out else ("split", "that split in data.path")
    value = getattr(section, key)
    if value != (None if held_out else "train") and local_files(path) is not None:
        raise InputError(
            f"data.{key}: {value!r} has a meaning for hub datasets only, and {path} is local. Remove the key, and name "
            f"the file of {name}."
        )
    if section.adapter_files:
        files = adapter_files(path)
        rows = (replace(row, owner=file.stem) for file in files for row in read_file(file, most_characters=most))
    elif path == section.path or not os.path.exists(resolve_path(path)):
        hub = section.config_name, section.revision
        rows = read_rows(path, split=split, config_name=hub[0], revision=hub[1], most_characters=most)
    else:  # a local eval file beside a hub dataset: the hub's keys are not about it
        rows = read_rows(path, most_characters=most)
    # With several adapters the limit counts the rows of each, so all rows are read.
    limit = None if held_out else section.limit
    seen: Counter[str | None] = Counter()
    for row in itertools.islice(rows, None if section.has_adapters else limit):
        owned = row if section.owner_column is None else _with_owner(row, *section.owner_column)
        if limit is not None and section.has_adapters:
            seen[owned.owner] += 1
            if seen[owned.owner] > limit:
                continue
        yield owned


def _with_owner(row: RawRow, column: str, kind: str) -> RawRow:
    if column not in row.fields:
        raise InputError(
            f"{row.source}: no column {column!r} (data.{kind}_column){did_you_mean(column, row.fields)} Columns "
            f"found: {', '.join(map(str, row.fields)) or 'none'}. Each row names its {kind}."
        )
    value = row.fields[column]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        is_missing = value is None or value != value or value == ""  # a missing number is a NaN
        raise InputError(
            f"{row.source}: the column {column!r} (data.{kind}_column) names the row's {kind} by a text or a whole "
            f"number, got {'nothing' if is_missing else describe(value)}. Fill it in, or remove the row."
        )
    return replace(row, owner=str(value))


@dataclass(frozen=True, slots=True)
class Survey:
    """The result of one pass over a source's raw rows."""

    first: RawRow
    format: RowFormat
    count: int  # rows
    names: list[str]  # adapters in order of first appearance; empty if rows name none
    members: list[np.ndarray]  # the numbers of each adapter's rows, int64; without adapters those of all rows


def survey(section: DataSection, held_out: bool = False) -> Survey:
    """Read all rows of `raw_rows` once.

    Raises InputError: as `raw_rows` and `detect_format`; an adapter's name is no directory name (`escape_name`), or a
    part of the row; or the first rows of two adapters differ in format.
    """
    firsts: dict[frozenset[str], RawRow] = {}  # by their columns: the first row of all, and of each adapter
    count, numbers, owner_of = 0, dict[str, int](), array("q")
    for row in raw_rows(section, held_out):
        count += 1
        if not firsts:
            firsts[frozenset(row.fields)] = row
        if section.has_adapters:
            name = row.owner or ""
            if name not in numbers:
                firsts.setdefault(frozenset(row.fields), row)
                try:
                    escape_name(name)
                except InputError as error:
                    raise InputError(f"{row.source}: {error}") from None
            owner_of.append(numbers.setdefault(name, len(numbers)))
    first, *others = firsts.values()  # readers refuse what holds no rows
    format = detect_format(first, section.format, section.columns)
    # A format is detected by the columns, so one row of each set of columns is enough.
    for other in others:
        if (name := detect_format(other, section.format, section.columns).name) != format.name:
            raise InputError(
                f"{other.source}: the row looks like {name}, and {first.source} like {format.name}. All adapters of a "
                "run have rows of one format: convert them, or set data.format if both can be read as one."
            )
    if section.adapter_column is not None and section.adapter_column in map(
        format.column, FORMATS[format.name].required
    ):
        raise InputError(
            f"data.adapter_column: {section.adapter_column!r} is the column of the {format.name} rows themselves, so "
            "each adapter would learn its own name. Name a column that says whose rows they are."
        )
    members = [np.arange(count)]
    if numbers:
        members = members_of(np.frombuffer(owner_of, dtype=np.int64), len(numbers))
    return Survey(first, format, count, list(numbers), members)


def members_of(numbers: np.ndarray, count: int) -> list[np.ndarray]:
    """The rows of each of ``count`` owners, int64 arrays, from each row's owner number, int64 [rows]."""
    by_owner = np.argsort(numbers, kind="stable")
    return np.split(by_owner, np.cumsum(np.bincount(numbers, minlength=count))[:-1])


def choose_rows(section: DataSection, rows: Survey, eval_rows: Survey | None) -> tuple[np.ndarray, np.ndarray]:
    """Decide which raw rows are trained on and which are held out, for each adapter by itself.

    Args:
        eval_rows: the rows of ``data.held_out_path``; None: the held-out rows are drawn from ``rows``.

    Returns:
        bool [raw rows of ``data.path``] and bool [raw rows that held-out rows come from].
    """
    trained, held = np.ones(rows.count, dtype=bool), np.zeros((eval_rows or rows).count, dtype=bool)
    if eval_rows is not None:
        for members in eval_rows.members:
            held[members[: section.eval_limit]] = True
        return trained, held
    for members in rows.members:
        chosen = members[hold_out(len(members), section.eval_fraction, section.seed)]
        trained[chosen] = False
        held[chosen[: section.eval_limit]] = True
    return trained, held


def hold_out(count: int, fraction: float, seed: int) -> np.ndarray:
    """Draw the rows to hold out, bool [count]: none if ``fraction`` is 0 or there is one row, else some, never all."""
    held = np.zeros(count, dtype=bool)
    if fraction > 0:
        chosen = min(max(1, round(count * fraction)), count - 1)
        held[random_order(count, seed, -1)[:chosen]] = True
    return held


def encoder_of(section: DataSection, processor: Processor) -> Encoder | ImageEncoder:
    """The encoder of a source's rows; raises as `Encoder`."""
    if isinstance(processor, ImageProcessor):
        return ImageEncoder(processor.patches)
    return Encoder(processor, has_answers=section.format not in LABELLED)


def template_of(section: DataSection, encoder: Encoder | ImageEncoder, format: str) -> ChatTemplate | None:
    """The template of a source's rows; None for images. Raises as `resolve_template`."""
    return None if isinstance(encoder, ImageEncoder) else resolve_template(section.template, encoder.tokenizer, format)


@dataclass(slots=True)
class TokenizedSource:
    """A source's tokenized rows."""

    format: str
    unused_columns: list[str]
    template: str  # the template's name
    counts: RowCounts
    train: Rows
    eval: Rows  # empty if none are held out
    adapters: list[str] = field(default_factory=list)  # in order of first appearance, also those with no rows left
    cache_entry: str | None = None  # its name; None: tokenized now


@dataclass(frozen=True, slots=True)
class Part:
    """The training or the held-out rows of a source."""

    tokenizer: RowTokenizer
    name: str  # `TRAIN` or `EVAL`
    held_out: bool  # read from data.held_out_path, not data.path
    chosen: np.ndarray  # bool [raw rows]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.chosen.sum())

    def chunks(self, first: int, step: int = 1) -> Iterator[TokenizedChunk]:
        """The chunks ``first``, ``first + step``, ..., tokenized by this process."""
        rows = itertools.compress(raw_rows(self.tokenizer.section, self.held_out), self.chosen)
        chunks = iter(lambda: list(itertools.islice(rows, CHUNK_ROWS)), [])  # up to an empty one
        return map(self.tokenizer.tokenize_chunk, itertools.islice(chunks, first, None, step))


def tokenize_source(
    section: DataSection, encoder: Encoder | ImageEncoder, directory: Path, show: Phase
) -> TokenizedSource:
    """Read, check, render and tokenize one source (with an empty ``mixture``) into tables in ``directory``.

    Raises InputError: anything wrong with the recipe's ``data``, a file or a row.
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
    unused = [name for name in rows.format.unused if name not in (section.owner_column or ())[:1]]
    name = "" if template is None else template.name
    source = TokenizedSource(rows.format.name, unused, name, RowCounts(), Rows(), Rows(), rows.names)
    trained, held = choose_rows(section, rows, eval_rows)
    parts = [(TRAIN, False, trained, rows.format), (EVAL, eval_rows is not None, held, (eval_rows or rows).format)]
    for name, held_out, chosen, format in parts:
        kind = LabelledTokenizer if format.name in LABELLED else RowTokenizer
        kind = ImageReader if isinstance(encoder, ImageEncoder) else kind
        part = Part(kind(section, encoder, template, format), name, held_out, chosen)  # type: ignore[arg-type]
        if name == TRAIN or held.any():
            setattr(source, name, _tokenize(part, directory, source, show))
    return source


def _tokenize(part: Part, directory: Path, source: TokenizedSource, show: Phase) -> Rows:
    """Write a part's rows to ``directory``, and add what they lost to the counts of ``source``."""
    section = part.tokenizer.section
    path, count = section.held_out_path if part.held_out else section.path, part.rows
    empty_rows: list[str] = []

    def batches() -> Iterator[pa.RecordBatch]:
        show(0, count, f"tokenizing {path}")
        with contextlib.closing(_chunks(part, show.console)) as chunks:
            for number, chunk in enumerate(chunks, start=1):
                show(min(number * CHUNK_ROWS, count))
                if chunk.error:
                    raise InputError(chunk.error)
                empty_rows.extend(chunk.empty_rows)
                if not empty_rows:
                    source.counts.add(chunk.counts)
                    yield chunk.batch
        if empty_rows:
            raise InputError(part.tokenizer.empty_rows_message(empty_rows))

    rows = write_table(batches(), directory / f"{part.name}.arrow")
    if len(rows):
        return rows
    limit, dropped = section.max_length, source.counts.dropped
    reasons = ", ".join(f"{reason} ({len(sources)})" for reason, sources in dropped.items())
    raise InputError(
        f"{path}: no row is left: all {count} are left out: {reasons}. Fix the rows, raise data.max_length ({limit}), "
        "or cut rows otherwise (data.too_long)."
    )


# --- several processes


def _chunks(part: Part, console: Console) -> Generator[TokenizedChunk]:
    """All chunks in order, from several processes if the recipe asks for them or it is worth it."""
    asked, total = part.tokenizer.section.tokenize_processes, -(-part.rows // CHUNK_ROWS)
    processes = min(asked or len(core_ids()), total)
    done, begun = 0, time.perf_counter()
    # Begin with one process and measure: others are started only if the rest would take long.
    for chunk in part.chunks(0) if asked is None else ():
        yield chunk
        done += 1
        seconds = time.perf_counter() - begun
        if processes > 1 and seconds > MEASURED_SECONDS and seconds * (total / done - 1) > WORTH_SECONDS:
            break
    # A process that fails is no error: the chunks that it owes are tokenized here instead.
    if processes > 1 and done < total:
        try:
            for chunk in _chunks_by_processes(part, done, processes, total):
                yield chunk
                done += 1
        except _ProcessFailed:
            text = "One process tokenizes all rows: others could not be started, or could not load this tokenizer."
            console.print(text, style="yellow", markup=False)
    if done < total:
        yield from part.chunks(done)


class _ProcessFailed(Exception):
    """A process could not start, or ended too early."""


def _chunks_by_processes(part: Part, first: int, processes: int, total: int) -> Iterator[TokenizedChunk]:
    """The chunks from number ``first`` on, in order. Each process writes its own to its standard output.

    Raises _ProcessFailed: the remaining chunks must be made in another way.
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
            for number in range(total - first):
                # Each process has every n-th chunk, so turns restore the order. A full pipe makes those ahead wait.
                yield pickle.load(outputs[number % processes])
        # the last two: Python's own start (a sitecustomize) printed something in front of the chunks
        except (OSError, EOFError, pickle.PickleError, TypeError, AttributeError, ValueError, LookupError) as error:
            raise _ProcessFailed(str(error)) from error


def work(job: str, number: int, out: IO[bytes]) -> None:
    """Write one process's chunks: ``first + number``, ``first + number + processes``, ..."""
    with open(job, "rb") as file:
        part, sha256, first, processes = pickle.load(file)
    # A tokenizer that is no longer the same after pickling would make other rows than the parent's.
    if part.tokenizer.encoder.sha256() != sha256:
        raise SystemExit("the tokenizer is another one here")
    for chunk in part.chunks(first + number, processes):
        pickle.dump(chunk, out)
        out.flush()


_ANSWERS = {"prompt": "completion", "instruction": "output"}
"""The field of a prompt → that of its answer."""


def read_prompts(path: Path, section: DataSection, owner_columns: Sequence[str] = ()) -> list[Conversation]:
    """Read the prompts of a file. Answers at the end of a row are left out.

    Args:
        path: .txt (one prompt a line), or a data file like a training file; its answers may be missing.
        section: gives the column names and the system prompt.
        owner_columns: the first of these columns with a value becomes ``owner``, as text.

    Raises:
        InputError: no such file, no prompts in it, or a row that asks nothing; names file and line.
    """
    is_text = path.suffix.lower() == ".txt"
    format, columns = ("prompt-completion", {}) if is_text else (section.format, section.columns)
    if is_text:
        local_files(str(path), f".txt (one prompt a line), {ACCEPTED}")  # raises where it is not here
    conversations = []
    for row in read_file(path, read_lines) if is_text else read_rows(str(path)):
        fields = dict(row.fields)
        named, kind = {ours: theirs for ours, theirs in columns.items() if theirs in fields}, format
        # of a judged answer only the prompt counts; a pair's answers may begin with it
        has_pair = kind == "preference" and all(fields.get(named.get(name, name)) for name in ("chosen", "rejected"))
        if kind in PREFERENCES and not has_pair:
            kind, named = "prompt-completion", {name: named[name] for name in ("prompt", "system") if name in named}
        answers = {**_ANSWERS, "instruction": "response"} if is_dolly(row.fields) and not columns else _ANSWERS
        for question, answer in answers.items():
            asked, answered = (named.get(name, name) for name in (question, answer))
            if asked in fields and not fields.get(answered):
                fields[answered] = "-"  # a row without its answer is read like a training row
        filled = replace(row, fields=fields)
        try:
            try:
                found = detect_format(filled, kind, named)
            except MissingColumn:  # a prompt may be written otherwise than the rows that trained
                found = detect_format(filled, "auto", named)
            parsed = parse_row(filled, found, section.system)
        except UnaskedPreferences:
            parsed = parse_row(filled, detect_format(filled, "preference", named), section.system)
        except (MissingColumn, UnknownFormat) as error:
            text = str(error)
            lost = next((theirs for ours, theirs in columns.items() if ours in _ANSWERS and theirs not in fields), None)
            if lost is not None:
                found_names = ", ".join(map(str, row.fields))
                text = f"{row.source}: no column {lost!r}{did_you_mean(lost, row.fields)} Columns found: {found_names}."
            raise InputError(f"{text} Rows to answer need no answers: a column called prompt is enough.") from None
        if not isinstance(parsed, Conversation):
            wanted = " or ".join(dict.fromkeys([columns.get("prompt", "prompt"), "prompt"]))
            raise InputError(
                f"{row.source}: is plain text, which asks nothing. Columns found: {', '.join(map(str, row.fields))}. "
                f"Call that of the prompts {wanted}, or give messages."
            )
        turns = list(parsed.turns)
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if not turns or turns[-1].role == "system":
            raise InputError(f"{row.source}: has no user turn to answer.")
        owner = next((row.fields[name] for name in owner_columns if row.fields.get(name) not in (None, "")), None)
        conversations.append(replace(parsed, turns=turns, owner=None if owner is None else str(owner)))
    return conversations
