"""Quantized bases, made once and found again by content.

$QVERA_CACHE/bases/
  nf4-IDENTITY/            a finished copy; IDENTITY is of config, shards and settings (`prequantize.content_identity`)
  .unfinished-KEY/         one that is being made, or was killed; KEY is of source path, sizes, times, settings, device
  .KEY.lock                held by the process that makes it; the kernel drops it when the process dies
  hashes.json              file → SHA-256, believed while the file's size, mtime_ns and inode are the same
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from . import prequantize
from .errors import InputError
from .locations import base_directory, cache_root
from .prequantize import NotPlain, Source
from .recipe import ModelSection
from .stored import file_sha256, file_stamp
from .unfinished import flush, replace_text

__all__ = ["NotPlain", "cached_base", "find_base", "listed", "quantized_copy", "remove", "uses_cache"]

Progress = Callable[[str, int, int, str], None]
"""Called with (stage, bytes done, bytes in all, what); stage is hashing, quantizing or waiting."""
WAIT_SECONDS = 0.5
_UNFINISHED = ".unfinished-"


def bases_root() -> Path:
    """Where the quantized copies are."""
    return cache_root() / "bases"


def uses_cache(section: ModelSection) -> bool:
    """Whether a quantized copy is what this section should load: 4 bits are asked for, and the source is not stored quantized.

    `cached_base` can still raise `NotPlain`; such a checkpoint is quantized while it is loaded.

    Raises:
        InputError: there is no such model.
    """
    if section.quantization not in ("nf4", "fp4"):
        return False
    return prequantize.read_config(base_directory(section)).get("quantization_config") is None


def cached_base(
    section: ModelSection,
    *,
    device: torch.device | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The directory of the quantized copy of ``section.path``, made on first use.

    Processes that want the same one at the same time: one makes it, the others wait. A copy that is found damaged is made
    again.

    Args:
        device: where to quantize (default CPU).
        verify: hash source and copy again, instead of believing sizes and times.

    Raises:
        NotPlain: transformers renames or fuses this checkpoint's tensors while loading.
        InputError: no such model, a shard is missing or damaged, or the cache can't be written.
        RunFailed: a weight has NaN or Inf, or the disk is full; finished shards are kept.
    """
    directory = base_directory(section)
    if not verify and (found := find_base(section, directory)) is not None:
        return found  # without a look at the model
    source = prequantize.read_source(section, directory)
    root = bases_root()
    hashes = HashIndex(root / "hashes.json")
    key = _key(source, section, device)
    unfinished = root / f"{_UNFINISHED}{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{root}: the cache can't be written ({error.strerror}). Set QVERA_CACHE to a directory that can."
        ) from None
    lock = FileLock(root / f".{key}.lock")
    _wait_for(lock, unfinished, prequantize.output_bytes(source, section), progress)
    try:
        known = {} if verify else hashes.known(source.files)
        if verify or (len(known) < len(source.files) and _similar(source, section)):
            known = hashes.hashed(source.files, known, progress)
        if len(known) == len(source.files):
            target = root / _name(section, _identity(source, section, known))
            if target.exists() and prequantize.problem_of(target, verify=verify) is None:
                return target
        for leftover in root.glob(".removed-*"):  # a removal that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        record = _complete(unfinished)  # killed between its last byte and its name
        if record is None and unfinished.is_dir() and not any(unfinished.glob(".qvera_*")):
            _discard(unfinished)  # it was complete once, and was damaged since: nothing to go on from
        if record is None:
            record = prequantize.quantize_checkpoint(
                section, source, unfinished, known=known, device=device, progress=_staged(progress, "quantizing")
            )
        hashes.remember(source, record)
        return _publish(unfinished, root / _name(section, record["identity"]))
    finally:
        lock.release()


def find_base(section: ModelSection, directory: Path | None = None) -> Path | None:
    """The finished copy for this section if there is one, by what is known of the source's files; nothing is made or hashed."""
    directory = directory or base_directory(section)
    root = bases_root()
    if not (root / "hashes.json").is_file():
        return None
    files = prequantize.shard_files(directory)
    known = HashIndex(root / "hashes.json").known(files)
    if not files or len(known) < len(files) or not (directory / "config.json").is_file():
        return None
    config = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    names = {file.name: digest for file, digest in known.items()}
    identity = prequantize.content_identity(config, names, prequantize.settings_of(section))
    target = root / _name(section, identity)
    return target if prequantize.problem_of(target) is None else None


