"""Who may do what, how much one call may take, and whose pages may call. Imports no FastAPI.

    {"keys": [{"name": "anna", "sha256": "9f86…", "adapters": ["anna"], "may": ["use"]}]}

is a file of hashed keys. A key is 256 random bits. Nobody guesses those, so one round of SHA-256 keeps them: a slow
hash is for passwords, which people choose from few.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError
from qvera.utils.files import file_stamp, read_json


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a server. A request beyond one is refused with the number that it may have."""

    connections: int = 512
    """Open at a time. Beyond that, the one that has waited longest for a whole request gives way."""
    head_seconds: float = 15.0
    """A connection on which no request's head arrives for so long is closed."""
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    """A body that takes longer to arrive is not waited for."""
    messages: int = 256
    prompt_tokens: int = 32_768
    """Of one prompt; the engine's own limit may be lower."""
    new_tokens: int = 4_096
    """Of one answer."""
    answers: int = 16
    """Of one call: prompts times n."""
    open_answers: int = 128
    """Of one key, running or waiting; so that others find room in the queue. Without keys there is no such limit."""
    file_bytes: int = 512 << 20
    """Of one uploaded file; 256 KiB of it must arrive within ``body_seconds``."""
    files: int = 100
    """Uploaded files of one key. Without keys there is no such limit."""
    open_jobs: int = 16
    """Fine-tuning jobs of one key that have not ended. Without keys there is no such limit."""
    jobs_at_once: int = 8
    """Fine-tuning jobs that are trained together."""
    stop_strings: int = 4
    stop_characters: int = 256
    """Of one stop string."""
    top_logprobs: int = 20
    seconds: float = 600.0
    """From a call's arrival to its last token."""
    send_seconds: float = 60.0
    """A client that takes nothing for so long is let go."""
    drain_seconds: float = 30.0
    """After SIGTERM: running requests may finish until then."""
    retry_seconds: int = 1
    """What a refused client is told to wait."""


DEFAULTS = Limits()


Action = Literal["use", "load", "train"]
ACTIONS: tuple[Action, ...] = get_args(Action)
ALL = "*"
_PREFIX = "qvera-"
"""So that tools which look for leaked keys can know one."""
_log = logging.getLogger("qvera.serve")


@dataclass(frozen=True, slots=True)
class Access:
    """What the sender of a request may do.

    Attributes:
        name: of the key, for logs.
        adapters: names of the models it may use (the base has one too); None: all.
        may: what it may do with them.
    """

    name: str
    adapters: frozenset[str] | None
    may: frozenset[Action]

    def covers(self, name: str) -> bool:
        """Whether it may use this model."""
        return self.adapters is None or name in self.adapters


LOCAL = Access("local", None, frozenset(ACTIONS))
"""Of a server on the loopback address without keys: its user's own."""


class KeyFile:
    """The keys of a file, which is read again when it changes: a key that is taken out is refused from then on."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            InputError: it is missing, or not such a file.
        """
        self.path = path
        self._lock = threading.Lock()
        self._keys = read_keys(path)
        self._stamp: list[int] | None = _stamp(path)

    def find(self, key: str) -> Access | None:
        """Who has this key; None: nobody. Compares with all hashes in constant time."""
        self._read_again()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for sha256, access in self._keys:
            if hmac.compare_digest(sha256, digest):
                found = access
        return found

    def _read_again(self) -> None:
        with self._lock:
            stamp = _stamp(self.path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._keys = read_keys(self.path)
            except InputError as error:  # being edited, or spoilt: nobody gets more than before
                _log.warning("%s The keys read before stay in use.", error)


def _stamp(path: Path) -> list[int] | None:
    try:
        return file_stamp(os.stat(path))
    except OSError:
        return None


def read_keys(path: Path) -> list[tuple[str, Access]]:
    """The keys of a file: their hashes and what each may do.

    Raises:
        InputError: names the entry and what is wrong with it.
    """
    made = "Make one with `qvera serve --new-key NAME --keys FILE`."
    entries = read_json(path, "a file of keys", keys=("keys",), fix=made)["keys"]
    if not isinstance(entries, list):
        raise InputError(f"{path}: keys: expected a list. {made}")
    found: dict[str, tuple[str, Access]] = {}
    for number, entry in enumerate(entries, start=1):
        name, key = _read_key(f"{path}: key {number}", entry)
        if name in found:
            raise InputError(f"{path}: key {number}: the name {name!r} is used twice; give each key its own.")
        found[name] = key
    return list(found.values())


def _read_key(where: str, entry: Any) -> tuple[str, tuple[str, Access]]:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object with name, sha256, adapters and may.")
    if unknown := sorted(set(entry) - {"name", "sha256", "adapters", "may"}):
        raise InputError(f"{where}: unknown {unknown[0]!r}; expected name, sha256, adapters and may.")
    name, sha256 = entry.get("name"), entry.get("sha256")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: name: expected a text.")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(f"{where} ({name}): sha256: expected 64 hex digits, the SHA-256 of the key.")
    lists = {}
    for part in ("adapters", "may"):
        values = entry.get(part)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise InputError(f"{where} ({name}): {part}: expected a list of texts.")
        lists[part] = values
    _require_actions(f"{where} ({name}): may", lists["may"])
    adapters = None if ALL in lists["adapters"] else frozenset(lists["adapters"])
    return name, (sha256, Access(name, adapters, frozenset(lists["may"])))


def _require_actions(where: str, may: Collection[str]) -> None:
    if wrong := [value for value in may if value not in ACTIONS]:
        raise InputError(f"{where}: {wrong[0]!r} is none of {', '.join(ACTIONS)}.")


def new_key(path: Path, name: str, adapters: Collection[str], may: Collection[str]) -> str:
    """Add a key to a file, which is made where it is missing; returns the key, which is kept nowhere.

    Raises:
        InputError: the file is not one of keys, or has a key of this name, or ``may`` holds what nobody can do.
    """
    _require_actions("--may", may)
    if not name.strip():
        raise InputError("--new-key: the name is empty; expected a text to know the key by.")
    with FileLock(path.with_name(f".{path.name}.lock")):
        entries: list[dict[str, Any]] = []
        if path.exists():
            read_keys(path)
            entries = read_json(path, "a file of keys")["keys"]
        if any(entry["name"] == name for entry in entries):
            raise InputError(f"{path}: has a key {name!r} already. Use another name, or take that key out of the file.")
        key = _PREFIX + secrets.token_urlsafe(32)
        sha256 = hashlib.sha256(key.encode()).hexdigest()
        entries.append({"name": name, "sha256": sha256, "adapters": sorted(adapters), "may": sorted(may)})
        replace_text(path, json.dumps({"keys": entries}, indent=2, ensure_ascii=False) + "\n")
    return key


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine itself and reachable from no other."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_of(host: str) -> str:
    """The name or address in a Host header, without its port and brackets."""
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or "]:" in host else host
    return name.strip("[]")


def is_of_other_site(host: str, origin: str | None) -> bool:
    """Whether a call comes from a page that another site has sent; its browser says so in ``Origin``."""
    return origin is not None and origin.partition("://")[2] != host


def is_own_name(host: str, listens_on: str) -> bool:
    """Whether a Host header names this machine, as seen from where the server listens.

    A page of another site may have its own name point to this machine (DNS rebinding); then the header has that name.
    An address can't be rebound, so a server that others can reach takes any.
    """
    name = name_of(host)
    if is_loopback(name):
        return True
    if is_loopback(listens_on):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in (listens_on, socket.gethostname(), socket.getfqdn())
    return True
