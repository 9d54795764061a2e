"""Tokenized rows kept on disk: a second run of the same recipe maps them instead of reading, rendering and tokenizing again.

They are entries (`qvera.utils.cache_dir`) of $QVERA_CACHE/rows. A name is rows-IDENTITY, of everything the rows are a function of; in it
are train.arrow, eval.arrow and, last, record.json. The ranks of a node wait for the first of them; what that one found wrong with
the rows is in .IDENTITY.failed, for those that have waited. hashes.json has the sources and the tables.

`datasets`' own cache holds what comes from the hub, as Arrow files that are mapped too. Its cache of `Dataset.map` would not do
here: it wants one type for each column (rows of JSON often have none: tools, arguments), and names results by pickled code.
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
from qvera.data.encoding import Encoder
from qvera.data.readers import Unreadable, source_content, source_files
from qvera.data.row_selection import EVAL, TRAIN
from qvera.data.row_tables import RowTable, RowWriter
from qvera.data.tokenization import Counts
from qvera.data.tokenize_parallel import state_sha256, tokenizer_state
from qvera.data.tokenize_source import Made, make
from qvera.utils.atomic import disk_errors, flush, replace_text
from qvera.utils.cache_dir import UNFINISHED, WAIT_SECONDS, DiskCache, HashIndex, discard
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256, file_stamp
from qvera.utils.paths import cache_root

if TYPE_CHECKING:
    from rich.console import Console

RECORD = "record.json"
PREFIX = "rows-"
_WORTH_BYTES = 256 * 1024
"""Local files smaller than this are tokenized in less than a second, which is not worth an entry."""
_NOT_OF_THE_ROWS = ("mixture", "weight", "shuffle", "prefix_once", "packing", "group_by_length", "tokenize_processes")
"""Keys of a source that decide what is made of the rows, not what they are. Any other key, a new one too, makes another entry."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def rows_root() -> Path:
    """Where the entries are."""
    return cache_root() / "rows"


def tokenized(section: DataSection, encoder: Encoder, console: Console | None) -> Made:
    """The rows of one source: found in the cache, or made now (and kept, where they are worth it and can be told apart).

    Raises:
        InputError: as `making.make`; or a file of the source changed while it was read.
        RunFailed: the cache's disk is full.
    """
    hashes = HashIndex(rows_root() / "hashes.json")
    key = key_of(section, encoder.tokenizer, hashes)
    if key is None:
        return _unkept(section, encoder, console)
    identity = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    root = rows_root()
    failed = root / f".{identity}.failed"
    try:
        root.mkdir(parents=True, exist_ok=True)
        failed_before = _stamp(failed)
        lock = FileLock(root / f".{identity}.lock")
        _wait_for(lock, section, console)
    except OSError as error:
        _say(
            console,
            f"{root}: tokenized rows can't be kept there ({error.strerror or error}); the next run makes them again.",
        )
        return _unkept(section, encoder, console)
    try:
        target = root / f"{PREFIX}{identity}"
        found = _open(target, hashes, console)
        if found is not None:
            return found
        if _stamp(failed) not in (None, failed_before):  # while this process waited, and on the same content
            raise InputError(json.loads(failed.read_text(encoding="utf-8")))
        return _keep(section, encoder, key, target, failed, hashes, console)
    finally:
        lock.release()


def _unkept(section: DataSection, encoder: Encoder, console: Console | None) -> Made:
    """Rows without an entry: few of them in memory, others mapped from a file whose name is gone as soon as they are."""
    if _is_small(source_files(section)):
        return make(section, encoder, None, console)
    with (
        tempfile.TemporaryDirectory(prefix="qvera-rows-", ignore_cleanup_errors=True) as directory,
        disk_errors(directory, "Make room, or set TMPDIR to a directory on another disk."),
    ):
        return make(section, encoder, Path(directory), console)


def _is_small(files: list[Path] | None) -> bool:
    return files is not None and sum(file.stat().st_size for file in files) < _WORTH_BYTES


def _keep(
    section: DataSection,
    encoder: Encoder,
    key: dict[str, Any],
    target: Path,
    failed: Path,
    hashes: HashIndex,
    console: Console | None,
) -> Made:
    """Make the rows and the entry ``target`` of them; what is wrong with the rows themselves is written to ``failed`` too."""
    root = target.parent
    unfinished = root / f"{UNFINISHED}{target.name.removeprefix(PREFIX)}"
    shutil.rmtree(unfinished, ignore_errors=True)
    ROWS.clear_removed()
    try:
        with disk_errors(str(root), "Make room, or set QVERA_CACHE to a directory on another disk."):
            failed.unlink(missing_ok=True)
            unfinished.mkdir()
            made = make(section, encoder, unfinished, console)
            if not _is_unchanged(section, key, hashes):
                raise Unreadable(
                    f"{section.path}: was changed while it was read. Run the same command again when it is at rest."
                )
            sums = _write_record(unfinished, key, section, made)
            unfinished.rename(target)  # what is mapped stays mapped
            flush(root)
            hashes.add({target / name: (file_stamp((target / name).stat()), sha) for name, sha in sums.items()})
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, InputError) and not isinstance(error, Unreadable):
            with contextlib.suppress(OSError, InputError):  # the error that is raised is the one above
                if _is_unchanged(section, key, hashes):
                    replace_text(failed, json.dumps(str(error)))
        raise
    return made


