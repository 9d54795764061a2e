"""uvicorn, with a SIGTERM that lets running calls finish."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from qvera.serve.api.service import Service

_KEEP_ALIVE_SECONDS = 15
_CLOSE_SECONDS = 2
"""For connections that are still open when the drain ends."""


class Server(uvicorn.Server):
    """Serves an app. SIGTERM or Ctrl-C: new calls get 503, running ones finish within a time; a second one ends them.

    Attributes:
        service: the app's.
        drained_at: when it stops at the latest (`time.monotonic`); None while it serves.
    """

    def __init__(self, app: FastAPI, host: str, port: int, *, log_calls: bool = False) -> None:
        self.service: Service = app.state.service
        self.drained_at: float | None = None
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="info" if log_calls else "warning",
                access_log=log_calls,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        """Take the address; yields its URL.

        Raises:
            InputError: it can't be taken.
        """
        config = self.config
        try:
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            listener = socket.create_server((config.host, config.port), family=family, backlog=config.backlog)
        except OSError as error:
            raise InputError(
                f"--host {config.host} --port {config.port}: can't be listened on ({error.strerror or error})."
            ) from None
        with listener:
            self._listener = listener
            host = f"[{config.host}]" if ":" in config.host else config.host
            yield f"http://{host}:{listener.getsockname()[1]}"

    def serve_until_stopped(self) -> None:
        """Serve at the address of `listening`; returns when a signal has stopped it and running calls have ended."""
        self.run(sockets=[self._listener])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at the second signal, stop."""
        if self.drained_at is not None:
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        self.drained_at = time.monotonic() + self.service.limits.drain_seconds
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True: stop."""
        if self.drained_at is not None and (not self.service.running or time.monotonic() >= self.drained_at):
            self.should_exit = True
        return await super().on_tick(counter)
