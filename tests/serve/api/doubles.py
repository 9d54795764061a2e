"""A small engine and store that follow the interfaces: deterministic, with a thread, and without a model."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvera.serve.engine import BackgroundWork
from qvera.serve.requests import (
    AdapterPart,
    Busy,
    EndEvent,
    EngineStats,
    Event,
    GenerationRequest,
    ResolvedAdapter,
    TokenEvent,
    UnknownAdapter,
)
from qvera.utils.errors import InputError


@dataclass
class Running:
    request: GenerationRequest
    on_event: Callable[[Event], None]
    tokens: Iterator[int]
    given: int = 0
    cancelled: bool = False


class ScriptedEngine:
    """Gives every request the tokens that ``script`` says, one to each running request in a step.

    Attributes:
        hold: while it is set, no step is made.
        places: requests that run at a time; ``queue`` more may wait.
    """

    longest_tokens = 1000

    def __init__(self, script: Callable[[GenerationRequest], Iterator[int]], places: int = 8, queue: int = 4) -> None:
        self.script, self.places, self.queue = script, places, queue
        self.hold = threading.Event()
        self.step_seconds = 0.0
        self.fails: str | None = None
        self.requests: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.loaded: list[str] = []
        self.unloaded: list[str] = []
        self._lock = threading.Lock()
        self._all: list[Running] = []
        self._tokens, self._prompts, self._finished = 0, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        with self._lock:
            if len(self._all) >= self.places + self.queue:
                raise Busy
            assert request.id not in [each.id for each in self.requests]
            self.requests.append(request)
            self._prompts += len(request.prompt)
            self._all.append(Running(request, on_event, self.script(request)))

    def cancel(self, request_id: str) -> None:
        with self._lock:
            for running in self._all:
                if running.request.id == request_id:
                    running.cancelled = True
                    self.cancelled.append(request_id)

    def load(self, adapter: ResolvedAdapter) -> None:
        self.loaded.append(adapter.identity)

    def unload(self, identity: str) -> None:
        self.unloaded.append(identity)

    def set_background(self, work: BackgroundWork | None) -> None:
        """It has no time of its own to give."""

    def wake(self) -> None:
        """Nothing waits."""

    def stats(self) -> EngineStats:
        with self._lock:
            running = min(len(self._all), self.places)
            return EngineStats(
                running,
                len(self._all) - running,
                len(self.loaded),
                16,
                1 << 20,
                None,
                self._prompts,
                self._tokens,
                self._finished,
            )

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for running in self._all:
            running.on_event(EndEvent("cancelled"))

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                batch = self._all[: self.places]
                gone = [running for running in self._all if running.cancelled]
            for running in gone:
                self._end(running, EndEvent("cancelled"))
            if self.hold.is_set() or not batch:
                time.sleep(0.002)
                continue
            for running in batch:
                if running not in gone:
                    self._step(running)
            time.sleep(self.step_seconds)

    def _step(self, running: Running) -> None:
        sampling = running.request.sampling
        if self.fails is not None:
            return self._end(running, EndEvent("error", self.fails))
        token = next(running.tokens, None)
        if token is None or token in sampling.stop_tokens:
            return self._end(running, EndEvent("stop"))
        running.given += 1
        self._tokens += 1
        wanted = sampling.top_logprobs
        top = tuple((token + k, -0.5 - k) for k in range(wanted or 0))
        running.on_event(TokenEvent(token, None if wanted is None else -0.5, top))
        if running.given == sampling.max_tokens:
            self._end(running, EndEvent("length"))

    def _end(self, running: Running, event: EndEvent) -> None:
        with self._lock:
            self._all.remove(running)
            self._finished += 1
        running.on_event(event)


class NamedStore:
    """Adapters that are names and contents; a directory under ``root`` with a file ``content`` can be added."""

    def __init__(self, contents: dict[str, bytes], root: Path | None = None) -> None:
        self.base_names, self.root, self.contents = frozenset({"tiny", "hub/tiny"}), root, dict(contents)

    def names(self) -> list[str]:
        return sorted(self.contents)

    def parts_of(self, model: str) -> list[str]:
        parts = [part.partition("*")[0] for part in model.split("+")]
        for part in parts:
            if part not in self.contents:
                raise UnknownAdapter(f"{part}: no adapter has this name.")
        return parts

    def resolve(self, model: str) -> ResolvedAdapter | None:
        if model in self.base_names:
            return None
        parts = [AdapterPart(1.0, Path(name), self._sha256(name)) for name in self.parts_of(model)]
        if len(parts) > 1 and "bad" in model:
            raise InputError(f"{model}: the adapters have different d, so their sum is none of them.")
        return ResolvedAdapter(model, hashlib.sha256(repr(parts).encode()).hexdigest(), tuple(parts))

    def _sha256(self, name: str) -> str:
        return hashlib.sha256(self.contents[name]).hexdigest()

    def add(self, name: str, directory: Path, replace: bool = False) -> None:
        if not (directory / "content").is_file():
            raise InputError(f"{directory.name}: is no adapter.")
        self.contents[name] = (directory / "content").read_bytes()

    def remove(self, name: str) -> None:
        if name not in self.contents:
            raise UnknownAdapter(name)
        del self.contents[name]

    def facts(self, name: str) -> dict[str, Any]:
        size, place = len(self.contents[name]), Path("/secret")
        return {"rows": 7, "size_bytes": size, "changed": 5.5, "base": "/models/tiny", "directory": place}
