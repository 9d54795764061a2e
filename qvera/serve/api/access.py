"""Who may do what, how much one call may take, and whose pages may call. Imports no FastAPI.

A file of hashed keys looks like this:

    {"keys": [{"name": "anna", "sha256": "9f86…", "adapters": ["anna"], "may": ["use"]}]}

A key is 256 random bits, which nobody guesses. So one round of SHA-256 is enough; slow hashes are for passwords.
"""

import functools
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import socket
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from qvera.utils.errors import InputError
from qvera.utils.files import file_stamp, read_json, replace_text


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a server. A call beyond one is refused, and the error names the limit."""

    connections: int = 512
    """Open at a time. Beyond that, the one that has waited longest for a whole request is closed."""
    head_seconds: float = 15.0
    """A connection that sends no request head for this long is closed."""
    body_bytes: int = 1 << 20
    tinker_body_bytes: int = 32 << 20  # of Tinker's API, also of what a compressed body expands to
    body_seconds: float = 30.0  # a body that takes longer to arrive is refused
    messages: int = 256
    prompt_tokens: int = 32_768  # of one prompt; the engine's own limit may be lower
    new_tokens: int = 4_096  # of one answer
    answers: int = 16  # of one call: prompts times n
    open_answers: int = 128
    """Running or waiting, of one key, so that others find room in the queue. Without keys there is no such limit."""
    file_bytes: int = 512 << 20  # of one upload; every 256 KiB must arrive within ``body_seconds``
    files: int = 100  # uploaded files of one key; without keys there is no such limit
    open_jobs: int = 16  # unfinished fine-tuning jobs of one key; without keys there is no such limit
    stop_strings: int = 32  # OpenAI takes 4; editors and harnesses send more to other servers
    stop_characters: int = 256  # of one stop string
    top_logprobs: int = 20
    seconds: float = 600.0  # from a call's arrival to its last token
    send_seconds: float = 60.0  # a client that takes nothing for this long is disconnected
    drain_seconds: float = 30.0  # running calls may take this long after SIGTERM


DEFAULTS = Limits()


Action = Literal["use", "load", "train"]
ACTIONS: tuple[Action, ...] = get_args(Action)
ALL = "*"
_PREFIX = "qvera-"  # lets tools that look for leaked keys recognize one
_log = logging.getLogger("qvera.serve")


@dataclass(frozen=True, slots=True)
class Access:
    """The models and actions that the sender of a request may use."""

    name: str
    adapters: frozenset[str] | None  # names of models, the base's among them; None: all
    may: frozenset[Action]

    def covers(self, name: str) -> bool:
        """Whether the sender may use the model of this name."""
        return self.adapters is None or name in self.adapters


LOCAL = Access("local", None, frozenset(ACTIONS))
"""The user of a server on the loopback address that asks for no keys."""


class KeyFile:
    """The keys of a file. A changed file is read again, so a key that is taken out is refused from then on."""

    def __init__(self, path: Path) -> None:
        """Raises InputError where the file is missing or holds something else."""
        self.path = path
        self._lock = threading.Lock()
        self._keys = _read_keys(path)
        self._stamp: list[int] | None = None  # the first look reads it again, as it may have changed meanwhile

    def unknown(self, models: Collection[str]) -> list[str]:
        """Names that keys may use and that are not among ``models``, each with the key's own name."""
        named = [(name, access) for _, access in self._keys for name in sorted(access.adapters or ())]
        return [f"{name!r} ({access.name})" for name, access in named if name not in models]

    def find(self, key: str) -> Access | None:
        """The owner of a key, or None. All hashes are compared, in constant time."""
        with self._lock:
            try:
                stamp = file_stamp(self.path.stat())
            except OSError:
                stamp = None
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._keys = _read_keys(self.path)
                except InputError as error:  # being edited, or spoilt: nobody gets more than before
                    _log.warning("%s The keys read before stay in use.", error)
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for sha256, access in self._keys:  # to the end: how long it takes says nothing about a key's place
            if hmac.compare_digest(sha256, digest):
                found = access
        return found


