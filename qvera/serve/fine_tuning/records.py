"""The rows of a training directory's database: files, jobs and events; and why a client is refused. No torch."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from qvera.utils.errors import InputError

TRAINING, RESULTS = "fine-tune", "fine-tune-results"  # purposes of a file
Status = Literal["validating_files", "queued", "running", "finishing", "paused", "succeeded", "failed", "cancelled"]
BEFORE: tuple[Status, ...] = ("validating_files", "queued")
TRAINED: tuple[Status, ...] = ("running", "finishing")
"""``finishing``: its adapter is being saved, so it can't be cancelled any more. The API shows "running"."""
OPEN: tuple[Status, ...] = (*BEFORE, *TRAINED, "paused")  # all other statuses are final


def new_id(kind: str) -> str:
    """An id that nobody can guess: ``kind``, a dash and 24 hex digits."""
    return f"{kind}-{secrets.token_hex(12)}"


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

    id: str
    owner: str
    model: str  # name of the adapter that it makes
    base: str
    training_file: str
    validation_file: str | None
    seed: int | None  # as asked; None: the recipe's
    asked: dict[str, Any]  # hyperparameters by OpenAI's names, each ``auto`` or a number
    replaces: bool  # whether it may replace an adapter of its name
    metadata: dict[str, str]
    recipe: dict[str, Any]  # `Recipe.to_dict` of the recipe in use
    status: Status = "validating_files"
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


class UnknownRecord(LookupError):
    """No record has this id, or it belongs to another owner."""


class Refused(InputError):
    """A client's request that can't be done."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class TooMany(Exception):
    """An owner is at its limit of unfinished jobs."""


class NotMade(Exception):
    """No job of this owner made the model."""
