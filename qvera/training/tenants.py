"""Models of many tenants on one base that answers meanwhile. Calls train them: rows with a loss, and optimizer steps.

**Order.** Calls of one model are done in the order in which they came. Rows of many models' calls share a pass, where
they are of one shape. The owner whose rows had the fewest tokens so far gives the next row, from its oldest call. So
the time is fair over tokens, whatever the size of calls. While a call waits for room, nobody after it begins one.

**Atomic calls.** Passes write to the gradients of the bank as scratch. They are added to the model's pending gradient
when the call is whole and finite. Where memory runs out, or anything else fails, the calls of the pass begin again with
half as many rows in a pass, and a single row that fails ends its call. Other models' gradients are never touched.

**Paging.** A model is in a slot of its shape's bank, or packed in host memory, or in a file: by least use, with its
gradient, moments and count of steps. A shape whose models are idle gives its bank up to another one. With its last
model a shape goes too; only its names stay on the layers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import math
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from qvera.adapters.bank import AdapterBank
from qvera.adapters.config import PREFIX
from qvera.adapters.layer import linear_specs
from qvera.adapters.methods import Source, method_of
from qvera.adapters.methods.lora import Lora
from qvera.adapters.projection import forget_inputs
from qvera.adapters.save_load import named_vectors, save_adapter
from qvera.config.sections import AdapterSection, ModelSection
from qvera.models.checkpointing import draws_random_numbers
from qvera.models.loader import Base
from qvera.models.structure import beside_the_layers
from qvera.training.checkpoint import read_state, write_state
from qvera.training.lent_bank import LentBank, require_trainable_base
from qvera.training.optim import AdamSettings, BankAdamW
from qvera.training.token_rows import LossSettings, PassRow, RowResults, TokenRow, run_pass
from qvera.utils.errors import InputError, RunFailed, first_line
from qvera.utils.files import disk_errors
from qvera.utils.memory import Shortage, or_shortage
from qvera.utils.safetensors_io import save_tensors

_logger = logging.getLogger(__name__)
LORA_ALPHA = 32.0
"""ΔW = 32 / r · B A for every rank, as Tinker has it."""
VERA_RATE_FACTOR = 27.0
"""VeRA's vectors step so many times as far as a call's learning rate says, so that rates that are usual for LoRA act.

That is exactly AdamW's step of vectors in units of 1/27: of b/27, and of d/27 with its usual start. Measured on Alpaca:
50 steps at 0.00173 give 1.650 so (bench/results/quality.jsonl), and by hand 1.701 with d starting 27 times as large.
"""
_MOST_SLOTS = 64
_SHORT_SECONDS = 0.1  # the limit of calls without a pass in one slice
_PASSES_BEFORE_MORE = 50  # so many must go well after a shortage before a pass may have twice as many rows again
_ATTENTION = re.compile(r"attn|attention")

Done: TypeAlias = Callable[[Any], None]
"""Takes a call's result or a `CallFailed`, once, in the engine's thread. It must be quick and raise nothing."""


class ModelShape(NamedTuple):
    """The traits that all models of one bank have."""

    method: str  # ``lora`` or ``vera``
    rank: int
    targets: str = "all-linear"  # or the linears of ``attention``, or the others: ``mlp``

    @property
    def is_lora(self) -> bool:
        """Whether each model has A and B of its own. If not, it has vectors of VeRA."""
        return self.method == Lora.name


class CallFailed(Exception):
    """A call that left nothing behind. ``category``: whether the ``user`` can mend it, or it is the ``server``'s."""

    def __init__(self, message: str, category: Literal["user", "server"] = "user") -> None:
        super().__init__(message)
        self.message, self.category = message, category


@dataclasses.dataclass(frozen=True)
class TenantSettings:
    """Limits of `Tenants`."""

    directory: Path  # for models that are paged out; what an earlier server left there is deleted
    base_section: ModelSection | None = None  # how the base was opened, which adapters keep
    device_bytes: int = 2 * 2**30  # of all banks; a bank takes half of it at most, but always has a slot
    host_bytes: int = 4 * 2**30  # of models that are in no slot; further ones are in files
    pass_tokens: int = 2048  # padding included; a longer row has a pass of its own
    loss_chunk_tokens: int = 512  # whose logits are in memory at one time


@dataclasses.dataclass(eq=False)
class _Do:
    """A call without a pass."""

    done: Done
    do: Callable[[_Model], Any]


