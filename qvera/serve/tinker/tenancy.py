"""Sessions and models of Tinker's clients: the order of a model's calls, promises, expiry, and the restart.

A call is in the database before it is promised. What it changes is in the model's state file some time later; until
then its body stays, and the next server does it again. So a loop goes on after a kill, and its client notices nothing.

    tinker.sqlite                       see `qvera.serve.tinker.database`
    models/MODEL/SEQ.safetensors        a model after the calls up to SEQ
    sessions/SESSION/                   adapters of its samplers that have no name
    runs/                               see `qvera.serve.tinker.checkpoints`

Only a thread of its own waits for the disk: the engine's thread passes results to it, in order, and events of samples.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from qvera.models.structure import engine_limit
from qvera.serve.api.errors import ApiError, require_room
from qvera.serve.engine import Engine
from qvera.serve.fine_tuning.directory import remove_remains
from qvera.serve.opening import Served
from qvera.serve.sqlite import new_id
from qvera.serve.tinker.calls import READERS, Call, CreateModel, LoadWeights, parsed
from qvera.serve.tinker.checkpoints import Checkpoints
from qvera.serve.tinker.database import Database
from qvera.training.tenants import LORA_ALPHA, VERA_RATE_FACTOR, CallFailed, ModelShape, Tenants, TenantSettings
from qvera.utils.errors import InputError, RunFailed, first_line
from qvera.utils.files import disk_errors, resolve_path

_logger = logging.getLogger(__name__)
_TICK_SECONDS = 1.0
_RETRY_SECONDS = 2.0  # after the disk was full
_UNNAMED_KEPT = 8  # of a model's adapters for sampling, also if nobody asks for them
_NOT_BACK = "The server could not bring the model back after a restart; load its last saved state."
_VERA = re.compile(r":vera-(\d{1,4})\Z")


@dataclass(frozen=True, slots=True)
class TinkerSettings:
    """Limits of Tinker's API. Those of a key hold on a server without keys too."""

    max_rank: int = 64  # of LoRA
    max_vera_rank: int = 1024
    call_tokens: int = 1 << 20  # of one call, in all of its rows
    sessions: int = 1024  # live, of one key
    models: int = 2048  # live, of one key
    open_calls: int = 512  # accepted and without a result, of one key
    open_bytes: int = 512 << 20  # bodies of these, or their rows in memory where those are larger
    open_samples: int = 4096  # that wait or run, of one key
    checkpoint_bytes: int = 64 << 30  # of one key, on disk
    session_seconds: float = 600.0  # a session without a heartbeat ends after this long
    gap_seconds: float = 5.0  # a missing seq_id holds up later ones for so long
    save_seconds: float = 120.0  # a model that changes is saved this often
    save_bytes: int = 64 << 20  # or once it has had so many bytes of calls
    kept_seconds: float = 3600.0  # results can be fetched again for so long, and ended sessions be looked up


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The served base, as clients see it."""

    name: str
    names: frozenset[str]  # all that it is called
    tokenizer: str  # what `AutoTokenizer` loads: a directory or hub id
    architecture: str
    vocabulary: int
    most_tokens: int  # of a row


@dataclass(eq=False, slots=True)
class TrainedModel:
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
    waiting: dict[int, tuple[str, str, Call | None]] = field(default_factory=dict)
    """seq → kind, promise, and what is to be done; None: nothing."""
    waits_since: float | None = None  # for a missing seq
    unsaved_bytes: int = 0
    unsaved_since: float | None = None
    is_saving: bool = False


@contextlib.contextmanager
def open_tinker(directory: Path, served: Served, engine: Engine, max_rank: int) -> Iterator[Tinker]:
    """Open Tinker's API over an engine. Raises InputError for a base that can't be trained.

    Calls that a server before this one has promised are done. The caller makes ``tenants`` the engine's background
    work, and ends the engine first.
    """
    base, section = served.opened.base, served.opened.target.section
    path = Path(resolve_path(section.path))
    tokenizer, model = str(path.resolve() if path.is_dir() else path), base.model
    sizes = model.get_input_embeddings().num_embeddings, model.get_output_embeddings().out_features
    facts = BaseFacts(
        name=served.base_name,
        names=frozenset({*served.store.base_names, tokenizer}),
        tokenizer=tokenizer,
        architecture=model.config.architectures[0],
        vocabulary=min(map(int, sizes)),
        most_tokens=engine_limit(model),
    )
    with disk_errors(str(directory), "Choose another --training-dir."):
        directory.mkdir(exist_ok=True)
    tenants = Tenants(base, TenantSettings(directory / "paged", section), engine.wake)
    with (
        contextlib.closing(Database(directory / "tinker.sqlite")) as database,
        Tinker(directory, database, tenants, facts, TinkerSettings(max_rank)) as tinker,
    ):
        yield tinker


class Tinker:
    """Sessions, models and promises of Tinker's API. Methods may block, so call them in a thread."""

    def __init__(
        self, directory: Path, database: Database, tenants: Tenants, base: BaseFacts, settings: TinkerSettings
    ) -> None:
        """``database`` is that of the directory; the caller closes it."""
        self.directory, self.database, self.base, self.settings = directory, database, base, settings
        self.checkpoints = Checkpoints(database, directory, settings.checkpoint_bytes)
        self.on_session_end: Callable[[str], None] = lambda _: None
        """Called with the id of a session that has ended."""
        self.tenants = tenants
        self._lock = threading.RLock()
        self._sessions: dict[tuple[str, str], float] = {}
        """A live session and its owner → when its client was heard last."""
        self._models: dict[str, TrainedModel] = {}
        self._closing = False
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.put = self._work.put
        """Queues work for the thread, which does it in order. What a full disk refuses is tried again."""
        self._thread = threading.Thread(target=self._run, name="qvera-tinker", daemon=True)

    def __enter__(self) -> Self:
        """Go on where the last server ended."""
        self._remove_remains()
        self._restore()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Write down the results that there are. The engine's thread must have ended."""
        self._closing = True
        self._work.put(None)
        self._thread.join()

    # Sessions

    def create_session(self, owner: str, about: dict[str, Any]) -> tuple[str, str]:
        """Begin a session. Returns its id, and what its user should know. Raises ApiError 429 at the key's limit."""
        with self._lock:
            require_room("sessions", sum(one == owner for _, one in self._sessions), self.settings.sessions)
            session, now, text = new_id("session"), time.time(), json.dumps(about)
            self.database.insert("sessions", id=session, owner=owner, created=now, heartbeat=now, about=text)
            self._sessions[session, owner] = time.monotonic()
        name = self.base.name
        return session, (
            f"base_model={name!r} trains LoRA of the asked rank on the served base, with alpha {LORA_ALPHA:g}: the "
            f"change of W is {LORA_ALPHA:g}/rank · B A. base_model={name + ':vera-256'!r} trains VeRA of rank 256, "
            f"whose vectors step {VERA_RATE_FACTOR:g} times as far as learning_rate says, so that LoRA's usual "
            "learning rates act. train_unembed is not trained: the output layer stays as it is."
        )

    def hear(self, session_id: str, owner: str) -> None:
        """Keep a session alive. Raises ApiError: 410 if it has ended, 404 if there is no such one of this owner."""
        with self._lock:
            if (session_id, owner) not in self._sessions:
                raise self._gone("sessions", session_id, owner)
            self._sessions[session_id, owner] = time.monotonic()

    def end_session(self, session_id: str, owner: str) -> None:
        """End a session and its models. Named checkpoints stay."""
        with self._lock:
            if self._sessions.pop((session_id, owner), None) is None:
                return
            models = [model.id for model in self._models.values() if model.session == session_id]
            for model in models:
                del self._models[model]
        self.on_session_end(session_id)
        write = partial(self._write_end, session_id, models)
        if not self._do(write):  # the disk refused it
            self.put(write)
        # the engine may be writing one of the files
        directories = [self.directory / "sessions" / session_id, *map(self._states, models)]
        self.tenants.remove(models, lambda _: self.put(partial(remove_remains, directories)))

    def _write_end(self, session_id: str, models: list[str]) -> None:
        for model in models:
            self._end_model(model, "The session has ended.")
        # the session last: after a kill before that it is still live, and ends once more
        for table, key in (("samplers", "session"), ("sessions", "id")):
            query = f"UPDATE {table} SET ended = ? WHERE {key} = ? AND ended IS NULL"
            self.database.rows(query, (time.time(), session_id))

    def _end_model(self, model: str, why: str, category: Literal["user", "server"] = "user") -> None:
        """End a model, if it is live still, write that down, and fail its calls that have no result."""
        with self._lock:
            self._models.pop(model, None)
        for row in self.database.rows("SELECT id FROM promises WHERE target = ? AND state = 'pending'", (model,)):
            self.database.fail(row["id"], why, category)
        self.database.saved(model, 2**31)  # none of its calls is done again
        self.database.rows("UPDATE models SET ended = ? WHERE id = ?", (time.time(), model))

    def _end_unmade(self, model: str, why: str, category: Literal["user", "server"] = "user") -> None:
        """End a model that could not be made, or not be brought back after a restart."""
        self._end_model(model, why, category)
        self.tenants.remove([model])  # a load that came before this has made it after all

    def drop_unasked_samplers(self, session: str) -> None:
        """Delete unnamed adapters that no call of `kept_seconds` has asked for, but for the newest of each model."""
        before, unnamed = time.time() - self.settings.kept_seconds, "session = ? AND directory > '' AND ended IS NULL"
        # a directory without the digits at its end names the model and kind of its adapter
        age = "ROW_NUMBER() OVER (PARTITION BY rtrim(directory, '0123456789') ORDER BY created DESC)"
        old = f"SELECT id FROM (SELECT id, created, {age} AS age FROM samplers WHERE {unnamed}) WHERE age > ?"
        asked = "EXISTS (SELECT 1 FROM promises WHERE target = samplers.id)"
        query = f"UPDATE samplers SET ended = ? WHERE id IN ({old}) AND created < ? AND NOT {asked}"
        self.database.rows(query, (time.time(), session, _UNNAMED_KEPT, before))
        used = {row[0] for row in self.database.rows(f"SELECT directory FROM samplers WHERE {unnamed}", (session,))}
        # a young one may be an adapter that is just being saved, and has no row yet
        for directory in self.directory.glob(f"sessions/{session}/*"):
            if str(directory.relative_to(self.directory)) not in used and directory.stat().st_mtime < before:
                shutil.rmtree(directory, ignore_errors=True)

    def _gone(self, table: Literal["sessions", "models"], name: str, owner: str) -> ApiError:
        self.database.own(table, name, owner)  # raises 404 if it was never the owner's
        return ApiError(410, f"The {table.removesuffix('s')} {name} has ended.")

    # Models

    def create_model(self, owner: str, kind: str, body: bytes) -> tuple[str, str]:
        """Make a model from a seed or a saved state. Returns its creation's promise, and its id.

        Raises ApiError (`hear`; 429 at the key's limit), or InputError if it can't be made as asked.
        """
        asked = parsed(CreateModel, body) if kind == "create_model" else parsed(LoadWeights, body)
        session, seed = asked.session_id or "", None
        model_id = f"{session}:train:{asked.model_seq_id}"
        if isinstance(asked, CreateModel):
            base, shape, seed = asked.base_model, self._shape(asked), asked.lora_config.seed
        else:
            found = self.checkpoints.find(asked.path, owner, "weights")
            base, shape = asked.base_model or found.about["base"], found.shape
            self._vera_rank(base)
        most = self.settings.max_rank if shape.is_lora else self.settings.max_vera_rank
        if not 1 <= shape.rank <= most:
            raise InputError(f"rank: is {shape.rank:,}, and this server takes 1 to {most:,} of {shape.method}.")
        with self._lock:
            self.hear(session, owner)  # under the lock, so that it does not end before it has the model
            model = self._models.get(model_id)
            if model is None:
                if self.database.rows("SELECT 1 FROM models WHERE id = ?", (model_id,)):  # an ended one keeps its id
                    raise self._gone("models", model_id, owner)
                require_room("models", sum(one.owner == owner for one in self._models.values()), self.settings.models)
                seed = secrets.randbits(31) if seed is None else seed % 2**63
                columns: dict[str, Any] = {"id": model_id, "session": session, "owner": owner, "base": base}
                model = TrainedModel(**columns, shape=shape, seed=seed)
                self.database.add_model(shape, asked.user_metadata, **columns, seed=seed)
                self._models[model_id] = model
            return self.call(model, 0, kind, body), model_id

    def _shape(self, asked: CreateModel) -> ModelShape:
        lora, vera = asked.lora_config, self._vera_rank(asked.base_model)
        if not (lora.train_mlp or lora.train_attn):
            raise InputError("lora_config: train_mlp and train_attn are off, and the output layer is not trained here.")
        targets = "all-linear" if lora.train_mlp and lora.train_attn else "mlp" if lora.train_mlp else "attention"
        return ModelShape("lora", lora.rank, targets) if vera is None else ModelShape("vera", vera, targets)

    def _vera_rank(self, name: str) -> int | None:
        """The rank of VeRA in a base's name; None: it trains LoRA. Raises InputError for another base."""
        if name in self.base.names:
            return None
        bare, *rank = _VERA.split(name)
        if bare not in self.base.names:
            raise InputError(
                f"base_model: {name[:200]!r} is not served here; expected {self.base.name!r}, or "
                f"{self.base.name + ':vera-256'!r} for VeRA."
            )
        return int(rank[0])

    def model(self, model_id: str, owner: str) -> TrainedModel:
        """Return a live model. Raises ApiError as `hear`."""
        model = self._models.get(model_id)
        if model is None or model.owner != owner:
            raise self._gone("models", model_id, owner)
        self.hear(model.session, owner)
        return model

    # Calls

    def call(self, model: TrainedModel, seq: int, kind: str, body: bytes) -> str:
        """Accept a call of a model. Returns its promise; a repetition gets the first one's.

        Raises InputError for a body that can't be used, and ApiError 429 if the key has too many open calls.
        """
        # read before the lock is taken: a body may have megabytes
        call, owner, settings = READERS[kind](self, model, seq, kind, body), model.owner, self.settings
        with self._lock:
            if self._models.get(model.id) is not model:
                raise self._gone("models", model.id, owner)
            count, size = self.database.open_of(owner, samples=False)
            require_room("calls", count, settings.open_calls)
            require_room("bytes of calls", size, settings.open_bytes)
            held = max(len(body), call.held_bytes)
            promise, is_new = self.database.begin(owner, model.id, seq, kind, body, size=held)
            if is_new:
                model.unsaved_bytes += len(body)
                if seq < model.barrier:
                    late = f"seq_id: {seq} came after call {model.barrier}, which it should have come before."
                    self.put(partial(self.database.fail, promise, late, "user"))
                else:
                    model.waiting[seq] = kind, promise, call
                    self._advance(model)
            return promise

    def refuse(self, model: TrainedModel, seq: int, kind: str) -> None:
        """Note that a call was refused: it has used its seq, and later ones do not wait for it."""
        with self._lock:
            promise, is_new = self.database.begin(model.owner, model.id, seq, kind, None)
            if is_new and seq >= model.next_seq:
                model.waiting[seq] = kind, promise, None
                self._advance(model)

    def _advance(self, model: TrainedModel, closes_gaps: bool = False) -> None:
        """Hand over the calls whose turn it is.

        Parts of one forward_backward may come in any order. Any other call proves that all before it are there, or
        were given up: the client sends a call once the one before was answered.
        """
        # `proof`: the last call that proves this. Before it there are no gaps, or they will never be filled.
        proof = max((seq for seq, (kind, *_) in model.waiting.items() if kind != "forward_backward"), default=-1)
        for seq in sorted(model.waiting):
            if seq > max(model.next_seq, proof) and not closes_gaps:
                model.waits_since = model.waits_since or time.monotonic()
                return
            kind, promise, call = model.waiting.pop(seq)
            model.next_seq = max(model.next_seq, seq + 1)
            if kind != "forward_backward":
                model.barrier = max(model.barrier, seq)
            if call is not None:
                self._start(model, promise, call)
        model.waits_since = None

    def _start(self, model: TrainedModel, promise: str, call: Call) -> None:
        """Hand a call to the engine. An error at that ends the promise."""
        if not model.in_engine:  # after a restart, its first call brings it back
            model.in_engine = True
            if model.applied_seq >= 0:
                file = self._states(model.id) / f"{model.applied_seq}.safetensors"
                self.tenants.load(model.id, model.owner, file, True, partial(self._after_load, model))
        model.unsaved_since = model.unsaved_since or time.monotonic()

        def done(result: Any) -> None:
            self.put(partial(self._finish, model, promise, call, result))

        try:
            call.start(done)
        except (InputError, RunFailed) as error:
            done(CallFailed(str(error), "user" if isinstance(error, InputError) else "server"))

    def _after_load(self, model: TrainedModel, result: Any) -> None:
        """End a model whose state can't be read back, before the engine says why its calls fail."""
        if isinstance(result, CallFailed):
            _logger.error("%s can't be brought back after a restart: %s", model.id, result)
            self.put(partial(self._end_unmade, model.id, _NOT_BACK, "server"))

    def _states(self, model_id: str) -> Path:
        return self.directory / "models" / model_id.replace(":", "_")

    # The thread that waits for the disk

    def _run(self) -> None:
        next_tick = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                if (work := self._work.get(timeout=max(next_tick - time.monotonic(), 0.0))) is None:
                    return
                while not (self._do(work) or self._closing):
                    time.sleep(_RETRY_SECONDS)
            if time.monotonic() >= next_tick:
                self._do(self._tick)
                next_tick = time.monotonic() + _TICK_SECONDS

    def _do(self, work: Callable[[], None]) -> bool:
        """Do a piece of work. Returns False if the disk refused it; other errors are logged, and it counts as done."""
        try:
            work()
        except RunFailed as error:
            _logger.warning("%s", error)
            return False
        except Exception:
            _logger.exception("a part of the work failed")
        return True

    def _finish(self, model: TrainedModel, promise: str, call: Call, result: Any) -> None:
        """Write down what came of a call, or why nothing did."""
        try:
            found = result if isinstance(result, CallFailed) else call.finish(result)
        except RunFailed:
            raise
        except InputError as error:
            found = CallFailed(str(error))
        except Exception as error:
            _logger.exception("%s of %s", call.kind, model.id)
            found = CallFailed(f"The result can't be written: {first_line(error)}", "server")
        if isinstance(found, CallFailed):
            self.database.fail(promise, found.message, found.category)
            if call.kind in ("create_model", "load_weights"):  # there is no such model, then
                self._end_unmade(model.id, f"The model was not made: {found.message}")
                remove_remains([self._states(model.id)])
            return
        payload = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.database.end(promise, "proto" if payload is found else "json", payload, keep_body=call.is_kept)
        if call.kind == "load_weights":  # saved soon: the state that it was made of may be deleted
            model.unsaved_bytes += self.settings.save_bytes

    def _tick(self) -> None:
        """Do what is due: close gaps, save models, end silent sessions, and drop what is over."""
        now, settings = time.monotonic(), self.settings
        with self._lock:
            expired = [key for key, heard in self._sessions.items() if now - heard > settings.session_seconds]
            for model in self._models.values():
                if model.waits_since is not None and now - model.waits_since > settings.gap_seconds:
                    self._advance(model, closes_gaps=True)
                is_due = now - (model.unsaved_since or now) > settings.save_seconds
                # a part that came late is saved with the next call: the file that the database names must stay as it is
                is_new = model.next_seq - 1 > model.applied_seq and not model.is_saving
                if is_new and (is_due or model.unsaved_bytes >= settings.save_bytes):
                    self._save(model)
        for session_id, owner in expired:
            _logger.warning("%s ends: there was no heartbeat for %g s", session_id, settings.session_seconds)
            self.end_session(session_id, owner)
        self.database.forget(time.time() - settings.kept_seconds)
        self.checkpoints.remove_expired()

    def _save(self, model: TrainedModel) -> None:
        seq = model.next_seq - 1
        file = self._states(model.id) / f"{seq}.safetensors"
        # the engine does a model's calls in order, so it saves after call `seq`; what comes from now on is unsaved
        model.is_saving, model.unsaved_bytes, model.unsaved_since = True, 0, None
        self.tenants.save_state(model.id, file, lambda result: self.put(partial(self._saved, model, seq, file, result)))

    def _saved(self, model: TrainedModel, seq: int, file: Path, result: Any) -> None:
        if isinstance(result, CallFailed):
            _logger.warning("%s can't be saved: %s", model.id, result)
            model.unsaved_since = model.unsaved_since or time.monotonic()
        else:
            self.database.saved(model.id, seq)
            model.applied_seq = seq
            # only now, as a restart needs the file that the database names
            for other in file.parent.glob("*.safetensors"):
                if other != file:
                    other.unlink(missing_ok=True)
        model.is_saving = False

    def _remove_remains(self) -> None:
        """Delete directories that the database does not name, and empty ones. What is done again writes its own."""
        for table, place in (("models", self._states), ("sessions", (self.directory / "sessions").joinpath)):
            live = self.database.rows(f"SELECT id FROM {table} WHERE ended IS NULL")
            remove_remains(self.directory.glob(f"{table}/*"), [place(row["id"]) for row in live])
        remove_remains(self.directory.glob("runs/*/*/*"), self.checkpoints.directories())
        for empty in [*self.directory.glob("runs/*/*"), *self.directory.glob("runs/*")]:
            with contextlib.suppress(OSError):  # it has checkpoints
                empty.rmdir()

    def _restore(self) -> None:
        """Begin again the calls whose effect is in no state file, and those that were promised and not done."""
        live = self.database.rows("SELECT id, owner FROM sessions WHERE ended IS NULL")
        self._sessions.update((tuple(row), time.monotonic()) for row in live)
        columns = "id, session, owner, base, shape, seed, applied_seq"
        for row in self.database.rows(f"SELECT {columns} FROM models WHERE ended IS NULL ORDER BY created"):
            shape, applied = ModelShape(*json.loads(row["shape"])), row["applied_seq"]
            names = row["id"], row["session"], row["owner"], row["base"]
            model = TrainedModel(*names, shape, int(row["seed"]), applied + 1, applied_seq=applied, in_engine=False)
            self._models[model.id] = model
            query = "SELECT id, seq, kind, body FROM promises WHERE target = ?"
            for key, seq, kind, body in self.database.rows(query, (model.id,)):
                if seq <= applied and kind != "forward_backward":
                    model.barrier = max(model.barrier, seq)
                if body is None:
                    if seq > applied:  # it has its result and changed nothing, or was refused
                        model.waiting[seq] = kind, key, None
                    continue
                try:
                    model.waiting[seq] = kind, key, READERS[kind](self, model, seq, kind, body)
                except (ApiError, InputError):
                    self.database.fail(key, "After a restart the server can't do it as it is.", "server")
                    if kind == "load_weights":  # its state was deleted: no later call may be done on other numbers
                        self._end_model(model.id, _NOT_BACK, "server")
                        break
            else:
                self._advance(model)
