"""The Starlette app of `qvera ui`: read-only pages, their style and scripts, and events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from qvera.evaluation import report
from qvera.serve.api.access import Limits, is_of_other_site, is_own_name
from qvera.serve.api.server import EventStream
from qvera.serve.ui.directories import RunDirectories
from qvera.serve.ui.events import LOOK_SECONDS, list_events, run_events
from qvera.serve.ui.metrics import NOTHING, Position
from qvera.serve.ui.pages import Finder, Pages, list_signature, run_href
from qvera.serve.ui.views import SIGNED, NotFound, Summaries, Views, signature_of, stamps_of
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_STREAMS = 200  # event streams at a time
_QUERY_CHARACTERS = 16_384
_HEADERS = {
    # texts of runs are escaped; should markup ever get in, it can load and run nothing
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_LOOK = {
    "style.css": Path(report.__file__).with_name("style.css"),
    "script.js": Path(report.__file__).with_name("script.js"),
    "ui.css": Path(__file__).with_name("ui.css"),
    "live.js": Path(__file__).with_name("live.js"),
}  # name in /look/ → file; no other file is sent
_TYPES = {".css": "text/css", ".js": "text/javascript"}


@dataclass
class Service:
    """The server's state; `qvera.serve.api.server.Server` reads limits, running and draining."""

    place: str  # what the command line names, for the list's heading
    directories: RunDirectories
    limits: Limits = field(default_factory=lambda: Limits(drain_seconds=0.0))
    running: int = 0
    draining: bool = False
    streams: int = 0
    _listed: tuple[float, str] = (0.0, "")
    """When the list was last read for event streams, and its signature then."""

    def __post_init__(self) -> None:
        self.summaries = Summaries(self.directories)
        self.views = Views(self.directories)
        self.pages = Pages(self.place, self.directories, self.summaries, self.views)

    def list_signature(self) -> str:
        """Changes with the shown list of runs. It is computed once for all who ask at about the same time."""
        now = time.monotonic()
        if now - self._listed[0] > LOOK_SECONDS / 2:
            self._listed = now, list_signature(self.summaries.list())
        return self._listed[1]

    def run_signature(self, id: str) -> str:
        """Changes with a run's state and files, except metrics.jsonl, whose records are sent."""
        directory = self.directories.get(id)
        if directory is None:
            return ""
        return signature_of(self.summaries.state(id, directory), stamps_of(directory, *SIGNED))


def create_app(places: Sequence[Path], listens_on: str = "127.0.0.1") -> Starlette:
    """The app over runs, or directories of runs; ``app.state.service`` is its state.

    Raises InputError if a place is no directory.
    """
    routes = [
        Route("/", _runs),
        Route("/run/{id:path}", _run),
        Route("/adapter/{id:path}", _adapter),
        Route("/compare", _compare),
        Route("/events/runs", _list_events),
        Route("/events/run/{id:path}", _run_events),
        Route("/look/{name}", _look),
        Route("/health", _health),
    ]
    handlers = {NotFound: _not_found, InputError: _wrong_input, HTTPException: _http, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service = Service(" ".join(map(str, places)), RunDirectories(places))
    app.add_middleware(Guard, service=app.state.service, listens_on=listens_on)
    return app


class Guard:
    """ASGI middleware. Refuses other sites' pages and overlong calls, and adds security headers."""

    def __init__(self, app: ASGIApp, service: Service, listens_on: str) -> None:
        self.app, self.service, self.listens_on = app, service, listens_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one call through, or answer why not."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        self.service.running += 1
        try:
            refusal = self._refusal(scope)
            await (self.app if refusal is None else refusal)(scope, receive, guarded)
        finally:
            self.service.running -= 1

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not is_own_name(host, self.listens_on):
            return _text(403, f"The host {host[:200]!r} is not this machine's own name. Use localhost, or an address.")
        if is_of_other_site(host, headers.get("origin")):
            return _text(403, "Pages of other sites may not read this server.")
        if len(scope["query_string"]) > _QUERY_CHARACTERS:
            return _text(414, f"The address has more than {_QUERY_CHARACTERS:,} characters after its question mark.")
        return None


def _text(status: int, text: str) -> Response:
    return PlainTextResponse(text.encode(errors="replace").decode() + "\n", status)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _finder(request: Request, action: str) -> Finder:
    asked = request.query_params
    page = asked.get("page", "")
    number = int(page) if page.isascii() and page.isdecimal() and len(page) < 8 else 0
    return Finder(action, asked.get("q", "")[:200], asked.get("flagged") == "1", number)


def _runs(request: Request) -> Response:
    return HTMLResponse(_service(request).pages.runs(_finder(request, "/")))


def _run(request: Request) -> Response:
    id = request.path_params["id"]
    return HTMLResponse(_service(request).pages.run(id, _finder(request, run_href(id))))


def _adapter(request: Request) -> Response:
    name = request.query_params.get("name", "")
    return HTMLResponse(_service(request).pages.adapter(request.path_params["id"], name))


def _compare(request: Request) -> Response:
    asked = request.query_params
    return HTMLResponse(_service(request).pages.compare(asked.getlist("run"), asked.getlist("adapter")))


async def _list_events(request: Request) -> Response:
    return _stream(request, lambda service: list_events(service, request.query_params.get("seen", "")))


async def _run_events(request: Request) -> Response:
    # a reader that comes again says what it has seen last; the first time, its page does
    text = request.headers.get("last-event-id") or request.query_params.get("from", "")
    position = Position.parse(text) or NOTHING
    seen = request.query_params.get("seen", "")
    return _stream(request, lambda service: run_events(service, request.path_params["id"], position, seen))


def _stream(request: Request, events: Callable[[Service], AsyncIterator[bytes]]) -> Response:
    service = _service(request)
    if service.draining or service.streams >= MOST_STREAMS:
        return _text(503, f"{MOST_STREAMS} readers hear of news already; reload the page instead.")
    service.streams += 1

    def close() -> None:
        service.streams -= 1

    return EventStream(events(service), close)


def _look(request: Request) -> Response:
    file = _LOOK.get(request.path_params["name"])
    if file is None:
        raise HTTPException(404)
    return Response(file.read_bytes(), media_type=_TYPES[file.suffix])


async def _health(request: Request) -> Response:
    return PlainTextResponse("ok\n")


def _refused(request: Request, status: int, title: str, *reasons: str) -> Response:
    return HTMLResponse(_service(request).pages.refused(title, reasons), status)


def _not_found(request: Request, error: Exception) -> Response:
    return _refused(request, 404, "Not found", str(error))


def _wrong_input(request: Request, error: Exception) -> Response:
    return _refused(request, 400, "Not shown", str(error))


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _refused(request, 404, "Not found", "There is no such page.")
    return PlainTextResponse(f"{error.detail}\n", error.status_code, headers=error.headers)


def _failed(request: Request, error: Exception) -> Response:
    return _text(500, "The server failed; its log says why.")
