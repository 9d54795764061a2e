"""A training directory: the database, the uploaded files, and the states of unfinished jobs.

    fine_tuning.sqlite              files, jobs, events
    files/FILE_ID.jsonl             an uploaded file, or a job's results; a hidden one is being written
    states/JOB_ID.safetensors       what a job continues from
    .qvera_run.lock                 held by the server that uses it

A file enters the database once it is complete on disk. Other files are remains of a crash, and `open` removes them. So
it is with the directories of Tinker's API beside them (`qvera.serve.tinker.tenancy`).
"""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Self

from qvera.data.readers import EXTENSIONS
from qvera.serve.fine_tuning.database import BEFORE, RESULTS, TRAINED, Database, Event, StoredFile, now
from qvera.serve.sqlite import new_id
from qvera.training.run_dir import run_lock
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError
from qvera.utils.files import disk_errors, flush, replace_text
from qvera.utils.formatting import shortened

DATABASE = "fine_tuning.sqlite"
_MESSAGE_CHARACTERS = 2000  # of an error, which may list all columns of a file
_KEPT = "Nothing of this file was kept."


class TrainingDirectory:
    """A training directory that this process has locked; `open` makes one.

    Methods that write raise RunFailed if the disk is full.
    """

    def __init__(self, path: Path, database: Database) -> None:
        self.path, self.database = path, database
        self.files, self.states = path / "files", path / "states"

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Lock a directory for this process, or make one.

        Raises InputError if another server uses it, it holds something else, or it can't be read and written.
        """
        path = path.absolute()  # `without_places` would take a short relative path for a word of a message
        with run_lock(path, what="--training-dir"), contextlib.closing(Database(path / DATABASE)) as database:
            directory = cls(path, database)
            known = {directory.place(file) for file in database.all_files()}
            states = {directory.state(job.id) for job in database.open_jobs()}
            try:
                for place, kept in ((directory.files, known), (directory.states, states)):
                    place.mkdir(exist_ok=True)
                    remove_remains(place.iterdir(), kept)
            except OSError as error:
                raise InputError(
                    f"{path}: can't be written ({error.strerror or error}). Choose another --training-dir."
                ) from None
            yield directory

    def place(self, file: StoredFile) -> Path:
        """The path of a stored file."""
        return self.files / f"{file.id}{file.suffix}"

    def state(self, job_id: str) -> Path:
        """The path of a job's saved state, which may not exist yet."""
        return self.states / f"{job_id}.safetensors"

    def without_places(self, text: str) -> str:
        """A message without the path of this directory, for a job's owner."""
        return text.replace(f"{self.path}/", "")

    def for_owner(self, text: str, files: Iterable[StoredFile]) -> str:
        """A message with the sender's file names in place of paths."""
        for file in files:
            text = text.replace(str(self.place(file)), shown_name(file.name))
        return self.without_places(text)

    def fail(self, job_id: str, code: str, message: str, param: str | None = None) -> None:
        """End a job that can't continue, and delete its state. A cancelled or paused one stays as it is.

        Args:
            code: OpenAI's error code.
            param: the key of the job's request that is wrong.
        """
        message = shortened(message, _MESSAGE_CHARACTERS)
        error = {"code": code, "message": message, "param": param}
        event = Event(job_id, message, level="error")
        if self.database.move(job_id, (*BEFORE, *TRAINED), "failed", event, error=error, finished=now()):
            self.state(job_id).unlink(missing_ok=True)

    def write_results(self, owner: str, name: str, text: str) -> StoredFile:
        """Write a job's results; the caller adds the file to the database."""
        file = StoredFile(new_id("file"), owner, name, ".csv", RESULTS, len(text.encode()))
        with disk_errors(name, _KEPT):
            replace_text(self.place(file), text)
        return file


def remove_remains(found: Iterable[Path], kept: Collection[Path] = ()) -> None:
    """Delete what nobody needs, as a killed server leaves it: files and directories ``found`` that are not ``kept``."""
    for place in set(found) - set(kept):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


class Upload:
    """A file in transfer, for one thread at a time. Methods raise RunFailed if the disk is full."""

    def __init__(self, directory: TrainingDirectory, owner: str, name: str) -> None:
        """``name``: the sender's, of which only the suffix matters. Raises InputError if no reader takes that."""
        suffix = Path(name).suffix.lower() or ".jsonl"  # without one it is JSON lines, as in OpenAI's API
        if suffix not in EXTENSIONS:
            raise InputError(
                f"{shown_name(name)}: can't read a file that ends in {suffix!r}; expected {', '.join(EXTENSIONS)}. "
                "Convert it, or rename it if it is one of these."
            )
        self._directory, self._owner, self._name, self._suffix = directory, owner, name, suffix
        self._id, self.size_bytes = new_id("file"), 0
        self._partial = directory.files / f".{self._id}"
        with disk_errors(shown_name(name), _KEPT):
            self._stream = self._partial.open("xb")

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self.size_bytes += len(data)
        with disk_errors(shown_name(self._name), _KEPT):
            self._stream.write(data)

    def finish(self, purpose: str) -> StoredFile:
        """Sync it to disk and add it to the database. If that fails, nothing of it is left there."""
        file = StoredFile(self._id, self._owner, self._name, self._suffix, purpose, self.size_bytes)
        place = self._directory.place(file)
        try:
            with disk_errors(shown_name(self._name), _KEPT):
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
                self._partial.rename(place)
                flush(place.parent)
            self._directory.database.add(file)
        except BaseException:
            place.unlink(missing_ok=True)
            raise
        return file

    def discard(self) -> None:
        """Remove the unfinished file."""
        with contextlib.suppress(OSError):  # a full disk takes the last buffer no better now
            self._stream.close()
        self._partial.unlink(missing_ok=True)
