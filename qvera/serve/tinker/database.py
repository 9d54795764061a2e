"""The database of Tinker's API: sessions, models, promises, samplers and checkpoints in SQLite. No torch.

A promise is a call that was accepted: its body, and its result once there is one. So a killed server goes on with what
it has promised. Calls of training keep their body until the model's state file holds their effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvera.serve.sqlite import SqliteFile

VERSION = 1
_SCHEMA = """
CREATE TABLE sessions (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, heartbeat REAL NOT NULL, ended REAL,
    about TEXT NOT NULL
);
CREATE TABLE models (
    id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, base TEXT NOT NULL, shape TEXT NOT NULL,
    seed TEXT, created REAL NOT NULL, last_request REAL NOT NULL, about TEXT NOT NULL, ended REAL,
    applied_seq INTEGER NOT NULL DEFAULT -1
);
CREATE INDEX models_of_owner ON models (owner, created);
CREATE INDEX models_of_session ON models (session);
CREATE TABLE promises (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, target TEXT NOT NULL,
    seq INTEGER NOT NULL, kind TEXT NOT NULL, body BLOB, state TEXT NOT NULL, payload BLOB, created REAL NOT NULL,
    done_at REAL, UNIQUE (target, seq)
);
CREATE INDEX promises_pending ON promises (state, number) WHERE state = 'pending';
CREATE INDEX promises_done ON promises (done_at);
CREATE TABLE samplers (
    id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, base TEXT NOT NULL, model_path TEXT,
    directory TEXT, created REAL NOT NULL, ended REAL
);
CREATE INDEX samplers_of_session ON samplers (session);
CREATE TABLE checkpoints (
    path TEXT PRIMARY KEY, owner TEXT NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
    directory TEXT NOT NULL, created REAL NOT NULL, bytes INTEGER NOT NULL, expires REAL,
    public INTEGER NOT NULL DEFAULT 0, about TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX checkpoints_of_owner ON checkpoints (owner, created);
CREATE INDEX checkpoints_of_run ON checkpoints (run, created);
"""
PromiseState = Literal["pending", "json", "proto", "user", "server", "refused"]
"""``json`` and ``proto``: the form of the result. ``user`` and ``server``: it failed, and whose fault that is.
``refused``: answered by 4xx, so nobody waits for it, but it has used its seq_id."""


class UnknownPromise(LookupError):
    """No promise has this id, or it belongs to another owner, or its result was dropped long after it was given."""


@dataclass(frozen=True, slots=True)
class Promise:
    """A call and its result. A failed one has the message as its payload, in UTF-8."""

    id: str
    owner: str  # name of a key
    target: str  # id of a model or sampling session
    seq: int
    kind: str  # last part of the path, such as ``optim_step``
    state: PromiseState
    body: bytes | None = None  # as decoded from its transfer; None: no longer needed
    payload: bytes | None = None


class Database(SqliteFile):
    """Each method is one transaction (see `SqliteFile`). They raise RunFailed if the disk is full."""

    def __init__(self, path: Path) -> None:
        """Raises as `SqliteFile`."""
        super().__init__(path, _SCHEMA, VERSION, "Tinker's API", synchronous="NORMAL")
        self._waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}  # by promise

    def begin(
        self,
        owner: str,
        target: str,
        seq: int,
        kind: str,
        body: bytes | None,
        state: Literal["pending", "refused"] = "pending",
    ) -> tuple[str, bool]:
        """Write down a call before it is done. Returns the promise's id, and False where the call is a repetition."""
        promise, moment = f"promise-{secrets.token_hex(12)}", time.time()
        with self.transaction() as connection:
            found = connection.execute("SELECT id FROM promises WHERE target = ? AND seq = ?", (target, seq)).fetchone()
            if found is not None:
                return found["id"], False
            values = (promise, owner, target, seq, kind, body, state, moment, None if state == "pending" else moment)
            columns = "id, owner, target, seq, kind, body, state, created, done_at"
            connection.execute(f"INSERT INTO promises ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            connection.execute("UPDATE models SET last_request = ? WHERE id = ?", (moment, target))
        return promise, True

    def fulfil(self, promise: str, state: Literal["json", "proto"], payload: bytes, keep_body: bool = False) -> None:
        """Give a pending promise its result. Does nothing for another one, so the first result stays.

        ``keep_body``: the call is done again after a restart, until `saved`.
        """
        self._end(promise, state, payload, keep_body)

    def fail(self, promise: str, message: str, category: Literal["user", "server"]) -> None:
        """End a pending promise without a result. Does nothing for another one."""
        self._end(promise, category, message.encode(), keep_body=False)

    def _end(self, promise: str, state: PromiseState, payload: bytes, keep_body: bool) -> None:
        kept = "body" if keep_body else "NULL"
        query = (
            f"UPDATE promises SET state = ?, payload = ?, done_at = ?, body = {kept} WHERE id = ? AND state = 'pending'"
        )
        self.rows(query, (state, payload, time.time(), promise))
        with self._lock:
            waiting = self._waiting.pop(promise, set())
        for loop, done in waiting:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(done.set)

    async def wait(self, promise: str, owner: str, seconds: float) -> Promise:
        """A promise with its result, or pending still after so many seconds. Raises UnknownPromise."""
        waits = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._waiting.setdefault(promise, set()).add(waits)
        try:
            found = await asyncio.to_thread(self.promise, promise, owner)
            if found.state == "pending" and seconds > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(waits[1].wait(), seconds)
                    found = await asyncio.to_thread(self.promise, promise, owner)
            return found
        finally:
            with self._lock:
                if (others := self._waiting.get(promise)) is not None:
                    others.discard(waits)
                    if not others:
                        del self._waiting[promise]

    def promise(self, promise: str, owner: str) -> Promise:
        """A promise without its body. Raises UnknownPromise."""
        query = "SELECT id, owner, target, seq, kind, state, payload FROM promises WHERE id = ? AND owner = ?"
        found = self.rows(query, (promise, owner))
        if not found or found[0]["state"] == "refused":
            raise UnknownPromise(promise)
        return Promise(**found[0])

    def promises(self, target: str | None = None, above: int = -1, pending: bool = False) -> list[Promise]:
        """Promises with their bodies and without results: of a target in its order, of all in the order they came.

        ``above``: only those of larger seq. ``pending``: only those without a result.
        """
        wanted, order = "AND state = 'pending'" * pending, "number" if target is None else "seq"
        query = "SELECT id, owner, target, seq, kind, state, body FROM promises WHERE target = IFNULL(?, target)"
        query += f" AND seq > ? {wanted} ORDER BY {order}"
        return [Promise(**row) for row in self.rows(query, (target, above))]

    def saved(self, model: str, through: int) -> None:
        """Note that a state file has what a model's calls so far did: those with a result need no body any more."""
        with self.transaction() as connection:
            connection.execute("UPDATE models SET applied_seq = ? WHERE id = ?", (through, model))
            query = "UPDATE promises SET body = NULL WHERE target = ? AND body IS NOT NULL AND state != 'pending'"
            connection.execute(query, (model,))

    def forget_results(self, before: float) -> None:
        """Remove promises that had their result before a moment (seconds since 1970) and need not be done again."""
        self.rows("DELETE FROM promises WHERE done_at < ? AND body IS NULL", (before,))

    def insert(self, table: str, **values: object) -> None:
        """Add a row to a table, in place of one with its key."""
        marks = ", ".join("?" * len(values))
        self.rows(f"INSERT OR REPLACE INTO {table} ({', '.join(values)}) VALUES ({marks})", values.values())

    def update(self, table: str, keys: Iterable[str], **values: object) -> None:
        """Change columns of the rows with these ids."""
        changes, keys = ", ".join(f"{name} = ?" for name in values), tuple(keys)
        self.rows(f"UPDATE {table} SET {changes} WHERE id IN ({', '.join('?' * len(keys))})", (*values.values(), *keys))
