"""A real server of `qvera ui` over made-up runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.serve.api.server import Server, bound
from qvera.serve.ui.app import Service, create_app
from qvera.utils.paths import RUN_OWNER
from tests.evaluation.report.conftest import build_run  # noqa: F401
from tests.helpers import wait_until


@dataclasses.dataclass
class Served:
    """A running server."""

    url: str
    port: int
    service: Service
    server: Server

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=30)

    def raw(self, target: bytes, host: bytes = b"localhost", method: bytes = b"GET") -> bytes:
        """The whole answer to a request whose target is sent as it is."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(
                method + b" " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
            )
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start servers over directories."""
    ending = contextlib.ExitStack()

    def start(*places: Path) -> Served:
        app = create_app(places)
        server = Server(app)
        listener, url = ending.enter_context(bound("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        wait_until(lambda: server.started)

        def stop() -> None:
            app.state.service.draining = server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

        ending.callback(stop)
        return Served(url, listener.getsockname()[1], app.state.service, server)

    yield start
    ending.close()


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
