"""A small engine that follows the interface: deterministic, with a thread, and without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from qvera.serve.background import BackgroundWork
from qvera.serve.requests import (
    Busy,
    EndEvent,
    EngineSettings,
    EngineStats,
    Event,
    GenerationRequest,
    ResolvedAdapter,
    TokenEvent,
)
from qvera.utils.errors import InputError


class ScriptedEngine:
    """Gives every request the tokens that ``script`` says, one to each running request in a step.

    Attributes:
        hold: while it is set, no step is made. ``trains``: while it is set, parts of ``background`` are done.
        fails: what ends each request, if anything; ``refuses``: why it takes none.
        places: requests that run at a time; ``queue`` more may wait.
    """

    longest_tokens = 1000

    def __init__(self, script: Callable[[GenerationRequest], Iterator[int]], places: int = 8, queue: int = 4) -> None:
        self.script, self.places, self.queue = script, places, queue
        self.settings = EngineSettings(max_running=places)
        self.hold, self.trains = threading.Event(), threading.Event()
        self.trains.set()
        self.background: BackgroundWork | None = None
        self.step_seconds = 0.0
        self.fails: str | None = None
        self.refuses: str | None = None
        self.requests: list[GenerationRequest] = []
        self.cancelled, self.loaded, self.unloaded = list[str](), list[str](), list[str]()
        self._lock = threading.Lock()
        self._open: dict[str, tuple[GenerationRequest, Callable[[Event], None], Iterator[tuple[int, int]]]] = {}
        self._tokens = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        if self.refuses is not None:
            raise InputError(self.refuses)
        with self._lock:
            if len(self._open) >= self.places + self.queue:
                raise Busy
            assert request.id not in [each.id for each in self.requests]
            self.requests.append(request)
            self._open[request.id] = request, on_event, enumerate(self.script(request), start=1)

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._open:
                self.cancelled.append(request_id)

    def load(self, adapter: ResolvedAdapter) -> None:
        self.loaded.append(adapter.identity)

    def unload(self, identity: str) -> None:
        self.unloaded.append(identity)

    def stats(self) -> EngineStats:
        with self._lock:
            running, asked = min(len(self._open), self.places), len(self.requests)
            prompts, finished = sum(len(each.prompt) for each in self.requests), asked - len(self._open)
            waiting, loaded = len(self._open) - running, len(self.loaded)
        return EngineStats(running, waiting, loaded, 16, 1 << 20, None, prompts, self._tokens, finished)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for _, on_event, _ in self._open.values():
            on_event(EndEvent("cancelled"))

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                running = list(self._open.items())
            for place, (request_id, (request, on_event, tokens)) in enumerate(running):
                end = EndEvent("cancelled") if request_id in self.cancelled else None
                if end is None and place < self.places and not self.hold.is_set():
                    end = self._step(request, on_event, tokens)
                if end is not None:
                    with self._lock:
                        del self._open[request_id]
                    on_event(end)
            if self.background is not None and self.trains.is_set() and self.background.has_work():
                self.background.run_slice()
            time.sleep(self.step_seconds if running and not self.hold.is_set() else 0.002)

    def _step(
        self, request: GenerationRequest, on_event: Callable[[Event], None], tokens: Iterator[tuple[int, int]]
    ) -> EndEvent | None:
        """The next token, or why there is none."""
        if self.fails is not None:
            return EndEvent("error", self.fails)
        given, token = next(tokens, (0, -1))
        if token == -1 or token in request.sampling.stop_tokens:
            return EndEvent("stop")
        self._tokens += 1
        wanted = request.sampling.top_logprobs
        top = tuple((token + k, -0.5 - k) for k in range(wanted or 0))
        cached = 3 if given == 1 else 0  # as if three tokens of each prompt had been in the cache
        on_event(TokenEvent(token, None if wanted is None else -0.5, top, cached_tokens=cached))
        return EndEvent("length") if given == request.sampling.max_tokens else None
