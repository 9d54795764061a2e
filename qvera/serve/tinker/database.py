"""The database of Tinker's API: sessions, models, promises, samplers and checkpoints in SQLite. No torch.

A promise is a call that was accepted: its body, as decoded from its transfer, and its result once there is one (of a
failed one the message). So a killed server goes on with what it has promised. Calls of training keep their body until
the model's state file holds their effect. ``target`` is a model or sampling session, ``kind`` the last part of the
path, ``size`` bytes that the call holds or what it counts in samples, and ``owner`` a key's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from qvera.serve.sqlite import SqliteFile, insert, new_id

if TYPE_CHECKING:
    import sqlite3

    from qvera.training.tenants import ModelShape

T = TypeVar("T")
VERSION = 1
_ASK_SECONDS = 4.0  # nothing tells who waits that the engine has ended, or the server stops
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
    seq INTEGER NOT NULL, kind TEXT NOT NULL, body BLOB, size INTEGER NOT NULL, state TEXT NOT NULL, payload BLOB,
    created REAL NOT NULL, done_at INTEGER, UNIQUE (target, seq)
);
CREATE INDEX promises_pending ON promises (owner, kind, size) WHERE state = 'pending';
CREATE INDEX promises_done ON promises (done_at);
CREATE INDEX promises_told ON promises (target, done_at);
CREATE TABLE samplers (
    id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, base TEXT NOT NULL, model_path TEXT,
    directory TEXT, created REAL NOT NULL, ended REAL
);
CREATE INDEX samplers_of_session ON samplers (session);
CREATE TABLE checkpoints (
    path TEXT PRIMARY KEY, owner TEXT NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
    created REAL NOT NULL, bytes INTEGER NOT NULL, expires REAL, public INTEGER NOT NULL DEFAULT 0,
    about TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX checkpoints_of_owner ON checkpoints (owner, created);
CREATE INDEX checkpoints_of_run ON checkpoints (run, created);
"""
PromiseState = Literal["pending", "json", "proto", "user", "server", "refused"]
"""``json`` and ``proto``: the form of the result. ``user`` and ``server``: it failed, and whose fault that is.
``refused``: answered by 4xx, so nobody waits for it, but it has used its seq_id."""
SAMPLE = "asample"
"""The kind of promises of samples."""


