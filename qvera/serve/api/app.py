"""The FastAPI app over an engine, and the checks that every call passes before its route."""

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import qvera
from qvera.serve.api import completions, errors, files, fine_tuning, models, responses
from qvera.serve.api.access import LOCAL, Access, host_name, is_loopback, is_of_other_site
from qvera.serve.api.errors import DOWNLOADS, TINKER, ApiError
from qvera.serve.api.server import ClientGone, announces_more, read_body
from qvera.serve.api.service import Service, User

_PAGE = Path(__file__).parents[1] / "page"
PAGE_FILES = {"/": "index.html", "/page/page.css": "page.css", "/page/page.js": "page.js"}
"""The chat page: files of our own, without a build step. They hold no secret; the page's calls to the server do."""
_PAGE_HEADERS = {
    # what a model says is shown as text; should markup ever get in, it can load and run nothing
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_OPEN = ("/health", *PAGE_FILES)
"""No key is needed: a load balancer has none, and the page asks its reader for one."""
_UPLOAD_PATH = "/v1/files"

router = APIRouter()


def create_app(service: Service) -> FastAPI:
    """OpenAI's API over a service, which is ``app.state.service``."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # The pages of FastAPI's documentation load scripts from other hosts.
    app = FastAPI(title="qvera", version=qvera.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    for each in _ROUTERS:
        app.include_router(each)
    if service.tinker is not None:
        from qvera.serve.tinker import routes, sampling

        app.state.samples = sampling.Samples(service.tinker, service)
        app.include_router(routes.router)
    for path, name in PAGE_FILES.items():
        app.get(path, include_in_schema=False)(_page_file(_PAGE / name))
    errors.add_handlers(app)
    app.add_middleware(Guard, service=service)
    if service.keys is not None:  # any site's page may call with a key; before the guard, as a preflight has none
        app.add_middleware(CORSMiddleware, allow_origins="*", allow_methods="*", allow_headers="*", expose_headers="*")
    return app


def _page_file(file: Path) -> Callable[[], FileResponse]:
    return lambda: FileResponse(file, headers=_PAGE_HEADERS)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the server takes calls; 503 once it stops, or where its engine has ended."""
    service: Service = request.app.state.service
    stats = await service.in_thread(service.engine.stats, "quick")
    status = "draining" if service.draining else "ok" if stats.dead is None else "dead"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


@router.get("/metrics")
def metrics(sender: User) -> Response:
    """Numbers in Prometheus' text format."""
    return Response(sender.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


_ROUTERS = (completions.router, responses.router, models.router, files.router, fine_tuning.router, router)
_KNOWN_PATHS = {*PAGE_FILES, *(route.path for each in _ROUTERS for route in each.routes if isinstance(route, APIRoute))}
"""Labels of a metric. Paths that clients invent would be labels without end."""


class Guard:
    """ASGI middleware. Answers 503, 401, 403, 408 and 413 itself, and reads the whole body before it calls the app.

    The upload route reads its own body, piece by piece, with its own limits.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one call through, or answer why not."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        service, path, began, status = self.service, scope["path"], time.monotonic(), 0
        name = uuid.uuid4().hex

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        state = scope.setdefault("state", {})
        state["began"] = began
        service.running += 1
        try:
            try:
                state["access"] = await self._access(path, Headers(scope=scope))
                is_upload = scope["method"] == "POST" and path == _UPLOAD_PATH
                replay = receive if is_upload else await self._with_body(scope, receive)
            except ApiError as error:
                return await error.response(path)(scope, receive, counted)
            except ClientGone:
                return
            await self.app(scope, replay, counted)
        finally:
            service.running -= 1
            # the route's path, as one with a name or id in it would be a label of its own
            label = scope["route"].path if "route" in scope else path if path in _KNOWN_PATHS else "other"
            service.metrics.calls.labels(label, str(status)).inc()
            if path.endswith(("/completions", "/responses")):
                service.metrics.call_seconds.observe(time.monotonic() - began)

    async def _access(self, path: str, headers: Headers) -> Access:
        """Return what the sender may do. Raises ApiError 503, 403 or 401."""
        service, keys = self.service, self.service.keys
        if path in _OPEN or path.startswith(DOWNLOADS):
            return Access("nobody", frozenset(), frozenset())
        if service.draining:
            raise ApiError(503, "The server is stopping and takes no new calls.", retry_seconds=1)
        if keys is None:
            # only the loopback address protects this server, and a browser here lets any site's page call it
            host, origin = headers.get("host", ""), headers.get("origin")
            if not is_loopback(host_name(host)):
                raise ApiError(
                    403,
                    f"The host {host!r} is not this machine's own name. Use localhost, or start the server with "
                    "--keys.",
                )
            if is_of_other_site(host, origin):
                raise ApiError(403, f"Pages of {origin!r} may not call this server. Start it with --keys.")
            return LOCAL
        form = "Authorization: Bearer KEY"
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if path.startswith(TINKER):  # its client sends only keys that begin so
            form, scheme, key = "X-API-Key: tml-KEY", "bearer", headers.get("x-api-key", "").removeprefix("tml-")
        access = None
        if scheme.lower() == "bearer":
            access = await service.in_thread(lambda: keys.find(key.strip()), "quick")
        if access is None:
            raise ApiError(401, f"Send a key that this server knows as {form!r}.", code="invalid_api_key")
        return access

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body within its limits. Returns a function that gives it again, then waits for a disconnect."""
        limits = self.service.limits
        most = limits.tinker_body_bytes if scope["path"].startswith(TINKER) else limits.body_bytes
        too_large = ApiError(413, f"The body is larger than {most:,} bytes, the most that is taken.")
        if announces_more(Headers(scope=scope), most):
            raise too_large
        try:
            body, _ = await read_body(receive, most + 1, limits.body_seconds)
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {limits.body_seconds:g} s.") from None
        if len(body) > most:
            raise too_large
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        return replay
