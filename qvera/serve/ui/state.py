"""Whether a run goes on: by what its process and its run.json say."""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil

from qvera.evaluation.report.read import get_number, get_text
from qvera.serve.ui.directories import open_plain
from qvera.utils.paths import RUN_OWNER

State = Literal["running", "finished", "interrupted", "failed", "killed", "unreadable"]
"""``killed``: it has no end in its files, and no process that could write one."""

_ENDED: dict[str, State] = {"done": "finished", "interrupted": "interrupted", "failed": "failed"}
_CLOCK_SECONDS = 5.0
"""A process begins before it says since when it trains; so much may the clocks of the two differ."""


def state_of(directory: Path, status: str) -> State:
    """The state of a run whose run.json has this status ("" where there is none).

    A resumed run still has the run.json of its first part for a moment, so its process is asked first.
    """
    if _has_process(directory):
        return "running"
    return _ENDED.get(status, "killed")


def _has_process(directory: Path) -> bool:
    """Whether the process that the directory names as its owner is there; one of another machine counts as there."""
    owner = _read_owner(directory / RUN_OWNER)
    if owner is None:
        return False
    pid, host = get_number(owner, "pid"), get_text(owner, "host")
    if host != socket.gethostname():
        return bool(host)
    if pid is None or not 0 < pid < 2**31:
        return False
    try:
        began = psutil.Process(int(pid)).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
    try:
        return began < datetime.fromisoformat(get_text(owner, "started")).timestamp() + _CLOCK_SECONDS
    except (ValueError, OverflowError):
        return True


def _read_owner(path: Path) -> dict[str, object] | None:
    descriptor = open_plain(path)
    if descriptor is None:
        return None
    try:
        found = json.loads(os.read(descriptor, 4096))
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        os.close(descriptor)
    return found if isinstance(found, dict) else None
