"""The calls of a model, as they are read from their bodies: what each does, and what its result looks like.

A body is read when it arrives and once more after a restart, so all that a call needs is in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from qvera.serve.tinker.checkpoints import CheckpointKind, Ttl, encrypt, recipients_of
from qvera.serve.tinker.messages import decode_forward_backward, encode_forward_backward
from qvera.training.optim import AdamSettings
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.serve.tinker.tenancy import Tinker, TrainedModel
    from qvera.training.tenants import Done

M = TypeVar("M", bound=BaseModel)
STATE = "state.safetensors"
"""In the directory of a saved state."""
Seq = Annotated[int, Field(ge=0, lt=2**31)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Form(BaseModel):
    """A body that FastAPI has read as JSON. It tells what no database and no answer takes, such as half a character."""

    @model_validator(mode="before")
    @classmethod
    def _require_text(cls, given: Any) -> Any:
        try:
            json.dumps(given, ensure_ascii=False, default=repr).encode()
        except RecursionError:
            raise ValueError("is nested too deeply") from None
        return given


class LoraSettings(BaseModel):
    """Settings of a new adapter, as the client's ``LoraConfig``."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(BaseModel):
    type: Literal["adamw"] = "adamw"


class CreateModel(BaseModel):
    session_id: str
    model_seq_id: Seq
    base_model: str
    lora_config: LoraSettings = LoraSettings()
    optimizer_config: Optimizer = Optimizer()
    user_metadata: dict[str, Any] | None = None


class LoadWeights(BaseModel):
    """A saved state, loaded into a new model of a session, or (the older form) as the first call of a model."""

    path: str
    optimizer: bool
    session_id: str | None = None
    model_seq_id: Seq | None = None
    base_model: str | None = None
    optimizer_config: Optimizer | None = None
    user_metadata: dict[str, Any] | None = None


class Adam(BaseModel):
    learning_rate: NonNegative = 1e-4
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Annotated[float, Field(ge=1e-30, allow_inf_nan=False)] = 1e-12
    weight_decay: NonNegative = 0.0
    grad_clip_norm: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class OptimStep(BaseModel):
    """An optimizer step. ``optimizer_params`` are of another optimizer."""

    adam_params: Adam | None = None
    optimizer_params: Optimizer | None = None


class Save(BaseModel):
    """A state or an adapter to be saved under a name; without ``path``, an adapter for one sampling session."""

    path: str | None = None
    overwrite: bool = False
    ttl_seconds: Ttl = None
    user_metadata: dict[str, Any] | None = None
    age_encryption_recipients: Annotated[list[str], Field(max_length=10)] = []
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    kind: str
    start: Callable[[Done], None]
    """Hands the call to the engine. Raises InputError, or RunFailed as the database."""
    finish: Callable[[Any], dict[str, Any] | bytes]
    """Makes the promise's result, JSON or the bytes of a message, from the engine's. Raises InputError."""
    is_kept: bool = True
    """Whether it changes the model, so that it is done again if the model's state is lost."""
    held_bytes: int = 0
    """Of its rows in memory: those that came sparse may take far more than the body."""