def quantized_copy(
    section: ModelSection,
    out: Path,
    *,
    device: torch.device | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the quantized copy to ``out`` (or go on with it, or find it finished there) and return its record.

    Raises:
        InputError: ``out`` holds something else; else as `cached_base`.
    """
    source = prequantize.read_source(section, base_directory(section))
    hashes = HashIndex(bases_root() / "hashes.json")
    known = {} if verify else hashes.known(source.files)
    record = prequantize.read_record(out)
    if record is not None:
        if record["settings"] != prequantize.settings_of(section):
            raise InputError(f"{out}: is quantized with other settings ({record['settings']}). Name another directory.")
        known = hashes.hashed(source.files, known, progress)
        if record["identity"] != _identity(source, section, known):
            raise InputError(f"{out}: is the quantized copy of another checkpoint. Name another directory.")
        if (problem := prequantize.problem_of(out, verify=verify)) is not None:
            raise InputError(f"{problem}. Delete {out} and run again.")
        return record
    record = prequantize.quantize_checkpoint(
        section, source, out, known=known, device=device, progress=_staged(progress, "quantizing")
    )
    hashes.remember(source, record)
    return record


class HashIndex:
    """SHA-256 of files by path, believed as long as size, mtime_ns and inode are what they were."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _read(self) -> dict[str, Any]:
        try:
            document = json.loads(self._path.read_text(encoding="utf-8"))
            return document if isinstance(document, dict) else {}
        except (OSError, ValueError):
            return {}  # nothing is lost but time

    def known(self, files: Iterable[Path]) -> dict[Path, str]:
        """File → SHA-256, of those that are known."""
        document = self._read()
        found: dict[Path, str] = {}
        for file in files:
            entry = document.get(str(file.resolve()))
            if isinstance(entry, dict) and file.is_file() and entry.get("stat") == file_stamp(file.stat()):
                found[file] = entry["sha256"]
        return found

    def add(self, entries: dict[Path, tuple[list[int], str]]) -> None:
        """Remember file → (what `file_stamp` said before its content was read, SHA-256); files that are gone are dropped."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock")):
                document = {name: entry for name, entry in self._read().items() if Path(name).is_file()}
                document |= {str(f.resolve()): {"stat": stat, "sha256": sha} for f, (stat, sha) in entries.items()}
                replace_text(self._path, json.dumps(document, indent=1))
        except OSError:
            return  # a cache that can't be written: the next use hashes again

    def hashed(self, files: list[Path], known: dict[Path, str], progress: Progress | None) -> dict[Path, str]:
        """All of ``files``: what is not in ``known`` is read and hashed now, and remembered."""
        total = sum(file.stat().st_size for file in files)
        done, found, new = 0, dict(known), {}
        for file in files:
            if progress is not None:
                progress("hashing", done, total, file.name)
            if file not in found:
                stat = file_stamp(file.stat())
                found[file] = file_sha256(file)
                new[file] = (stat, found[file])
            done += file.stat().st_size
        if new:
            self.add(new)
        return found

    def remember(self, source: Source, record: dict[str, Any]) -> None:
        """The hashes that came out of quantizing; `quantize_checkpoint` has made sure that the files had not changed."""
        recorded = record["source"]["files"]
        self.add({file: (file_stamp(file.stat()), recorded[file.name]["sha256"]) for file in source.files})


def _identity(source: Source, section: ModelSection, known: dict[Path, str]) -> str:
    names = {file.name: digest for file, digest in known.items()}
    return prequantize.content_identity(source.config_sha256, names, prequantize.settings_of(section))


def _name(section: ModelSection, identity: str) -> str:
    return f"{section.quantization}-{identity[:24]}"


def _key(source: Source, section: ModelSection, device: torch.device | None) -> str:
    where = device.type if device is not None else "cpu"
    parts = [
        str(source.directory.resolve()),
        source.file_identity(),
        source.config_sha256,
        where,
        prequantize.SHARD_BYTES,
    ]
    text = json.dumps([parts, prequantize.settings_of(section)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _similar(source: Source, section: ModelSection) -> bool:
    """Whether a finished copy was made from files of these names and sizes: then it pays to hash before quantizing."""
    sizes = {file.name: file.stat().st_size for file in source.files}
    for found in listed():
        record = found.record
        if record is not None and record["settings"] == prequantize.settings_of(section):
            if {name: value["bytes"] for name, value in record["source"]["files"].items()} == sizes:
                return True
    return False


def _staged(progress: Progress | None, stage: str) -> prequantize.Progress | None:
    if progress is None:
        return None
    return lambda done, total, what: progress(stage, done, total, what)


def _wait_for(lock: FileLock, unfinished: Path, total: int, progress: Progress | None) -> None:
    """Take the lock; while another process has it, show how far that one is."""
    while True:
        try:
            lock.acquire(timeout=0 if progress is None else WAIT_SECONDS)
            return
        except Timeout:
            if progress is None:
                lock.acquire()
                return
            progress("waiting", min(_size_bytes(unfinished), total), total, "another process quantizes this model")


def _size_bytes(directory: Path) -> int:
    size = 0
    for file in directory.glob("*") if directory.is_dir() else ():
        try:
            size += file.stat().st_size
        except OSError:
            continue  # renamed meanwhile
    return size


def _complete(unfinished: Path) -> dict[str, Any] | None:
    """The record of a copy that is whole but for its place, or None."""
    if prequantize.problem_of(unfinished, verify=True) is not None or any(unfinished.glob(".qvera_*.json")):
        return None
    return prequantize.read_record(unfinished)


def _publish(made: Path, target: Path) -> Path:
    """Give a finished copy its name; where another process was quicker, its copy is as good."""
    if target.exists():
        if prequantize.problem_of(target) is None and prequantize.problem_of(target, verify=True) is None:
            shutil.rmtree(made)
            return target
        _discard(target)
    try:
        made.rename(target)
    except OSError:
        if prequantize.problem_of(target) is not None:
            raise
        shutil.rmtree(made)
    flush(target.parent)
    return target


def _discard(directory: Path) -> None:
    """Out of sight at once, then gone; a process that has it mapped keeps its pages."""
    gone = directory.with_name(f".removed-{directory.name.lstrip('.')}")
    shutil.rmtree(gone, ignore_errors=True)
    directory.rename(gone)
    shutil.rmtree(gone)


@dataclasses.dataclass
class Listed:
    """One directory of the cache."""

    name: str
    directory: Path
    size_bytes: int
    record: dict[str, Any] | None
    """None: unfinished, or its record is damaged."""

    @property
    def finished(self) -> bool:
        return not self.name.startswith(_UNFINISHED) and self.record is not None


def listed() -> list[Listed]:
    """All quantized copies in the cache, finished or not, by name."""
    root = bases_root()
    found = []
    for directory in sorted(root.iterdir()) if root.is_dir() else []:
        if not directory.is_dir() or (directory.name.startswith(".") and not directory.name.startswith(_UNFINISHED)):
            continue
        found.append(Listed(directory.name, directory, _size_bytes(directory), prequantize.read_record(directory)))
    return found


def remove(name: str) -> int:
    """Delete one copy by its name (or the unique beginning of it); returns its bytes.

    Raises:
        InputError: there is none, or more than one, or it is being made right now.
    """
    if re.search(r"[/\\]", name):
        raise InputError(f"{name!r}: is not a name. `qvera cache ls` shows the names.")
    entries = listed()
    found = [e for e in entries if e.name == name] or [e for e in entries if name and e.name.startswith(name)]
    if len(found) != 1:
        what = "no quantized base" if not found else f"{len(found)} quantized bases"
        raise InputError(f"{name}: {what} of that name in {bases_root()}. `qvera cache ls` shows the names.")
    (entry,) = found
    if entry.name.startswith(_UNFINISHED):
        lock = FileLock(bases_root() / f".{entry.name.removeprefix(_UNFINISHED)}.lock", timeout=0)
        try:
            with lock:
                _discard(entry.directory)
        except Timeout:
            raise InputError(f"{entry.name}: is being made by another process right now.") from None
    else:
        _discard(entry.directory)
    return entry.size_bytes
