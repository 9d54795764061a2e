"""HTTP routes of Tinker's API: sessions, models, training and promises."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from qvera.serve.api.errors import ApiError
from qvera.serve.api.service import Service, require, service_of
from qvera.serve.tinker import rest
from qvera.serve.tinker.calls import CreateModel, LoadWeights, parsed, place_of
from qvera.serve.tinker.database import UnknownPromise
from qvera.serve.tinker.messages import decompress
from qvera.serve.tinker.tenancy import Tinker
from qvera.training.tenants import TENANT_METHODS
from qvera.utils.errors import InputError

router = APIRouter(prefix="/api/v1")
_HELD_SECONDS = 40.0  # a poll for a result; the client waits 45
_POLL_SECONDS = 4.0  # between two looks whether the client has gone
_CHUNK_BYTES = 5_000_000  # of a part of forward_backward; a single row may be larger


class NewSession(BaseModel):
    """A new session."""

    tags: list[str] = []
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    display_name: str | None = None


class Named(BaseModel):
    """What a call is about, by one of these."""

    session_id: str = ""
    model_id: str = ""
    request_id: str = ""


def tinker_of(service: Service) -> Tinker:
    """The part of a server that these routes are for; they are there only if it is."""
    assert service.tinker is not None
    return service.tinker


@router.post("/client/config")
async def client_config(request: Request) -> dict[str, Any]:
    """What the client should do by its own choice."""
    require(request, "use")
    return {
        "fwdbwd_max_chunk_bytes_count": min(_CHUNK_BYTES, service_of(request).limits.tinker_body_bytes // 2),
        "sample_use_retrieve_futures": True,
        "sample_join_sampling_session": True,
    }


@router.post("/client/dynamic_config")
async def dynamic_config(request: Request) -> dict[str, Any]:
    """The same, asked for again and again."""
    require(request, "use")
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}


@router.post("/telemetry")
async def telemetry(request: Request) -> dict[str, str]:
    """Events of the client, which nobody reads."""
    require(request, "use")
    return {"status": "accepted"}


@router.get("/get_server_capabilities")
async def capabilities(request: Request) -> dict[str, Any]:
    """The names that take ``base_model``."""
    access = require(request, "use")
    base = tinker_of(service_of(request)).base
    names = [base.name, f"{base.name}:vera-256"] if access.covers(base.name) else []
    about = {"max_context_length": base.most_tokens, "trainable": True}
    return {"supported_models": [{"model_name": name, **about, "sampleable": name == base.name} for name in names]}


@router.post("/create_session")
async def create_session(request: Request) -> dict[str, Any]:
    """A new session."""
    access, service = require(request, "use"), service_of(request)
    asked = parsed(NewSession, await request.body()).model_dump()
    made = await service.in_thread(lambda: tinker_of(service).create_session(access.name, asked), "disk")
    return {"type": "create_session", "session_id": made[0], "warning_message": made[1]}


@router.post("/session_heartbeat")
async def heartbeat(request: Request) -> dict[str, str]:
    """Keep a session alive. 410 once it has ended."""
    access, service = require(request, "use"), service_of(request)
    asked = parsed(Named, await request.body())
    await service.in_thread(lambda: tinker_of(service).session(asked.session_id, access.name), "disk")
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish")
async def finish(session_id: str, request: Request) -> Response:
    """End a session, its models and samplers."""
    access, service = require(request, "use"), service_of(request)
    tinker = tinker_of(service)

    def end() -> None:
        tinker.session(session_id, access.name)
        tinker.end_session(session_id)

    await service.in_thread(end, "disk")
    return Response(status_code=204)


@router.post("/create_model")
async def create_model(request: Request) -> dict[str, str]:
    """A new model, by a promise."""
    return await _created(request, "create_model", CreateModel)


@router.post("/load_weights")
async def load_weights(request: Request) -> dict[str, str]:
    """A new model from a saved state, or (the older form) a state for one that has done nothing yet."""
    if parsed(LoadWeights, await request.body()).session_id is None:
        return await _training(request, "load_weights")
    return await _created(request, "load_weights", LoadWeights)


async def _created(request: Request, kind: str, form: type[CreateModel] | type[LoadWeights]) -> dict[str, str]:
    access, service = require(request, "train"), service_of(request)
    tinker, body = tinker_of(service), await request.body()
    if not access.covers(tinker.base.name):
        raise ApiError(404, "base_model: there is no such model, or this key may not use it.")
    promise, model_id = await service.in_thread(
        lambda: tinker.create_model(access.name, kind, body, parsed(form, body)), "disk"
    )
    return {"request_id": promise, "model_id": model_id}


@router.post("/get_info")
async def get_info(request: Request) -> dict[str, Any]:
    """What a model is."""
    access, service = require(request, "use"), service_of(request)
    tinker, asked = tinker_of(service), parsed(Named, await request.body())
    model = await service.in_thread(lambda: tinker.model(asked.model_id, access.name), "disk")
    method, arch = TENANT_METHODS[model.shape.method], tinker.base.architecture
    if not method.is_lora:
        arch += f", VeRA at {method.rate_factor:g} times learning_rate"
    about = {"arch": arch, "model_name": model.base, "tokenizer_id": tinker.base.tokenizer}
    return {
        "type": "get_info",
        "model_id": model.id,
        "model_name": model.base,
        "model_data": about,
        "is_lora": method.is_lora,
        "lora_rank": model.shape.rank,
        "optimizer_config": {"type": "adamw"},
    }


async def _training(request: Request, kind: str, is_known: bool = True) -> dict[str, str]:
    """Accept a call in a model's order. One that is refused has used its seq_id, whatever it is."""
    access, service = require(request, "train"), service_of(request)
    tinker, body = tinker_of(service), await request.body()

    def accept() -> dict[str, str]:
        content = body
        if request.headers.get("content-encoding") == "zstd":
            content = decompress(body, service.limits.tinker_body_bytes)
        model_id, seq = place_of(kind, content)
        model = tinker.model(model_id, access.name)
        if not 0 < seq < 2**31:
            raise InputError(f"seq_id: is {seq}; expected 1 or more.")
        try:
            if not is_known:
                raise ApiError(404, f"This server does not do {kind[:100]!r}.")
            return {"request_id": tinker.call(model, seq, kind, content), "model_id": model_id}
        except (InputError, ApiError) as error:
            if getattr(error, "status", 400) != 429:
                tinker.refuse(model, seq, kind)
            raise

    return await service.in_thread(accept, "long")


