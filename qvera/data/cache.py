"""A cache of tokenized rows: a second run of the same recipe maps them instead of tokenizing again.

An entry (`qvera.utils.cache_dir`) is $QVERA_CACHE/rows/rows-KEY. KEY hashes everything that decides the rows. The entry
holds train.arrow, eval.arrow and record.json, which is written last. One rank of a node makes it and the others wait.
If the rows are wrong, that rank writes its error to .KEY.failed for them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from qvera.config import plugins
from qvera.config.sections import DataSection
from qvera.data.images import images_of
from qvera.data.labelled import ImageEncoder
from qvera.data.readers import EXTENSIONS, load_hub
from qvera.data.rows import Rows
from qvera.data.source import EVAL, TRAIN, TokenizedSource, source_files, source_paths, tokenize_source
from qvera.data.tokenization import Encoder, RowCounts
from qvera.utils.cache_dir import UNFINISHED, DiskCache, HashIndex, discard
from qvera.utils.errors import InputError
from qvera.utils.files import disk_errors, file_sha256, file_stamp, flush, replace_text, try_read_json
from qvera.utils.progress import Phase

RECORD = "record.json"
PREFIX = "rows-"
WORTH_BYTES = 256 * 1024
"""Smaller local files are tokenized in less than a second, so they get no entry."""
_NOT_OF_THE_ROWS = (
    *("mixture", "weight", "shuffle", "prefix_once", "packing", "group_by_length", "tokenize_processes"),
    *("max_row_characters", "augment", "adapter_column", "regression", "rows_per_label"),
)
"""These keys decide how rows are used, not what they are. Any other key, also a new one, makes another entry."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


def tokenized(
    section: DataSection, encoder: Encoder | ImageEncoder, show: Phase, cached: bool = True
) -> TokenizedSource:
    """Return the rows of one source from the cache; rows that it lacks are tokenized, and cached if possible.

    Args:
        cached: False: the rows are mapped from a temporary file that is deleted right away, and not cached.

    Raises:
        InputError: as `tokenize_source`; or a file of the source changed while it was read.
        RunFailed: the disk of the cache or of temporary files is full.
    """
    key = _key_of(section, encoder) if cached else None
    with contextlib.ExitStack() as stack:
        if key is not None:
            root, sha256 = ROWS.root, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
            failed, text = root / f".{sha256}.failed", f"{section.path}: waiting, another process tokenizes these rows."
            try:
                root.mkdir(parents=True, exist_ok=True)
                # Taken before the lock: an error of an earlier run does not count, only one from during the wait.
                failed_before = _stamp(failed)
                stack.enter_context(ROWS.locked(sha256, functools.cache(lambda: _warn(show, text))))  # said once
            except OSError as error:
                reason = f"{root}: tokenized rows can't be cached there ({error.strerror or error})"
                _warn(show, f"{reason}; the next run tokenizes them again.")
                key = None
        if key is None:
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="qvera-rows-", ignore_cleanup_errors=True)
            )
            stack.enter_context(disk_errors(directory, "Make room, or set TMPDIR to a directory on another disk."))
            return tokenize_source(section, encoder, Path(directory), show)
        # The lock is held now. If another process had it, its entry or its error is there.
        target = root / f"{PREFIX}{sha256}"
        if (found := _open_entry(target, show)) is not None:
            return found
        if _stamp(failed) not in (None, failed_before):  # written while this process waited
            raise InputError(failed.read_text(encoding="utf-8"))
        try:
            return _make_entry(section, encoder, key, target, show)
        except InputError as error:
            with contextlib.suppress(OSError):  # the error that is raised is the one above
                replace_text(failed, str(error))
            raise


def _stamp(file: Path) -> list[int] | None:
    return file_stamp(file.stat()) if file.exists() else None


def _make_entry(
    section: DataSection, encoder: Encoder | ImageEncoder, key: dict[str, Any], target: Path, show: Phase
) -> TokenizedSource:
    unfinished = target.with_name(f"{UNFINISHED}{target.name.removeprefix(PREFIX)}")
    shutil.rmtree(unfinished, ignore_errors=True)
    ROWS.clear_removed()
    with disk_errors(str(target.parent), "Make room, or set QVERA_CACHE to a directory on another disk."):
        unfinished.mkdir()
        try:
            source = tokenize_source(section, encoder, unfinished, show)
            # The key is older than the rows. Were a file changed between the two, the entry would have wrong rows for
            # ever.
            if source_content(section) != key["content"]:
                raise InputError(
                    f"{section.path}: was changed while it was read. Run the same command again when nothing writes to "
                    "it."
                )
            # Parquet or a hub dataset may name images too. Were one changed, the entry would not be of it.
            known = {str(Path(name).absolute()) for name, _ in key["content"]}
            if not known.issuperset(source.train.image_files + source.eval.image_files):
                return source  # what is mapped stays mapped
            files, hashes = {}, {}
            for file in sorted(unfinished.glob("*.arrow")):
                flush(file)
                stat, sha256 = file.stat(), file_sha256(file)
                files[file.name] = {"bytes": stat.st_size, "sha256": sha256}
                hashes[target / file.name] = file_stamp(stat), sha256
            # The record comes last and the directory is renamed when whole, so a kill leaves no entry that looks
            # finished.
            record = {
                "source": section.path,
                "key": key,
                "rows": {TRAIN: len(source.train), EVAL: len(source.eval)},
                "format": source.format,
                "unused": source.unused_columns,
                "template": source.template,
                "counts": dataclasses.asdict(source.counts),
                "adapters": source.adapters,
                "files": files,
            }
            replace_text(unfinished / RECORD, json.dumps(record, indent=1))
            unfinished.rename(target)  # what is mapped stays mapped
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        flush(target.parent)
        ROWS.hashes.add(hashes)
    return source


