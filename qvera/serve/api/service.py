"""What all routes share: the engine, the adapters, access and counters."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import Depends, Request

from qvera.serve.api.access import DEFAULTS, Access, Action, KeyFile, Limits
from qvera.serve.api.errors import ApiError, require_room, shortened_name
from qvera.serve.api.metrics import Metrics
from qvera.serve.api.server import while_connected
from qvera.serve.grammars import Grammars
from qvera.serve.requests import ResolvedAdapter, UnknownAdapter
from qvera.serve.text import TokenTexts
from qvera.serve.tool_calls import ToolFormat
from qvera.utils.errors import did_you_mean

if TYPE_CHECKING:
    from qvera.evaluation.generate import PromptWriter
    from qvera.serve.engine import Engine
    from qvera.serve.fine_tuning.jobs import Jobs
    from qvera.serve.store import AdapterStore
    from qvera.serve.tinker.tenancy import Tinker

T = TypeVar("T")
_PROMPTS_OF_A_KEY = 2
"""Tokenized at a time. A megabyte of text takes a second, so one key must not fill all threads."""
_COMPARED_NAMES = 1000  # compared with a wrong name, at some microseconds each


class Service:
    """A server's state, for `qvera.serve.api.app.create_app`."""

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        prompts: PromptWriter,
        stop_tokens: frozenset[int],
        base_name: str,
        limits: Limits = DEFAULTS,
        keys: KeyFile | None = None,
        jobs: Jobs | None = None,
        tinker: Tinker | None = None,
    ) -> None:
        """Take over the parts of a server.

        Args:
            engine: already started; the caller closes it.
            stop_tokens: each ends an answer.
            base_name: how the base is listed; one of the store's ``base_names``.
            keys: None: no key is asked for, and everybody may do everything; only for the loopback address.
            jobs: None: the fine-tuning routes say that this server trains nothing.
            tinker: None: there is nothing below ``/api/v1``.
        """
        self.engine, self.store, self.prompts, self.stop_tokens = engine, store, prompts, stop_tokens
        self.base_name, self.limits, self.keys, self.jobs = base_name, limits, keys, jobs
        self.tinker = tinker
        self.metrics = Metrics(engine.stats, jobs)
        self.texts = TokenTexts(prompts.encoder.tokenizer)
        self.grammars = Grammars(self.texts, stop_tokens)
        self.draining = False  # stopping: no new calls are taken
        self.running = 0  # calls in progress
        self.created = int(time.time())  # seconds since 1970
        # `in_thread` says what each is for
        self._threads = {
            kind: ThreadPoolExecutor(count, thread_name_prefix=f"qvera-{kind}")
            for kind, count in (("long", 4), ("quick", 2))
        }
        self._open_answers: Counter[str] = Counter()  # of each key
        self._open_uploads: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def tool_format(self) -> ToolFormat:
        """The format in which the base writes calls of tools. Raises InputError if it writes none that can be read."""
        return ToolFormat.of(self.prompts.template)

    def end_answers(self) -> None:
        """End all running answers. Their calls get 503, streams an error as their last chunk."""
        self.engine.close()

    async def in_thread(self, work: Callable[[], T], kind: Literal["long", "quick"] = "long") -> T:
        """Run ``work`` off the event loop.

        No key or prompt may wait behind a slow disk. So what asks the database of jobs or writes files is in routes
        without ``async``, which FastAPI runs in threads of its own.

        Args:
            kind: ``long`` work tokenizes prompts and reads adapters. ``quick`` work waits for a lock or a small file
                only, and must not wait behind long prompts.
        """
        return await asyncio.wrap_future(self._threads[kind].submit(work))

    async def read_prompts(self, access: Access, work: Callable[[], T]) -> T:
        """Tokenize a call's prompts in a thread: a few at a time per key, and counted as open answers.

        Raises ApiError 429 if the key has too many open, and whatever ``work`` raises.
        """
        if self.keys is None:
            return await self.in_thread(work)
        self.open_answers(access, 1)
        try:
            turns = self._turns.setdefault(access.name, asyncio.Semaphore(_PROMPTS_OF_A_KEY))
            loop = asyncio.get_running_loop()
            await turns.acquire()

            def release(_: object) -> None:  # when the work has ended, whether or not the client still waits for it
                with contextlib.suppress(RuntimeError):  # the server has stopped
                    loop.call_soon_threadsafe(turns.release)

            future = self._threads["long"].submit(work)
            future.add_done_callback(release)
            return await asyncio.wrap_future(future)
        finally:
            self.open_answers(access, -1)

    def open_answers(self, access: Access, count: int) -> None:
        """Add to a key's open answers, so that no key fills the queue. A negative ``count`` means that they have ended.

        Raises ApiError 429 if the key would have too many; nothing is added then.
        """
        with self._lock:
            if count > 0 and self.keys is not None:
                require_room("answers", self._open_answers[access.name], self.limits.open_answers, count)
            self._open_answers[access.name] += count
            if not self._open_answers[access.name]:
                del self._open_answers[access.name]

    @contextlib.contextmanager
    def uploading(self, access: Access) -> Iterator[int]:
        """Count an upload in progress. Yields how many the key has, this one included. Event loop only."""
        self._open_uploads[access.name] += 1
        try:
            yield self._open_uploads[access.name]
        finally:
            self._open_uploads[access.name] -= 1
            self._open_uploads += Counter()  # drops zeros

    def close(self) -> None:
        """End the threads. Calls that wait for a long one are given up."""
        for kind, threads in self._threads.items():
            threads.shutdown(wait=False, cancel_futures=kind != "quick")

    def require_model(self, model: str, access: Access) -> None:
        """Refuse a model that does not exist or that the sender may not use.

        Raises ApiError 404, with the nearest name that the sender may use, or InputError for an invalid blend.
        """
        try:
            names = [self.base_name] if model in self.store.base_names else self.store.parts_of(model)
        except UnknownAdapter:
            raise self.unknown(model, access) from None
        if not all(access.covers(name) for name in names):
            raise self.unknown(model, access)

    def resolve(self, model: str, access: Access) -> ResolvedAdapter | None:
        """The adapter behind a model's name, by its present content; None: the base.

        Raises as `require_model`, and InputError if the adapter is damaged.
        """
        self.require_model(model, access)
        try:
            return self.store.resolve(model)
        except UnknownAdapter:
            raise self.unknown(model, access) from None

    def names(self, access: Access) -> list[str]:
        """The models that the sender may use, the base first."""
        return [name for name in (self.base_name, *self.store.names()) if access.covers(name)]

    def unknown(self, model: str, access: Access) -> ApiError:
        """404 with the nearest name that the sender may use. It reveals nothing of other keys' models."""
        shown, known = shortened_name(model), self.names(access)
        hint = did_you_mean(shown, known[:_COMPARED_NAMES])
        if "+" in model and (blended := set(known).intersection(map(str.strip, model.split("+")))):
            hint = f". In a blend each adapter has a weight, such as {min(blended)}*0.5."
        denied = "" if self.keys is None else ", or this key may not use it"
        message = f"The model {shown!r} does not exist{denied}{hint} GET /v1/models lists what there is."
        return ApiError(404, message, "model", "model_not_found")


class Sender:
    """Who asks, and the parts of the server for the answer."""

    def __init__(self, request: Request, action: Action) -> None:
        """Raises ApiError 403 if the key may not do the action."""
        self.request = request
        self.service: Service = request.app.state.service
        self.access: Access = request.state.access  # `Guard` has put it there
        self.owner = self.access.name
        if action not in self.access.may:
            raise ApiError(403, f"The key {self.owner!r} may not {action} models on this server.", code="forbidden")

    async def hold(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work`` for a call whose body was read. Raises ClientGone if the client disconnects."""
        return await while_connected(self.request.receive, work)


def sent_by(kind: type[Sender], action: Action) -> Any:
    """What `Annotated` needs to give a route the sender of its call, who may do the action."""

    async def make(request: Request) -> Sender:
        return kind(request, action)

    return Depends(make)


User = Annotated[Sender, sent_by(Sender, "use")]
