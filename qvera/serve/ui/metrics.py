"""Reads a growing metrics.jsonl: curves of a limited number of steps, or what is new since a position."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from qvera.evaluation.report.read import AdapterEntry, get_number, get_text, parse_metrics, round_as_step
from qvera.serve.ui.directories import open_plain
from qvera.utils.formatting import count, size

MOST_ROWS = 4_096
"""Steps that a curve keeps. Beyond that only every second one stays, then every fourth. Charts draw fewer."""
MOST_ADAPTERS = 20_000
WHOLE_BYTES = 48 << 20
"""Of a longer file, only its end and `_SAMPLES` evenly spread pieces are read."""
_SAMPLES = 3_000
_SAMPLE_BYTES = 8 << 10
_CHUNK_BYTES = 1 << 20
_LINE_BYTES = 1 << 20  # a longer line is no record
_END_BYTES = 256  # of what was read last, by which a file is known again
_PLACES = ("step", "round")
MOST_NEW_BYTES = 1 << 20
"""A reader that is further behind gets no records; it is told to reload the page."""
_KEYS, _CHARACTERS = 64, 512
"""Most keys of a record, and longest texts, so that a foreign file does not fill the memory."""


class Position(NamedTuple):
    """The place up to which a file was read. A file that replaces it mostly has another inode."""

    inode: int
    offset: int

    def __str__(self) -> str:
        return f"{self.inode}-{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The inverse of `str`; None for any other text."""
        found = re.fullmatch("([0-9]{1,30})-([0-9]{1,30})", text)
        return None if found is None else cls(int(found[1]), int(found[2]))


NOTHING = Position(0, 0)  # of a file that does not exist yet


class Curve:
    """Records by step. The last one of a step counts, and beyond `MOST_ROWS` they are thinned evenly."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Any]] = {}
        self._seen = 0
        self.every = 1  # one record in so many is kept
        self.last: dict[str, Any] | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Take a record with a key ``step``; it is kept if its step is due."""
        self.last = row
        self._seen += 1
        if (self._seen - 1) % self.every == 0:
            self._rows[int(row["step"])] = row
        if len(self._rows) > MOST_ROWS:
            self.every *= 2  # also for the steps to come, so that early and late ones are kept equally densely
            self._rows = {step: self._rows[step] for step in sorted(self._rows)[::2]}

    def rows(self) -> list[dict[str, Any]]:
        """The kept records and the last one, by rising step."""
        last = {} if self.last is None else {int(self.last["step"]): self.last}
        found = {**self._rows, **last}
        return [found[step] for step in sorted(found)]


@dataclass
class Read:
    """The content of a file, as far as it was read."""

    position: Position  # where reading stopped
    train: Curve = field(default_factory=Curve)  # steps, or rounds in the form of steps
    evals: Curve = field(default_factory=Curve)
    seconds: float = 0.0  # of all steps, as the next three
    tokens: float = 0.0
    adapter_steps: float = 0.0  # optimizer steps of all adapters of a run of many
    peak_bytes: float | None = None
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a run of many: name → numbers
    sampled_bytes: int = 0  # size of a file that was read in samples only
    unreadable: int = 0  # lines that are no records

    def notes(self) -> list[str]:
        """Notes for readers of the curves."""
        notes = []
        if self.sampled_bytes:
            notes.append(
                f"metrics.jsonl had {size(self.sampled_bytes)} when it was opened: of what was there then, the curves "
                "show pieces that are spread evenly over it."
            )
        if self.train.every > 1:
            notes.append(f"There are more steps than the curves hold: they are made of every {self.train.every}th.")
        if self.unreadable:
            notes.append(f"metrics.jsonl: {count(self.unreadable)} lines can't be read and are left out.")
        return notes

    def recorded(self) -> dict[str, float | None]:
        """Totals under the keys of `RunFiles.totals`; None where samples can't tell."""
        last, whole = self.train.last, not self.sampled_bytes and self.seconds > 0
        return {
            "steps": None if last is None else float(last["step"]),
            "seconds": self.seconds if whole else None,
            "tokens_per_second": self.tokens / self.seconds if whole and self.tokens else None,
            "peak_bytes": self.peak_bytes,
        }

    def entries(self) -> list[AdapterEntry]:
        """The adapters that have taken a step, in the order in which they began."""
        return [AdapterEntry(name, "", **numbers) for name, numbers in self.adapters.items()]

    def add(self, row: dict[str, Any]) -> None:
        """Add a record of any kind."""
        kind, adapter = get_text(row, "kind"), get_text(row, "adapter")
        if len(adapter) > _CHARACTERS:
            return
        row = {key: value for key, value in list(row.items())[:_KEYS] if _is_short(key) and _is_short(value)}
        if kind == "round" and not row.get("rank") and get_number(row, "round") is not None:
            self._add_step(round_as_step(row))
        elif get_number(row, "step") is None:
            return
        elif adapter:
            if kind == "train" and (adapter in self.adapters or len(self.adapters) < MOST_ADAPTERS):
                numbers = self.adapters.setdefault(adapter, {"train_loss_first": get_number(row, "loss")})
                numbers |= {"steps": get_number(row, "step"), "train_loss_last": get_number(row, "loss")}
        elif kind == "train":
            self._add_step(row)
        elif kind == "eval":
            self.evals.add(row)

    def _add_step(self, row: dict[str, Any]) -> None:
        self.seconds += get_number(row, "step_seconds") or 0.0
        self.tokens += get_number(row, "input_tokens") or 0.0
        # a thinned curve can't be summed up
        self.train.add(row if self.sampled_bytes else {**row, "tokens_seen": self.tokens})
        self.adapter_steps += get_number(row, "adapters") or 0.0
        if (peak := get_number(row, "peak_bytes")) is not None:
            self.peak_bytes = max(self.peak_bytes or 0.0, peak)


