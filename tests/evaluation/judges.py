"""Servers of models that judge."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

from qvera.utils.errors import RunFailed


class Server:
    """A server of OpenAI's API whose models answer by a function."""

    def __init__(self, reply: Callable[[str], str], models: list[str]) -> None:
        self.reply, self.models = reply, models
        self.bodies: list[dict[str, Any]] = []
        self.url = ""


@contextlib.contextmanager
def serving(reply: Callable[[str], str], *models: str) -> Iterator[Server]:
    server = Server(reply, list(models) or ["judge"])

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": name} for name in server.models]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.bodies.append(body)
            try:
                text = server.reply(body["messages"][0]["content"])
            except RunFailed as error:
                self._send(500, json.dumps({"error": {"message": str(error)}}))
                return
            event = json.dumps({"choices": [{"delta": {"content": text}}]})
            self._send(200, f"data: {event}\n\ndata: [DONE]\n\n")

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
