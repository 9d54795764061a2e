"""What the list of runs says of each: from run.json and the end of metrics.jsonl, read again where they changed."""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from qvera.evaluation.report.read import get, get_number, get_text, parse_row
from qvera.serve.ui.directories import READ_BYTES, RunDirectories, open_plain, unreadable
from qvera.serve.ui.state import State, state_of
from qvera.utils.errors import InputError
from qvera.utils.files import file_stamp, read_json

_TAIL_BYTES = 64 << 10
_SPEED_STEPS = 50
"""How many of the last steps say how long the others will take."""
_ORDER: tuple[State, ...] = ("running", "interrupted", "failed", "killed", "unreadable", "finished")

Stamps = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the files of a run say, None or "" where they do not.

    Attributes:
        step: the last one that was recorded; of a run of many adapters the last round.
        left_seconds: what the planned steps that are left take, if they take as long as the last ones did.
        adapters: of a run of many adapters, their number.
    """

    status: str
    model: str
    method: str
    started: str
    step: float | None
    planned_steps: float | None
    train_loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    left_seconds: float | None
    adapters: int | None
    is_rounds: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in the list. ``changed``: when its files were last written, in seconds since 1970."""

    id: str
    state: State
    facts: Facts
    changed: float

    @property
    def changed_text(self) -> str:
        """The time of the last change, in UTC: 27 Nov, 10:02."""
        if not self.changed:
            return ""
        when = datetime.fromtimestamp(self.changed, UTC)
        return f"{when.day} {when:%b, %H:%M}"


class Summaries:
    """The list of all runs, for any number of readers."""

    def __init__(self, directories: RunDirectories) -> None:
        self._directories = directories
        self._known: dict[str, tuple[Stamps, Facts]] = {}
        self._lock = threading.Lock()

    def list(self) -> list[Summary]:
        """Every run: first those that go on, then those that did not finish, the newest first."""
        with self._lock:
            found = [self._summary(id, directory) for id, directory in self._directories.find().items()]
            self._known = {one.id: self._known[one.id] for one in found}
        return sorted(found, key=_place)

    def state(self, id: str, directory: Path) -> State:
        """The state of one run."""
        with self._lock:
            return self._summary(id, directory).state

    def _summary(self, id: str, directory: Path) -> Summary:
        stamps = stamps_of(directory, "run.json", "metrics.jsonl")
        known = self._known.get(id)
        if known is None or known[0] != stamps:
            known = self._known[id] = stamps, read_facts(directory)
        facts = known[1]
        odd = unreadable(directory, "run.json", "metrics.jsonl")
        state: State = "unreadable" if odd else state_of(directory, facts.status)
        return Summary(id, state, facts, max((stamp[1] for stamp in stamps if stamp), default=0) / 1e9)


def _place(run: Summary) -> tuple[int, float, str]:
    """Running ones stay in the order of their ids: each of them is always the newest for a moment."""
    return _ORDER.index(run.state), 0.0 if run.state == "running" else -run.changed, run.id


def stamps_of(directory: Path, *names: str) -> Stamps:
    """What tells cheaply whether files are still the ones they were; () for one that is missing."""
    stamps: list[tuple[int, ...]] = []
    for name in names:
        try:
            stamps.append(tuple(file_stamp((directory / name).lstat())))
        except OSError:
            stamps.append(())
    return tuple(stamps)


def read_facts(directory: Path) -> Facts:
    """The facts of one run: one read of run.json and one of the end of metrics.jsonl."""
    info = _read_info(directory / "run.json")
    rows = _tail(directory / "metrics.jsonl")
    rounds = [row for row in rows if get_text(row, "kind") == "round" and not row.get("rank")]
    own = [row for row in rows if not get_text(row, "adapter")]
    steps = rounds or [row for row in own if get_text(row, "kind") == "train"]
    evals = [loss for row in own if get_text(row, "kind") == "eval" and (loss := get_number(row, "loss")) is not None]
    last = steps[-1] if steps else None
    result, adapters = get(info, "result"), get(info, "adapters")
    step = get_number(last, "round" if rounds else "step")
    planned = get_number(result, "planned_steps") or get_number(info, "planned_steps")
    return Facts(
        status=get_text(info, "status"),
        model=PurePosixPath(get_text(info, "model", "path").replace("\\", "/")).name,
        method=get_text(info, "adapter", "method"),
        started=get_text(info, "started"),
        step=step,
        planned_steps=None if rounds else planned,
        train_loss=get_number(last, "loss"),
        eval_loss=evals[-1] if evals else get_number(result, "eval_after", "loss"),
        tokens_per_second=get_number(last, "tokens_per_second"),
        left_seconds=None if rounds or planned is None or step is None else left_seconds(steps, planned - step),
        adapters=len(adapters) if isinstance(adapters, list) else None,
        is_rounds=bool(rounds),
    )


def left_seconds(steps: Sequence[dict[str, Any]], left: float) -> float | None:
    """How long ``left`` further steps take at the pace of the last ones; None where it is not known."""
    taken = [seconds for row in steps[-_SPEED_STEPS:] if (seconds := get_number(row, "step_seconds")) is not None]
    return statistics.mean(taken) * left if taken and left >= 0 else None


def _read_info(path: Path) -> dict[str, Any]:
    try:
        facts = path.lstat()
        if facts.st_size > READ_BYTES["run.json"] or (descriptor := open_plain(path)) is None:
            return {}
        os.close(descriptor)
        return read_json(path, "the summary of a run")
    except (OSError, InputError):
        return {}


def _tail(path: Path) -> list[dict[str, Any]]:
    """The records in the last bytes of metrics.jsonl."""
    descriptor = open_plain(path)
    if descriptor is None:
        return []
    try:
        start = max(0, os.fstat(descriptor).st_size - _TAIL_BYTES)
        lines = os.pread(descriptor, _TAIL_BYTES, start).split(b"\n")[(1 if start else 0) : -1]
    except OSError:
        return []
    finally:
        os.close(descriptor)
    rows = (parse_row(line, ("step", "round")) for line in lines)
    return [row for row in rows if row is not None]
