"""The calls of a model, as they are read from their bodies: what each does, and what its result looks like.

A body is read when it arrives and once more after a restart, so all that a call needs is in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from qvera.serve.tinker.checkpoints import Checkpoints, Kind, encrypt, recipients_of
from qvera.serve.tinker.database import Database
from qvera.serve.tinker.messages import call_of, decode_forward_backward, encode_forward_backward
from qvera.training.optim import AdamSettings
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.training.tenants import Done, ModelShape, Tenants

M = TypeVar("M", bound=BaseModel)
STATE = "state.safetensors"
"""In the directory of a saved state."""
Seq = Annotated[int, Field(ge=0, lt=2**31)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
_LEAST_TTL, _MOST_TTL = 3600, 10 * 366 * 86400


class OfModel(BaseModel):
    """A call in a model's order."""

    model_id: str
    seq_id: int


class Lora(BaseModel):
    """Settings of a new adapter, as the client's ``LoraConfig``."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(BaseModel):
    """An optimizer by name; ``adamw`` is the only one."""

    type: str = "adamw"


class CreateModel(BaseModel):
    """A new model."""

    session_id: str
    model_seq_id: Seq
    base_model: str
    lora_config: Lora = Lora()
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
    """Settings of one optimizer step."""

    learning_rate: Number = 1e-4
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Number = 1e-12
    weight_decay: Number = 0.0
    grad_clip_norm: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class OptimStep(BaseModel):
    """An optimizer step. ``optimizer_params`` are of another optimizer."""

    adam_params: Adam | None = None
    optimizer_params: Optimizer | None = None


class Save(BaseModel):
    """A state or an adapter to be saved under a name; without ``path``, an adapter for one sampling session."""

    path: str | None = None
    overwrite: bool = False
    ttl_seconds: Annotated[int, Field(ge=_LEAST_TTL, le=_MOST_TTL)] | None = None
    user_metadata: dict[str, Any] | None = None
    age_encryption_recipients: Annotated[list[str], Field(max_length=10)] = []
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    kind: str
    start: Callable[[str, Done], None]
    """Hands it, with its promise's id, to the engine. Raises InputError."""
    finish: Callable[[str, Any], tuple[Literal["json", "proto"], bytes]]
    """Makes the promise's result of the promise's id and what ``start`` gave to its ``done``."""
    is_kept: bool = True
    """Whether it changes the model, so that it is done again if the model's state is lost."""


@dataclass(eq=False, slots=True)
class Model:
    """A model of a live session, and its place in the order of its calls."""

    id: str
    session: str
    owner: str  # name of a key
    base: str  # as asked for
    shape: ModelShape
    seed: int
    next_seq: int = 0  # creation is 0, the first call 1
    barrier: int = -1  # the largest seq that was begun and is no part of a forward_backward
    applied_seq: int = -1  # in the state file; -1: there is none
    in_engine: bool = True
    waiting: dict[int, tuple[str, Call | None]] = field(default_factory=dict)
    """seq → promise and call; of a refused one, its kind and None."""
    waits_since: float | None = None  # for a missing seq
    unsaved_bytes: int = 0
    unsaved_since: float | None = None
    is_saving: bool = False


def parsed(kind: type[M], body: bytes) -> M:
    """A JSON body. Raises InputError that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:100] for part in first["loc"])
        raise InputError(f"{where or 'The body'}: {first['msg']}.") from None


def place_of(kind: str, body: bytes) -> tuple[str, int]:
    """The model and seq of a call in a model's order, which may be faulty otherwise. Raises InputError."""
    if kind != "forward_backward":
        asked = parsed(OfModel, body)
        return asked.model_id, asked.seq_id
    return call_of(body)


def require_adamw(optimizer: Optimizer | None) -> None:
    """Raise InputError for another optimizer."""
    if optimizer is not None and optimizer.type != "adamw":
        raise InputError(f"optimizer: {optimizer.type[:100]!r} is not supported; expected adamw.")