def _read_keys(path: Path) -> list[tuple[str, Access]]:
    """Each key's hash and what it may do. Raises InputError that names the faulty entry."""
    made = "`qvera serve --new-key NAME --keys FILE` makes one, where FILE is not there yet."
    entries = read_json(path, "a file of keys", keys=("keys",), fix=made)["keys"]
    if not isinstance(entries, list):
        raise InputError(f"{path}: keys: expected a list. {made}")
    found: dict[str, tuple[str, Access]] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: key {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected an object with name, sha256, adapters and may.")
        if unknown := sorted(set(entry) - {"name", "sha256", "adapters", "may"}):
            raise InputError(f"{where}: unknown {unknown[0]!r}; expected name, sha256, adapters and may.")
        name, sha256 = entry.get("name"), entry.get("sha256")
        if not isinstance(name, str) or not name:
            raise InputError(f"{where}: name: expected a text.")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise InputError(f"{where} ({name}): sha256: expected 64 hex digits, the SHA-256 of the key.")
        for part in ("adapters", "may"):
            values = entry.get(part)
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise InputError(f"{where} ({name}): {part}: expected a list of texts.")
        _require_actions(f"{where} ({name}): may", entry["may"])
        if name in found:
            raise InputError(f"{where}: the name {name!r} is used twice; give each key its own.")
        adapters = None if ALL in entry["adapters"] else frozenset(entry["adapters"])
        found[name] = sha256, Access(name, adapters, frozenset(entry["may"]))
    return list(found.values())


def _require_actions(where: str, may: Collection[str]) -> None:
    if wrong := [value for value in may if value not in ACTIONS]:
        raise InputError(f"{where}: {wrong[0]!r} is none of {', '.join(ACTIONS)}.")


def new_key(path: Path, name: str, adapters: Collection[str], may: Collection[str]) -> str:
    """Add a key to a file, which is made if needed, and return the key. The file keeps its hash only.

    Raises InputError for a file of something else, a name that it has already, or an unknown action.
    """
    _require_actions("--may", may)
    if not name.strip():
        raise InputError("--new-key: the name is empty; expected a text to know the key by.")
    with FileLock(path.with_name(f".{path.name}.lock")):
        entries: list[dict[str, Any]] = []
        if path.exists():
            _read_keys(path)
            entries = read_json(path, "a file of keys")["keys"]
        if any(entry["name"] == name for entry in entries):
            raise InputError(f"{path}: has a key {name!r} already. Use another name, or take that key out of the file.")
        key = _PREFIX + secrets.token_urlsafe(32)
        sha256 = hashlib.sha256(key.encode()).hexdigest()
        entries.append({"name": name, "sha256": sha256, "adapters": sorted(adapters), "may": sorted(may)})
        replace_text(path, json.dumps({"keys": entries}, indent=2, ensure_ascii=False) + "\n")
    return key


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine's loopback, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(host: str) -> str:
    """The name or address in a Host header, without its port and brackets."""
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or "]:" in host else host
    return name.strip("[]")


def is_of_other_site(host: str, origin: str | None) -> bool:
    """Whether another site's page makes this call. Browsers name the page's site in ``Origin``."""
    return origin is not None and origin.partition("://")[2] != host


def is_own_name(host: str, listens_on: str) -> bool:
    """Whether a Host header names this machine, seen from the address that the server listens on.

    DNS rebinding makes another site's name point to this machine; the header then has that name. An address can't be
    rebound, so a server that others can reach takes any address.
    """
    name = host_name(host)
    if is_loopback(name):
        return True
    if is_loopback(listens_on):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == listens_on or name in _names_of_this_machine()
    return True


@functools.cache
def _names_of_this_machine() -> tuple[str, str]:
    """The host name, without and with its domain. Asked once: DNS may take seconds, in which no call is answered."""
    return socket.gethostname(), socket.getfqdn()
