"""The database of a training directory: files, jobs and events in SQLite. Only this module writes SQL. No torch.

Each method is one transaction (see `SqliteFile`).
"""

import dataclasses
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from qvera.serve.api.errors import ApiError, too_many, unknown_id
from qvera.serve.sqlite import SqliteFile, insert, new_id

TRAINING, RESULTS = "fine-tune", "fine-tune-results"  # purposes of a file
JobAction = Literal["cancel", "pause", "resume"]
JobStatus = Literal["validating_files", "queued", "running", "finishing", "paused", "succeeded", "failed", "cancelled"]
BEFORE: tuple[JobStatus, ...] = ("validating_files", "queued")
TRAINED: tuple[JobStatus, ...] = ("running", "finishing")
"""``finishing``: its adapter is being saved, so it can't be cancelled any more. The API shows "running"."""
OPEN: tuple[JobStatus, ...] = (*BEFORE, *TRAINED, "paused")  # all other statuses are final


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An uploaded file, or a job's results."""

    id: str
    owner: str  # name of a key
    name: str  # from the sender; shown, but never used as a path
    suffix: str  # picks the reader, such as ``.jsonl``
    purpose: str
    size_bytes: int
    created: int = field(default_factory=now)


@dataclass(frozen=True, slots=True)
class Job:
    """A fine-tuning job."""

    owner: str
    model: str  # name of the adapter that it makes
    base: str
    training_file: str
    validation_file: str | None
    seed: int | None  # as asked; None: the recipe's
    asked: dict[str, Any]  # hyperparameters by OpenAI's names, each ``auto`` or a number
    replaces: bool  # whether it may replace an adapter of its name
    metadata: dict[str, str]
    recipe: dict[str, Any] = field(default_factory=dict)  # `Recipe.to_dict` of the recipe in use
    id: str = field(default_factory=lambda: new_id("ftjob"))
    status: JobStatus = "validating_files"
    created: int = field(default_factory=now)
    started: int | None = None
    finished: int | None = None
    trained_tokens: int | None = None
    step: int | None = None  # optimizer steps of the saved adapter
    result_file: str | None = None
    error: dict[str, Any] | None = None  # ``code``, ``message`` and ``param`` of a failed job
    deleted: bool = False  # whether the owner deleted the adapter


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job. With the numbers of a step its type is ``metrics``."""

    job: str
    message: str
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] | None = None
    step: int | None = None  # optimizer step of metrics
    id: str = field(default_factory=lambda: new_id("ftevent"))
    created: int = field(default_factory=now)


def not_made(model: str) -> ApiError:
    """403: the sender can't delete a model that no job of its own has made."""
    return ApiError(403, f"No fine-tuning job of this key has made {model!r}, so it can't delete it.", "model")