def key_of(section: DataSection, tokenizer: Any, hashes: HashIndex) -> dict[str, Any] | None:
    """Everything that a source's rows are a function of, as JSON; None where they are not kept.

    That is the content (and the names, which messages show) of its files, the tokenizer's whole state, its template, the keys of
    the recipe, the code that makes rows of them, and the day for templates that write it.
    """
    files = source_files(section)
    if _is_small(files):
        return None
    content = source_content(section, files, hashes)
    state = tokenizer_state(tokenizer)
    if content is None or state is None:
        return None
    keys = {k: v for k, v in section.to_dict().items() if k not in _NOT_OF_THE_ROWS}
    if not section.eval_fraction:
        del keys["seed"]  # it has chosen nothing here
    dated = "strftime_now" in json.dumps(state["chat_template"])
    return {
        "format": 1,
        "content": content,
        "tokenizer": [type(tokenizer).__name__, state_sha256(state)],
        "keys": keys,
        "code": _code_sha256(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "day": datetime.date.today().isoformat() if dated else None,
    }


def _is_unchanged(section: DataSection, key: dict[str, Any], hashes: HashIndex) -> bool:
    """Whether the source holds what it held for ``key``; not the whole key, since a day may end while rows are made."""
    return bool(source_content(section, source_files(section), hashes) == key["content"])


def _wait_for(lock: FileLock, section: DataSection, console: Console | None) -> None:
    """Take the lock; where another process keeps it for a while, that is said."""
    try:
        lock.acquire(timeout=WAIT_SECONDS)
    except Timeout:
        _say(console, f"{section.path}: waiting, another process tokenizes these rows.")
        lock.acquire()


def _stamp(file: Path) -> list[int] | None:
    try:
        return file_stamp(file.stat())
    except FileNotFoundError:
        return None


def _code_sha256() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _write_record(directory: Path, key: dict[str, Any], section: DataSection, made: Made) -> dict[str, str]:
    """Write it, and return the tables' SHA-256 by name."""
    sums = {}
    for file in sorted(directory.glob("*.arrow")):
        flush(file)
        sums[file.name] = file_sha256(file)
    record = {
        "source": section.path,
        "key": key,
        "rows": {TRAIN: len(made.train), EVAL: len(made.eval)},
        "format": made.format,
        "unused": made.unused,
        "template": made.template,
        "counts": dataclasses.asdict(made.counts),
        "files": {name: {"bytes": (directory / name).stat().st_size, "sha256": sha} for name, sha in sums.items()},
    }
    replace_text(directory / RECORD, json.dumps(record, indent=1))
    return sums


def _open(directory: Path, hashes: HashIndex, console: Console | None) -> Made | None:
    """The entry if there is one and it is as it was written; one that is not is removed, and that is said."""
    if not directory.is_dir():
        return None
    problem = problem_of(directory, hashes)
    if problem is None:
        record = _read_record(directory)
        assert record is not None
        try:
            tables = {part: _table(directory / f"{part}.arrow", record["rows"][part]) for part in (TRAIN, EVAL)}
            counts = Counts(**record["counts"])
            return Made(
                record["format"], record["unused"], record["template"], counts, tables[TRAIN], tables[EVAL], directory.name
            )  # fmt: skip
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            problem = f"{directory}: can't be read ({' '.join(str(error).split())})"
    _say(console, f"{problem}. The rows are tokenized again.")
    discard(directory)
    return None


def _table(file: Path, rows: int) -> RowTable:
    table = RowTable(file) if rows else RowWriter(None).close()
    if len(table) != rows:
        raise ValueError(f"{file.name} has {len(table)} rows, its record says {rows}")
    return table


def problem_of(directory: Path, hashes: HashIndex | None = None) -> str | None:
    """What is wrong with an entry, or None.

    Args:
        hashes: where the hashes of files that have not changed since are known; None: all are taken again.
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


def _read_record(directory: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _say(console: Console | None, text: str) -> None:
    from rich.console import Console

    (console or Console(stderr=True)).print(text, style="yellow", markup=False)


ROWS = DiskCache(("kept rows", "kept rows"), rows_root, _read_record, problem_of, PREFIX)
