"""What all routes share: the engine, the adapters, access and counters."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from fastapi import Request

from qvera.serve.api.access import Access, Action, KeyFile, Limits
from qvera.serve.api.errors import ApiError, shortened
from qvera.serve.requests import EngineDead, ResolvedAdapter, UnknownAdapter
from qvera.serve.text import TokenTexts
from qvera.utils.errors import did_you_mean

if TYPE_CHECKING:
    from qvera.evaluation.generate import PromptWriter
    from qvera.serve.api.metrics import Metrics
    from qvera.serve.engine import Engine
    from qvera.serve.fine_tuning.jobs import Jobs
    from qvera.serve.store import AdapterStore

T = TypeVar("T")
_THREADS = 4  # tokenize prompts and read adapters
_PROMPTS_OF_A_KEY = 2
"""Tokenized at a time. A megabyte of text takes a second, so one key must not fill all threads."""
_QUICK_THREADS = 2
_DISK_THREADS = 4
_COMPARED_NAMES = 1000  # compared with a wrong name, at some microseconds each


@dataclass
class Service:
    """A server's state; made by `qvera.serve.api.app.create_app`."""

    engine: Engine
    store: AdapterStore
    prompts: PromptWriter
    base_name: str  # how the base is listed
    stop_tokens: frozenset[int]  # each ends an answer
    vocabulary: int  # tokens that the tokenizer knows
    limits: Limits
    keys: KeyFile | None  # None: no key is asked for, and everybody may do everything
    metrics: Metrics
    jobs: Jobs | None = None  # None: this server trains nothing
    texts: TokenTexts = field(init=False)
    draining: bool = False  # stopping: no new calls are taken
    running: int = 0  # calls in progress
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970
    _threads: ThreadPoolExecutor = field(init=False)
    _quick_threads: ThreadPoolExecutor = field(init=False)
    _disk_threads: ThreadPoolExecutor = field(init=False)
    _open_answers: dict[str, int] = field(default_factory=dict)
    _open_uploads: dict[str, int] = field(default_factory=dict)
    _turns: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.prompts.encoder.tokenizer)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="qvera-serve")
        self._quick_threads = ThreadPoolExecutor(_QUICK_THREADS, thread_name_prefix="qvera-quick")
        self._disk_threads = ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="qvera-disk")

    async def in_thread(self, work: Callable[[], T], kind: Literal["long", "quick", "disk"] = "long") -> T:
        """Run ``work`` off the event loop. Raises ApiError if the engine has ended.

        Args:
            kind: ``quick`` work waits for a lock or a small file only, and must not wait behind long prompts.
                ``disk`` work writes files or asks the database of jobs, and no key or prompt may wait behind it.
        """
        threads = {"long": self._threads, "quick": self._quick_threads, "disk": self._disk_threads}[kind]
        return await _result(threads.submit(work))

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

            future = self._threads.submit(work)
            future.add_done_callback(release)
            return await _result(future)
        finally:
            self.open_answers(access, -1)

    def cancel_soon(self, request_id: str) -> None:
        """Tell the engine to free a request's place, without waiting."""
        try:
            self._quick_threads.submit(self.engine.cancel, request_id)
        except RuntimeError:  # the server is stopping, and nobody waits for its event loop any more
            self.engine.cancel(request_id)

    def open_answers(self, access: Access, count: int) -> None:
        """Add to a key's open answers, so that no key fills the queue. A negative ``count`` means that they have ended.

        Raises ApiError 429 if the key would have too many; nothing is added then.
        """
        most = self.limits.open_answers
        with self._lock:
            total = self._open_answers.get(access.name, 0) + count
            if count > 0 and self.keys is not None and total > most:
                raise ApiError(
                    429,
                    f"The key {access.name!r} has {total - count} answers open, and may have {most}.",
                    code="too_many_open",
                    retry_seconds=self.limits.retry_seconds,
                )
            self._open_answers[access.name] = total
            if not total:
                del self._open_answers[access.name]

    @contextlib.contextmanager
    def uploading(self, access: Access) -> Iterator[int]:
        """Count an upload in progress. Yields how many the key has, this one included. Event loop only."""
        open_uploads = self._open_uploads
        open_uploads[access.name] = open_uploads.get(access.name, 0) + 1
        try:
            yield open_uploads[access.name]
        finally:
            open_uploads[access.name] -= 1
            if not open_uploads[access.name]:
                del open_uploads[access.name]

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._quick_threads.shutdown(wait=False)
        self._disk_threads.shutdown(wait=False, cancel_futures=True)

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
        shown = shortened(model)
        hint = did_you_mean(shown, self.names(access)[:_COMPARED_NAMES])
        message = f"The model {shown!r} does not exist, or this key may not use it{hint}"
        return ApiError(404, message, "model", "model_not_found")


async def _result(future: Future[T]) -> T:
    try:
        return await asyncio.wrap_future(future)
    except EngineDead as error:
        raise ApiError(503, f"The engine has ended: {error}") from None


def service_of(request: Request) -> Service:
    """The state of the request's app."""
    return request.app.state.service


def access_of(request: Request) -> Access:
    """What the sender may do. `Guard` has put it there."""
    return request.state.access


def require(request: Request, action: Action) -> Access:
    """The sender's access. Raises ApiError 403 if it does not include ``action``."""
    access = access_of(request)
    if action not in access.may:
        raise ApiError(403, f"The key {access.name!r} may not {action} models on this server.", code="forbidden")
    return access
