"""The FastAPI app over an engine, and the checks that every call passes before its route."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders

import qvera
from qvera.serve.api import completions, errors, files, fine_tuning, metrics, models
from qvera.serve.api.access import DEFAULTS, LOCAL, Access, KeyFile, Limits, is_loopback, is_of_other_site, name_of
from qvera.serve.api.errors import ApiError, ClientGone
from qvera.serve.api.metrics import Metrics
from qvera.serve.api.service import Service
from qvera.serve.page import PAGE_PATHS, add_page

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from qvera.evaluation.generate import PromptWriter
    from qvera.serve.engine import Engine
    from qvera.serve.fine_tuning.jobs import Jobs
    from qvera.serve.store import AdapterStore


def create_app(
    engine: Engine,
    store: AdapterStore,
    prompts: PromptWriter,
    stop_tokens: frozenset[int],
    *,
    base_name: str,
    limits: Limits = DEFAULTS,
    keys: KeyFile | None = None,
    jobs: Jobs | None = None,
) -> FastAPI:
    """OpenAI's API over an engine; ``app.state.service`` is its state.

    Args:
        engine: already started; the caller closes it.
        base_name: how the base is listed; one of the store's ``base_names``.
        keys: None asks for no key; only for the loopback address.
        jobs: None: the fine-tuning routes say that this server trains nothing.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.service.close()

    # The pages of FastAPI's documentation load scripts from other hosts.
    app = FastAPI(title="qvera", version=qvera.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    service = Service(
        engine,
        store,
        prompts,
        base_name,
        stop_tokens,
        vocabulary=len(prompts.encoder.tokenizer),
        limits=limits,
        keys=keys,
        metrics=Metrics(engine.stats, jobs),
        jobs=jobs,
    )
    app.state.service = service
    for routes in (completions, models, files, fine_tuning, metrics):
        app.include_router(routes.router)
    add_page(app)
    errors.add_handlers(app)
    app.add_middleware(Guard, service=service)
    return app


_OPEN = ("/health", *PAGE_PATHS)
"""No key is needed: a load balancer has none, and the page asks its reader for one."""
_UPLOAD_PATH = "/v1/files"
_KNOWN_PATHS = (
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/load_adapter",
    "/v1/unload_adapter",
    "/v1/files",
    "/v1/fine_tuning/jobs",
    "/health",
    "/metrics",
    *PAGE_PATHS,
)  # labels of a metric; paths that clients invent would be labels without end


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
        metrics, began, status = self.service.metrics, time.monotonic(), 0
        name = uuid.uuid4().hex

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        state = scope.setdefault("state", {})
        state["began"] = began
        self.service.running += 1
        try:
            try:
                state["access"] = await self._access(scope)
                is_upload = scope["method"] == "POST" and scope["path"] == _UPLOAD_PATH
                replay = receive if is_upload else await self._with_body(scope, receive)
            except ApiError as error:
                return await error.response()(scope, receive, counted)
            except ClientGone:
                return
            await self.app(scope, replay, counted)
        finally:
            self.service.running -= 1
            metrics.calls.labels(_label(scope["path"]), str(status)).inc()
            if scope["path"].endswith("/completions"):
                metrics.call_seconds.observe(time.monotonic() - began)

    async def _access(self, scope: Scope) -> Access:
        headers, service = Headers(scope=scope), self.service
        if scope["path"] in _OPEN:
            return Access("nobody", frozenset(), frozenset())
        if service.draining:
            raise ApiError(
                503, "The server is stopping and takes no new calls.", retry_seconds=service.limits.retry_seconds
            )
        if service.keys is None:
            _require_own_page(headers.get("host", ""), headers.get("origin"))
            return LOCAL
        scheme, _, key = headers.get("authorization", "").partition(" ")
        access = None
        if scheme.lower() == "bearer":
            keys = service.keys
            access = await service.in_thread(lambda: keys.find(key.strip()), "quick")
        if access is None:
            raise ApiError(
                401, "Send a key that this server knows as 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )
        return access

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body within its limits. What is returned replays it, then waits for the client to disconnect."""
        limits, body = self.service.limits, bytearray()
        too_large = ApiError(413, f"The body is larger than {limits.body_bytes:,} bytes, the most that is taken.")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > limits.body_bytes):
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limits.body_bytes:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {limits.body_seconds:g} s.") from None
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        return replay


def _require_own_page(host: str, origin: str | None) -> None:
    """Without keys, only the loopback address protects a server, and a browser here lets any site's page call it."""
    if not is_loopback(name_of(host)):
        raise ApiError(
            403, f"The host {host!r} is not this machine's own name. Use localhost, or start the server with --keys."
        )
    if is_of_other_site(host, origin):
        raise ApiError(403, f"Pages of {origin!r} may not call this server. Start it with --keys.")


def _label(path: str) -> str:
    for known in ("/v1/models", "/v1/files", "/v1/fine_tuning/jobs"):
        if path.startswith(f"{known}/"):
            return known
    return path if path in _KNOWN_PATHS else "other"
