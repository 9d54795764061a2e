"""Servers: `qvera serve` as a process, and an app in a thread."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from qvera.serve.api.server import Server, bound
from tests.helpers import start_process, wait_until


@contextlib.contextmanager
def running(app: Any, send_buffer_bytes: int | None = None) -> Iterator[tuple[Server, str, int]]:
    """A server of an app, its address and its port; ``send_buffer_bytes`` of every connection."""
    server = Server(app)
    with bound("127.0.0.1", 0) as (listener, url):
        if send_buffer_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield server, url, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def _serve(log: str, arguments: tuple[str, ...], save_steps: int) -> None:
    from qvera.cli.main import main
    from qvera.serve.fine_tuning import worker

    worker._SAVE_STEPS = save_steps
    with open(log, "wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    port = [] if "--port" in arguments else ["--port", "0"]
    sys.exit(main(["serve", *port, *arguments]))


class Command:
    """A running `qvera serve`, and calls to it. A context that is left without an error expects that it ended well."""

    def __init__(self, *arguments: str, save_steps: int = 100) -> None:
        """``save_steps``: after so many steps a job is saved."""
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.process = start_process(_serve, self._log.name, arguments, save_steps)
        wait_until(lambda: " at http" in self.said or not self.process.is_alive())
        found = re.search(r"at (http://\S+)/v1", self.said)
        assert found is not None, self.said
        self.url = found[1]

    @property
    def said(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def send_signal(self, number: int) -> None:
        if self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, number)

    def wait(self) -> int | None:
        """For the end; returns the exit code."""
        self.process.join(60)
        return self.process.exitcode

    def stop(self, number: int = signal.SIGTERM) -> int | None:
        self.send_signal(number)
        return self.wait()

    def post(self, path: str, body: dict[str, Any], **settings: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **settings)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        code = self.stop()
        assert kind is not None or (code == 0 and "Traceback" not in self.said), self.said
