"""The routes of Tinker's RestClient: sessions, runs and checkpoints of the sender.

They are functions without ``async``, so each runs in a thread, where it may wait for the disk.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from qvera.serve.api.access import Action
from qvera.serve.api.errors import DOWNLOADS, ApiError, shortened
from qvera.serve.api.service import require, service_of
from qvera.serve.tinker.checkpoints import Checkpoint, Checkpoints
from qvera.serve.tinker.database import Database
from qvera.training.tenants import TENANT_METHODS

if TYPE_CHECKING:
    import sqlite3

_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_OF_RUN = "/training_runs/{run}/checkpoints/{checkpoint:path}"
router = APIRouter(prefix="/api/v1")
Count = Annotated[int, Query(ge=0, le=2**31)]
Ttl = Annotated[int, Field(ge=3600, le=10 * 366 * 86400)] | None
"""Seconds until a checkpoint goes; None: it stays."""


class Sender:
    """Who asks, and the parts of the server for the answer."""

    def __init__(self, request: Request, action: Action) -> None:
        """Raises ApiError 403 as `require`."""
        self.owner, tinker = require(request, action).name, service_of(request).tinker
        assert tinker is not None  # or there would be no routes
        self.database: Database = tinker.database
        self.checkpoints: Checkpoints = tinker.checkpoints

    def row(self, table: Literal["models", "sessions"], key: str) -> sqlite3.Row:
        """A row of the sender. Raises ApiError 404."""
        found = self.database.rows(f"SELECT * FROM {table} WHERE id = ? AND owner = ?", (key, self.owner))
        if not found:
            raise ApiError(404, f"There is no {'training run' if table == 'models' else 'session'} {shortened(key)!r}.")
        return found[0]

    def page(self, table: Literal["models", "sessions"], limit: int, offset: int) -> list[sqlite3.Row]:
        """Some rows of the sender, the newest first."""
        query = f"SELECT * FROM {table} WHERE owner = ? ORDER BY created DESC LIMIT ? OFFSET ?"
        return self.database.rows(query, (self.owner, min(limit, 1000), offset))


def _reader(request: Request) -> Sender:
    return Sender(request, "use")


def _trainer(request: Request) -> Sender:
    return Sender(request, "train")


Reader = Annotated[Sender, Depends(_reader)]
Trainer = Annotated[Sender, Depends(_trainer)]


class OfPath(BaseModel):
    """A question about a checkpoint."""

    tinker_path: str


class NewTtl(BaseModel):
    """How long a checkpoint stays from now on."""

    ttl_seconds: Ttl


class Copy(BaseModel):
    """A checkpoint to be copied. There are no projects here, so the one that the client names is not read."""

    source_path: str
    ttl_seconds: Ttl = None


@router.get("/sessions")
def list_sessions(sender: Reader, limit: Count = 20, offset: Count = 0) -> dict[str, Any]:
    """Sessions, ended ones too."""
    return {"sessions": [row["id"] for row in sender.page("sessions", limit, offset)]}


@router.get("/sessions/{session}")
def describe_session(sender: Reader, session: str) -> dict[str, Any]:
    """One session, with its models and samplers."""
    about = json.loads(sender.row("sessions", session)["about"])
    models, samplers = (
        [row["id"] for row in sender.database.rows(f"SELECT id FROM {table} WHERE session = ?", (session,))]
        for table in ("models", "samplers")
    )
    shown = {name: about.get(name) for name in ("user_metadata", "display_name")}
    return {"training_run_ids": models, "sampler_ids": samplers, **shown}


@router.get("/training_runs")
def list_runs(sender: Reader, limit: Count = 20, offset: Count = 0) -> dict[str, Any]:
    """Runs, ended ones too."""
    (total,) = sender.database.rows("SELECT COUNT(*) FROM models WHERE owner = ?", (sender.owner,))[0]
    cards = [_run_card(sender, row) for row in sender.page("models", limit, offset)]
    return {"training_runs": cards, "cursor": {"offset": offset, "limit": limit, "total_count": total}}


@router.get("/training_runs/{run}")
def describe_run(sender: Reader, run: str) -> dict[str, Any]:
    """One run."""
    return _run_card(sender, sender.row("models", run))


@router.get("/checkpoints")
def list_checkpoints(sender: Reader, limit: Count = 100, offset: Count = 0) -> dict[str, Any]:
    """Checkpoints of all runs."""
    found, total = sender.checkpoints.page(sender.owner, None, min(limit, 1000), offset)
    return {"checkpoints": list(map(_card, found)), "cursor": {"offset": offset, "limit": limit, "total_count": total}}


@router.get("/training_runs/{run}/checkpoints")
def list_of_run(sender: Reader, run: str) -> dict[str, Any]:
    """All checkpoints of a run."""
    sender.row("models", run)
    return {"checkpoints": list(map(_card, sender.checkpoints.page(sender.owner, run, -1, 0)[0]))}


@router.get(f"{_OF_RUN}/external_weights_urls")
def external_weights_urls(sender: Reader, request: Request, run: str, checkpoint: str) -> dict[str, Any]:
    """A URL for each file of external weights. It needs no key and holds for an hour."""
    found, token, ends = sender.checkpoints.download_token(f"tinker://{run}/{checkpoint}", sender.owner)
    base = f"{str(request.base_url).rstrip('/')}{DOWNLOADS}{token}"
    return {"urls": {file: f"{base}/{file}" for file in sorted(os.listdir(found.directory))}, "expires": _moment(ends)}


@router.get("/downloads/{token}/{file}")
def download(request: Request, token: str, file: str) -> FileResponse:
    """A file of external weights."""
    tinker = service_of(request).tinker
    assert tinker is not None
    return FileResponse(tinker.checkpoints.download(token, file))


@router.post(f"{_OF_RUN}/publish", status_code=204)
def publish(sender: Trainer, run: str, checkpoint: str) -> None:
    """Let all keys read a checkpoint."""
    sender.checkpoints.change(f"tinker://{run}/{checkpoint}", sender.owner, "public", 1)


@router.delete(f"{_OF_RUN}/publish", status_code=204)
def unpublish(sender: Trainer, run: str, checkpoint: str) -> None:
    """Let only its owner read it."""
    sender.checkpoints.change(f"tinker://{run}/{checkpoint}", sender.owner, "public", 0)


@router.put(f"{_OF_RUN}/ttl", status_code=204)
def set_ttl(sender: Trainer, run: str, checkpoint: str, body: NewTtl) -> None:
    """Choose how long it stays."""
    ends = None if body.ttl_seconds is None else time.time() + body.ttl_seconds
    sender.checkpoints.change(f"tinker://{run}/{checkpoint}", sender.owner, "expires", ends)


@router.delete(_OF_RUN, status_code=204)
def delete(sender: Trainer, run: str, checkpoint: str) -> None:
    """Delete a checkpoint and its files."""
    sender.checkpoints.change(f"tinker://{run}/{checkpoint}", sender.owner, "expires", 0)


@router.post("/weights_info")
def weights_info(sender: Reader, body: OfPath) -> dict[str, Any]:
    """What a checkpoint is of."""
    about = sender.checkpoints.find(body.tinker_path, sender.owner).about
    return {
        "base_model": about["base"],
        "is_lora": TENANT_METHODS[about["method"]].is_lora,
        "lora_rank": about["rank"],
        "train_attn": about["targets"] != "mlp",
        "train_mlp": about["targets"] != "attention",
        "train_unembed": False,
        "optimizer_config": {"type": "adamw"},
    }


@router.post("/copy_weights")
def copy_weights(sender: Trainer, request: Request, body: Copy) -> dict[str, Any]:
    """Copy a checkpoint that the sender may read. A call that is repeated makes one copy."""
    key = request.headers.get("x-idempotency-key", secrets.token_hex(16))
    return {"tinker_path": sender.checkpoints.copy(body.source_path, sender.owner, body.ttl_seconds, key).path}


def _run_card(sender: Sender, row: sqlite3.Row) -> dict[str, Any]:
    method, rank, _ = json.loads(row["shape"])
    state, sampler = (sender.checkpoints.newest(row["id"], kind) for kind in ("weights", "sampler_weights"))
    return {
        "training_run_id": row["id"],
        "base_model": row["base"],
        "model_owner": row["owner"],
        "is_lora": TENANT_METHODS[method].is_lora,
        "lora_rank": rank,
        "last_request_time": _moment(row["last_request"]),
        "last_checkpoint": None if state is None else _card(state),
        "last_sampler_checkpoint": None if sampler is None else _card(sampler),
        "user_metadata": json.loads(row["about"])["user_metadata"],
    }


def _card(found: Checkpoint) -> dict[str, Any]:
    place = found.place
    return {
        "checkpoint_id": f"{place.kind}/{place.name}",
        "checkpoint_type": _TYPES[place.kind],
        "time": _moment(found.created),
        "tinker_path": place.path,
        "size_bytes": found.bytes,
        "public": found.public,
        "user_metadata": found.about["user_metadata"],
        "expires_at": None if found.expires is None else _moment(found.expires),
    }


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
