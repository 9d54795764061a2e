"""Tokenized rows on disk: a second run of the same recipe maps them instead of reading, rendering and tokenizing again.

They are entries (`qvera.utils.cache_dir`) of $QVERA_CACHE/rows. A name is rows-KEY, the hash of everything that the
rows are a function of; in it are train.arrow, eval.arrow and, last, record.json. The ranks of a node wait for the first
of them. What that one found wrong with the rows is in .KEY.failed, for those that have waited. hashes.json has the
sources and the tables.

`datasets.Dataset.from_generator` was tried in place of this: it writes rows nine times slower (a Python list each),
forks the trainer's threads, does not notice a damaged file, and would replace about eighty lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from filelock import FileLock, Timeout

from qvera.config.schema import DataSection
from qvera.data.encoding import Encoder, tokenizer_sha256
from qvera.data.readers import Unreadable
from qvera.data.rows import RowTable
from qvera.data.sources import EVAL, TRAIN, source_content, source_files
from qvera.data.tokenization import RowCounts
from qvera.data.tokenize_source import TokenizedSource, tokenize_source
from qvera.utils.atomic import disk_errors, flush, replace_text
from qvera.utils.cache_dir import UNFINISHED, WAIT_SECONDS, DiskCache, HashIndex, discard
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256, file_stamp, try_read_json
from qvera.utils.paths import cache_root

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

RECORD = "record.json"
PREFIX = "rows-"
_WORTH_BYTES = 256 * 1024
"""Local files smaller than this are tokenized in less than a second, which is not worth an entry."""
_NOT_OF_THE_ROWS = ("mixture", "weight", "shuffle", "prefix_once", "packing", "group_by_length", "tokenize_processes")
"""Keys of a source that decide how rows are used, not what they are.

Any other key, a new one too, makes another entry.
"""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def rows_root() -> Path:
    """Where the entries are."""
    return cache_root() / "rows"


def tokenized(section: DataSection, encoder: Encoder, console: Console | None) -> TokenizedSource:
    """The rows of one source: from the cache, or tokenized now (and cached, where that is worth it and possible).

    Raises:
        InputError: as `tokenize_source`; or a file of the source changed while it was read.
        RunFailed: the cache's disk is full.
    """
    root = rows_root()
    hashes = HashIndex(root / "hashes.json")
    key = _key_of(section, encoder.tokenizer, hashes)
    if key is None:
        return _without_entry(section, encoder, console)
    sha256 = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    failed = root / f".{sha256}.failed"
    lock = FileLock(root / f".{sha256}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        failed_before = _stamp(failed)
        try:
            lock.acquire(timeout=WAIT_SECONDS)
        except Timeout:
            _warn(console, f"{section.path}: waiting, another process tokenizes these rows.")
            lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        _warn(console, f"{root}: tokenized rows can't be cached there ({reason}); the next run tokenizes them again.")
        return _without_entry(section, encoder, console)
    try:
        target = root / f"{PREFIX}{sha256}"
        found = _open_entry(target, hashes, console)
        if found is not None:
            return found
        if _stamp(failed) not in (None, failed_before):  # while this process waited, and on the same content
            raise InputError(json.loads(failed.read_text(encoding="utf-8")))
        return _make_entry(section, encoder, key, target, failed, hashes, console)
    finally:
        lock.release()


def _without_entry(section: DataSection, encoder: Encoder, console: Console | None) -> TokenizedSource:
    """Rows without an entry: few of them in memory, others mapped from a file whose name is gone once it is mapped."""
    if _is_small(section):
        return tokenize_source(section, encoder, None, console)
    with (
        tempfile.TemporaryDirectory(prefix="qvera-rows-", ignore_cleanup_errors=True) as directory,
        disk_errors(directory, "Make room, or set TMPDIR to a directory on another disk."),
    ):
        return tokenize_source(section, encoder, Path(directory), console)


def _is_small(section: DataSection) -> bool:
    files = source_files(section)
    return files is not None and sum(file.stat().st_size for file in files) < _WORTH_BYTES


def _make_entry(
    section: DataSection,
    encoder: Encoder,
    key: dict[str, Any],
    target: Path,
    failed: Path,
    hashes: HashIndex,
    console: Console | None,
) -> TokenizedSource:
    """Tokenize the rows into the entry ``target``.

    What is wrong with the rows themselves is written to ``failed`` too.
    """
    root = target.parent
    unfinished = root / f"{UNFINISHED}{target.name.removeprefix(PREFIX)}"
    shutil.rmtree(unfinished, ignore_errors=True)
    ROWS.clear_removed()
    try:
        with disk_errors(str(root), "Make room, or set QVERA_CACHE to a directory on another disk."):
            failed.unlink(missing_ok=True)
            unfinished.mkdir()
            source = tokenize_source(section, encoder, unfinished, console)
            if source_content(section, hashes) != key["content"]:
                raise Unreadable(
                    f"{section.path}: was changed while it was read. Run the same command again when nothing writes to "
                    f"it."
                )
            sha256_of = _write_record(unfinished, key, section, source)
            unfinished.rename(target)  # what is mapped stays mapped
            flush(root)
            hashes.add({target / name: (file_stamp((target / name).stat()), sha) for name, sha in sha256_of.items()})
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, InputError) and not isinstance(error, Unreadable):
            with contextlib.suppress(OSError, InputError):  # the error that is raised is the one above
                # not the whole key, since a day may end meanwhile
                if source_content(section, hashes) == key["content"]:
                    replace_text(failed, json.dumps(str(error)))
        raise
    return source


def _key_of(section: DataSection, tokenizer: PreTrainedTokenizerBase, hashes: HashIndex) -> dict[str, Any] | None:
    """Everything that a source's rows are a function of, as JSON; None where they are not cached.

    That is the content (and the names, which messages show) of its files, the tokenizer's whole state, its template,
    the keys of the recipe, the code that tokenizes, and the day for templates that write it.
    """
    if _is_small(section):
        return None
    content, tokenizer_hash = source_content(section, hashes), tokenizer_sha256(tokenizer)
    if content is None or tokenizer_hash is None:
        return None
    keys = {k: v for k, v in section.to_dict().items() if k not in _NOT_OF_THE_ROWS}
    if not section.eval_fraction:
        del keys["seed"]  # it has chosen nothing here
    dated = "strftime_now" in json.dumps(tokenizer.chat_template)
    return {
        "format": 1,
        "content": content,
        "tokenizer": [type(tokenizer).__name__, tokenizer_hash],
        "keys": keys,
        "code": _code_sha256(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "day": datetime.date.today().isoformat() if dated else None,
    }


def _code_sha256() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _stamp(file: Path) -> list[int] | None:
    try:
        return file_stamp(file.stat())
    except FileNotFoundError:
        return None


def _write_record(
    directory: Path, key: dict[str, Any], section: DataSection, source: TokenizedSource
) -> dict[str, str]:
    """Write it, and return the tables' SHA-256 by name."""
    sha256_of = {}
    for file in sorted(directory.glob("*.arrow")):
        flush(file)
        sha256_of[file.name] = file_sha256(file)
    record = {
        "source": section.path,
        "key": key,
        "rows": {TRAIN: len(source.train), EVAL: len(source.eval)},
        "format": source.format,
        "unused": source.unused_columns,
        "template": source.template,
        "counts": dataclasses.asdict(source.counts),
        "files": {name: {"bytes": (directory / name).stat().st_size, "sha256": sha} for name, sha in sha256_of.items()},
    }
    replace_text(directory / RECORD, json.dumps(record, indent=1))
    return sha256_of


