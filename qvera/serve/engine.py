"""The engine: a thread that runs the model, a queue of requests, and the events of each.

Only the engine's thread touches the model and the bank's slots, and only it calls ``on_event``. So a request gets its
events in order, and exactly one end. Other threads put what they want into queues under one lock. Meanwhile no other
thread may load a model, because transformers then patches functions of torch.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import torch

from qvera.adapters.projection import forget_inputs
from qvera.data.images import images_of
from qvera.evaluation.generate import generating
from qvera.models.loader import Base
from qvera.models.loss import Head
from qvera.serve.background import Background, BackgroundWork
from qvera.serve.batches import PagedBatches, StaticBatches
from qvera.serve.blocks import CachedTokens
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
    require_fits,
)
from qvera.serve.sampling import ScoredPrompt, TokenChooser, add_scores, choose_tokens
from qvera.serve.slots import HostVectors, ServingBank
from qvera.utils.errors import InputError, RunFailed, first_line

_logger = logging.getLogger(__name__)
_MOST_FAILURES = 3
"""So many failed steps in a row end the engine."""
NOT_FINITE = "the model's output was not finite, so no token can be drawn from it"


class ActiveRequest(CachedTokens):
    """A request that has not ended."""

    def __init__(
        self,
        request: GenerationRequest,
        on_event: Callable[[Event], None],
        vectors: HostVectors | None,
        device: torch.device,
    ) -> None:
        super().__init__(request.prompt, "" if vectors is None else vectors.identity, request.images)
        self.request, self.on_event, self.vectors = request, on_event, vectors
        self.slot = 0  # of its adapter, once it has a place in the batch
        self.chooser = TokenChooser(request.sampling, device, request.prompt)
        self.scored: ScoredPrompt | None = None
        if request.scoring is not None:
            self.scored = ScoredPrompt(request.scoring, request.prompt, device)
            self.unscored = self.scored.places


class Engine:
    """Answers many requests at a time. All public methods may be called from any thread."""

    def __init__(self, base: Base, settings: EngineSettings) -> None:
        """Take a base in evaluation mode without adapters. The engine owns it until `close`.

        Raises RunFailed if the settings ask for continuous batching that the model can't do, or memory is short.
        """
        self.settings, self.model = settings, base.model
        self.why_static: str | None = None  # why "auto" batching became static
        batches: PagedBatches | StaticBatches | None = None
        if settings.batching == "auto" and images_of(base.tokenizer) is not None:
            self.why_static = "The base takes images, for which there are no continuous batches."
        elif settings.batching != "static":
            try:
                batches = PagedBatches(self.model, settings)
            except RunFailed as error:
                if settings.batching == "continuous" or settings.batch_invariant:
                    raise
                self.why_static = str(error)
        if settings.batch_invariant:
            if not isinstance(batches, PagedBatches):
                raise RunFailed(f"--batch-invariant needs continuous batches. {self.why_static or ''}".rstrip())
            with generating(self.model, base_only=True, fixed=True):
                batches.fix_pass_tokens()
        self._batches = batches or StaticBatches(self.model)
        self.longest_tokens = self._batches.longest_tokens  # of a prompt and its answer together
        self.bank = ServingBank(base, settings.slots, settings.batch_invariant)
        self.running: dict[str, ActiveRequest] = {}  # by id, in the order in which they got a place
        self._vocabulary = base.model.get_input_embeddings().weight.shape[0]
        outputs = getattr(base.model.get_output_embeddings(), "out_features", self._vocabulary)
        self._outputs = min(self._vocabulary, outputs)  # a token that stands for an image may have no logit
        self._waiting: deque[ActiveRequest] = deque()
        self._tasks: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._closing = self._woken = False
        self._dead: str | None = None
        self._failures = self._prompt_tokens = self._generated = self._finished = 0
        self.background = Background(settings.training_share, answering_seconds=settings.answering_seconds)
        self._wake = threading.Condition()
        self._layout = contextlib.ExitStack()  # has the model in the layout of answers while the thread runs
        self._thread = threading.Thread(target=self._run, name="qvera-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # Called from any thread

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        """Queue a request. An adapter that is not in memory is read first.

        Args:
            request: its id must be new.
            on_event: gets each token, then one `EndEvent`, in the engine's thread. It must be quick and raise nothing.

        Raises:
            Busy: the queue is full.
            InputError: the prompt and ``max_tokens`` do not fit, or the adapter is damaged or of another base.
            AdapterChanged: its file was replaced after it was resolved.
            EngineDead: the engine has ended.
        """
        prompt = request.prompt
        require_fits(len(prompt), request.sampling.max_tokens, self.longest_tokens)
        if request.images and not isinstance(self._batches, StaticBatches):
            raise InputError("images are answered in static batches, and this server has continuous ones: send text.")
        scoring, targets = request.scoring, None if request.scoring is None else request.scoring.targets
        biased = [token for token, _ in request.sampling.logit_bias]
        # an id outside of the embedding, or of the head, would fail the step, and with it everybody else's requests
        for name, ids, count in (
            ("prompt", prompt, self._vocabulary if scoring is None else self._outputs),
            ("scoring.targets", () if targets is None else targets.reshape(-1), self._outputs),
            ("logit_bias", biased, self._outputs),
        ):
            if len(ids) and not 0 <= min(ids) <= max(ids) < count:
                raise InputError(f"{name}: token ids of this model are 0 to {count - 1:,}.")
        # asked before the files are read, which takes long, and again afterwards: others may have come meanwhile
        with self._wake:
            self._require_room()
        vectors = None if request.adapter is None else self.bank.read(request.adapter)
        active = ActiveRequest(request, on_event, vectors, self.bank.device)
        with self._wake:
            self._require_room()
            self._waiting.append(active)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """End a request with ``EndEvent("cancelled")`` and free its place, without waiting. Ignores unknown ids."""

        def end() -> None:
            with self._wake:
                active = next((one for one in self._all() if one.request.id == request_id), None)
            if active is not None:
                self._end(active, EndEvent("cancelled"))

        with contextlib.suppress(EngineDead):
            self._in_thread(end)

    def load(self, adapter: ResolvedAdapter) -> None:
        """Put an adapter on the device, so that its first request need not wait. If all slots are in use, only read it.

        Raises InputError, AdapterChanged and EngineDead as `submit`.
        """
        vectors = self.bank.read(adapter)

        def put() -> None:
            if self._acquire(vectors) is not None:
                self.bank.release(vectors)  # without a user it keeps its slot until another adapter needs it

        self._in_thread(put).result()

    def unload(self, identity: str) -> None:
        """Free an adapter's slot once no request uses it. Submitted requests still finish on it."""
        with contextlib.suppress(EngineDead):
            self._in_thread(lambda: self.bank.unload(identity))

    def set_background(self, *works: BackgroundWork) -> None:
        """Set the works for the time that answers leave (`EngineSettings.training_share`)."""
        self.background.set(*works)
        self.wake()

    def wake(self) -> None:
        """Tell the engine that the background work has something to do, or should be tried again after an error."""
        self.background.failure = None
        with self._wake:
            self._woken = True
            self._wake.notify()

    def stats(self) -> EngineStats:
        """Return the engine's numbers as they are now."""
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
                background_failure=self.background.failure,
            )

    def close(self) -> None:
        """End the thread. Unfinished requests get ``EndEvent("cancelled")``."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._batches.close()

    # With the lock

    def _require_alive(self) -> None:
        if self._dead is not None or self._closing:
            raise EngineDead(self._dead or "the engine is closing")

    def _require_room(self) -> None:
        self._require_alive()
        # as many of the waiting requests as there are free places only wait for the next step
        free = max(0, self.settings.max_running - len(self.running))
        if len(self._waiting) >= self.settings.max_waiting + free:
            raise Busy(f"{len(self._waiting):,} requests wait already")

    def _all(self) -> list[ActiveRequest]:
        return [*self.running.values(), *self._waiting]

    def _is_asked(self) -> bool:
        """Whether there is anything to do besides background work."""
        return bool(self._closing or self._waiting or self._tasks or self.running)

    def _in_thread(self, task: Callable[[], None]) -> Future[None]:
        """Queue a task for the engine's thread. Takes the lock itself. The future has the task's error, if any."""
        future: Future[None] = Future()
        with self._wake:
            self._require_alive()
            self._tasks.append((task, future))
            self._wake.notify()
        return future

    # The engine's thread

    def _run(self) -> None:
        """Loop until `close` or an error: tasks, new requests, a step of answers, and a slice of background work."""
        dead = "the engine was closed"
        try:
            with torch.no_grad(), self._layout:
                self._layout.enter_context(generating(self.model, base_only=True, fixed=self.settings.batch_invariant))
                while self._wait_for_work():
                    self._do_tasks()
                    self._admit()
                    if self.running:
                        self._try_step()
                    with self._wake:
                        answering, closing = bool(self.running or self._waiting), self._closing
                    if not closing and self.background.has_slice(answering):
                        with self._batches.paused():
                            went_well = self.background.run_slice()
                        if not went_well:  # it may have ended in the middle of a forward pass
                            forget_inputs(self.model)
        except BaseException as error:  # whatever it is, nobody may wait for this thread for ever
            _logger.exception("the engine's thread ended")
            dead = f"{type(error).__name__}: {first_line(error)}"
        finally:
            # under one lock: `submit` refuses from here on, so no request is missing in the lists
            with self._wake:
                self._dead = dead
                end = EndEvent("cancelled") if self._closing else EndEvent("error", dead)
                left, tasks = self._all(), list(self._tasks)
            for active in left:
                self._end(active, end)
            for _, future in tasks:
                future.set_exception(EngineDead(dead))

    def _wait_for_work(self) -> bool:
        """Wait for something to do. False: the engine is to end."""
        while True:
            with self._wake:
                self._woken = False
                if self._is_asked():
                    return not self._closing
            # Without the lock, because the work may wait for it. Work that comes from here on sets the flag.
            # The seconds come first: if the pause ended between the two calls, the wait below would never end.
            seconds = self.background.seconds_to_wait(answering=False)
            if not seconds and self.background.has_slice(answering=False):
                return True
            with self._wake:
                if not (self._woken or self._is_asked()):
                    self._wake.wait(seconds or None)

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

    def _admit(self) -> None:
        """Give places to waiting requests in order. None overtakes one that waits for a slot."""
        while self._waiting and len(self.running) < self.settings.max_running and self._batches.may_begin():
            active = self._waiting[0]
            try:
                slot = 0 if active.vectors is None else self._acquire(active.vectors)
            except Exception as error:
                _logger.exception("adapter of request %s", active.request.id)
                self._end(active, EndEvent("error", _message(error)))
                continue
            if slot is None:
                return
            active.slot = slot
            # together, so that other threads always find it in exactly one of the two
            with self._wake:
                self._waiting.popleft()
                self.running[active.request.id] = active
                self._prompt_tokens += len(active.request.prompt)

    def _acquire(self, vectors: HostVectors) -> int | None:
        if not self.bank.needs_layers(vectors) or self.settings.batch_invariant:
            return self.bank.acquire(vectors)
        # the layout is made for the layers that there are, so it is made anew when some are added
        self._layout.close()
        try:
            return self.bank.acquire(vectors)
        finally:
            self._layout.enter_context(generating(self.model, base_only=True))

    def step(self) -> list[tuple[ActiveRequest, TokenEvent | None]]:
        """Compute one step. Returns the requests that got a token; the event is None where none could be drawn."""
        got, apart = list[tuple[ActiveRequest, TokenEvent | None]](), self.settings.batch_invariant
        for batch in self._batches.passes(self._batches.schedule(self.running.values())):
            # the row of one that has ended stays in a static batch, and its adapter may be gone
            users = [(None if one.ended else one.vectors, one.slot, tokens) for one, tokens in batch]
            filled_tokens = self._batches.filled_tokens(batch)
            found = self._batches.run(batch, self.bank.use(users, self._batches.by_rows, filled_tokens))
            if found.hidden is not None:
                prompts = [request.scored for request in found.scored]
                # as many logits at a time as a step of answers may have
                most_rows = filled_tokens if apart and filled_tokens else self.settings.max_running
                add_scores(Head.of(self.model), prompts, found.hidden, most_rows, apart)
            choosers = [request.chooser for request in found.drawing]
            got += zip(found.drawing, choose_tokens(found.logits, choosers, apart), strict=True)
        return got

    def _try_step(self) -> None:
        """Run a step, send its tokens, and end the requests that are done. A failed step ends all that run."""
        try:
            got = self.step()
        except Exception as error:
            _logger.exception("a step failed")
            self._failures += 1
            # nothing says which request was at fault, or which keys and values were written
            for active in list(self.running.values()):
                self._end(active, EndEvent("error", _message(error)))
            if self._failures >= _MOST_FAILURES:
                raise
            forget_inputs(self.model)
            self._batches.reset()
            return
        self._failures = 0
        self.background.answered()
        for active, event in got:
            sampling, grammar = active.request.sampling, active.chooser.grammar
            if event is None:
                why = "" if grammar is None else grammar.error
                self._end(active, EndEvent("error", f"its grammar can't go on: {why}" if why else NOT_FINITE))
                continue
            if active.scored is not None:  # the first token, so the whole prompt was computed
                _send(active, active.scored.scores())
                active.scored = None
            if active.found and len(active.tokens) == len(active.request.prompt):  # the first token
                event = replace(event, cached_tokens=active.found)
            stops = event.token in sampling.stop_tokens
            if not stops or sampling.keeps_stop:
                active.tokens.append(event.token)
                with self._wake:
                    self._generated += 1
                if not _send(active, event):
                    self._end(active, EndEvent("cancelled"))
                    continue
            ends = stops or (grammar is not None and grammar.finished)
            if ends or len(active.tokens) - len(active.request.prompt) >= sampling.max_tokens:
                self._end(active, EndEvent("stop" if ends else "length"))

    def _end(self, active: ActiveRequest, event: EndEvent) -> None:
        """Take a request out of the batch or the queue, free what it holds, and send its last event."""
        active.ended = True
        with self._wake:
            was_running = self.running.pop(active.request.id, None) is not None
            if not was_running:
                self._waiting.remove(active)
            self._finished += 1
        self._batches.end(active)
        if was_running and active.vectors is not None:
            self.bank.release(active.vectors)
        _send(active, event)  # last: who hears of the end may count on the free place


def _send(active: ActiveRequest, event: Event) -> bool:
    """Pass an event on. Returns False if its receiver failed, which must end no other request."""
    try:
        active.on_event(event)
    except Exception:
        _logger.exception("the receiver of request %s failed", active.request.id)
        return False
    return True


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