@dataclasses.dataclass(eq=False)
class _OptimizerStep:
    done: Done
    settings: AdamSettings


@dataclasses.dataclass(eq=False)
class _Rows:
    """A call of rows. ``left``: the numbers of the rows that no pass has taken yet, the next one last."""

    done: Done
    rows: Sequence[TokenRow]
    loss: str
    settings: LossSettings
    forward_only: bool
    number: int

    def __post_init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Queue all rows again. The longest come first: if memory does not suffice for one, that is known soon."""
        self.left = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i].tokens))
        self.results: dict[int, tuple[np.ndarray, float]] = {}
        self.begun = False


_Call: TypeAlias = _Do | _OptimizerStep | _Rows


@dataclasses.dataclass(eq=False)
class _Model:
    """A tenant's model. Without a slot, ``packed`` or ``file`` has its fp32 vectors, moments and pending gradient."""

    id: str
    owner: str
    calls: deque[_Call] = dataclasses.field(default_factory=deque)
    slot: int = -1  # -1: it is in none
    steps: int = 0
    packed: dict[str, Tensor] | None = None
    file: Path | None = None
    used: int = 0
    pool: _Pool = dataclasses.field(init=False)  # once it is made

    @property
    def is_begun(self) -> bool:
        """Whether a call has rows in the scratch of its slot, which it must keep."""
        return bool(self.calls) and isinstance(self.calls[0], _Rows) and self.calls[0].begun


_Taken: TypeAlias = tuple[_Model, _Rows, int]
"""A row of a pass, by its number in the call."""


class _Pool:
    """The models of one shape, and its bank, which may have no slots."""

    def __init__(self, shape: ModelShape, lent: LentBank) -> None:
        self.shape, self.lent = shape, lent
        for vector in named_vectors(lent.model, lent.adapter).values():  # its shape is needed, its numbers never are
            vector.data = vector.new_zeros(()).expand(vector.shape)
        self.open(0)
        self.slot_bytes = 4 * (self.bank.numbers + 4 * self.bank.trained_numbers)

    def open(self, slots: int) -> None:
        """Make the bank anew. ``pending`` [slots, trained_numbers]: the gradients of calls that are whole."""
        self.bank: AdapterBank = self.lent.make_bank(slots)
        factors = dict.fromkeys(self.bank.layout.columns, 1.0 if self.shape.is_lora else VERA_RATE_FACTOR)
        self.adamw, self.pending = BankAdamW(self.bank, factors), torch.zeros_like(self.bank.gradients)
        moments = {"first": self.adamw.first, "second": self.adamw.second}
        self.rows = {"vectors": self.bank.vectors, **moments, "pending": self.pending}
        self.residents: list[_Model | None] = [None] * slots

    def start(self, seed: int) -> Tensor:
        """Return the numbers that a model starts with. ``seed``: for trained matrices; all share the frozen ones."""
        config = copy.copy(self.lent.model.peft_config[self.lent.adapter])
        method, specs = method_of(config), {layer.spec.name: layer.spec for layer in self.bank.layers}
        if method.source is Source.TRAINED:
            config.projection_seed = seed
        vectors = {}
        for key, columns in self.bank.layout.columns.items():
            name, _, kind = key.removeprefix(PREFIX).rpartition(".")
            vectors[key] = method.start(kind, columns.shape, config, specs[name])
        return self.bank.layout.pack(vectors)


