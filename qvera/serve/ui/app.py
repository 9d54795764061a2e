"""The Starlette app of `qvera ui`: read-only pages, their look, server-sent events, and the form of --train."""

import asyncio
import hmac
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvera.evaluation import report
from qvera.serve.api.access import Limits, is_of_other_site, is_own_name
from qvera.serve.api.server import EventStream, sse
from qvera.serve.ui.directories import RunDirectories
from qvera.serve.ui.metrics import NOTHING, Position, news_since
from qvera.serve.ui.pages import Finder, Pages, list_signature, run_href
from qvera.serve.ui.start import FIELDS, Starter
from qvera.serve.ui.views import NotFound, Summaries
from qvera.utils.errors import InputError

MOST_STREAMS = 200  # event streams at a time
LOOK_SECONDS = 1.0  # between two looks at a run's files
HEARTBEAT_SECONDS = 15.0
"""A quiet stream sends a comment, so that a lost reader is noticed, by proxies too."""
_END_SECONDS = 0.2  # a stream ends this soon after the server is asked to stop
_QUERY_CHARACTERS = 16_384
_HEADERS = {
    # texts of runs are escaped; should markup ever get in, it can load and run nothing
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # under no-referrer, browsers send forms without their origin
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


class Service:
    """The server's state; `qvera.serve.api.server.Server` reads limits, running and draining."""

    def __init__(self, places: Sequence[Path]) -> None:
        """Raises InputError if a place is no directory."""
        self.directories = RunDirectories(places)
        self.summaries = Summaries(self.directories)
        self.pages = Pages(" ".join(map(str, places)), self.directories, self.summaries)
        self.limits, self.draining = Limits(drain_seconds=0.0), False
        self.running = self.streams = 0
        self._listed = 0.0, ""
        """When the list was last read for event streams, and its signature then."""

    def end_answers(self) -> None:
        """Do nothing: pages take no time."""

    def list_signature(self) -> str:
        """Return a hash that changes with the list of runs. Those who ask at about the same time share one look."""
        now = time.monotonic()
        if now - self._listed[0] > LOOK_SECONDS / 2:
            self._listed = now, list_signature(self.summaries.list())
        return self._listed[1]


def create_app(places: Sequence[Path], listens_on: str = "127.0.0.1", trains: bool = False) -> Starlette:
    """Make the app over runs, or directories of runs; ``app.state.service`` is its state.

    ``trains``: those who know the key of ``service.pages.starter`` may start runs in the first of the places.
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
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys((NotFound, InputError, HTTPException), _refused))
    app.add_exception_handler(Exception, lambda _, error: _text(500, "The server failed; its log says why."))
    service = app.state.service = Service(places)
    if trains:
        forms = {"/new": _new, "/recipe/{name}": _recipe}
        app.router.routes += [Route(path, answer, methods=["GET", "POST"]) for path, answer in forms.items()]
        service.pages.starter = Starter(places[0], service.directories)
    app.add_middleware(Guard, service=service, listens_on=listens_on)
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
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host = headers.get("host", "")
        app: ASGIApp = self.app
        if not is_own_name(host, self.listens_on):
            app = _text(403, f"The host {host[:200]!r} is not this machine's own name. Use localhost, or an address.")
        elif is_of_other_site(host, headers.get("origin")):
            app = _text(403, "Pages of other sites may not read this server.")
        elif len(scope["query_string"]) > _QUERY_CHARACTERS:
            app = _text(414, f"The address has more than {_QUERY_CHARACTERS:,} characters after its question mark.")
        self.service.running += 1
        try:
            await app(scope, receive, guarded)
        finally:
            self.service.running -= 1


def _text(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status)


def _service(request: Request) -> Service:
    return request.app.state.service  # type: ignore[no-any-return]


def _refused(request: Request, error: Exception) -> Response:
    """A page that says why there is none."""
    status, title, reason = 404, "Not found", str(error)
    if isinstance(error, InputError):
        status, title = 400, "Not shown"
    elif isinstance(error, HTTPException):
        if error.status_code != 404:
            return PlainTextResponse(f"{error.detail}\n", error.status_code, headers=error.headers)
        reason = "There is no such page."
    return HTMLResponse(_service(request).pages.refused(title, [reason], request.path_params.get("id", "")), status)


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


async def _asked(request: Request) -> tuple[Starter, dict[str, str]]:
    """Return the starter, and the form's values. Raises HTTPException 403 without the key."""
    starter = _service(request).pages.starter
    assert starter is not None  # the routes are there only with it
    if not hmac.compare_digest(request.query_params.get("key", "").encode(), starter.key.encode()):
        raise HTTPException(403, "Open the address that `qvera ui --train` printed: it has the key.")
    return starter, dict(parse_qsl((await request.body()).decode(errors="replace")))


async def _new(request: Request) -> Response:
    (starter, values), said = await _asked(request), ""
    if request.method == "POST":
        name = values.get("name", "")
        if await run_in_threadpool(starter.init, name, values):
            return RedirectResponse(f"/recipe/{name}?key={starter.key}", 303)
        said = starter.output(name, "init")
    parts = {"fields": FIELDS, "values": defaultdict(str, values), "said": said}
    return HTMLResponse(_service(request).pages.form("new.html", "New run", parts), 400 if said else 200)


async def _recipe(request: Request) -> Response:
    (starter, form), name = await _asked(request), request.path_params["name"]
    if request.method == "POST":
        await run_in_threadpool(starter.act, name, form.get("do", ""), form.get("recipe", ""))
        trains = form.get("do") in ("train", "resume") and starter.is_running(name, "train")
        trained = starter.id_of(name) if trains else None
        return RedirectResponse(run_href(trained) if trained else f"/recipe/{name}?key={starter.key}", 303)
    return HTMLResponse(await run_in_threadpool(_service(request).pages.recipe, name))


def _look(request: Request) -> Response:
    file = _LOOK.get(request.path_params["name"])
    if file is None:
        raise HTTPException(404)
    return Response(file.read_bytes(), media_type=_TYPES[file.suffix])


async def _health(request: Request) -> Response:
    return PlainTextResponse("ok\n")


# Events: each `next` of a look reads files once, and gives the events to send.


async def _list_events(request: Request) -> Response:
    return _stream(request, list_news(_service(request), request.query_params.get("seen", "")))


def list_news(service: Service, seen: str) -> Iterator[list[bytes]]:
    """Yield ``changed`` whenever the list of runs differs from what the reader has ``seen``."""
    while True:
        now = service.list_signature()
        yield [sse({}, "changed")] if now != seen else []
        seen = now


async def _run_events(request: Request) -> Response:
    # a reader that comes again says what it has seen last; the first time, its page does
    text = request.headers.get("last-event-id") or request.query_params.get("from", "")
    position, seen = Position.parse(text) or NOTHING, request.query_params.get("seen", "")
    return _stream(request, run_news(_service(request), request.path_params["id"], position, seen))


def run_news(service: Service, id: str, position: Position, seen: str) -> Iterator[list[bytes]]:
    """Yield ``records`` (new ones), ``changed`` (reload the page), or ``gone`` (there is no such run any more).

    Args:
        position: how far the reader knows metrics.jsonl.
        seen: the signature of the other files that it knows.
    """
    while (directory := service.directories.get(id)) is not None:
        news, found = news_since(directory / "metrics.jsonl", position), []
        position = news.position
        if news.records:
            found.append(sse({"records": news.records}, "records", str(position)))
        now = service.summaries.signature(id, directory)
        if news.is_other or now != seen:
            seen = now
            found.append(sse({}, "changed", str(position)))
        yield found
    yield [sse({}, "gone")]


def _stream(request: Request, looks: Iterator[list[bytes]]) -> Response:
    service = _service(request)
    if service.draining or service.streams >= MOST_STREAMS:
        return _text(503, f"{MOST_STREAMS} readers hear of news already; reload the page instead.")
    service.streams += 1

    def close() -> None:
        service.streams -= 1

    async def send() -> AsyncIterator[bytes]:
        yield b"retry: 2000\n\n"
        beat = look = time.monotonic()
        while not service.draining:
            now = time.monotonic()
            if now >= look:
                found = await run_in_threadpool(next, looks, None)
                if found is None:
                    return
                for part in found:
                    yield part
                look = time.monotonic() + LOOK_SECONDS
            if now >= beat + HEARTBEAT_SECONDS:
                beat = now
                yield b": here\n\n"
            await asyncio.sleep(_END_SECONDS)

    return EventStream(send(), close)
