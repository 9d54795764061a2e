"""What the HTTP side knows of an engine. An engine's thread and asyncio meet only through ``on_event``."""

from collections.abc import Callable
from typing import Protocol

from qvera.serve.requests import EngineStats, Event, GenerationRequest, ResolvedAdapter


class BackgroundWork(Protocol):
    """What an engine does with the model where answers leave time, part by part."""

    def has_work(self) -> bool:
        """Whether there is a part to do. Called in the engine's thread between two steps, so it has to be quick.

        Where it has become true, `Engine.wake` tells the engine.
        """

    def run_slice(self) -> None:
        """Do one part; called in the engine's thread. It has to be short, since no request gets a token meanwhile.

        It may change the model for the time of the call. An error does not end the engine: it is logged, and nothing
        more is done until `Engine.wake` is called.
        """


class Engine(Protocol):
    """Answers requests, many at a time. All methods may be called from any thread."""

    @property
    def longest_tokens(self) -> int:
        """How many tokens prompt and answer may have together."""

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        """Queue a request. An adapter whose vectors are not in memory is read before this returns.

        Args:
            request: with an id that no other request has had.
            on_event: called with each token and, last, with one `EndEvent`, from the engine's thread. It must return
                soon and raise nothing.

        Raises:
            Busy: the queue is full.
            InputError: the prompt and ``max_tokens`` do not fit, or the adapter is damaged or not one of this base.
            AdapterChanged: its file was replaced after it was resolved.
            EngineDead: the engine has ended.
        """

    def cancel(self, request_id: str) -> None:
        """End a request and free its place; its last event is ``EndEvent("cancelled")``. Unknown ids are ignored."""

    def load(self, adapter: ResolvedAdapter) -> None:
        """Read an adapter and put its vectors on the device, so that its first request does not wait for that.

        Where requests use all slots, it is read and checked only.

        Raises:
            InputError: it is damaged, or not one of this base.
            AdapterChanged: as `submit`.
            EngineDead: the engine has ended.
        """

    def unload(self, identity: str) -> None:
        """Free an adapter's slot as soon as no request uses it; requests that were submitted finish on it."""

    def set_background(self, work: BackgroundWork | None) -> None:
        """Do this work where answers leave time (`EngineSettings.training_share`); None: no more."""

    def wake(self) -> None:
        """The background work has something to do, or is to be tried again after an error."""

    def stats(self) -> EngineStats:
        """The engine at this moment."""

    def close(self) -> None:
        """End the engine's thread. Requests that have not ended get ``EndEvent("cancelled")``."""