class Tenants:
    """The engine's `BackgroundWork` that trains the models. Public methods may be called from any thread.

    Results go to ``done`` of each call; a call that can't be done gives it a `CallFailed`. InputError: the base can't
    be trained on while it answers.
    """

    def __init__(self, base: Base, settings: TenantSettings, wake: Callable[[], None]) -> None:
        require_trainable_base(base)
        self._base, self._settings, self._wake = base, settings, wake
        self._device = next(base.model.parameters()).device
        self._is_training = not draws_random_numbers(base.model)  # dropout and checkpoints come with this mode
        self._arrivals: deque[Callable[[], None]] = deque()
        self._models: dict[str, _Model] = {}
        self._busy: dict[str, _Model] = {}  # those that have calls
        self._packed: dict[_Model, int] = {}  # bytes of those in host memory, in the order in which they came there
        self._pools: dict[ModelShape, _Pool] = {}
        self._clock = itertools.count(1)
        self._spent: dict[str, int] = {}  # owner → tokens
        self._level = 0  # tokens of the owner who was next in the last pass
        self._most_rows: int | None = None  # the limit of a pass, once memory has run out
        self._good_passes = 0
        self._waits_for_room = False  # whether an optimizer step waits for a slot
        shutil.rmtree(settings.directory, ignore_errors=True)
        settings.directory.mkdir(parents=True)

    def create(self, model_id: str, owner: str, shape: ModelShape, seed: int, done: Done) -> None:
        """Make a model. ``owner``: the one whose turns its calls take."""

        def make(model: _Model) -> None:
            if hasattr(model, "pool"):
                raise CallFailed(f"The model {model_id} is there already.")
            pool = self._pool(shape)
            self._pack(model, {"vectors": pool.start(seed)})
            model.pool = pool  # last: it is made now

        self._send(model_id, _Do(done, make), owner)

    def load(self, model_id: str, owner: str, file: Path, with_optimizer: bool, done: Done) -> None:
        """Make a model from a file of `save_state`, with its optimizer's state or without.

        A model that is there already gives way to it. If the file can't be used, there is none from then on.
        """

        def make(model: _Model) -> None:
            if hasattr(model, "pool"):
                self._forget(model)
                del model.pool  # until it is made
            tensors, state = read_state(file, "Give another one.")
            if "shape" not in state or state.get("base") != self._base.facts.get("fingerprint"):
                raise InputError(f"{file}: is no model's state, or one of another base. Give another one.")
            pool = self._pool(ModelShape(*state["shape"]))
            if any(name not in pool.rows or one.shape != pool.rows[name].shape[1:] for name, one in tensors.items()):
                raise InputError(f"{file}: its tensors are not those of a model of this base. Give another one.")
            self._pack(model, tensors if with_optimizer else {"vectors": tensors["vectors"]})
            model.pool, model.steps = pool, state["steps"] if with_optimizer else 0

        self._send(model_id, _Do(done, make), owner)

    def forward_backward(
        self, model_id: str, rows: Sequence[TokenRow], loss: str, settings: Mapping[str, float], forward_only: bool,
        done: Done,
    ) -> None:  # fmt: skip
        """Add the gradient of a loss, summed over rows and tokens, to the model's. ``done`` gets `RowResults`.

        ``loss`` is one of `TOKEN_LOSSES`, with all of its ``settings``. There is a row at least; each has the loss's
        inputs, and fits the base's context. ``forward_only``: no gradient is computed.
        """
        chosen = tuple(sorted(settings.items()))
        self._send(model_id, _Rows(done, rows, loss, chosen, forward_only, next(self._clock)))

    def optim_step(self, model_id: str, settings: AdamSettings, done: Done) -> None:
        """Step with the gradient of all calls since the last step, and drop it. ``done`` gets its metrics."""
        self._send(model_id, _OptimizerStep(done, settings))

    def save_state(self, model_id: str, file: Path, done: Done) -> None:
        """Write all of a model to a file for `load`: vectors, moments, count of steps and the pending gradient.

        The file is on the disk when ``done`` gets None.
        """

        def save(model: _Model) -> None:
            state = {"shape": model.pool.shape, "base": self._base.facts.get("fingerprint"), "steps": model.steps}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_state(file, self._tensors(model), state)

        self._send(model_id, _Do(done, save))

    def save_adapter(self, model_id: str, directory: Path, done: Done) -> None:
        """Write an adapter that this server and other programs can open. It is on the disk when ``done`` gets None."""

        def save(model: _Model) -> None:
            lent, vectors = model.pool.lent, self._tensors(model)["vectors"]
            named = {key: columns.of(vectors) for key, columns in model.pool.bank.layout.columns.items()}
            save_adapter(lent.model, directory, vectors=named, adapter=lent.adapter)

        self._send(model_id, _Do(done, save))

    def remove(self, model_ids: Sequence[str], done: Done = lambda _: None) -> None:
        """Drop models at once; calls that are not done fail. ``done`` gets None when no file of theirs is open."""

        def remove() -> None:
            for model in filter(None, map(self._models.get, model_ids)):
                self._drop(model, "was removed")
            used = {model.pool.shape for model in self._models.values() if hasattr(model, "pool")}
            self._pools = {shape: pool for shape, pool in self._pools.items() if shape in used}
            done(None)

        self._arrivals.append(remove)
        self._wake()

    def has_work(self) -> bool:
        return bool(self._arrivals or self._busy)

    def _send(self, model_id: str, call: _Call, owner: str | None = None) -> None:
        self._arrivals.append(functools.partial(self._take, model_id, call, owner))
        self._wake()

    # These methods run in the engine's thread.

    def run_slice(self) -> None:
        """Do calls that need no pass, and one pass."""
        while self._arrivals:
            self._arrivals.popleft()()
        self._do_short_calls()
        self._do_pass()

    def _take(self, model_id: str, call: _Call, owner: str | None) -> None:
        """Queue a call of a model. With an owner, the call makes the model."""
        if owner is not None:
            self._models.setdefault(model_id, _Model(model_id, owner))
        if (model := self._models.get(model_id)) is None:
            return call.done(CallFailed(f"The model {model_id} is not there: it was never made, or removed."))
        model.calls.append(call)
        self._busy[model_id] = model

    def _drop(self, model: _Model, why: str) -> None:
        self._models.pop(model.id)
        self._busy.pop(model.id, None)
        self._forget(model)
        for call in model.calls:
            call.done(CallFailed(f"The model {model.id} {why}."))
        model.calls.clear()

    def _end(self, model: _Model, result: Any) -> None:
        call = model.calls.popleft()
        if not model.calls:
            del self._busy[model.id]
        call.done(result)

    def _do_short_calls(self) -> None:
        """Do calls that need no pass for up to `_SHORT_SECONDS`, and all optimizer steps that are due and have room."""
        until, due = time.monotonic() + _SHORT_SECONDS, dict[_Pool, list[_Model]]()
        for model in list(self._busy.values()):
            while model.calls and isinstance(call := model.calls[0], _Do) and time.monotonic() < until:
                self._end(model, self._result_of(functools.partial(call.do, model)))
                if not hasattr(model, "pool"):  # the call that makes it has failed
                    self._drop(model, "could not be made")
            if model.calls and isinstance(model.calls[0], _OptimizerStep):
                due.setdefault(model.pool, []).append(model)
        self._waits_for_room = False
        for pool, models in due.items():
            chosen: list[_Model] = []
            chosen.extend(model for model in models if self._takes_slot(model, chosen))
            self._waits_for_room |= len(chosen) < len(models)
            self._step(pool, chosen)

    def _result_of(self, do: Callable[[], Any]) -> Any:
        """Return the result of ``do``, or the `CallFailed` that says why there is none."""
        try:
            found = or_shortage(do, self._device)
            return CallFailed(f"Memory ran out: {found}.", "server") if isinstance(found, Shortage) else found
        except CallFailed as error:
            return error
        except InputError as error:
            return CallFailed(str(error))
        except Exception as error:
            if not isinstance(error, RunFailed):
                _logger.exception("a call failed")
            return CallFailed(first_line(error), "server")

    def _step(self, pool: _Pool, models: Sequence[_Model]) -> None:
        slots = [model.slot for model in models]
        settings = [model.calls[0].settings for model in models if isinstance(model.calls[0], _OptimizerStep)]

        def step() -> list[float]:
            for slot in slots:  # no call of these models has begun, so their gradients in the bank are free to use
                pool.bank.gradients[slot].copy_(pool.pending[slot])
            return pool.adamw.step(slots, settings)

        norms = self._result_of(step)
        for place, (model, slot) in enumerate(zip(models, slots, strict=True)):
            pool.bank.gradients[slot].zero_()
            if isinstance(norms, CallFailed):
                self._end(model, norms)
                continue
            pool.pending[slot].zero_()
            norm, model.steps = norms[place], pool.adamw.steps[slot]
            failed = CallFailed("optim_step: the norm of the gradient is not finite. It is dropped; no step was taken.")
            self._end(model, {"grad_norm:mean": norm} if math.isfinite(norm) else failed)

    def _do_pass(self) -> None:
        chosen = self._choose_rows()
        if not chosen:
            return
        pool, gradients = chosen[0][0].pool, not chosen[0][1].forward_only
        # rows of one loss stand together, and of these the rows of one model
        chosen.sort(key=lambda one: (one[1].loss, one[1].settings, one[0].slot))
        rows = [PassRow(one.slot, call.rows[i], call.loss, call.settings) for one, call, i in chosen]
        chunk = self._settings.loss_chunk_tokens
        found = self._result_of(lambda: run_pass(pool.lent, pool.bank, rows, chunk, self._is_training, gradients))
        if isinstance(found, CallFailed):
            return self._begin_anew(chosen, found)
        self._good_passes += 1
        if self._most_rows is not None and self._good_passes % _PASSES_BEFORE_MORE == 0:
            self._most_rows *= 2
        for (model, call, number), result in zip(chosen, found, strict=True):
            call.results[number] = result
            if len(call.results) == len(call.rows):
                self._end(model, self._result_of(functools.partial(self._finished, model, call)))

    def _choose_rows(self) -> list[_Taken]:
        """Choose the rows of the next pass, and put their models into slots."""
        waiting: dict[str, list[tuple[_Model, _Rows]]] = {}
        for model in list(self._busy.values()):
            if isinstance(call := model.calls[0], _Rows):
                waiting.setdefault(model.owner, []).append((model, call))
        # an owner who was idle begins level with the one who is next: unused turns are not saved up
        spent = {owner: max(self._spent.get(owner, 0), self._level) for owner in waiting}
        self._level = min(spent.values(), default=self._level)
        self._spent = {owner: tokens for owner, tokens in self._spent.items() if tokens > self._level} | spent
        for calls in waiting.values():
            calls.sort(key=lambda one: one[1].number, reverse=True)  # the oldest last, to be popped
        chosen, kind, longest, total, is_full = list[_Taken](), None, 0, 0, self._waits_for_room
        while waiting:
            owner = min(waiting, key=lambda one: self._spent[one])
            model, call = waiting[owner][-1]
            if call.left and kind in (None, (model.pool, call.forward_only)):
                if call.begun or (not is_full and self._takes_slot(model)):
                    tokens = len(call.rows[call.left[-1]].tokens)
                    longest, total = max(longest, tokens), total + tokens
                    taken = total if model.pool.lent.joins_rows else longest * (len(chosen) + 1)
                    if chosen and (taken > self._settings.pass_tokens or len(chosen) == self._most_rows):
                        break
                    kind, call.begun = (model.pool, call.forward_only), True
                    self._spent[owner] += tokens
                    chosen.append((model, call, call.left.pop()))
                    continue
                is_full = True  # nobody after it begins a call, so that room comes to it at last
            waiting[owner].pop()
            if not waiting[owner]:
                del waiting[owner]
        return chosen

    def _begin_anew(self, chosen: Sequence[_Taken], failed: CallFailed) -> None:
        """Undo the calls of a pass that failed, and halve the rows of later ones. The call of a single row ends."""
        pool = chosen[0][0].pool
        forget_inputs(pool.lent.model)
        for model, call, _ in chosen:
            pool.bank.gradients[model.slot].zero_()
            call.begin_anew()
        if len(chosen) > 1:
            self._most_rows, self._good_passes = len(chosen) // 2, 0
            return _logger.warning("a pass of %d rows failed (%s); going on with half", len(chosen), failed.message)
        self._most_rows = None
        model, call, number = chosen[0]
        text = f"data[{number}], a row of {len(call.rows[number].tokens):,} tokens: {failed.message}"
        self._end(model, CallFailed(text, failed.category))

    def _finished(self, model: _Model, call: _Rows) -> RowResults:
        """Add the gradient of a whole call to the pending one. CallFailed where something in it is not finite."""
        pool, slot = model.pool, model.slot
        scratch, results = pool.bank.gradients[slot], [call.results[i] for i in range(len(call.rows))]
        try:
            for number, (logprobs, loss) in enumerate(results):
                if not (math.isfinite(loss) and np.isfinite(logprobs).all()):
                    raise CallFailed(f"data[{number}]: the loss is not finite. The call's gradient is dropped.")
            if not call.forward_only:
                if not bool(torch.isfinite(scratch).all()):
                    raise CallFailed("data: the gradient is not finite. It is dropped.")
                pool.pending[slot].add_(scratch)
        finally:
            scratch.zero_()
        return RowResults([logprobs for logprobs, _ in results], math.fsum(loss for _, loss in results))

    # These methods move models between slots, host memory and files.

    def _pool(self, shape: ModelShape) -> _Pool:
        """Return the pool of a shape, made at its first use. CallFailed where this base has no such models."""
        if shape not in self._pools:
            about = {"method": shape.method, "rank": shape.rank, "targets": self._targets(shape.targets)}
            section = AdapterSection.model_validate(about | ({"alpha": LORA_ALPHA} if shape.is_lora else {}))
            name, opened = f"__{'-'.join(map(str, shape))}__", self._settings.base_section
            self._pools[shape] = _Pool(shape, LentBank(self._base, name, section, base_section=opened))
        return self._pools[shape]

    def _targets(self, targets: str) -> str | list[str]:
        """Return the ``adapter.targets`` that a recipe would have."""
        if targets == "all-linear":
            return targets
        found = {name.removesuffix(".base_layer"): spec for name, spec in linear_specs(self._base.model).items()}
        names = [name for name in found.keys() - beside_the_layers(self._base.model) if not found[name].experts]
        wanted = [name for name in names if bool(_ATTENTION.search(name)) is (targets == "attention")]
        if not wanted:
            raise CallFailed(f"targets: this base has no linears of its {targets} alone. Train all of them.")
        short, others = ({name.rpartition(".")[2] for name in some} for some in (wanted, set(names) - set(wanted)))
        return sorted(wanted if short & others else short)

    def _open(self, pool: _Pool) -> bool:
        """Give a pool its bank, for which idle pools give up theirs. Returns False where too many are in use."""
        slots = max(min(self._settings.device_bytes // 2 // pool.slot_bytes, _MOST_SLOTS), 1)
        others = [other for other in self._pools.values() if other.residents]
        others.sort(key=lambda one: max((model.used for model in one.residents if model), default=0))
        held = sum(len(other.residents) * other.slot_bytes for other in others)
        room = self._settings.device_bytes - slots * pool.slot_bytes
        for other in others:
            models = [model for model in other.residents if model is not None]
            if held > room and not any(model.is_begun for model in models):
                for model in models:
                    self._page_out(model)
                held -= len(other.residents) * other.slot_bytes
                other.open(0)
        if held and held > room:
            return False
        pool.open(slots)
        return True

    def _takes_slot(self, model: _Model, kept: Collection[_Model] = ()) -> bool:
        """Put a model into a slot, if it is in none. False: all are in use or ``kept``, or its call has failed."""
        found = self._result_of(lambda: self._has_slot(model, kept))
        if isinstance(found, CallFailed):
            self._end(model, found)
        return found is True

    def _has_slot(self, model: _Model, kept: Collection[_Model]) -> bool:
        pool, model.used = model.pool, next(self._clock)
        if model.slot >= 0:
            return True
        if not pool.residents and not self._open(pool):
            return False
        if None not in pool.residents:
            idle = [one for one in pool.residents if one is not None and not one.is_begun and one not in kept]
            if not idle:
                return False
            # rather a model without calls, and of these the one that was used longest ago
            self._page_out(min(idle, key=lambda one: (bool(one.calls), one.used)))
        tensors, slot = self._tensors(model), pool.residents.index(None)
        pool.bank.gradients[slot].zero_()  # a model that was removed in the middle of a call leaves some
        for name, rows in pool.rows.items():
            rows[slot].copy_(tensors[name] if name in tensors else torch.zeros(()))  # zeros were not kept
        pool.adamw.steps[slot] = model.steps
        pool.residents[slot], model.slot = model, slot
        self._unpack(model)
        return True

    def _page_out(self, model: _Model) -> None:
        tensors, slot = self._tensors(model), model.slot
        model.pool.residents[slot], model.slot = None, -1
        self._pack(model, tensors)

    def _pack(self, model: _Model, tensors: dict[str, Tensor]) -> None:
        """Hold a model in host memory. If that is full, write the models that came there first to files."""
        model.packed, self._packed[model] = tensors, sum(tensor.nbytes for tensor in tensors.values())
        while sum(self._packed.values()) > self._settings.host_bytes:
            first = next(iter(self._packed))
            file = self._settings.directory / f"{next(self._clock)}.safetensors"
            try:
                with disk_errors(str(file), "Models stay in memory."):
                    save_tensors(first.packed or {}, file)
            except RunFailed as error:
                return _logger.warning("%s", error)
            self._unpack(first)
            first.file = file

    def _forget(self, model: _Model) -> None:
        """Drop a model's tensors, wherever they are."""
        if model.slot >= 0:
            model.pool.residents[model.slot], model.slot = None, -1
        self._unpack(model)

    def _unpack(self, model: _Model) -> None:
        """Drop a model's copy in host memory or in a file."""
        self._packed.pop(model, None)
        if model.file is not None:
            model.file.unlink(missing_ok=True)
        model.packed = model.file = None

    def _tensors(self, model: _Model) -> dict[str, Tensor]:
        """Return a model's tensors in host memory, wherever it is."""
        if model.packed is not None:
            return model.packed
        if model.file is not None:
            return load_file(model.file)
        held = {name: rows[model.slot].detach() for name, rows in model.pool.rows.items()}  # zeros need no room
        return {name: row.to("cpu", copy=True) for name, row in held.items() if name == "vectors" or row.any()}
