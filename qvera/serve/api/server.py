"""uvicorn with two additions: silent or slow peers are disconnected, and running calls may finish after SIGTERM.

Plain uvicorn waits forever for a request's head, and for a peer that does not read its answer.
"""

import asyncio
import contextlib
import errno
import json
import math
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from qvera.serve.api.access import Limits
from qvera.utils.errors import InputError

T = TypeVar("T")
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\nContent-Type: application/json\r\n\r\n"
    b'{"error": {"message": "The server has as many connections as it takes; ask again later.", '
    b'"type": "server_error", "param": null, "code": "too_many_connections"}}'
)


class Connection(H11Protocol):
    """One connection; there are at most ``Limits.connections``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits: Limits = self.config.app.state.service.limits  # type: ignore[union-attr]
        self._waits_since = time.monotonic()
        """When it began to wait for a request."""
        self._gives_way = False  # it closes as soon as the event loop reaches it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection. If there are too many, the one that has waited longest for a whole request is closed."""
        super().connection_made(transport)
        # those that give way stay in the set until the event loop has reached them
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
        """Whether nothing can be answered yet: the head is missing, or the body is not complete."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def end_if_silent(self, now: float) -> None:
        """Close it if no request head came in time (``now``: `time.monotonic`). Bodies have a limit of their own."""
        has_head = self.cycle is not None and not self.cycle.response_complete
        if not has_head and now - self._waits_since > self._limits.head_seconds and not self.transport.is_closing():
            self.transport.close()


_CLOSE_SECONDS = 2  # for connections still open after the drain


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """Bind an address before anything big is loaded. Yields the socket, which does not listen yet, and its URL.

    Raises InputError if it can't be bound.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, port))
        except OSError as error:
            fix = " Another program listens there: choose another --port." if error.errno == errno.EADDRINUSE else ""
            raise InputError(f"--host {host} --port {port}: can't be taken ({error.strerror or error}).{fix}") from None
        shown = f"[{host}]" if ":" in host else host
        yield taken, f"http://{shown}:{taken.getsockname()[1]}"


class Server(uvicorn.Server):
    """Serves an app: ``run(sockets=[...])``.

    After SIGTERM or Ctrl-C, new calls get 503 and running ones may finish within a time. A second signal ends them.
    """

    def __init__(
        self,
        app: Starlette,
        *,
        log_calls: bool = False,
        on_start: Callable[[], None] | None = None,
        on_stop: Callable[[int], None] | None = None,
    ) -> None:
        """``on_start`` is called once the server takes calls, ``on_stop`` with the running calls once it drains."""
        self._on_start, self._on_stop = on_start, on_stop
        self.service = app.state.service  # with ``limits``, ``running`` (calls in progress) and ``draining``
        self.drained_at: float | None = None  # the latest end (`time.monotonic`), once it drains
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
        """Begin to listen, with a time limit for peers that take nothing."""
        for listener in sockets or ():
            # the system ends a connection whose peer takes nothing of what it is sent for so long
            milliseconds = round(self.service.limits.send_seconds * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        await super().startup(sockets)
        if self._on_start is not None:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at the second signal, stop."""
        if self.drained_at is not None:
            self.force_exit = self.should_exit  # a signal after that ends open connections at once
            self.drained_at = time.monotonic()
            return
        self.drained_at = time.monotonic() + self.service.limits.drain_seconds
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True stops the server."""
        if counter % 10 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.end_if_silent(now)
        # Here, and not in the handler of the signal, which may have come in the middle of another line.
        if self.drained_at is not None and self._on_stop is not None:
            self._on_stop(self.service.running)
            self._on_stop = None
        if self.drained_at is not None and not self.should_exit:
            is_late = time.monotonic() >= self.drained_at
            if self.service.running and is_late:  # its calls end with an error, and not with a cut connection
                await asyncio.to_thread(self.service.end_answers)
            self.should_exit = is_late or not self.service.running
        return await super().on_tick(counter)


class EventStream(StreamingResponse):
    """A stream of server-sent events. It ends when the client disconnects, or takes nothing (`Limits.send_seconds`)."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        """``events``: bytes to send; ``close`` is called at the end in any case."""
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until they end or the client goes."""
        try:
            with contextlib.suppress(ClientGone):
                await while_connected(receive, self.stream_response(send))
        finally:
            self._close()


def sse(data: object, name: str = "", id: str = "") -> bytes:
    """The bytes of one server-sent event. A reader that reconnects sends the last ``id`` back."""
    # data is one line whatever a text holds: JSON escapes line breaks, and ASCII has no other ones
    fields = {"event": name, "id": id, "data": json.dumps(data, separators=(",", ":"))}
    return "".join(f"{key}: {value}\n" for key, value in fields.items() if value).encode() + b"\n"


class ClientGone(Exception):
    """The client has closed its connection."""


def announces_more(headers: Headers, most: int) -> bool:
    """Whether a call's head announces a body of more than ``most`` bytes."""
    length = headers.get("content-length", "")
    return length.isdecimal() and (len(length) > 18 or int(length) > most)  # `int` refuses thousands of digits


async def read_body(receive: Receive, enough: int, seconds: float) -> tuple[bytes, bool]:
    """Read a body until it has ``enough`` bytes or ends. Returns what came, and whether there is more.

    Raises TimeoutError if that takes longer than ``seconds``, and ClientGone if the client disconnects.
    """
    body, more = bytearray(), True
    async with asyncio.timeout(seconds):
        while more and len(body) < enough:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            more = message.get("more_body", False)
    return bytes(body), more


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, and cancel it and raise ClientGone if the client disconnects. The body must have been read."""

    async def wait_until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(wait_until_gone())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
