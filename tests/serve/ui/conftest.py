"""A real server of `qvera ui` over made-up runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.serve.api.server import Server
from qvera.serve.ui.app import Service, create_app
from qvera.utils.files import RUN_OWNER
from tests.evaluation.report.conftest import build_run  # noqa: F401
from tests.serve.command import running


@dataclasses.dataclass
class Served:
    """A running server."""

    url: str
    port: int
    service: Service
    server: Server

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=30)

    def raw(self, target: bytes, method: bytes = b"GET") -> bytes:
        """The whole answer to a request whose target is sent as it is."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(method + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def look_again(self) -> None:
        """For new and deleted runs, at the next call."""
        self.service.directories._scanned_at = None


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start servers over directories."""
    with contextlib.ExitStack() as ending:

        def start(*places: Path) -> Served:
            app = create_app(places)
            server, url, port = ending.enter_context(running(app))
            ending.callback(setattr, app.state.service, "draining", True)
            return Served(url, port, app.state.service, server)

        yield start


def begin(run: Path, **info: Any) -> Path:
    """Let a made-up run be one that this very process trains."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": "2999-01-01T00:00:00+00:00"}
    (run / RUN_OWNER).write_text(json.dumps(owner))
    if info:
        (run / "run.json").write_text(json.dumps(info))
    return run


def append(run: Path, *rows: dict[str, Any]) -> None:
    """Write records as the trainer does."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(row) + "\n" for row in rows))
