"""A training directory: the database, the uploaded files, and the states of jobs that are not done.

    fine_tuning.sqlite              files, jobs, events
    files/FILE_ID.jsonl             an uploaded file, or a job's results; a hidden one is being written
    states/JOB_ID.safetensors       what a job goes on from
    .qvera_run.lock                 held by the server that uses it

A file stands in the database once it is whole and on disk. What does not stand there was cut off, and is removed when
the directory is opened.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qvera.data.readers import EXTENSIONS
from qvera.serve.fine_tuning.database import Database
from qvera.serve.fine_tuning.records import BEFORE, RESULTS, TRAINED, Event, StoredFile, new_id, now
from qvera.training.run_dir import run_lock
from qvera.utils.atomic import disk_errors, flush, replace_text
from qvera.utils.errors import InputError

DATABASE = "fine_tuning.sqlite"
_PARTS = ("files", "states")
_MESSAGE_CHARACTERS = 2000
"""Of an error: a message may list all columns of a file."""
_KEPT = "Nothing of this file was kept."


class TrainingDirectory:
    """An open one; made by `open`."""

    def __init__(self, path: Path, database: Database) -> None:
        self.path, self.database = path, database
        self.files, self.states = (path / name for name in _PARTS)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[TrainingDirectory]:
        """Take a directory, which is made where there is none, for this process.

        Raises:
            InputError: another server uses it, it has files of something else, its database can't be read, or nothing
                can be written there.
        """
        path = path.absolute()  # a message about it has no word that another text may have
        with run_lock(path, socket.gethostname(), what="--training-dir"):
            _require_own(path)
            database = Database.open(path / DATABASE)
            with contextlib.closing(database):
                directory = cls(path, database)
                try:
                    for each in (directory.files, directory.states):
                        each.mkdir(exist_ok=True)
                    directory._remove_leftovers()
                except OSError as error:
                    raise InputError(
                        f"{path}: can't be written ({error.strerror or error}). Choose another --training-dir."
                    ) from None
                yield directory

    def _remove_leftovers(self) -> None:
        known = {f"{file_id}{suffix}" for file_id, suffix in self.database.all_files().items()}
        states = {self.state(job.id).name for job in self.database.open_jobs()}
        for directory, keep in ((self.files, known), (self.states, states)):
            for file in directory.iterdir():
                if file.name not in keep:
                    file.unlink()

    def place(self, file: StoredFile) -> Path:
        """Where a file lies."""
        return self.files / f"{file.id}{file.suffix}"

    def state(self, job_id: str) -> Path:
        """What a job goes on from; there is none before it is saved first."""
        return self.states / f"{job_id}.safetensors"

    def without_places(self, text: str) -> str:
        """A message for a job's owner, who need not know where this directory is."""
        return text.replace(f"{self.path}/", "")

    def remove_file(self, file: StoredFile) -> None:
        """Delete the bytes of a file that the database has forgotten."""
        self.place(file).unlink(missing_ok=True)

    def fail(self, job_id: str, code: str, message: str, param: str | None = None) -> None:
        """End a job that can't go on, and delete its state. One that was cancelled or paused meanwhile stays so.

        Args:
            code: OpenAI's word for it.
            message: for its owner.
            param: the key of its body that it is about.

        Raises:
            RunFailed: the disk is full.
        """
        if len(message) > _MESSAGE_CHARACTERS:
            message = f"{message[:_MESSAGE_CHARACTERS]}…"
        error = {"code": code, "message": message, "param": param}
        event = Event(job_id, message, level="error")
        if self.database.move(job_id, (*BEFORE, *TRAINED), "failed", event, error=error, finished=now()):
            self.state(job_id).unlink(missing_ok=True)

    def write_results(self, owner: str, name: str, text: str) -> StoredFile:
        """Write a job's results; the caller puts the file into the database.

        Raises:
            RunFailed: the disk is full.
        """
        file = StoredFile(new_id("file"), owner, name, ".csv", RESULTS, len(text.encode()))
        with disk_errors(name, _KEPT):
            replace_text(self.place(file), text)
        return file


def _require_own(path: Path) -> None:
    """Refuse files beside no database: they would be taken for what was cut off, and removed."""
    for part in [] if (path / DATABASE).exists() else [path / name for name in _PARTS]:
        if part.exists() and not (part.is_dir() and not any(part.iterdir())):
            raise InputError(
                f"{part}: is of something else, or {DATABASE} beside it was lost. Put that back, or choose another "
                "--training-dir."
            )


class Upload:
    """A file that is arriving. Its methods are called by one thread at a time; `discard` undoes it at any moment."""

    def __init__(self, directory: TrainingDirectory, owner: str) -> None:
        self._directory, self._owner = directory, owner
        self._id = new_id("file")
        self._partial = directory.files / f".{self._id}"
        self._stream: BinaryIO | None = None
        self._name = self._suffix = ""
        self.size_bytes = 0

    @property
    def has_begun(self) -> bool:
        """Whether its first byte may come, or has come."""
        return self._stream is not None

    def begin(self, name: str) -> None:
        """Take the sender's name for it, of which only the suffix matters.

        Raises:
            InputError: no reader is for such a file.
        """
        self._name, self._suffix = name, suffix_of(name)
        with disk_errors(shown(name), _KEPT):
            self._stream = self._partial.open("xb")

    def write(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            RunFailed: the disk is full.
        """
        assert self._stream is not None
        self.size_bytes += len(data)
        with disk_errors(shown(self._name), _KEPT):
            self._stream.write(data)

    def finish(self, purpose: str) -> StoredFile:
        """Put it on disk and into the database.

        Raises:
            RunFailed: the disk is full; nothing is left of it.
        """
        assert self._stream is not None
        file = StoredFile(self._id, self._owner, self._name, self._suffix, purpose, self.size_bytes)
        place = self._directory.place(file)
        try:
            with disk_errors(shown(self._name), _KEPT):
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
                self._partial.rename(place)
                flush(place.parent)
            self._directory.database.add_file(file)
        except BaseException:
            place.unlink(missing_ok=True)
            raise
        return file

    def discard(self) -> None:
        """Leave nothing of one that did not finish."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # a full disk takes the last buffer no better now
                self._stream.close()
        self._partial.unlink(missing_ok=True)


def suffix_of(name: str) -> str:
    """Which reader a file is for; one without a suffix is JSONL, as OpenAI's are.

    Raises:
        InputError: there is no reader for it.
    """
    suffix = Path(name).suffix.lower() or ".jsonl"
    if suffix not in EXTENSIONS:
        raise InputError(
            f"{shown(name)}: can't read a file that ends in {suffix!r}; expected {', '.join(EXTENSIONS)}. Convert it, "
            "or rename it if it is one of these."
        )
    return suffix


def shown(name: str) -> str:
    """A sender's name of a file, for a message."""
    return name if name.isprintable() and len(name) <= 200 else repr(name[:200])
