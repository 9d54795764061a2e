"""A SQLite file that a server owns: opened with checks, one connection under a lock. No torch.

Any thread may call the methods, but an event loop should not. Each transaction is done or not done, also in a killed
process. ``PRAGMA user_version`` has the version of the schema.
"""

import contextlib
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from qvera.serve.api.errors import unknown_id
from qvera.utils.errors import InputError, RunFailed


class SqliteFile:
    """An open database, until `close`."""

    def __init__(
        self,
        path: Path,
        schema: str,
        version: int,
        what: str,
        parts: Sequence[str],
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
    ) -> None:
        """Open the database, or make one.

        Raises InputError if it is damaged, no database, from a newer qvera, can't be opened or written, or was lost.

        Args:
            schema: SQL that makes the tables.
            what: what the file holds, for a message.
            parts: directories beside it, whose content it names. Other content is removed as remains of a crash, so
                there may be none without the database.
            synchronous: with NORMAL a power cut may lose the last transactions; a killed process loses none.
        """
        for part in () if path.exists() else map(path.with_name, parts):
            if part.exists() and not (part.is_dir() and not any(part.iterdir())):
                raise InputError(
                    f"{part}: is of something else, or {path.name} beside it was lost. Put that back, or choose "
                    "another --training-dir."
                )
        self.path, self._lock, problem = path, threading.RLock(), ""
        try:
            self._connection = sqlite3.connect(path, isolation_level="IMMEDIATE", check_same_thread=False, timeout=10)
        except sqlite3.OperationalError as error:
            raise InputError(f"{path}: can't be opened ({error}). Is it a file, and may you write there?") from None
        self._connection.row_factory = sqlite3.Row
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            if (damage := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(damage)
            (found,) = self._connection.execute("PRAGMA user_version").fetchone()
            if found > version:
                problem = (
                    f"was written by a newer version of qvera (its version is {found}, and {version} is the newest "
                    "that this one knows). Update qvera, or choose another --training-dir."
                )
            elif found == 0:  # a new file; one transaction, so that a killed process leaves all tables or none
                self._connection.executescript(f"BEGIN IMMEDIATE; {schema} PRAGMA user_version = {version}; COMMIT;")
        except sqlite3.OperationalError as error:
            problem = f"can't be used ({error}). Is its disk full, or read-only?"
        except sqlite3.DatabaseError as error:
            problem = (
                f"is damaged, or no database of {what} ({error}). Put a copy of it back, or choose another "
                "--training-dir."
            )
        if problem:
            self._connection.close()
            raise InputError(f"{path}: {problem}")

    def close(self) -> None:
        """Close it; SQLite moves its log into the file."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which is committed at the end or rolled back after an error. RunFailed: SQLite refused it."""
        with self._lock:
            try:
                with self._connection:
                    yield self._connection
            except sqlite3.Error as error:
                raise RunFailed(f"{self.path}: {error}. Nothing was changed; is its disk full or read-only?") from None

    def rows(self, query: str, values: Iterable[object] = ()) -> list[sqlite3.Row]:
        """The rows of a statement, in a transaction of its own."""
        with self.transaction() as connection:
            return connection.execute(query, tuple(values)).fetchall()

    def own(self, table: str, key: str, owner: str | None) -> sqlite3.Row:
        """A row by its id, of this owner only if one is named. Raises ApiError 404, for foreign ids too."""
        found = self.rows(f"SELECT * FROM {table} WHERE id = ? AND owner = IFNULL(?, owner)", (key, owner))
        if not found:
            raise unknown_id(table.removesuffix("s"), key)
        return found[0]


def new_id(kind: str) -> str:
    """An id that nobody can guess: ``kind``, a dash and 24 hex digits."""
    return f"{kind}-{secrets.token_hex(12)}"


def insert(connection: sqlite3.Connection, table: str, **values: object) -> None:
    """Add a row to a table, in place of one with its key."""
    marks = ", ".join("?" * len(values))
    query = f"INSERT OR REPLACE INTO {table} ({', '.join(values)}) VALUES ({marks})"
    connection.execute(query, tuple(values.values()))