class Database(SqliteFile):
    """Each method is one transaction (see `SqliteFile`). They raise RunFailed if the disk is full."""

    def __init__(self, path: Path) -> None:
        """Raises as `SqliteFile`."""
        parts = "models", "sessions", "runs"
        super().__init__(path, _SCHEMA, VERSION, "Tinker's API", parts, synchronous="NORMAL")
        self._waiting: defaultdict[str, set[Callable[[], object]]] = defaultdict(set)
        """Promise or target → calls that wake those who wait for its end."""
        self._waiting_lock = threading.Lock()  # of its own: an event loop must not wait for a transaction
        (self._last_end,) = self.rows("SELECT IFNULL(MAX(done_at), 0) FROM promises")[0]

    def begin(
        self, owner: str, target: str, seq: int, kind: str, body: bytes | None, size: int = 0
    ) -> tuple[str, bool]:
        """Write down a call before it is done. Returns the promise's id, and False if the call is a repetition.

        A repetition has the ``target`` and ``seq`` of an earlier call, whose promise it gets. One that was refused has
        no ``body``.
        """
        promise, moment = new_id("promise"), time.time()
        with self.transaction() as connection:
            found = connection.execute("SELECT id FROM promises WHERE target = ? AND seq = ?", (target, seq)).fetchone()
            if found is not None:
                return found["id"], False
            state, done_at = ("refused", self._end_microseconds()) if body is None else ("pending", None)
            about = {"owner": owner, "target": target, "seq": seq, "kind": kind, "body": body, "size": size}
            insert(connection, "promises", id=promise, **about, state=state, created=moment, done_at=done_at)
            connection.execute("UPDATE models SET last_request = ? WHERE id = ?", (moment, target))
        return promise, True

    def open_of(self, owner: str, samples: bool) -> tuple[int, int]:
        """Return the number of a key's calls without a result, and the sum of their sizes.

        ``samples``: only calls for samples count; else only all others.
        """
        query = "SELECT COUNT(*), IFNULL(SUM(size), 0) FROM promises WHERE state = 'pending' AND owner = ?"
        return tuple(self.rows(f"{query} AND (kind = ?) = ?", (owner, SAMPLE, samples))[0])

    def end(self, promise: str, state: PromiseState, payload: bytes, keep_body: bool = False) -> None:
        """Give a pending promise its result, or the reason why it has none. The first one stays.

        ``keep_body``: the call is done again after a restart, until `saved`.
        """
        query = "UPDATE promises SET state = ?, payload = ?, done_at = ?, body = IIF(?, body, NULL) WHERE id = ?"
        with self.transaction() as connection:
            values = (state, payload, self._end_microseconds(), keep_body, promise)
            found = connection.execute(f"{query} AND state = 'pending' RETURNING target", values).fetchall()
        # after the transaction, so that those who are woken find the result
        keys = [promise, *(row["target"] for row in found)]
        with self._waiting_lock:
            waiting = [one for key in keys for one in self._waiting.get(key, ())]
        for wake in waiting:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                wake()

    def fail(self, promise: str, message: str, category: Literal["user", "server"]) -> None:
        """End a pending promise without a result."""
        self.end(promise, category, message.encode())

    def _end_microseconds(self) -> int:
        """Return microseconds since 1970, but always more than the last time: clients ask for ends since a moment."""
        self._last_end = max(self._last_end + 1, int(time.time() * 1e6))
        return self._last_end

    async def wait(
        self, key: str, look: Callable[[], T | None], seconds: float, is_over: Callable[[], bool] = lambda: False
    ) -> T | None:
        """Return what ``look`` finds. It looks now, whenever a promise of ``key`` ends, and at the end.

        Returns None if nothing was found for so many seconds, or when ``is_over``, asked every `_ASK_SECONDS`, says
        that nothing will be. ``key``: a promise, or a target with all of its promises.
        """
        ended, ends_at = asyncio.Event(), time.monotonic() + seconds
        wake = partial(asyncio.get_running_loop().call_soon_threadsafe, ended.set)
        with self._waiting_lock:
            self._waiting[key].add(wake)
        try:
            while True:
                ended.clear()  # before the look, so that an end during the look is not missed
                is_last = is_over() or time.monotonic() >= ends_at
                found = await asyncio.to_thread(look)
                if found is not None or is_last:
                    return found
                # a look takes a thread and a transaction: a thousand who wait must not look for nothing
                while not ended.is_set() and not is_over() and (left := ends_at - time.monotonic()) > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ended.wait(), min(left, _ASK_SECONDS))
        finally:
            with self._waiting_lock:
                self._waiting[key].discard(wake)
                if not self._waiting[key]:
                    del self._waiting[key]

    def promise(self, promise: str, owner: str) -> sqlite3.Row | None:
        """Return a promise with its result; None: there is no such promise, or it was forgotten long ago."""
        query = "SELECT state, payload FROM promises WHERE id = ? AND owner = ? AND state != 'refused'"
        return next(iter(self.rows(query, (promise, owner))), None)

    def saved(self, model: str, through: int) -> None:
        """Note that a state file has what a model's calls so far did: those with a result need no body any more."""
        with self.transaction() as connection:
            connection.execute("UPDATE models SET applied_seq = ? WHERE id = ?", (through, model))
            query = "UPDATE promises SET body = NULL WHERE target = ? AND body IS NOT NULL AND state != 'pending'"
            connection.execute(query, (model,))

    def forget(self, before: float) -> None:
        """Remove what ended before a moment (seconds since 1970) and is not needed any more.

        Promises that may be done again stay, what a live session has had, models with checkpoints, and their sessions.
        """
        live, saved = "SELECT id FROM sessions WHERE ended IS NULL", "SELECT run FROM checkpoints"
        with self.transaction() as connection:
            for query in (
                "promises WHERE done_at < :before * 1e6 AND body IS NULL",
                "samplers WHERE session IN (SELECT id FROM sessions WHERE ended < :before)",
                f"models WHERE ended < :before AND session NOT IN ({live}) AND id NOT IN ({saved})",
                "sessions WHERE ended < :before AND id NOT IN (SELECT session FROM models)",
            ):
                connection.execute(f"DELETE FROM {query}", {"before": before})

    def add_model(self, shape: ModelShape, metadata: Any, **columns: object) -> None:
        """Add a model. ``metadata`` are its user's, ``columns`` the others that need a value."""
        now, about = time.time(), json.dumps({"user_metadata": metadata})
        self.insert("models", **columns, shape=json.dumps(shape), created=now, last_request=now, about=about)

    def insert(self, table: str, **values: object) -> None:
        """Add a row to a table, in place of one with its key."""
        with self.transaction() as connection:
            insert(connection, table, **values)
