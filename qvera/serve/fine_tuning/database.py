"""The database of a training directory: files, jobs and events in SQLite. Only this module writes SQL.

There is one connection under a lock, so any thread may call the methods, but an event loop should not. Each method is
one transaction: a killed process leaves it done or not done. ``PRAGMA user_version`` has the version of the schema.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qvera.serve.fine_tuning.records import OPEN, Event, Job, Status, StoredFile, UnknownRecord
from qvera.utils.errors import InputError, RunFailed

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
_AS_JSON = (
    "asked",
    "metadata",
    "recipe",
    "error",
    "data",
    "seed",
)  # a seed may have 64 bits, SQLite's integers have 63
_AS_BOOL = ("replaces", "deleted")


class Database:
    """Made by `open`; ended by `close`. Lookups raise UnknownRecord for an unknown id, or an unknown ``after``."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self._connection = path, connection
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open the database, or make one.

        Raises InputError if it is damaged, no database, from a newer qvera, or can't be written.
        """
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise sqlite3.DatabaseError(damage)
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise InputError(
                    f"{path}: was written by a newer version of qvera (its version is {version}, and {VERSION} is the "
                    "newest that this one knows). Update qvera, or choose another --training-dir."
                )
            if version == 0:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        except sqlite3.OperationalError as error:
            connection.close()
            raise InputError(f"{path}: can't be used ({error}). Is its disk full, or read-only?") from None
        except sqlite3.DatabaseError as error:
            connection.close()
            raise InputError(
                f"{path}: is damaged, or no database of fine-tuning jobs ({error}). Put a copy of it back, or choose "
                "another --training-dir."
            ) from None
        except InputError:
            connection.close()
            raise
        return cls(path, connection)

    def close(self) -> None:
        """Close it; SQLite moves its log into the file."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise RunFailed(f"{self.path}: {error}. Nothing was changed; is its disk full or read-only?") from None

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[dict[str, Any]]:
        with self._transaction() as connection:
            found = connection.execute(query, values)
            names = [column[0] for column in found.description]
            return [_read(dict(zip(names, row, strict=True))) for row in found]

    # Files

    def add_file(self, file: StoredFile) -> None:
        """Add a file that is complete on disk."""
        with self._transaction() as connection:
            _insert(connection, "files", file)

    def file(self, file_id: str, owner: str | None = None) -> StoredFile:
        """A file, of this owner only if one is named."""
        return _record(StoredFile, self._one("files", file_id, owner))

    def files(
        self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> list[StoredFile]:
        """An owner's files that come after the file ``after``."""
        where, values = ("", []) if purpose is None else (" AND purpose = ?", [purpose])
        return [
            _record(StoredFile, row)
            for row in self._page("files", "owner", owner, where, values, after, limit, newest_first)
        ]

    def file_count(self, owner: str, purpose: str) -> int:
        """Number of an owner's files."""
        query = "SELECT COUNT(*) AS count FROM files WHERE owner = ? AND purpose = ?"
        return int(self._rows(query, (owner, purpose))[0]["count"])

    def all_files(self) -> dict[str, str]:
        """Id → suffix of every file."""
        return {row["id"]: row["suffix"] for row in self._rows("SELECT id, suffix FROM files")}

    def remove_file(self, file_id: str, owner: str) -> str | None:
        """Remove a file. If an unfinished job needs it, it stays, and the job's id is returned."""
        self.file(file_id, owner)
        with self._transaction() as connection:
            query = f"SELECT id FROM jobs WHERE ? IN (training_file, validation_file) AND status IN ({_marks(OPEN)})"
            user = connection.execute(query, (file_id, *OPEN)).fetchone()
            if user is None:
                connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
            return None if user is None else str(user[0])

    # Jobs

    def add_job(self, job: Job, events: Iterable[Event], most_open: int | None) -> bool:
        """Add a job and return True, unless its owner has ``most_open`` unfinished ones."""
        with self._transaction() as connection:
            query = f"SELECT COUNT(*) FROM jobs WHERE owner = ? AND status IN ({_marks(OPEN)})"
            (count,) = connection.execute(query, (job.owner, *OPEN)).fetchone()
            if most_open is not None and count >= most_open:
                return False
            _insert(connection, "jobs", job)
            for event in events:
                _insert(connection, "events", event)
            return True

    def job(self, job_id: str, owner: str | None = None) -> Job:
        """A job, of this owner only if one is named."""
        return _record(Job, self._one("jobs", job_id, owner))

    def jobs(self, owner: str, metadata: Mapping[str, str], after: str | None, limit: int) -> list[Job]:
        """An owner's jobs with these metadata that come after the job ``after``, newest first."""
        where = " AND EXISTS (SELECT 1 FROM json_each(metadata) AS pair WHERE pair.key = ? AND pair.value = ?)"
        values = [part for pair in metadata.items() for part in pair]
        return [
            _record(Job, row) for row in self._page("jobs", "owner", owner, where * len(metadata), values, after, limit)
        ]

    def open_jobs(self) -> list[Job]:
        """Unfinished jobs, paused ones too, oldest first."""
        query = f"SELECT * FROM jobs WHERE status IN ({_marks(OPEN)}) ORDER BY number"
        return [_record(Job, row) for row in self._rows(query, OPEN)]

    def job_of_model(self, model: str, statuses: Sequence[Status]) -> Job | None:
        """The newest job with one of these statuses whose adapter has this name, unless the adapter was deleted."""
        query = (
            f"SELECT * FROM jobs WHERE model = ? AND status IN ({_marks(statuses)}) AND NOT deleted "
            "ORDER BY number DESC LIMIT 1"
        )
        found = self._rows(query, (model, *statuses))
        return _record(Job, found[0]) if found else None

    def counts(self) -> dict[str, int]:
        """Status → number of jobs."""
        rows = self._rows("SELECT status, COUNT(*) AS count FROM jobs GROUP BY status")
        return {row["status"]: row["count"] for row in rows}

    def move(self, job_id: str, expected: Sequence[Status], status: Status, *events: Event, **changes: object) -> bool:
        """Set a job's status and the columns in ``changes``, and add events.

        False: its status was not one of ``expected``, and nothing is changed.
        """
        with self._transaction() as connection:
            return _move(connection, job_id, expected, status, changes, events)

    def succeed(self, job_id: str, result: StoredFile, *events: Event, **changes: object) -> bool:
        """`move` a job whose adapter is saved to "succeeded", and add its file of results."""
        with self._transaction() as connection:
            changes |= {"result_file": result.id}
            done = _move(connection, job_id, ("finishing",), "succeeded", changes, events)
            if done:
                _insert(connection, "files", result)
            return done

    def forget_model(self, job_id: str) -> None:
        """Note that a job's adapter was deleted."""
        with self._transaction() as connection:
            connection.execute("UPDATE jobs SET deleted = 1 WHERE id = ?", (job_id,))

    # Events

    def add_events(self, events: Iterable[Event], taken_again: Mapping[str, int] | None = None) -> None:
        """Add events in order. ``taken_again``: job → a step; its events of later steps are removed first."""
        with self._transaction() as connection:
            for job_id, step in (taken_again or {}).items():
                connection.execute("DELETE FROM events WHERE job = ? AND step > ?", (job_id, step))
            for event in events:
                _insert(connection, "events", event)

    def events(self, job_id: str, after: str | None, limit: int) -> list[Event]:
        """A job's events that come after the event ``after``, newest first."""
        return [_record(Event, row) for row in self._page("events", "job", job_id, "", [], after, limit)]

    def metrics(self, job_id: str) -> list[Event]:
        """The events of a job's steps, in order."""
        query = "SELECT * FROM events WHERE job = ? AND step IS NOT NULL ORDER BY step, number"
        return [_record(Event, row) for row in self._rows(query, (job_id,))]

    def last_losses(self, job_id: str) -> dict[str, float]:
        """A job's last ``train_loss`` and ``valid_loss``. It may have millions of events, so SQL picks them."""
        found = {}
        for name in ("train_loss", "valid_loss"):
            query = "SELECT data FROM events WHERE job = ? AND json_extract(data, ?) IS NOT NULL"
            for row in self._rows(f"{query} ORDER BY number DESC LIMIT 1", (job_id, f"$.{name}")):
                found[name] = float(row["data"][name])
        return found

    def _one(self, table: str, key: str, owner: str | None) -> dict[str, Any]:
        where, values = ("", ()) if owner is None else (" AND owner = ?", (owner,))
        found = self._rows(f"SELECT * FROM {table} WHERE id = ?{where}", (key, *values))
        if not found:
            raise UnknownRecord(key)
        return found[0]

    def _page(
        self,
        table: str,
        group: str,
        value: str,
        where: str,
        values: list[Any],
        after: str | None,
        limit: int,
        newest_first: bool = True,
    ) -> list[dict[str, Any]]:
        query, given = f"SELECT * FROM {table} WHERE {group} = ?{where}", [value, *values]
        if after is not None:
            found = self._rows(f"SELECT number FROM {table} WHERE {group} = ? AND id = ?", (value, after))
            if not found:
                raise UnknownRecord(after)
            query, given = f"{query} AND number {'<' if newest_first else '>'} ?", [*given, found[0]["number"]]
        return self._rows(f"{query} ORDER BY number {'DESC' if newest_first else 'ASC'} LIMIT ?", [*given, limit])


def _move(
    connection: sqlite3.Connection,
    job_id: str,
    expected: Sequence[Status],
    status: Status,
    changes: Mapping[str, object],
    events: Iterable[Event],
) -> bool:
    written = _written({"status": status, **changes})
    assigned = ", ".join(f"{name} = ?" for name in written)
    query = f"UPDATE jobs SET {assigned} WHERE id = ? AND status IN ({_marks(expected)})"
    if not connection.execute(query, (*written.values(), job_id, *expected)).rowcount:
        return False
    for event in events:
        _insert(connection, "events", event)
    return True


def _insert(connection: sqlite3.Connection, table: str, record: Any) -> None:
    values = _written(dataclasses.asdict(record))
    connection.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({_marks(values)})", tuple(values.values()))


def _marks(values: Iterable[object]) -> str:
    return ", ".join("?" for _ in values)


def _written(values: Mapping[str, object]) -> dict[str, object]:
    return {name: json.dumps(value) if name in _AS_JSON else value for name, value in values.items()}


def _read(row: dict[str, Any]) -> dict[str, Any]:
    for name in row:
        if name in _AS_JSON:
            row[name] = json.loads(row[name])
        elif name in _AS_BOOL:
            row[name] = bool(row[name])
    return row


def _record(kind: type[R], row: dict[str, Any]) -> R:
    return kind(**{name: value for name, value in row.items() if name != "number"})
