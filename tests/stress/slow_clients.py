"""Clients that keep connections busy."""

from __future__ import annotations

import socket

KINDS = ("sends nothing", "half a head", "half a body", "reads nothing")


class SlowClient:
    """One that keeps a connection busy; ``kind``: one of `KINDS`."""

    def __init__(self, kind: str, port: int, body: bytes) -> None:
        """``body``: of a right request of /v1/completions."""
        self.kind, self._port, self._body = kind, port, body
        self.opened = 0
        self._socket: socket.socket | None = None

    def go_on(self, *, come_back: bool = True) -> bool:
        """Send one more byte, or come back where the server has let it go; returns whether it has a connection."""
        if self._socket is None:
            if come_back:
                self._open()
            return come_back
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
        return self._socket is not None

    def _open(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket.connect(("127.0.0.1", self._port))
        self.opened += 1
        host = b"Host: localhost\r\n"
        if self.kind == "half a head":
            self._socket.sendall(b"POST /v1/completions HTTP/1.1\r\n" + host + b"X-Long: ")
        elif self.kind == "half a body":
            self._socket.sendall(b"POST /v1/completions HTTP/1.1\r\n" + host + b"Content-Length: 100000\r\n\r\n{")
        elif self.kind == "reads nothing" and self.opened % 2:
            self._socket.sendall((b"GET /openapi.json HTTP/1.1\r\n" + host + b"\r\n") * 400)
        elif self.kind == "reads nothing":
            length = b"Content-Length: %d\r\n\r\n" % len(self._body)
            self._socket.sendall(b"POST /v1/completions HTTP/1.1\r\n" + host + length + self._body)
