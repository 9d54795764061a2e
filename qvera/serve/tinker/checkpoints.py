"""Saved states and adapters of Tinker's clients, by their paths.

    tinker://RUN/weights/NAME             runs/RUN/weights/NAME/              a state, to train on from
    tinker://RUN/sampler_weights/NAME     runs/RUN/sampler_weights/NAME/      an adapter directory, to answer with
    tinker://RUN/external_weights/NAME    runs/RUN/external_weights/NAME/     the same, to be downloaded

RUN is a model's id, with ``_`` for ``:`` in a directory's name. Files are written to a hidden directory beside their
place, and are moved there together. A checkpoint enters the database once its files are on disk, and leaves it after
they were deleted. So a directory that it does not name is what a killed server has left.
"""

import json
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from qvera.serve.api.errors import ApiError, unknown_id
from qvera.serve.sqlite import new_id
from qvera.serve.tinker.database import Database
from qvera.training.tenants import ModelShape
from qvera.utils.errors import InputError
from qvera.utils.files import disk_errors, replacing, take_place
from qvera.utils.formatting import size

CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]
Ttl = Annotated[int, Field(ge=3600, le=10 * 366 * 86400)] | None
"""Seconds until a checkpoint goes; None: it stays."""
_DOWNLOAD_SECONDS = 3600.0
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+@-]{0,127}")
_LIVE = "IFNULL(expires, 1e18) > ?"


class Checkpoint(NamedTuple):
    """The place of a checkpoint, and the facts about it once its files are on disk. Times are seconds since 1970."""

    path: str
    run: str
    kind: CheckpointKind
    name: str
    directory: Path
    created: float = 0.0
    bytes: int = 0
    expires: float | None = None
    public: bool = False  # whether every key may read it
    about: Mapping[str, Any] = {}  # base, method, rank, targets, user_metadata

    @property
    def shape(self) -> ModelShape:
        """The method, rank and targets of its model."""
        return ModelShape(self.about["method"], self.about["rank"], self.about["targets"])


