"""uvicorn, with a SIGTERM that lets running calls finish."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import uvicorn

from qvera.serve.api.connections import Connection, end_silent, end_those_that_do_not_read
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from qvera.serve.api.limits import Limits

_CLOSE_SECONDS = 2
"""For connections that are still open when the drain ends."""


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """Take an address, before anything big is loaded; yields its socket and its URL. It does not listen yet.

    Raises:
        InputError: it can't be taken.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, port))
        except OSError as error:
            raise InputError(f"--host {host} --port {port}: can't be taken ({error.strerror or error}).") from None
        shown = f"[{host}]" if ":" in host else host
        yield taken, f"http://{shown}:{taken.getsockname()[1]}"


class ServerState(Protocol):
    """What a server knows of its app, as ``app.state.service``.

    Attributes:
        running: calls that are being answered.
        draining: the server stops, and takes no new calls.
    """

    limits: Limits
    running: int
    draining: bool


class Server(uvicorn.Server):
    """Serves an app: ``run(sockets=[...])``.

    SIGTERM or Ctrl-C: new calls get 503, running ones finish within a time; a second one ends them.

    Attributes:
        service: the app's.
        drained_at: when it stops at the latest (`time.monotonic`); None while it serves.
    """

    def __init__(self, app: Starlette, *, log_calls: bool = False, on_start: Callable[[], None] | None = None) -> None:
        """``on_start``: called once calls are taken."""
        self._on_start = on_start
        self.service: ServerState = app.state.service
        self.drained_at: float | None = None
        super().__init__(
            uvicorn.Config(
                app,
                log_level="info" if log_calls else "warning",
                access_log=log_calls,
                server_header=False,
                http=Connection,
                ws="none",
                timeout_keep_alive=math.ceil(self.service.limits.head_seconds),
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        for listener in sockets or ():
            end_those_that_do_not_read(listener, self.service.limits.send_seconds)
        await super().startup(sockets)
        if self._on_start is not None:
            self._on_start()

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
        if counter % 10 == 0:
            end_silent(self.server_state.connections)
        if self.drained_at is not None and (not self.service.running or time.monotonic() >= self.drained_at):
            self.should_exit = True
        return await super().on_tick(counter)