def _add_training_route(kind: str) -> None:
    @router.post(f"/{kind}", name=kind)
    async def accept(request: Request) -> dict[str, str]:
        return await _training(request, kind)


for _kind in ("forward_backward", "optim_step", "save_weights", "save_weights_for_sampler", "save_weights_external"):
    _add_training_route(_kind)


@router.post("/retrieve_future")
async def retrieve_future(request: Request) -> Response:
    """The result of a promise, for which the call is held. ``try_again`` where it takes longer."""
    access, service = require(request, "use"), service_of(request)
    database, asked = tinker_of(service).database, parsed(Named, await request.body())
    ends_at = time.monotonic() + _HELD_SECONDS
    while True:
        seconds = max(min(_POLL_SECONDS, ends_at - time.monotonic()), 0.0)
        try:
            promise = await database.wait(asked.request_id, access.name, seconds)
        except UnknownPromise:
            raise ApiError(404, f"There is no promise {asked.request_id[:100]!r}.") from None
        if promise.state == "json":
            return Response(promise.payload, media_type="application/json")
        if promise.state == "proto":
            return Response(promise.payload, media_type="application/x-protobuf")
        if promise.state != "pending":
            message = (promise.payload or b"").decode()
            return JSONResponse({"error": message, "category": promise.state})
        stats = service.engine.stats()
        if stats.dead is not None:
            return JSONResponse({"error": f"The engine has ended: {stats.dead}", "category": "server"})
        if time.monotonic() >= ends_at or service.draining or await request.is_disconnected():
            state: dict[str, str] = {"queue_state": "active"}
            if stats.background_failure is not None:
                state = {"queue_state": "paused_capacity", "queue_state_reason": "Training failed and is parked."}
            return JSONResponse({"type": "try_again", "request_id": promise.id, **state})


def add_routes(app: FastAPI, *routers: APIRouter) -> None:
    """Add this module's routes and others of Tinker's API, and one that refuses all other paths below it."""
    for each in (router, rest.router, *routers):
        app.include_router(each)

    @app.api_route("/api/v1/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def unknown(path: str, request: Request) -> None:
        # what is unknown here may have a place in a model's order all the same
        with contextlib.suppress(InputError):
            await _training(request, path, is_known=False)
        raise ApiError(404, f"This server does not know {path[:100]!r}.")
