"""The cache on disk: directories that are found again by content, and the hashes of files.

It serves quantized bases (`qvera.models.quantize_checkpoint`) and tokenized rows (`qvera.data.cache`):

  NAME/                    a finished entry
  .unfinished-KEY/         one that is being made, or was killed
  .KEY.lock                held by the process that makes it; the kernel drops it when the process dies
  .removed-NAME/           one that is being deleted
  hashes.json              file → SHA-256, valid while size, mtime_ns and inode stay the same
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qvera.utils.errors import InputError
from qvera.utils.files import cache_root, file_sha256, file_stamp, replace_text, try_read_json

StageProgress = Callable[[str, int, int, str], None]
"""Called with (stage, bytes done, bytes in all, what). Stages are hashing, quantizing and waiting."""
WAIT_SECONDS = 0.5
UNFINISHED = ".unfinished-"


@dataclasses.dataclass(frozen=True)
class DiskCache:
    """A cache of one kind of directories.

    Attributes:
        what: the word for an entry in messages.
        record_of: reads an entry's record; None where it can't be read.
        problem_of: reads all bytes of a finished entry and says what is wrong; None: nothing.
        prefix: a finished entry is called PREFIXKEY; None: its name has no key.
    """

    what: str
    folder: str
    record_of: Callable[[Path], dict[str, Any] | None]
    problem_of: Callable[[Path], str | None]
    prefix: str | None = None

    @property
    def root(self) -> Path:
        """The directory of all entries, computed each time, because QVERA_CACHE may change."""
        return cache_root() / self.folder

    @property
    def hashes(self) -> HashIndex:
        """Hashes of the files that the entries were made from."""
        return HashIndex(self.root / "hashes.json")

    def listed(self) -> list[CacheEntry]:
        """All entries, finished or not, by name."""
        root = self.root
        return [
            CacheEntry(path.name, path, size_bytes(path), self.record_of(path), self)
            for path in (sorted(root.iterdir()) if root.is_dir() else [])
            if path.is_dir() and (path.name.startswith(UNFINISHED) or not path.name.startswith("."))
        ]

    def remove(self, name: str) -> int:
        """Delete an entry by name or a unique beginning of it; returns its bytes. InputError: not found, or in use."""
        entries = self.listed()
        found = [e for e in entries if e.name == name] or [e for e in entries if name and e.name.startswith(name)]
        if len(found) != 1:
            what = f"{'more than one' if found else 'no'} {self.what} of that name"
            raise InputError(f"{name!r}: {what} in {self.root}. `qvera cache ls` shows the names.")
        (entry,) = found
        self.clear_removed()
        lock: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.prefix is not None or entry.name.startswith(UNFINISHED):  # else no lock is of its name
            key = entry.name.removeprefix(UNFINISHED).removeprefix(self.prefix or "")
            lock = FileLock(self.root / f".{key}.lock", timeout=0)
        try:
            with lock:
                discard(entry.directory)
        except Timeout:
            raise InputError(f"{entry.name}: is being made or opened by another process right now.") from None
        return entry.size_bytes

    @contextlib.contextmanager
    def locked(self, key: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the lock of ``key``; call ``waiting`` now and then while another process has it."""
        lock = FileLock(self.root / f".{key}.lock")
        while not lock.is_locked:
            try:
                lock.acquire(timeout=WAIT_SECONDS)
            except Timeout:
                if waiting is not None:
                    waiting()
        try:
            yield
        finally:
            lock.release()

    def clear_removed(self) -> None:
        """Finish deletions that were killed."""
        for leftover in self.root.glob(".removed-*"):
            shutil.rmtree(leftover, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """A directory of the cache."""

    name: str
    directory: Path
    size_bytes: int
    record: dict[str, Any] | None
    """None: unfinished, or its record is damaged."""
    kind: DiskCache

    @property
    def finished(self) -> bool:
        """Whether all of it is there, with a readable record."""
        return not self.name.startswith(UNFINISHED) and self.record is not None


def size_bytes(directory: Path) -> int:
    """Bytes of the files in a directory, which another process may be changing."""
    size = 0
    for file in directory.glob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            size += file.stat().st_size
    return size


def discard(directory: Path) -> None:
    """Rename a directory out of sight, then delete it; a process that has mapped it keeps its pages."""
    gone = directory.with_name(f".removed-{directory.name.lstrip('.')}")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # another process was quicker
        # A rename takes the name away at once. A delete that is killed would leave half an entry under it.
        directory.rename(gone)
        shutil.rmtree(gone)


class HashIndex:
    """SHA-256 of files by path, valid while size, mtime_ns and inode stay the same."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def known(self, files: Iterable[Path]) -> dict[Path, str]:
        """Map those of the files that the index has to their SHA-256."""
        document = try_read_json(self._path) or {}  # a damaged index loses nothing but time
        found: dict[Path, str] = {}
        for file in files:
            entry = document.get(str(file.resolve()))
            if isinstance(entry, dict) and file.is_file() and entry.get("stat") == file_stamp(file.stat()):
                found[file] = entry["sha256"]
        return found

    def add(self, entries: dict[Path, tuple[list[int], str]]) -> None:
        """Remember file → (`file_stamp` from before it was read, SHA-256); forget files that are gone."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock")):
                known = try_read_json(self._path) or {}
                document = {name: entry for name, entry in known.items() if Path(name).is_file()}
                document |= {str(f.resolve()): {"stat": stat, "sha256": sha} for f, (stat, sha) in entries.items()}
                replace_text(self._path, json.dumps(document, indent=1))
        except OSError:
            return  # a cache that can't be written: the next use hashes again

    def hashed(self, files: list[Path], known: dict[Path, str], progress: StageProgress | None) -> dict[Path, str]:
        """Map all ``files`` to their SHA-256. Those that are not in ``known`` are hashed now and remembered."""
        total = sum(file.stat().st_size for file in files)
        done, found, new = 0, dict(known), {}
        for file in files:
            if progress is not None:
                progress("hashing", done, total, file.name)
            if file not in found:
                # The stamp is from before the hash: a file that changes meanwhile then fits no entry.
                stat = file_stamp(file.stat())
                found[file] = file_sha256(file)
                new[file] = (stat, found[file])
            done += file.stat().st_size
        if new:
            self.add(new)
        return found
