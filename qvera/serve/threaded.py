"""What engines have in common: a thread that runs the model, the queue before it, and the events of each request.

Only the engine's thread touches the model and the bank's slots, and only it calls ``on_event``, so a request gets its
events in order and exactly one end. Other threads leave what they want in queues under one lock. No other thread may
load a model meanwhile: transformers changes torch's own functions while it does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal

import torch

from qvera.adapters.projection import forget_inputs
from qvera.evaluation.generate import generating
from qvera.serve.active_request import ActiveRequest
from qvera.serve.background import Background
from qvera.serve.bank import HostVectors, ServingBank
from qvera.serve.requests import (
    Busy,
    EndEvent,
    EngineDead,
    EngineSettings,
    EngineStats,
    Event,
    GenerationRequest,
    ResolvedAdapter,
    TokenEvent,
)
from qvera.serve.sampling import TokenChooser
from qvera.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from qvera.models.loader import Base
    from qvera.serve.engine import BackgroundWork

_logger = logging.getLogger(__name__)
_MOST_FAILURES = 3
"""Steps that fail one after the other, without a good one between them, end the engine."""
_POLL_SECONDS = 0.05
NOT_FINITE = "the model's output was not finite, so no token can be drawn from it"


class ThreadedEngine(ABC):
    """An `Engine` whose subclass says what a step is."""

    def __init__(self, base: Base, settings: EngineSettings) -> None:
        """``base``: in evaluation mode, without adapters. It belongs to the engine until `close`."""
        self.settings, self.model = settings, base.model
        self.bank = ServingBank(base, settings.slots)
        self.running: dict[str, ActiveRequest] = {}
        self._vocabulary = base.model.get_input_embeddings().weight.shape[0]
        self._waiting: deque[ActiveRequest] = deque()
        self._cancelled: set[str] = set()
        self._tasks: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._closing = False
        self._dead: str | None = None
        self._failures = self._prompt_tokens = self._generated = self._finished = 0
        self.background = Background(settings.training_share)
        self._woken = False
        self._wake = threading.Condition()
        self._layout = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run, name="qvera-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # Called from any thread

    @property
    def longest_tokens(self) -> int:
        """How many tokens prompt and answer may have together."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        """See `Engine.submit`."""
        self._require_fit(request)
        with self._wake:
            self._require_room()
        vectors = None if request.adapter is None else self.bank.read(request.adapter)
        with self._wake:
            self._require_room()
            self._waiting.append(ActiveRequest(request, on_event, vectors))
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        with self._wake:
            if request_id in self.running or any(live.request.id == request_id for live in self._waiting):
                self._cancelled.add(request_id)
                self._wake.notify()

    def load(self, adapter: ResolvedAdapter) -> None:
        """See `Engine.load`."""
        vectors = self.bank.read(adapter)

        def put() -> None:
            if self._acquire(vectors) is not None:
                self.bank.release(vectors)

        self._in_thread(put).result()

    def unload(self, identity: str) -> None:
        """See `Engine.unload`."""
        with contextlib.suppress(EngineDead):
            self._in_thread(lambda: self.bank.unload(identity))

    def set_background(self, work: BackgroundWork | None) -> None:
        """See `Engine.set_background`."""
        self.background.set(work)
        self.wake()

    def wake(self) -> None:
        """See `Engine.wake`."""
        self.background.resume()
        with self._wake:
            self._woken = True
            self._wake.notify()

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._wake:
            return EngineStats(
                running=len(self.running),
                waiting=len(self._waiting),
                adapters_resident=self.bank.resident,
                adapter_slots=self.settings.slots,
                bank_bytes=self.bank.size_bytes,
                dead=self._dead,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated,
                finished=self._finished,
                background_seconds=self.background.seconds,
                background_parts=self.background.parts,
                background_failure=self.background.failure,
            )

    def close(self) -> None:
        """See `Engine.close`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _require_fit(self, request: GenerationRequest) -> None:
        prompt, longest = request.prompt, self.longest_tokens
        if not prompt:
            raise InputError("prompt: has no tokens; expected at least one.")
        if len(prompt) + request.sampling.max_tokens > longest:
            raise InputError(
                f"prompt and max_tokens: {len(prompt):,} and {request.sampling.max_tokens:,} tokens are more than the "
                f"{longest:,} that fit; shorten the prompt or lower max_tokens."
            )
        if not 0 <= min(prompt) <= max(prompt) < self._vocabulary:
            raise InputError(f"prompt: token ids of this model are 0 to {self._vocabulary - 1:,}.")

    def _require_room(self) -> None:
        if self._dead is not None or self._closing:
            raise EngineDead(self._dead or "the engine is closing")
        free = max(0, self.settings.max_running - len(self.running))
        if len(self._waiting) >= self.settings.max_waiting + free:
            raise Busy(f"{len(self._waiting):,} requests wait already")

    def _in_thread(self, task: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        with self._wake:
            if self._dead is not None or self._closing:
                raise EngineDead(self._dead or "the engine is closing")
            self._tasks.append((task, future))
            self._wake.notify()
        return future

    # The engine's thread

    @abstractmethod
    def begin(self, live: ActiveRequest) -> None:
        """A request has got its place and its slot; it is in ``running``."""

    @abstractmethod
    def drop(self, live: ActiveRequest) -> None:
        """A request has ended before its last token; the next step must be without it."""

    @abstractmethod
    def step(self) -> Iterable[tuple[ActiveRequest, TokenEvent | None]]:
        """Run the model once.

        Returns:
            For each request that got a token: the event, or None where its logits were not finite. Nothing at all
            where there is nothing to run now.
        """

    @abstractmethod
    def recover(self) -> None:
        """A step failed, and all requests have been ended: forget everything about them."""

    def _run(self) -> None:
        dead = "the engine was closed"
        try:
            with torch.no_grad(), self._layout:
                self._layout.enter_context(generating(self.model, base_only=True))
                while self._wait_for_work():
                    self._do_tasks()
                    self._take_cancelled()
                    self._admit()
                    self._try_step()
                    self._try_part()
        except BaseException as error:  # whatever it is, nobody may wait for this thread for ever
            _logger.exception("the engine's thread ended")
            dead = f"{type(error).__name__}: {first_line(error)}"
        finally:
            self._end_all(dead)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False: the engine is to end."""
        while True:
            with self._wake:
                self._woken = False
                if self._is_asked():
                    return not self._closing
            # without the lock, which the work may wait for; one that has something to do from here on sets the flag.
            # The time is asked for first: if it came in between, nobody would look for the part any more.
            seconds = self.background.seconds_to_wait(answering=False)
            if not seconds and self.background.has_part(answering=False):
                return True
            with self._wake:
                if not (self._woken or self._is_asked()):
                    self._wake.wait(seconds or None)

    def _is_asked(self) -> bool:
        """Whether there is something to do but background work; with the lock."""
        return bool(self._closing or self._waiting or self._tasks or self._cancelled or self.running)

    def _do_tasks(self) -> None:
        while True:
            with self._wake:
                if not self._tasks:
                    return
                task, future = self._tasks.popleft()
            try:
                task()
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise

    def _take_cancelled(self) -> None:
        with self._wake:
            cancelled, self._cancelled = self._cancelled, set()
            gone = [live for live in self._waiting if live.request.id in cancelled]
            for live in gone:
                self._waiting.remove(live)
        for live in gone:
            self._end(live, EndEvent("cancelled"))
        for request_id in cancelled:
            if (running := self.running.get(request_id)) is not None:
                self._drop(running, EndEvent("cancelled"))

    def _admit(self) -> None:
        """Give places to waiting requests, in their order: none passes one that waits for a slot."""
        while len(self.running) < self.settings.max_running and self.may_begin():
            with self._wake:
                live = self._waiting[0] if self._waiting else None
            if live is None:
                return
            try:
                slot = 0 if live.vectors is None else self._acquire(live.vectors)
            except Exception as error:
                _logger.exception("adapter of request %s", live.request.id)
                with self._wake:
                    self._waiting.popleft()
                live.vectors = None
                self._end(live, EndEvent("error", _message(error)))
                continue
            if slot is None:
                return
            live.slot = slot
            live.chooser = TokenChooser(live.request.sampling, self.bank.device)
            with self._wake:
                self._waiting.popleft()
                self.running[live.request.id] = live
                self._prompt_tokens += len(live.request.prompt)
            self.begin(live)

    def may_begin(self) -> bool:
        """Whether requests may join those that run."""
        return True

    def _acquire(self, vectors: HostVectors) -> int | None:
        if not self.bank.needs_layers(vectors):
            return self.bank.acquire(vectors)
        # layers that are made anew take the layout of answers too
        self._layout.close()
        try:
            return self.bank.acquire(vectors)
        finally:
            self._layout.enter_context(generating(self.model, base_only=True))

    def _try_step(self) -> None:
        if not self.running:
            return
        try:
            got = list(self.step())
        except Exception as error:
            _logger.exception("a step failed")
            self._failures += 1
            message = _message(error)
            for live in list(self.running.values()):
                self._end(live, EndEvent("error", message))
            if self._failures >= _MOST_FAILURES:
                raise
            forget_inputs(self.model)
            self.recover()
            return
        self._failures = 0
        self.background.answered()
        for live, event in got:
            self._pass_on(live, event)
        if not got:
            with self._wake:
                self._wake.wait(_POLL_SECONDS)

    def _try_part(self) -> None:
        """Do a part of the background work, if it is its turn."""
        with self._wake:
            if self._closing:
                return
            answering = bool(self.running or self._waiting)
        if self.background.has_part(answering) and not self.background.run_slice():
            forget_inputs(self.model)

    def _pass_on(self, live: ActiveRequest, event: TokenEvent | None) -> None:
        if event is None:
            self._drop(live, EndEvent("error", NOT_FINITE))
            return
        sampling = live.request.sampling
        if event.token in sampling.stop_tokens:
            self._end(live, EndEvent("stop"))
            return
        live.answer.append(event.token)
        with self._wake:
            self._generated += 1
        if not live.send(event):
            self._drop(live, EndEvent("cancelled"))
        elif len(live.answer) >= sampling.max_tokens:
            self._end(live, EndEvent("length"))

    def _drop(self, live: ActiveRequest, event: EndEvent) -> None:
        self.drop(live)
        self._end(live, event)

    def _end(self, live: ActiveRequest, event: EndEvent) -> None:
        live.ended = True
        with self._wake:
            was_running = self.running.pop(live.request.id, None) is not None
            self._finished += 1
        if was_running and live.vectors is not None:
            self.bank.release(live.vectors)
        live.send(event)

    def _end_all(self, dead: str) -> None:
        with self._wake:
            self._dead = dead
            left = [*self.running.values(), *self._waiting]
            self._waiting.clear()
            tasks = list(self._tasks)
            reason: Literal["cancelled", "error"] = "cancelled" if self._closing else "error"
        for live in left:
            self._end(live, EndEvent(reason, "" if self._closing else dead))
        for _, future in tasks:
            future.set_exception(EngineDead(dead))


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
