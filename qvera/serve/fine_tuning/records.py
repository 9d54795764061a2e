"""What a training directory's database has rows of: files, jobs and events; and why a client is refused. No torch."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from qvera.utils.errors import InputError

TRAINING, RESULTS = "fine-tune", "fine-tune-results"
"""Purposes of a file: rows to train on, and what a job has written."""
Status = Literal["validating_files", "queued", "running", "finishing", "paused", "succeeded", "failed", "cancelled"]
BEFORE: tuple[Status, ...] = ("validating_files", "queued")
TRAINED: tuple[Status, ...] = ("running", "finishing")
"""``finishing``: its adapter is being saved, and it can't be cancelled any more. The API calls it running."""
OPEN: tuple[Status, ...] = (*BEFORE, *TRAINED, "paused")
"""A job of another status never changes again."""


def new_id(kind: str) -> str:
    """An identifier that nobody guesses: ``kind``, a dash and 24 hex digits."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that was uploaded, or that a job has written."""

    id: str
    owner: str
    """The name of the key that sent it."""
    name: str
    """As the sender called it: only ever shown, no path."""
    suffix: str
    """Which reader it is for, such as ``.jsonl``."""
    purpose: str
    size_bytes: int
    created: int = field(default_factory=now)


@dataclass(frozen=True, slots=True)
class Job:
    """A fine-tuning job."""

    id: str
    owner: str
    model: str
    """The name of the adapter that it makes."""
    base: str
    training_file: str
    validation_file: str | None
    seed: int | None
    """As asked; None: the recipe's."""
    asked: dict[str, Any]
    """Hyperparameters as asked, by OpenAI's names; ``auto`` or a number each."""
    replaces: bool
    """Whether an adapter of this name may be replaced."""
    metadata: dict[str, str]
    recipe: dict[str, Any]
    """`Recipe.to_dict` of the recipe that it is trained by."""
    status: Status = "validating_files"
    created: int = field(default_factory=now)
    started: int | None = None
    finished: int | None = None
    trained_tokens: int | None = None
    step: int | None = None
    """Optimizer steps of the adapter that was saved."""
    result_file: str | None = None
    error: dict[str, Any] | None = None
    """``code``, ``message`` and ``param`` of a failed job."""
    deleted: bool = False
    """Whether its adapter was deleted by its owner."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job; of type ``metrics`` with the numbers of a step."""

    job: str
    message: str
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] | None = None
    step: int | None = None
    """Of metrics: after which optimizer step."""
    id: str = field(default_factory=lambda: new_id("ftevent"))
    created: int = field(default_factory=now)


class UnknownRecord(LookupError):
    """There is none of that id, or it is another owner's."""


class Refused(InputError):
    """What a client asks can't be done.

    Attributes:
        param: the key of the body that it is about.
        code: OpenAI's word for it.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class TooMany(Exception):
    """An owner has as many open jobs as it may have."""


class NotMade(Exception):
    """No job of this owner has made the model."""