def _key_of(section: DataSection, encoder: Encoder | ImageEncoder) -> dict[str, Any] | None:
    """Everything that decides a source's rows, as JSON; None if they are not cached."""
    by_path = [source_files(section, path) for path, _ in source_paths(section)]
    files = [file for found in by_path for file in found or ()]
    # A hub dataset (None) has no files to add up here, so it always gets an entry.
    if None not in by_path and sum(file.stat().st_size for file in files) < WORTH_BYTES:
        return None
    suffixes = {file.suffix.lower() for file in files}
    names_images = section.format == "image" or images_of(encoder.tokenizer) is not None
    if names_images and suffixes.intersection(EXTENSIONS) - {".parquet"}:
        return None  # a text file names images: its content is not theirs
    content, tokenizer_hash = source_content(section), encoder.sha256()
    if content is None or tokenizer_hash is None:
        return None
    no_keys = {*_NOT_OF_THE_ROWS, *plugins.added_keys(section)}
    keys = {k: v for k, v in section.to_dict().items() if k not in no_keys} | {"owner_column": section.owner_column}
    if not section.eval_fraction:
        del keys["seed"]  # it has chosen nothing here
    return {
        "format": 1,
        "content": content,  # and the names of files, which messages show
        "tokenizer": [type(encoder.tokenizer).__name__, tokenizer_hash],
        "keys": keys,
        "code": code_sha256(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
    }


def source_content(section: DataSection) -> list[list[str]] | None:
    """Each file with its SHA-256, or each hub dataset with its fingerprint; None if a dataset has no fingerprint."""
    content: list[list[str]] = []
    for path, split in source_paths(section):
        files = source_files(section, path)
        if files is not None:
            sha256_of = ROWS.hashes.hashed(files, ROWS.hashes.known(files), None)
            content += [[str(file), sha256_of[file]] for file in files]
            continue
        dataset = load_hub(path, split, section.config_name, section.revision)
        if (fingerprint := getattr(dataset, "_fingerprint", None)) is None:
            return None
        content.append([path, str(fingerprint)])
    return content


def code_sha256() -> str:
    """A hash of the modules and templates that make rows."""
    digest = hashlib.sha256()
    room = Path(__file__).parent
    for file in sorted([*room.glob("*.py"), *room.glob("templates/*.jinja")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _open_entry(directory: Path, show: Phase) -> TokenizedSource | None:
    """Open a cache entry; None if there is none. A damaged entry is removed with a warning, and counts as none."""
    if not directory.is_dir():
        return None
    if problem := problem_of(directory, ROWS.hashes):
        _warn(show, f"{problem}. The rows are tokenized again.")
        discard(directory)
        return None
    record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    train, held_out = (
        Rows.open(directory / f"{part}.arrow") if record["rows"][part] else Rows() for part in (TRAIN, EVAL)
    )
    looks = record["format"], record["unused"], record["template"], RowCounts(**record["counts"])
    return TokenizedSource(*looks, train, held_out, record["adapters"], directory.name)


def problem_of(directory: Path, hashes: HashIndex | None = None) -> str | None:
    """Say what is wrong with an entry; None if it is whole. Without ``hashes``, unchanged files are read again too."""
    record = try_read_json(directory / RECORD)
    if record is None or not record.keys() >= {"files", "rows", "format", "unused", "template", "counts", "adapters"}:
        return f"{directory / RECORD}: is missing or damaged"
    for name, written in record["files"].items():
        file = directory / name
        if not file.is_file():
            return f"{file}: is missing"
        found = file_sha256(file) if hashes is None else hashes.hashed([file], hashes.known([file]), None)[file]
        if found != written["sha256"]:
            return f"{file}: has other bytes than were written"
    return None


def _warn(show: Phase, text: str) -> None:
    show.console.print(text, style="yellow", markup=False)


ROWS = DiskCache("set of cached rows", "rows", lambda entry: try_read_json(entry / RECORD), problem_of, PREFIX)
