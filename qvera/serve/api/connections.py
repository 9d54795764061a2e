"""Connections of peers that ask nothing or take nothing: each ends in its time, and when all places are taken.

uvicorn by itself waits for ever for a request's head, and for a peer that does not read its answer.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

    from qvera.serve.api.limits import Limits

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Type: application/json\r\n\r\n"
    b'{"error": {"message": "The server has as many connections as it takes; ask again later.", '
    b'"type": "server_error", "param": null, "code": "too_many_connections"}}'
)


class Connection(H11Protocol):
    """One peer's connection; counts among ``connections``, which all share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits: Limits = self.config.app.state.service.limits  # type: ignore[union-attr]
        self._waits_since = time.monotonic()
        """For a request, since the last answer or the beginning."""
        self._gives_way = False
        """It is gone as soon as the event loop comes to it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it; where there are too many, the one that has waited longest for a whole request gives way to it."""
        super().connection_made(transport)
        if len(self.connections) <= self._limits.connections:
            return
        staying = [one for one in self.connections if isinstance(one, Connection) and not one._gives_way]
        if len(staying) <= self._limits.connections:
            return
        waiting = [one for one in staying if one._has_no_request and one is not self]
        if waiting:
            oldest = min(waiting, key=lambda one: one._waits_since)
            oldest._gives_way = True
            oldest.transport.abort()
            return
        self._gives_way = True
        transport.write(_FULL)
        transport.close()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, which may be there already."""
        self._waits_since = time.monotonic()
        super().on_response_complete()

    @property
    def _has_no_request(self) -> bool:
        """Whether nothing can be answered yet: not even a head is there, or the body is not whole."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def end_if_silent(self, now: float) -> None:
        """Close it if no head of a request has come in its time; a body has a time of its own.

        Args:
            now: `time.monotonic`.
        """
        has_head = self.cycle is not None and not self.cycle.response_complete
        if not has_head and now - self._waits_since > self._limits.head_seconds and not self.transport.is_closing():
            self.transport.close()


def end_silent(connections: Iterable[object]) -> None:
    """Close all that have been silent for too long."""
    now = time.monotonic()
    for connection in list(connections):
        if isinstance(connection, Connection):
            connection.end_if_silent(now)


def end_those_that_do_not_read(listener: socket.socket, seconds: float) -> None:
    """Have the system end each connection to ``listener`` whose peer takes nothing of what it is sent for so long."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))
