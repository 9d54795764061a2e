"""HTTP routes of Tinker's API.

Those without ``async`` run in a thread, where they may wait for the disk.
"""

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from qvera.serve.api.access import Action
from qvera.serve.api.errors import DOWNLOADS, ApiError, unknown_id
from qvera.serve.api.service import Sender as AnySender
from qvera.serve.api.service import sent_by
from qvera.serve.tinker.calls import SAVES, Form, parsed
from qvera.serve.tinker.checkpoints import Checkpoint, Ttl
from qvera.serve.tinker.messages import call_of, decompress
from qvera.serve.tinker.sampling import CLONE, NewSampler, Samples
from qvera.training.tenants import VERA_RATE_FACTOR, ModelShape
from qvera.utils.errors import InputError

T = TypeVar("T")
router = APIRouter(prefix="/api/v1")
_HELD_SECONDS = 40.0  # a poll for a result; the client waits 45
_CHUNK_BYTES = 5_000_000  # of a part of forward_backward; a single row may be larger
_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_OF_RUN = "/training_runs/{run}/checkpoints/{checkpoint:path}"
_ADAMW = {"type": "adamw"}
Count = Annotated[int, Query(ge=0, le=2**31)]


class Sender(AnySender):
    """Who asks, and the parts of the server for the answer."""

    def __init__(self, request: Request, action: Action) -> None:
        """Raises ApiError 403 if the key may not do the action."""
        super().__init__(request, action)
        assert self.service.tinker is not None  # or there would be no routes
        self.tinker = self.service.tinker
        self.database, self.checkpoints = self.tinker.database, self.tinker.checkpoints
        self.samples: Samples = request.app.state.samples

    def page(self, table: Literal["models", "sessions"], limit: int, offset: int) -> list[sqlite3.Row]:
        """Some rows of the sender, the newest first."""
        query = f"SELECT * FROM {table} WHERE owner = ? ORDER BY created DESC LIMIT ? OFFSET ?"
        return self.database.rows(query, (self.owner, min(limit, 1000), offset))

    async def wait(self, key: str, look: Callable[[], T | None], seconds: float) -> T | None:
        """Hold the call as `Database.wait` does, until the server stops or the engine has ended. Raises ClientGone."""

        def is_over() -> bool:
            return self.service.draining or self.service.engine.stats().dead is not None

        return await self.hold(self.database.wait(key, look, seconds, is_over))


Reader = Annotated[Sender, sent_by(Sender, "use")]
Trainer = Annotated[Sender, sent_by(Sender, "train")]


class NewSession(Form):
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None


class Named(Form):
    """The session, model, promise or checkpoint that a call is about."""

    session_id: str = ""
    model_id: str = ""
    request_id: str = ""
    tinker_path: str = ""


class OfModel(BaseModel):
    model_id: str
    seq_id: int