R = TypeVar("R", StoredFile, Job, Event)
VERSION = 1
_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, name TEXT NOT NULL,
    suffix TEXT NOT NULL, purpose TEXT NOT NULL, size_bytes INTEGER NOT NULL, created INTEGER NOT NULL
);
CREATE INDEX files_of_owner ON files (owner, number);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, model TEXT NOT NULL,
    base TEXT NOT NULL, training_file TEXT NOT NULL, validation_file TEXT, seed TEXT, asked TEXT NOT NULL,
    replaces INTEGER NOT NULL, metadata TEXT NOT NULL, recipe TEXT NOT NULL, status TEXT NOT NULL,
    created INTEGER NOT NULL, started INTEGER, finished INTEGER, trained_tokens INTEGER, step INTEGER,
    result_file TEXT, error TEXT NOT NULL, deleted INTEGER NOT NULL
);
CREATE INDEX jobs_of_owner ON jobs (owner, number);
CREATE INDEX jobs_by_status ON jobs (status, number);
CREATE INDEX jobs_by_model ON jobs (model);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, message TEXT NOT NULL,
    level TEXT NOT NULL, data TEXT NOT NULL, step INTEGER, created INTEGER NOT NULL
);
CREATE INDEX events_of_job ON events (job, number);
"""
_TABLES: dict[type, str] = {StoredFile: "files", Job: "jobs", Event: "events"}
_AS_JSON = ("asked", "metadata", "recipe", "error", "data", "seed")  # a seed may have 64 bits, SQLite's integers 63
_AS_BOOL = ("replaces", "deleted")


class Database(SqliteFile):
    """Files, jobs and events. Lookups raise ApiError 404 for an unknown id, or an unknown ``after``."""

    def __init__(self, path: Path) -> None:
        """Raises as `SqliteFile`."""
        super().__init__(path, _SCHEMA, VERSION, "fine-tuning jobs", ("files", "states"))

    def _records(self, kind: type[R], rest: str, values: Iterable[object]) -> list[R]:
        return [_made(kind, row) for row in self.rows(f"SELECT * FROM {_TABLES[kind]} {rest}", values)]

    def _page(
        self,
        kind: type[R],
        owner: str,
        after: str | None,
        limit: int,
        more: str = "",
        values: Iterable[object] = (),
        newest_first: bool = True,
    ) -> list[R]:
        """An owner's records, or a job's events, that fit ``more`` and come after the record ``after``."""
        of_owner = "WHERE job = ?" if kind is Event else "WHERE owner = ?"
        given: list[object] = [owner, *values]
        where = of_owner + more
        if after is not None:
            found = self.rows(f"SELECT number FROM {_TABLES[kind]} {of_owner} AND id = ?", (owner, after))
            if not found:
                raise unknown_id(_TABLES[kind].removesuffix("s"), after)
            where += f" AND number {'<' if newest_first else '>'} ?"
            given.append(found[0]["number"])
        order = "DESC" if newest_first else "ASC"
        return self._records(kind, f"{where} ORDER BY number {order} LIMIT ?", [*given, limit])

    # Files

    def file(self, file_id: str, owner: str | None = None) -> StoredFile:
        """A file, of this owner only if one is named."""
        return _made(StoredFile, self.own("files", file_id, owner))

    def files(
        self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> list[StoredFile]:
        """An owner's files that come after the file ``after``."""
        more = " AND purpose = IFNULL(?, purpose)"
        return self._page(StoredFile, owner, after, limit, more, (purpose,), newest_first)

    def all_files(self) -> list[StoredFile]:
        """Every owner's files."""
        return self._records(StoredFile, "", ())

    def remove_file(self, file_id: str) -> str | None:
        """Remove a file. If an unfinished job needs it, it stays, and the job's id is returned."""
        # in one transaction, so that no job takes the file between the look and the removal
        with self.transaction() as connection:
            query = f"SELECT id FROM jobs WHERE ? IN (training_file, validation_file) AND status IN ({_marks(OPEN)})"
            user = connection.execute(query, (file_id, *OPEN)).fetchone()
            if user is None:
                connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
            return None if user is None else str(user[0])

    # Jobs

    def add_job(self, job: Job, events: Iterable[Event], most_open: int | None) -> None:
        """Add a job. Raises ApiError 429 if its owner has ``most_open`` unfinished ones."""
        with self.transaction() as connection:
            query = f"SELECT COUNT(*) FROM jobs WHERE owner = ? AND status IN ({_marks(OPEN)})"
            (count,) = connection.execute(query, (job.owner, *OPEN)).fetchone()
            if most_open is not None and count >= most_open:
                text = f"This key has {count} jobs that have not ended, the most that it may have"
                raise too_many(f"{text}; wait for one, or cancel one.")
            _insert(connection, job, *events)

    def job(self, job_id: str, owner: str | None = None) -> Job:
        """A job, of this owner only if one is named."""
        return _made(Job, self.own("jobs", job_id, owner))

    def jobs(self, owner: str, metadata: Mapping[str, str], after: str | None, limit: int) -> list[Job]:
        """An owner's jobs with these metadata that come after the job ``after``, newest first."""
        more = " AND EXISTS (SELECT 1 FROM json_each(metadata) AS pair WHERE pair.key = ? AND pair.value = ?)"
        values = [part for pair in metadata.items() for part in pair]
        return self._page(Job, owner, after, limit, more * len(metadata), values)

    def open_jobs(self) -> list[Job]:
        """Unfinished jobs, paused ones too, oldest first."""
        return self._records(Job, f"WHERE status IN ({_marks(OPEN)}) ORDER BY number", OPEN)

    def job_of_model(self, model: str, statuses: Sequence[JobStatus]) -> Job | None:
        """The newest job with one of these statuses whose adapter has this name, unless the adapter was deleted."""
        where = f"WHERE model = ? AND status IN ({_marks(statuses)}) AND NOT deleted ORDER BY number DESC LIMIT 1"
        return next(iter(self._records(Job, where, (model, *statuses))), None)

    def counts(self) -> dict[str, int]:
        """Status → number of jobs."""
        return dict(map(tuple, self.rows("SELECT status, COUNT(*) FROM jobs GROUP BY status")))

    def move(
        self,
        job_id: str,
        expected: Sequence[JobStatus],
        status: JobStatus,
        *records: Event | StoredFile,
        **changes: object,
    ) -> bool:
        """Set a job's status and the columns in ``changes``, and add events and files.

        Returns False if its status was not one of ``expected``. Then nothing is changed.
        """
        written = _written({"status": status, **changes})
        assigned = ", ".join(f"{name} = ?" for name in written)
        query = f"UPDATE jobs SET {assigned} WHERE id = ? AND status IN ({_marks(expected)})"
        with self.transaction() as connection:
            if not connection.execute(query, (*written.values(), job_id, *expected)).rowcount:
                return False
            _insert(connection, *records)
            return True

    # Events

    def add(self, *records: Event | StoredFile, taken_again: Mapping[str, tuple[int, int]] | None = None) -> None:
        """Add events in order, or files that are complete on disk.

        ``taken_again``: job → two steps; its events of losses after the first and of held-out losses after the second
        are removed first.
        """
        later = "step > ? OR (step > ? AND json_type(data, '$.valid_loss') IS NOT NULL)"
        values = [(job, *steps) for job, steps in (taken_again or {}).items()]
        with self.transaction() as connection:
            connection.executemany(f"DELETE FROM events WHERE job = ? AND ({later})", values)
            _insert(connection, *records)

    def events(self, job_id: str, after: str | None, limit: int) -> list[Event]:
        """A job's events that come after the event ``after``, newest first."""
        return self._page(Event, job_id, after, limit)

    def metrics(self, job_id: str) -> list[Event]:
        """The events of a job's steps, in order."""
        return self._records(Event, "WHERE job = ? AND step IS NOT NULL ORDER BY step, number", (job_id,))

    def last_losses(self, job_id: str, step: int | None) -> dict[str, float]:
        """Return a job's last ``train_loss`` and ``valid_loss`` up to a step. SQL picks them among maybe millions."""
        found = {}
        query = "WHERE job = ? AND step <= ? AND json_extract(data, ?) IS NOT NULL ORDER BY number DESC LIMIT 1"
        for name in ("train_loss", "valid_loss"):
            for event in self._records(Event, query, (job_id, step, f"$.{name}")):
                found[name] = float((event.data or {})[name])
        return found


def _made(kind: type[R], row: sqlite3.Row) -> R:
    fields = {name: json.loads(value) if name in _AS_JSON else value for name, value in dict(row).items()}
    fields |= {name: bool(fields[name]) for name in _AS_BOOL if name in fields}
    del fields["number"]
    return kind(**fields)


def _insert(connection: sqlite3.Connection, *records: StoredFile | Job | Event) -> None:
    for record in records:
        insert(connection, _TABLES[type(record)], **_written(dataclasses.asdict(record)))


def _marks(values: Iterable[object]) -> str:
    return ", ".join("?" for _ in values)


def _written(values: Mapping[str, object]) -> dict[str, object]:
    return {name: json.dumps(value) if name in _AS_JSON else value for name, value in values.items()}
