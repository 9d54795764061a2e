"""Server-sent events: a run's new records, or that the list of runs has changed."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from qvera.evaluation.report.read import get_number, get_text, parse_row
from qvera.serve.ui.directories import open_plain
from qvera.serve.ui.metrics import NOTHING, Position, whole_lines

if TYPE_CHECKING:
    from qvera.serve.ui.app import Service

LOOK_SECONDS = 1.0  # between two looks at a run's files
HEARTBEAT_SECONDS = 15.0
"""A quiet stream sends a comment, so that a lost reader is noticed, by proxies too."""
MOST_NEW_BYTES = 1 << 20
"""A reader that is further behind gets no records; it is told to reload the page."""
_END_SECONDS = 0.2  # a stream ends this soon after the server is asked to stop


@dataclass(frozen=True)
class News:
    """What is new in a metrics.jsonl since a position."""

    position: Position  # where the next look begins
    records: list[dict[str, Any]]  # steps, rounds and evaluations of the whole run
    is_other: bool = False  # the file was replaced, or has too much new to send


def news_since(path: Path, position: Position) -> News:
    """Look at the file once; it may be missing."""
    descriptor = open_plain(path)
    if descriptor is None:
        return News(NOTHING, [], is_other=position != NOTHING)
    try:
        facts = os.fstat(descriptor)
        now = Position(facts.st_ino, facts.st_size)
        if position == NOTHING:
            position = Position(facts.st_ino, 0)
        if now.inode != position.inode or now.offset < position.offset or now.offset - position.offset > MOST_NEW_BYTES:
            return News(now, [], is_other=True)
        lines = list(whole_lines(descriptor, position.offset, now.offset))
        rows = (parse_row(line, ("step", "round")) for line, _ in lines)
        records = [numbers for row in rows if row is not None and (numbers := _numbers(row))]
        return News(Position(now.inode, lines[-1][1] if lines else position.offset), records)
    except OSError:
        return News(position, [])
    finally:
        os.close(descriptor)


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A record's kind and numbers; {} for one of a single adapter of many, of which there can be thousands."""
    kind = get_text(row, "kind")
    if kind not in ("train", "eval", "round") or get_text(row, "adapter") or row.get("rank"):
        return {}
    found = {key[:64]: get_number(row, key) for key in list(row)[:64]}
    return {"kind": kind, **{key: value for key, value in found.items() if value is not None}}


def event(name: str, data: object, id: str = "") -> bytes:
    """The bytes of one event. A reader that reconnects sends the last ``id`` back."""
    lines = [f"event: {name}", *([f"id: {id}"] if id else []), f"data: {json.dumps(data)}"]
    return ("\n".join(lines) + "\n\n").encode()


async def run_events(service: Service, id: str, position: Position, seen: str) -> AsyncIterator[bytes]:
    """Sends ``records`` (new ones), ``changed`` (reload the page), or ``gone`` (there is no such run any more).

    Args:
        position: how far the reader knows metrics.jsonl.
        seen: the signature of the other files that it knows.
    """
    async for due in _looks(service):
        if due is not None:
            yield due
            continue
        directory = await run_in_threadpool(service.directories.get, id)
        if directory is None:
            yield event("gone", {})
            return
        news = await run_in_threadpool(news_since, directory / "metrics.jsonl", position)
        position = news.position
        if news.records:
            yield event("records", {"records": news.records}, str(position))
        now = await run_in_threadpool(service.run_signature, id)
        if news.is_other or now != seen:
            seen = now
            yield event("changed", {}, str(position))


async def list_events(service: Service, seen: str) -> AsyncIterator[bytes]:
    """Sends ``changed`` whenever the list of runs differs from what the reader has ``seen``."""
    async for due in _looks(service):
        if due is not None:
            yield due
            continue
        now = await run_in_threadpool(service.list_signature)
        if now != seen:
            seen = now
            yield event("changed", {})


async def _looks(service: Service) -> AsyncIterator[bytes | None]:
    """Gives bytes to send (heartbeats), or None when it is time to look. Ends when the server stops."""
    yield b"retry: 2000\n\n"
    beat = look = time.monotonic()
    while not service.draining:
        now = time.monotonic()
        if now >= look:
            yield None
            look = time.monotonic() + LOOK_SECONDS
        if now >= beat + HEARTBEAT_SECONDS:
            beat = now
            yield b": here\n\n"
        await asyncio.sleep(_END_SECONDS)