def _is_short(value: object) -> bool:
    return len(value) <= _CHARACTERS if isinstance(value, str) else value is None or isinstance(value, int | float)


class MetricsFile:
    """A metrics.jsonl that may grow, be replaced, damaged, or missing. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.read = Read(NOTHING)
        self._end = b""  # the last bytes that were read

    def update(self) -> Read:
        """Read what is new; a file that was replaced or cut is read from its beginning."""
        # where the disk is gone, what was read stays
        with open_plain(self._path) as descriptor, contextlib.suppress(OSError):
            if descriptor is None:
                self.read = Read(NOTHING)
                return self.read
            facts = os.fstat(descriptor)
            known = self.read.position
            # a file system may give the inode of a deleted file to the next one
            if facts.st_ino != known.inode or _before(descriptor, known.offset) != self._end:
                self.read = Read(Position(facts.st_ino, 0))
            if facts.st_size - self.read.position.offset > WHOLE_BYTES:
                self._sample(descriptor, facts.st_size)
            read = self.read
            for line, offset in whole_lines(descriptor, read.position.offset, facts.st_size):
                row = parse_metrics(line, _PLACES)
                if row is not None:
                    read.add(row)
                elif line.strip():
                    read.unreadable += 1
                read.position = Position(read.position.inode, offset)
            self._end = _before(descriptor, read.position.offset)
        return self.read

    def _sample(self, descriptor: int, end: int) -> None:
        """Read samples of a long file, and go on near its end."""
        read = self.read
        start = read.position.offset
        read.sampled_bytes = end
        stop = end - _CHUNK_BYTES
        for number in range(_SAMPLES):
            place = start + (stop - start) * number // _SAMPLES
            for row in whole_rows(descriptor, place, _SAMPLE_BYTES):
                read.add(row)
        # ordinary reading goes on with the first whole line behind the samples
        after = os.pread(descriptor, _LINE_BYTES, stop).find(b"\n")
        read.position = Position(read.position.inode, stop + after + 1)


def _before(descriptor: int, offset: int) -> bytes:
    """The bytes of a file that end at an offset; fewer where the file ends before it."""
    start = max(0, offset - _END_BYTES)
    return os.pread(descriptor, offset - start, start)


def whole_rows(descriptor: int, offset: int, size: int) -> list[dict[str, Any]]:
    """The records that lie in a piece of a file as a whole."""
    lines = os.pread(descriptor, size, offset).split(b"\n")[(1 if offset else 0) : -1]  # the first and last are cut
    return [row for line in lines if (row := parse_metrics(line, _PLACES)) is not None]


def whole_lines(descriptor: int, offset: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Complete lines between two offsets of a file, each with the offset after it.

    Of a line longer than `_LINE_BYTES` only the end is given, which no reader takes for a record.
    """
    kept = b""
    while offset < end:
        chunk = os.pread(descriptor, min(_CHUNK_BYTES, end - offset), offset)
        if not chunk:
            return
        *lines, rest = (kept + chunk).split(b"\n")
        at = offset - len(kept)
        for line in lines:
            at += len(line) + 1
            yield line, at
        offset += len(chunk)
        kept = rest if len(rest) <= _LINE_BYTES else b"x"
        if kept != rest:
            yield b"x", offset - 1  # so that its beginning is not read again


@dataclass(frozen=True)
class News:
    """The part of a metrics.jsonl that is new since a position."""

    position: Position  # where the next look begins
    records: list[dict[str, Any]]  # steps, rounds and evaluations of the whole run
    is_other: bool = False  # the file was replaced, or has too much new to send


def news_since(path: Path, position: Position) -> News:
    """Look at the file once; it may be missing."""
    with open_plain(path) as descriptor, contextlib.suppress(OSError):
        if descriptor is None:
            return News(NOTHING, [], is_other=position != NOTHING)
        facts = os.fstat(descriptor)
        now = Position(facts.st_ino, facts.st_size)
        if position == NOTHING:
            position = Position(facts.st_ino, 0)
        if now.inode != position.inode or not 0 <= now.offset - position.offset <= MOST_NEW_BYTES:
            return News(now, [], is_other=True)
        records, offset = [], position.offset
        for line, offset in whole_lines(descriptor, position.offset, now.offset):  # noqa: B007
            row = parse_metrics(line, _PLACES)
            kind = "" if row is None else get_text(row, "kind")
            # not those of a single adapter of many, of which there can be thousands
            if row is None or kind not in ("train", "eval", "round") or get_text(row, "adapter") or row.get("rank"):
                continue
            numbers = {key[:64]: get_number(row, key) for key in list(row)[:_KEYS]}
            records.append({"kind": kind, **{key: value for key, value in numbers.items() if value is not None}})
        return News(Position(now.inode, offset), records)
    return News(position, [])
