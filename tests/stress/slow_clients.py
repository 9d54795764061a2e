"""Clients that keep connections busy."""

from __future__ import annotations

import socket

KINDS = ("sends nothing", "half a head", "half a body", "reads nothing")
_POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
_GET = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"


class SlowClient:
    """One that keeps a connection busy; ``kind``: one of `KINDS`, ``body``: of a right request of /v1/completions."""

    def __init__(self, kind: str, port: int, body: bytes) -> None:
        self.kind, self._port, self.opened = kind, port, 0
        self._begins = {
            "sends nothing": [b""],
            "half a head": [_POST + b"X-Long: "],
            "half a body": [_POST + b"Content-Length: 100000\r\n\r\n{"],
            "reads nothing": [_POST + b"Content-Length: %d\r\n\r\n" % len(body) + body, _GET * 400],
        }[kind]
        self._socket: socket.socket | None = None

    def go_on(self, *, come_back: bool = True) -> None:
        """Send one more byte, or come back where the server has let it go."""
        if self._socket is None:
            if come_back:
                self._open()
            return
        try:
            if self.kind.startswith("half"):
                self._socket.sendall(b"x")
            elif self.kind == "sends nothing" and self._socket.recv(1, socket.MSG_DONTWAIT) == b"":
                raise ConnectionResetError
            elif self.kind == "reads nothing":
                self._socket.sendall(b"\r\n")  # nothing is asked by it
        except BlockingIOError:
            pass
        except OSError:
            self._socket.close()
            self._socket = None

    def _open(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket.connect(("127.0.0.1", self._port))
        self.opened += 1
        self._socket.sendall(self._begins[self.opened % len(self._begins)])