class Checkpoints:
    """The checkpoints of a server, for any thread. An expired one is not found."""

    def __init__(self, database: Database, root: Path, most_bytes: int) -> None:
        """``most_bytes``: the most that all checkpoints of one key may take."""
        self.database, self._runs, self._most_bytes = database, root / "runs", most_bytes
        self._lock = threading.RLock()

    def place(self, run: str, kind: CheckpointKind, name: str) -> Checkpoint:
        """The place of a checkpoint. Raises InputError for a name that is no part of a path."""
        if not _NAME.fullmatch(name):
            raise InputError(
                f"path: {name[:200]!r} is no name of a checkpoint; expected 1 to 128 of A-Z a-z 0-9 _ . = + @ -, and a "
                "letter, a digit or _ first."
            )
        directory = self._runs / run.replace(":", "_") / kind / name
        return Checkpoint(f"tinker://{run}/{kind}/{name}", run, kind, name, directory)

    def require_free(self, place: Checkpoint, owner: str, overwrite: bool, call: int | None) -> None:
        """Refuse to save where another call of the run has saved, or where the key's checkpoints are too many."""
        self.remove_expired()
        found = self._select("path = ?", place.path)
        if found and not overwrite and found[0].about.get("call") != call:
            raise InputError(f"path: {place.path} exists. Choose another name, delete it, or save with overwrite=True.")
        query = "SELECT IFNULL(SUM(bytes), 0) FROM checkpoints WHERE owner = ? AND path != ?"
        (used,) = self.database.rows(query, (owner, place.path))[0]
        if used >= self._most_bytes:
            raise InputError(
                f"path: this key's checkpoints take {size(used)}, and {size(self._most_bytes)} is the most; delete "
                "some, or save with ttl_seconds."
            )

    def add(
        self,
        place: Checkpoint,
        written: Path,
        owner: str,
        overwrite: bool,
        ttl_seconds: int | None,
        about: dict[str, Any],
    ) -> None:
        """Add a checkpoint, in place of one with its path. Raises as `require_free`, and deletes its files then.

        ``written``: a directory beside its own, with its files. It is gone afterwards. After a RunFailed call it again.
        """
        now = time.time()
        with self._lock:  # another save of the same name may have ended meanwhile, or the old one have expired
            try:
                self.require_free(place, owner, overwrite, about.get("call"))
            except InputError:
                shutil.rmtree(written, ignore_errors=True)
                raise
            if written.exists():
                take_place(written, place.directory)
            names = {"path": place.path, "owner": owner, "run": place.run, "kind": place.kind, "name": place.name}
            facts = {
                "created": now,
                "bytes": sum(file.stat().st_size for file in place.directory.iterdir()),
                "expires": None if ttl_seconds is None else now + ttl_seconds,
            }
            self.database.insert("checkpoints", **names, **facts, about=json.dumps(about))

    def find(self, path: str, owner: str, kind: CheckpointKind | None = None) -> Checkpoint:
        """Return a checkpoint that a key may read. Raises ApiError 404, or InputError if it is of another ``kind``."""
        found = self._select("path = ? AND (owner = ? OR public)", path, owner)
        if not found:
            raise unknown_id("checkpoint", path)
        if kind is not None and found[0].kind != kind:
            raise InputError(f"{path}: expected {kind}, found {found[0].kind}.")
        return found[0]

    def change(self, path: str, owner: str, column: Literal["public", "expires"], value: float | None) -> None:
        """Change a checkpoint of a key. Raises ApiError 404."""
        query = f"UPDATE checkpoints SET {column} = ? WHERE path = ? AND owner = ? AND {_LIVE} RETURNING path"
        if not self.database.rows(query, (value, path, owner, time.time())):
            raise unknown_id("checkpoint", path)
        self.remove_expired()

    def remove_expired(self) -> None:
        """Delete checkpoints whose time is over. What a kill leaves of one is deleted the next time."""
        with self._lock:
            for row in self.database.rows("SELECT * FROM checkpoints WHERE expires <= ?", (time.time(),)):
                shutil.rmtree(self._made(row).directory, ignore_errors=True)
                self.database.rows("DELETE FROM checkpoints WHERE path = ?", (row["path"],))

    def copy(self, path: str, owner: str, ttl_seconds: int | None, key: str) -> Checkpoint:
        """Copy a checkpoint to a run of its own. The same ``key`` gives the same copy.

        Raises as `find`, or RunFailed if the disk is full.
        """
        with self._lock:
            if done := self._select("owner = ? AND json_extract(about, '$.copy_key') = ?", owner, key):
                return done[0]
            source, run, now = self.find(path, owner), new_id("copy"), time.time()
            place = self.place(run, source.kind, source.name)
            self.require_free(place, owner, False, None)
            # a file that is saved over is a new file, so the copy keeps the old one
            written = place.directory.with_name(".copy")
            with disk_errors(place.path, "Nothing was copied."):
                shutil.copytree(source.directory, written, copy_function=os.link)
            about, columns = source.about, {"id": run, "session": "", "owner": owner, "ended": now}
            self.database.add_model(source.shape, about["user_metadata"], base=about["base"], **columns)
            # found from here on
            self.add(place, written, owner, False, ttl_seconds, {**about, "copy_key": key, "download": None})
            return place

    def directories(self) -> list[Path]:
        """The directories of all checkpoints, of expired ones too."""
        return [self._made(row).directory for row in self.database.rows("SELECT * FROM checkpoints")]

    def page(self, owner: str, run: str | None, limit: int, offset: int) -> tuple[list[Checkpoint], int]:
        """Some checkpoints of a key, of one run if it is named, the newest first; and how many there are."""
        where, values = "owner = ? AND run = IFNULL(?, run)", (owner, run)
        rest = f"{where} ORDER BY created DESC LIMIT {limit} OFFSET {offset}"
        count = f"SELECT COUNT(*) FROM checkpoints WHERE {_LIVE} AND {where}"
        return self._select(rest, *values), self.database.rows(count, (time.time(), *values))[0][0]

    def newest(self, run: str, kind: CheckpointKind) -> Checkpoint | None:
        """The newest checkpoint of a run and kind."""
        return next(iter(self._select("run = ? AND kind = ? ORDER BY created DESC LIMIT 1", run, kind)), None)

    def download_token(self, path: str, owner: str) -> tuple[Checkpoint, str, float]:
        """A token for the files of external weights, and until when it holds (seconds since 1970). Raises as `find`."""
        query = "UPDATE checkpoints SET about = json_set(about, '$.download', json(?)) WHERE path = ?"
        with self._lock:  # two who ask at one time get one token
            found, ends = self.find(path, owner, "external_weights"), time.time() + _DOWNLOAD_SECONDS
            token = (found.about.get("download") or [secrets.token_urlsafe(32)])[0]
            self.database.rows(query, (json.dumps([token, ends]), path))
        return found, token, ends

    def download(self, token: str, file: str) -> Path:
        """A file of the checkpoint that a token is for. Raises ApiError 404."""
        query = "json_extract(about, '$.download[0]') = ? AND json_extract(about, '$.download[1]') > ?"
        for found in self._select(query, token, time.time()):
            if file in os.listdir(found.directory):
                return found.directory / file
        raise ApiError(404, "There is no such file, or its URL has expired.")

    def _select(self, rest: str, *values: object) -> list[Checkpoint]:
        query = f"SELECT * FROM checkpoints WHERE {_LIVE} AND {rest}"
        return [self._made(row) for row in self.database.rows(query, (time.time(), *values))]

    def _made(self, row: sqlite3.Row) -> Checkpoint:
        place, facts = self.place(row["run"], row["kind"], row["name"]), ("created", "bytes", "expires")
        about, public = json.loads(row["about"]), bool(row["public"])
        return place._replace(about=about, public=public, **{name: row[name] for name in facts})


def recipients_of(texts: Sequence[str]) -> list[Any]:
    """Read recipients of age (filippo.io/age) from their keys. Raises InputError for a bad key, or without pyrage."""
    if not texts:
        return []
    try:
        import pyrage
    except ImportError:
        raise InputError(
            "age_encryption_recipients: this server can't encrypt, since it lacks pyrage. Export without them, or ask "
            "its owner to `pip install pyrage`."
        ) from None
    try:
        kinds = [pyrage.ssh if text.startswith("ssh-") else pyrage.x25519 for text in texts]
        return [kind.Recipient.from_str(text) for kind, text in zip(kinds, texts, strict=True)]
    except pyrage.RecipientError as error:
        raise InputError(f"age_encryption_recipients: expected keys that begin with age1 or ssh- ({error}).") from None


def encrypt(directory: Path, recipients: Sequence[Any]) -> None:
    """Encrypt all files for the recipients, of which there may be none. Names get ``.age``."""
    if not recipients:
        return
    import pyrage

    # where the database refuses the result it runs again: files with the suffix are done, or were moved away
    for file in [file for file in directory.glob("*") if file.suffix != ".age"]:
        with replacing(file.with_name(f"{file.name}.age")) as partial:
            partial.write_bytes(pyrage.encrypt(file.read_bytes(), recipients))
        file.unlink()
