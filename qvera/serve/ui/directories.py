"""Finds the runs in the named directories, and says which of their files may be read."""

import contextlib
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qvera.evaluation.report.read import RUN_FILES
from qvera.utils.errors import InputError
from qvera.utils.files import no_directory

MOST_DEPTH = 3  # levels at which runs are looked for
MOST_RUNS = 2_000
MOST_DIRECTORIES = 20_000
_SCAN_SECONDS = 1.0  # what was found is kept this long, for all readers

READ_BYTES = {"recipe.yaml": 256 << 10, "run.json": 64 << 20, "eval.json": 64 << 20}
"""Files that are read as a whole, with their largest sizes in bytes. metrics.jsonl has no limit."""


class RunDirectories:
    """The runs in some directories. A run's id is its path below them, with slashes.

    An id is looked up among the found runs and never made into a path, and links are not followed. So no request
    reaches anything outside of the directories. Raises InputError if a place is no directory.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self._roots: dict[str, Path] = {}
        for place in places:
            if not place.is_dir():
                raise InputError(f"{no_directory(place)} Give a directory that holds runs, or the directory of a run.")
            root = place.resolve()
            if root in self._roots.values():
                continue
            # the runs below a single place need no part of their id for the place
            alone = len(places) == 1 and not _holds_run(os.listdir(root))
            name, number = "" if alone else root.name or "runs", 1
            while name in self._roots:
                number += 1
                name = f"{root.name}-{number}"
            self._roots[name] = root
        self._lock = threading.Lock()
        self._found: dict[str, Path] = {}
        self._scanned_at: float | None = None
        self.is_cut = False  # there are more runs or directories than are looked at

    def find(self) -> dict[str, Path]:
        """Id → directory of every run."""
        with self._lock:
            if self._scanned_at is None or time.monotonic() - self._scanned_at > _SCAN_SECONDS:
                self.is_cut = False
                self._found = dict(self._walk())
                self._scanned_at = time.monotonic()
            return self._found

    def get(self, id: str) -> Path | None:
        """The directory of a run; None if there is no such run, or no longer."""
        directory = self.find().get(id)
        return directory if directory is not None and directory.is_dir() else None

    def _walk(self) -> Iterator[tuple[str, Path]]:
        looked_at = runs = 0
        waiting = [(name, root, 0) for name, root in self._roots.items()]
        while waiting:
            id, directory, depth = waiting.pop()
            if runs == MOST_RUNS or looked_at == MOST_DIRECTORIES:
                self.is_cut = True
                return
            looked_at += 1
            try:
                with os.scandir(directory) as listing:
                    entries = list(listing)
                if _holds_run([entry.name for entry in entries]):
                    runs += 1
                    yield id or directory.name, directory
                    continue
                below = [entry.name for entry in entries if depth < MOST_DEPTH and _is_plain_directory(entry)]
            except OSError:  # it was deleted, or may not be read
                continue
            waiting += [(f"{id}/{name}" if id else name, directory / name, depth + 1) for name in sorted(below)[::-1]]


def _holds_run(names: Sequence[str]) -> bool:
    return any(name in names for name in RUN_FILES)


def _is_plain_directory(entry: os.DirEntry[str]) -> bool:
    """Whether it is a directory and no link, not hidden, and has a name that fits into a URL."""
    return not entry.name.startswith(".") and entry.name.isprintable() and entry.is_dir(follow_symlinks=False)


def unreadable(directory: Path, *names: str) -> list[str]:
    """A sentence for each file that is a link, no file, or too large. Missing ones are fine."""
    found = []
    for name in names:
        place = directory
        for part in Path(name).parts:
            place /= part
            try:
                facts = place.lstat()
            except OSError:
                break
            is_last = place == directory / name
            most_bytes = READ_BYTES.get(place.name)
            if stat.S_ISLNK(facts.st_mode):
                found.append(f"{place.relative_to(directory)} is a link; links are not followed.")
                break
            if is_last and not stat.S_ISREG(facts.st_mode):
                found.append(f"{name} is no regular file.")
            elif is_last and most_bytes is not None and facts.st_size > most_bytes:
                found.append(f"{name} has {facts.st_size:,} bytes; at most {most_bytes:,} are read.")
    return found


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[int | None]:
    """A descriptor of a regular file, until the block ends; None for a link, or anything else."""
    # O_NONBLOCK: to open a pipe would else wait for somebody to write into it
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        yield descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)