class Calls:
    """Reads the calls of models."""

    def __init__(
        self,
        tenants: Tenants,
        database: Database,
        checkpoints: Checkpoints,
        root: Path,
        vocabulary: int,
        row_tokens: int,
        call_tokens: int,
    ) -> None:
        """Calls of the models of a server.

        Args:
            root: the directory that all is in.
            vocabulary: token ids are below.
            row_tokens: most of a row; ``call_tokens``: most of a call.
        """
        self._tenants, self._database, self._checkpoints, self._root = tenants, database, checkpoints, root
        self._limits, self._call_tokens = (row_tokens, vocabulary, vocabulary), call_tokens
        self._readers: dict[str, Callable[[Model, int, bytes], Call]] = {
            "create_model": self._create,
            "load_weights": self._load,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_for_sampler,
            "save_weights_external": self._save_external,
        }

    def read(self, model: Model, seq: int, kind: str, body: bytes) -> Call:
        """A call of a model. Raises InputError for a body that can't be used."""
        return self._readers[kind](model, seq, body)

    def _create(self, model: Model, seq: int, body: bytes) -> Call:
        def start(promise: str, done: Done) -> None:
            self._tenants.create(model.id, model.owner, model.shape, model.seed, done)

        return Call("create_model", start, lambda promise, _: _json(model_id=model.id, type="create_model"))

    def _load(self, model: Model, seq: int, body: bytes) -> Call:
        asked = parsed(LoadWeights, body)
        found = self._checkpoints.find(asked.path, model.owner, "weights")
        if seq > 1:
            raise InputError("load_weights: a state is loaded before the model's first other call; create a new model.")
        if (found.about["method"], found.about["rank"], found.about["targets"]) != tuple(model.shape):
            raise InputError(f"path: {asked.path} is of another method, rank or targets than {model.id}.")

        def start(promise: str, done: Done) -> None:
            self._tenants.remove(model.id)  # what `create_model` made, in the older form
            self._tenants.load(model.id, model.owner, found.directory / STATE, asked.optimizer, done)

        return Call(
            "load_weights", start, lambda promise, _: _json(path=asked.path, model_id=model.id, type="load_weights")
        )

    def _forward_backward(self, model: Model, seq: int, body: bytes) -> Call:
        asked = decode_forward_backward(body, self._limits)
        if (tokens := sum(len(row.tokens) for row in asked.rows)) > (most := self._call_tokens):
            raise InputError(f"data: has {tokens:,} tokens, and a call at most {most:,}; send fewer rows.")

        def start(promise: str, done: Done) -> None:
            self._tenants.forward_backward(model.id, asked.rows, asked.loss, asked.settings, asked.forward_only, done)

        return Call(
            "forward_backward",
            start,
            lambda promise, results: ("proto", encode_forward_backward(results, asked.shapes)),
            is_kept=not asked.forward_only,
        )

    def _optim_step(self, model: Model, seq: int, body: bytes) -> Call:
        asked = parsed(OptimStep, body)
        require_adamw(asked.optimizer_params)
        adam = asked.adam_params or Adam()
        settings = AdamSettings(
            learning_rate=adam.learning_rate,
            beta1=adam.beta1,
            beta2=adam.beta2,
            epsilon=adam.eps,
            weight_decay=adam.weight_decay,
            max_norm=max(adam.grad_clip_norm, 0.0),
        )
        return Call(
            "optim_step",
            lambda promise, done: self._tenants.optim_step(model.id, settings, done),
            lambda promise, metrics: _json(metrics=metrics),
        )

    def _save_weights(self, model: Model, seq: int, body: bytes) -> Call:
        return self._named("save_weights", "weights", model, seq, parsed(Save, body))

    def _save_for_sampler(self, model: Model, seq: int, body: bytes) -> Call:
        asked = parsed(Save, body)
        if asked.path is None and asked.sampling_session_seq_id is not None:
            return self._ephemeral(model, seq, asked)
        return self._named("save_weights_for_sampler", "sampler_weights", model, seq, asked)

    def _save_external(self, model: Model, seq: int, body: bytes) -> Call:
        return self._named("save_weights_external", "external_weights", model, seq, parsed(Save, body))

    def _named(self, call: str, kind: Kind, model: Model, seq: int, asked: Save) -> Call:
        """A call that saves a checkpoint. It is written down once its files are on disk."""
        place = self._checkpoints.place(model.id, kind, asked.path or f"{seq:06}")
        recipients = recipients_of(asked.age_encryption_recipients)
        about = {"base": model.base, **model.shape._asdict(), "user_metadata": asked.user_metadata}

        def start(promise: str, done: Done) -> None:
            self._checkpoints.require_free(place, model.owner, asked.overwrite, promise)
            if kind == "weights":
                place.directory.mkdir(parents=True, exist_ok=True)
                self._tenants.save_state(model.id, place.directory / STATE, {}, done)
            else:
                self._tenants.save_adapter(model.id, place.directory, done)

        def finish(promise: str, _: object) -> tuple[Literal["json"], bytes]:
            encrypt(place.directory, recipients)
            self._checkpoints.add(place, model.owner, asked.ttl_seconds, {**about, "promise": promise})
            return _json(path=place.path, type=call)

        return Call(call, start, finish, is_kept=False)

    def _ephemeral(self, model: Model, seq: int, asked: Save) -> Call:
        """An adapter for one sampling session. All ``inflight`` ones of a model move on to the newest."""
        sampler = f"{model.session}:sample:{asked.sampling_session_seq_id}"
        moving = f"{model.id.rpartition(':')[2]}-inflight-" if asked.kind == "inflight" else ""
        prefix = f"sessions/{model.session}/{moving}"
        place = f"{prefix}{asked.sampling_session_seq_id}"

        def finish(promise: str, _: object) -> tuple[Literal["json"], bytes]:
            self._database.insert(
                "samplers",
                id=sampler,
                session=model.session,
                owner=model.owner,
                base=model.base,
                directory=place,
                created=time.time(),
            )
            if moving:
                where = "session = ? AND instr(directory, ?) = 1"
                query = f"UPDATE samplers SET directory = ? WHERE {where}"
                self._database.rows(query, (place, model.session, prefix))
            return _json(path=None, sampling_session_id=sampler, type="save_weights_for_sampler")

        return Call(
            "save_weights_for_sampler",
            lambda promise, done: self._tenants.save_adapter(model.id, self._root / place, done),
            finish,
            is_kept=False,
        )


def _json(**values: object) -> tuple[Literal["json"], bytes]:
    return "json", json.dumps(values).encode()