def parsed(kind: type[M], body: bytes) -> M:
    """Read a JSON body. Raises InputError that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:100] for part in first["loc"])
        found = f", found {str(first['input'])[:100]!r}" if first["type"] == "literal_error" else ""
        raise InputError(f"{where or 'The body'}: {first['msg']}{found}.") from None


def _create(tinker: Tinker, model: TrainedModel, seq: int, kind: str, body: bytes) -> Call:
    start = partial(tinker.tenants.create, model.id, model.owner, model.shape, model.seed)
    return Call(kind, start, lambda _: {"model_id": model.id, "type": kind})


def _load(tinker: Tinker, model: TrainedModel, seq: int, kind: str, body: bytes) -> Call:
    asked = parsed(LoadWeights, body)
    found = tinker.checkpoints.find(asked.path, model.owner, "weights")
    if seq > 1:
        raise InputError("load_weights: a state is loaded before the model's first other call; create a new model.")
    if found.shape != model.shape:
        raise InputError(f"path: {asked.path} is of another method, rank or targets than {model.id}.")
    start = partial(tinker.tenants.load, model.id, model.owner, found.directory / STATE, asked.optimizer)
    return Call(kind, start, lambda _: {"path": asked.path, "model_id": model.id, "type": kind})


def _forward_backward(tinker: Tinker, model: TrainedModel, seq: int, kind: str, body: bytes) -> Call:
    asked = decode_forward_backward(body, tinker.base.most_tokens, tinker.base.vocabulary)
    if (tokens := sum(len(row.tokens) for row in asked.rows)) > (most := tinker.settings.call_tokens):
        raise InputError(f"data: has {tokens:,} tokens, and a call at most {most:,}; send fewer rows.")
    start = partial(tinker.tenants.forward_backward, model.id, *asked)
    held = sum(array.nbytes for row in asked.rows for array in (row.tokens, row.targets, *row.inputs.values()))
    return Call(kind, start, encode_forward_backward, not asked.forward_only, held)


def _optim_step(tinker: Tinker, model: TrainedModel, seq: int, kind: str, body: bytes) -> Call:
    asked = parsed(OptimStep, body)
    adam = asked.adam_params or Adam()
    norm = max(adam.grad_clip_norm, 0.0)
    settings = AdamSettings(adam.learning_rate, adam.beta1, adam.beta2, adam.eps, adam.weight_decay, norm)
    return Call(kind, partial(tinker.tenants.optim_step, model.id, settings), lambda metrics: {"metrics": metrics})


def _save(tinker: Tinker, model: TrainedModel, seq: int, kind: str, body: bytes) -> Call:
    """A call that saves a checkpoint. It is written down once its files are on disk."""
    asked, checkpoints = parsed(Save, body), tinker.checkpoints
    if kind == "save_weights_for_sampler" and asked.path is None and asked.sampling_session_seq_id is not None:
        return _save_unnamed(tinker, model, kind, asked, asked.sampling_session_seq_id)
    place = checkpoints.place(model.id, SAVES[kind], asked.path or f"{seq:06}")
    written, recipients = place.directory.with_name(f".{seq}"), recipients_of(asked.age_encryption_recipients)
    about = {"base": model.base, **model.shape._asdict(), "user_metadata": asked.user_metadata, "call": seq}

    def start(done: Done) -> None:
        checkpoints.require_free(place, model.owner, asked.overwrite, seq)
        if place.kind == "weights":
            tinker.tenants.save_state(model.id, written / STATE, done)
        else:
            tinker.tenants.save_adapter(model.id, written, done)

    def finish(_: object) -> dict[str, Any]:
        encrypt(written, recipients)
        checkpoints.add(place, written, model.owner, asked.overwrite, asked.ttl_seconds, about)
        return {"path": place.path, "type": kind}

    return Call(kind, start, finish, is_kept=False)


def _save_unnamed(tinker: Tinker, model: TrainedModel, kind: str, asked: Save, seq: int) -> Call:
    """A call that saves an adapter for one sampling session. All ``inflight`` ones of a model move on to the newest."""
    sampler, number = f"{model.session}:sample:{seq}", model.id.rpartition(":")[2]
    prefix = f"sessions/{model.session}/{number}-{asked.kind}-"

    def finish(_: object) -> dict[str, Any]:
        about = {"session": model.session, "owner": model.owner, "base": model.base, "created": time.time()}
        tinker.database.insert("samplers", id=sampler, directory=f"{prefix}{seq}", **about)
        if asked.kind == "inflight":
            query = "UPDATE samplers SET directory = ? WHERE session = ? AND instr(directory, ?) = 1"
            tinker.database.rows(query, (f"{prefix}{seq}", model.session, prefix))
        tinker.drop_unasked_samplers(model.session)
        return {"path": None, "sampling_session_id": sampler, "type": kind}

    start = partial(tinker.tenants.save_adapter, model.id, tinker.directory / f"{prefix}{seq}")
    return Call(kind, start, finish, is_kept=False)


SAVES: dict[str, CheckpointKind] = {
    "save_weights": "weights",
    "save_weights_for_sampler": "sampler_weights",
    "save_weights_external": "external_weights",
}
READERS: dict[str, Callable[[Tinker, TrainedModel, int, str, bytes], Call]] = {
    "create_model": _create,
    "load_weights": _load,
    "forward_backward": _forward_backward,
    "optim_step": _optim_step,
    **dict.fromkeys(SAVES, _save),
}
"""Kind of a call → a function that reads a call from its model, seq, kind and body.

It raises InputError, or ApiError 404, for a body that can't be used.
"""