class OfSampler(Form):
    """A sampler, or one of its joined clients."""

    sampling_session_id: str
    cloned_sampler_id: Annotated[int, Field(ge=0, le=2**63 // CLONE - 1)] = 0


class Poll(Form):
    target: OfSampler
    prev_cursor: Annotated[int, Field(ge=0, lt=2**63)] = 0
    timeout: Annotated[float, Field(ge=0)] = 30.0


class NewTtl(Form):
    ttl_seconds: Ttl


class Copy(Form):
    """A checkpoint to be copied. There are no projects here, so the one that the client names is not read."""

    source_path: str
    ttl_seconds: Ttl = None


# The client, sessions and models


@router.post("/client/config")
async def client_config(sender: Reader) -> dict[str, Any]:
    return {
        "fwdbwd_max_chunk_bytes_count": min(_CHUNK_BYTES, sender.service.limits.tinker_body_bytes // 2),
        "sample_use_retrieve_futures": True,
        "sample_join_sampling_session": True,
    }


@router.post("/client/dynamic_config")
async def dynamic_config(sender: Reader) -> dict[str, Any]:
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}


@router.post("/telemetry")
async def telemetry(sender: Reader) -> dict[str, str]:
    """Events of the client, which nobody reads."""
    return {"status": "accepted"}


@router.get("/get_server_capabilities")
async def capabilities(sender: Reader) -> dict[str, Any]:
    """Answer with the names that ``base_model`` takes."""
    base = sender.tinker.base
    names = [base.name, f"{base.name}:vera-256"] if sender.access.covers(base.name) else []
    about = {"max_context_length": base.most_tokens, "trainable": True}
    return {"supported_models": [{"model_name": name, **about, "sampleable": name == base.name} for name in names]}


@router.post("/create_session")
def create_session(sender: Reader, asked: NewSession) -> dict[str, Any]:
    session, warning = sender.tinker.create_session(sender.owner, asked.model_dump())
    return {"type": "create_session", "session_id": session, "warning_message": warning}


@router.post("/session_heartbeat")
def heartbeat(sender: Reader, asked: Named) -> dict[str, str]:
    """Keep a session alive. 410 once it has ended."""
    sender.tinker.hear(asked.session_id, sender.owner)
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session}/finish", status_code=204)
def finish(sender: Reader, session: str) -> None:
    """End a session. One that has ended is no error: a client whose answer was lost asks again."""
    sender.database.own("sessions", session, sender.owner)
    sender.tinker.end_session(session, sender.owner)


@router.post("/create_model")
async def create_model(sender: Trainer) -> dict[str, str]:
    return await _created(sender, "create_model")


@router.post("/load_weights")
async def load_weights(sender: Trainer) -> dict[str, str]:
    """Make a model from a saved state, or (the older form) load a state into one that has done nothing yet."""
    if parsed(Named, await sender.request.body()).model_id:
        return await _training(sender, "load_weights")
    return await _created(sender, "load_weights")


async def _created(sender: Sender, kind: str) -> dict[str, str]:
    tinker, body = sender.tinker, await sender.request.body()
    if not sender.access.covers(tinker.base.name):
        raise ApiError(404, "base_model: there is no such model, or this key may not use it.")
    promise, model_id = await run_in_threadpool(tinker.create_model, sender.owner, kind, body)
    return {"request_id": promise, "model_id": model_id}


@router.post("/get_info")
def get_info(sender: Reader, asked: Named) -> dict[str, Any]:
    model, base = sender.tinker.model(asked.model_id, sender.owner), sender.tinker.base
    arch = base.architecture + ("" if model.shape.is_lora else f", VeRA at {VERA_RATE_FACTOR:g} times learning_rate")
    return {
        "type": "get_info",
        "model_id": model.id,
        "model_name": model.base,
        "model_data": {"arch": arch, "model_name": model.base, "tokenizer_id": base.tokenizer},
        "is_lora": model.shape.is_lora,
        "lora_rank": model.shape.rank,
        "optimizer_config": _ADAMW,
    }


# Training, and results


async def _training(sender: Sender, kind: str, is_known: bool = True) -> dict[str, str]:
    """Accept a call in a model's order. One that is refused has used its seq_id, whatever it is."""
    request, tinker, body = sender.request, sender.tinker, await sender.request.body()

    def accept() -> dict[str, str]:
        content = body
        if request.headers.get("content-encoding") == "zstd":
            content = decompress(body, sender.service.limits.tinker_body_bytes)
        if kind == "forward_backward":
            model_id, seq = call_of(content)
        else:  # all else in the body may be faulty
            place = parsed(OfModel, content)
            model_id, seq = place.model_id, place.seq_id
        model = tinker.model(model_id, sender.owner)
        if not 0 < seq < 2**31:
            raise InputError(f"seq_id: is {seq}; expected 1 or more.")
        try:
            if not is_known:
                raise ApiError(404, f"This server does not do {kind[:100]!r}.")
            return {"request_id": tinker.call(model, seq, kind, content), "model_id": model_id}
        except (InputError, ApiError) as error:
            if getattr(error, "status", 400) != 429:  # after 429 the client sends the same call again
                tinker.refuse(model, seq, kind)
            raise

    return await sender.service.in_thread(accept, "long")


def _add_training_route(kind: str) -> None:
    @router.post(f"/{kind}", name=kind)
    async def accept(sender: Trainer) -> dict[str, str]:
        return await _training(sender, kind)


for _kind in ("forward_backward", "optim_step", *SAVES):
    _add_training_route(_kind)


@router.post("/retrieve_future")
async def retrieve_future(sender: Reader, asked: Named) -> Response:
    """Answer with the result of a promise. The call is held for it, and answered ``try_again`` if it takes longer."""

    def look() -> Response | None:
        promise = sender.database.promise(asked.request_id, sender.owner)
        if promise is None:
            raise unknown_id("promise", asked.request_id)
        if (state := promise["state"]) in ("json", "proto"):
            kind = "application/json" if state == "json" else "application/x-protobuf"
            return Response(promise["payload"], media_type=kind)
        if state != "pending":
            return JSONResponse({"error": promise["payload"].decode(), "category": state})
        if (dead := sender.service.engine.stats().dead) is not None:
            return JSONResponse({"error": f"The engine has ended: {dead}", "category": "server"})
        return None

    if (found := await sender.wait(asked.request_id, look, _HELD_SECONDS)) is not None:
        return found
    state = {"queue_state": "active"}
    if sender.service.engine.stats().background_failure is not None:
        state = {"queue_state": "paused_capacity", "queue_state_reason": "Training failed and is parked."}
    return JSONResponse({"type": "try_again", "request_id": asked.request_id, **state})


# Samples


@router.post("/create_sampling_session")
def create_sampling_session(sender: Reader, asked: NewSampler) -> dict[str, str]:
    made = sender.samples.create(sender.access, asked)
    return {"type": "create_sampling_session", "sampling_session_id": made}


@router.get("/samplers/{sampler:path}")
def get_sampler(sender: Reader, sampler: str) -> dict[str, str]:
    row = sender.samples.find(sampler, sender.owner)
    path = {} if row["model_path"] is None else {"model_path": row["model_path"]}
    return {"sampler_id": sampler, "base_model": row["base"], **path}


@router.post("/asample")
async def asample(sender: Reader) -> dict[str, Any]:
    body = await sender.request.body()
    promise, count = await sender.service.in_thread(lambda: sender.samples.call(sender.owner, body), "long")
    return {"request_id": promise, "sample_sequence_ids": [f"{promise}:{number}" for number in range(count)]}


@router.post("/join_sampling_session")
def join_sampling_session(sender: Reader, asked: OfSampler) -> dict[str, Any]:
    """Give another client of a sampler its number, with which its seq_ids begin."""
    sender.samples.find(asked.sampling_session_id, sender.owner)
    return {"type": "join_sampling_session", "client_counter": secrets.randbelow(9 * 10**9) + 1}  # by 10^9 below 2^63


@router.post("/retrieve_futures")
async def retrieve_futures(sender: Reader, asked: Poll) -> dict[str, Any]:
    """Tell which calls of a sampler's client have ended. The call is held until one has."""
    sampler, cursor = asked.target.sampling_session_id, asked.prev_cursor
    target = sender.owner, sampler, asked.target.cloned_sampler_id
    found = await sender.wait(sampler, lambda: sender.samples.ended(*target, cursor), min(asked.timeout, 30.0))
    return found or {"completions": [], "cursor": cursor}


@router.post("/cancel_future")
async def cancel_future(sender: Reader, asked: Named) -> dict[str, Any]:
    sender.samples.cancel(sender.owner, asked.request_id)
    return {}


# RestClient: sessions, runs and checkpoints of the sender


@router.get("/sessions")
def list_sessions(sender: Reader, limit: Count = 20, offset: Count = 0) -> dict[str, Any]:
    return {"sessions": [row["id"] for row in sender.page("sessions", limit, offset)]}


@router.get("/sessions/{session}")
def describe_session(sender: Reader, session: str) -> dict[str, Any]:
    about = sender.database.own("sessions", session, sender.owner)["about"]
    models, samplers = (
        [row["id"] for row in sender.database.rows(f"SELECT id FROM {table} WHERE session = ?", (session,))]
        for table in ("models", "samplers")
    )
    return {"training_run_ids": models, "sampler_ids": samplers, **json.loads(about)}


@router.get("/training_runs")
def list_runs(sender: Reader, limit: Count = 20, offset: Count = 0) -> dict[str, Any]:
    (total,) = sender.database.rows("SELECT COUNT(*) FROM models WHERE owner = ?", (sender.owner,))[0]
    cards = [_run_card(sender, row) for row in sender.page("models", limit, offset)]
    return {"training_runs": cards, "cursor": {"offset": offset, "limit": limit, "total_count": total}}


@router.get("/training_runs/{run}")
def describe_run(sender: Reader, run: str) -> dict[str, Any]:
    return _run_card(sender, sender.database.own("models", run, sender.owner))


@router.get("/checkpoints")
def list_checkpoints(sender: Reader, limit: Count = 100, offset: Count = 0) -> dict[str, Any]:
    found, total = sender.checkpoints.page(sender.owner, None, min(limit, 1000), offset)
    return {"checkpoints": list(map(_card, found)), "cursor": {"offset": offset, "limit": limit, "total_count": total}}


@router.get("/training_runs/{run}/checkpoints")
def list_of_run(sender: Reader, run: str) -> dict[str, Any]:
    sender.database.own("models", run, sender.owner)
    return {"checkpoints": list(map(_card, sender.checkpoints.page(sender.owner, run, -1, 0)[0]))}


@router.get(f"{_OF_RUN}/external_weights_urls")
def external_weights_urls(sender: Reader, run: str, checkpoint: str) -> dict[str, Any]:
    """Give a URL for each file of external weights. It needs no key and holds for an hour."""
    found, token, ends = sender.checkpoints.download_token(f"tinker://{run}/{checkpoint}", sender.owner)
    base = f"{str(sender.request.base_url).rstrip('/')}{DOWNLOADS}{token}"
    return {
        "urls": {file: f"{base}/{file}" for file in sorted(os.listdir(found.directory))},
        "expires": _iso_time(ends),
    }


@router.get("/downloads/{token}/{file}")
def download(request: Request, token: str, file: str) -> FileResponse:
    return FileResponse(request.app.state.service.tinker.checkpoints.download(token, file))


@router.post(f"{_OF_RUN}/publish", status_code=204)
@router.delete(f"{_OF_RUN}/publish", status_code=204)
def publish(sender: Trainer, run: str, checkpoint: str) -> None:
    """Let all keys read a checkpoint, or only its owner."""
    is_public = sender.request.method == "POST"
    sender.checkpoints.change(f"tinker://{run}/{checkpoint}", sender.owner, "public", is_public)


@router.put(f"{_OF_RUN}/ttl", status_code=204)
def set_ttl(sender: Trainer, run: str, checkpoint: str, body: NewTtl) -> None:
    """Set when a checkpoint expires, counted from now; None: never."""
    ends = None if body.ttl_seconds is None else time.time() + body.ttl_seconds
    sender.checkpoints.change(f"tinker://{run}/{checkpoint}", sender.owner, "expires", ends)


@router.delete(_OF_RUN, status_code=204)
def delete(sender: Trainer, run: str, checkpoint: str) -> None:
    """Delete a checkpoint, by letting it expire at once."""
    sender.checkpoints.change(f"tinker://{run}/{checkpoint}", sender.owner, "expires", 0)


@router.post("/weights_info")
def weights_info(sender: Reader, body: Named) -> dict[str, Any]:
    checkpoint = sender.checkpoints.find(body.tinker_path, sender.owner)
    shape = checkpoint.shape
    return {
        "base_model": checkpoint.about["base"],
        "is_lora": shape.is_lora,
        "lora_rank": shape.rank,
        "train_attn": shape.targets != "mlp",
        "train_mlp": shape.targets != "attention",
        "train_unembed": False,
        "optimizer_config": _ADAMW,
    }


@router.post("/copy_weights")
def copy_weights(sender: Trainer, body: Copy) -> dict[str, Any]:
    """Copy a checkpoint that the sender may read. A call that is repeated makes one copy."""
    key = sender.request.headers.get("x-idempotency-key", secrets.token_hex(16))
    return {"tinker_path": sender.checkpoints.copy(body.source_path, sender.owner, body.ttl_seconds, key).path}


def _run_card(sender: Sender, row: sqlite3.Row) -> dict[str, Any]:
    shape = ModelShape(*json.loads(row["shape"]))
    state, sampler = (sender.checkpoints.newest(row["id"], kind) for kind in ("weights", "sampler_weights"))
    return {
        "training_run_id": row["id"],
        "base_model": row["base"],
        "model_owner": row["owner"],
        "is_lora": shape.is_lora,
        "lora_rank": shape.rank,
        "last_request_time": _iso_time(row["last_request"]),
        "last_checkpoint": None if state is None else _card(state),
        "last_sampler_checkpoint": None if sampler is None else _card(sampler),
        "user_metadata": json.loads(row["about"])["user_metadata"],
    }


def _card(found: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{found.kind}/{found.name}",
        "checkpoint_type": _TYPES[found.kind],
        "time": _iso_time(found.created),
        "tinker_path": found.path,
        "size_bytes": found.bytes,
        "public": found.public,
        "user_metadata": found.about["user_metadata"],
        "expires_at": None if found.expires is None else _iso_time(found.expires),
    }


def _iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


@router.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
async def unknown(request: Request, path: str) -> None:
    """Refuse a path, which may have a place in a model's order all the same."""
    if "train" in request.state.access.may:  # or the sender has no models
        with contextlib.suppress(InputError):
            await _training(Sender(request, "train"), path, is_known=False)
    raise ApiError(404, f"This server does not know {request.method} {path[:100]!r}.")