def _read_record(directory: Path) -> dict[str, Any] | None:
    return try_read_json(directory / RECORD)


def _open_entry(directory: Path, hashes: HashIndex, console: Console | None) -> TokenizedSource | None:
    """The entry if there is one and its files are as they were written; a damaged one is removed, with a warning."""
    if not directory.is_dir():
        return None
    problem = problem_of(directory, hashes)
    if problem is None:
        record = _read_record(directory)
        assert record is not None
        try:
            train, held_out = (_table(directory / f"{part}.arrow", record["rows"][part]) for part in (TRAIN, EVAL))
            looks = record["format"], record["unused"], record["template"], RowCounts(**record["counts"])
            return TokenizedSource(*looks, train, held_out, directory.name)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            problem = f"{directory}: can't be read ({' '.join(str(error).split())})"
    _warn(console, f"{problem}. The rows are tokenized again.")
    discard(directory)
    return None


def _table(file: Path, rows: int) -> RowTable:
    table = RowTable.open(file) if rows else RowTable()
    if len(table) != rows:
        raise ValueError(f"{file.name} has {len(table)} rows, its record says {rows}")
    return table


def problem_of(directory: Path, hashes: HashIndex | None = None) -> str | None:
    """What is wrong with an entry, or None.

    Args:
        hashes: the hashes of files that have not changed; None: all files are read again.
    """
    record = _read_record(directory)
    if record is None:
        return f"{directory / RECORD}: is missing or damaged"
    try:
        files = {directory / name: entry for name, entry in record["files"].items()}
        for file, entry in files.items():
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                return f"{file}: is missing or has another size than was written"
        if hashes is None:
            found = {file: file_sha256(file) for file in files}
        else:
            found = hashes.hashed(list(files), hashes.known(files), None)
        for file, entry in files.items():
            if found[file] != entry["sha256"]:
                return f"{file}: has other bytes than were written"
    except (KeyError, TypeError, AttributeError):
        return f"{directory / RECORD}: is damaged"
    return None


def _warn(console: Console | None, text: str) -> None:
    from rich.console import Console

    (console or Console(stderr=True)).print(text, style="yellow", markup=False)


ROWS = DiskCache("set of cached rows", rows_root, _read_record, problem_of, PREFIX)
