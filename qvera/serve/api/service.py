"""What all routes share: the engine, the adapters, who may use them, and what is counted."""

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
_THREADS = 4
"""Prompts that are tokenized, and adapters that are read, at a time."""
_PROMPTS_OF_A_KEY = 2
"""Prompts of one key that are tokenized at a time: a megabyte of text takes a second."""
_QUICK_THREADS = 2
_DISK_THREADS = 4
_COMPARED_NAMES = 1000
"""A wrong name is compared with this many: it takes some microseconds for each."""


@dataclass
class Service:
    """A server's state; made by `qvera.serve.api.app.create_app`.

    Attributes:
        base_name: how the base is listed.
        vocabulary: tokens that the tokenizer knows.
        stop_tokens: each ends an answer.
        keys: None: no key is asked for, and everybody may do everything.
        jobs: fine-tuning; None: this server trains nothing.
        draining: no new request is taken.
        running: calls that are being answered.
        created: when the server started, in seconds since 1970.
    """

    engine: Engine
    store: AdapterStore
    prompts: PromptWriter
    base_name: str
    stop_tokens: frozenset[int]
    vocabulary: int
    limits: Limits
    keys: KeyFile | None
    metrics: Metrics
    jobs: Jobs | None = None
    texts: TokenTexts = field(init=False)
    draining: bool = False
    running: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
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
        """Do what takes long apart from the event loop, so that other requests go on.

        Args:
            kind: ``quick``: it only waits for a lock or a small file, and is not to wait behind long prompts.
                ``disk``: it writes files or asks the database of jobs, and no key or prompt is to wait behind it.

        Raises:
            ApiError: the engine has ended.
        """
        threads = {"long": self._threads, "quick": self._quick_threads, "disk": self._disk_threads}[kind]
        return await _result(threads.submit(work))

    async def read_prompts(self, access: Access, work: Callable[[], T]) -> T:
        """Make token ids of a call's prompts: `in_thread`, but of one key a few at a time, and counted as open answers.

        Raises:
            ApiError: 429, the key has too many open; or as ``work``.
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
        """Have the engine free a request's place; returns at once."""
        try:
            self._quick_threads.submit(self.engine.cancel, request_id)
        except RuntimeError:  # the server is stopping, and nobody waits for its event loop any more
            self.engine.cancel(request_id)

    def open_answers(self, access: Access, count: int) -> None:
        """Count answers that a key has open: one key does not fill the queue for all others.

        Args:
            count: negative: they have ended.

        Raises:
            ApiError: 429, they are more than one key may have; they are not counted.
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
        """Count a file that is arriving; yields how many a key has open, this one too. Only on the event loop."""
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
        """Refuse a model that is not there or that the sender may not use.

        Raises:
            ApiError: 404, and the nearest name that the sender may use.
            InputError: the name is a blend of adapters that can't be added.
        """
        try:
            names = [self.base_name] if model in self.store.base_names else self.store.parts_of(model)
        except UnknownAdapter:
            raise self.unknown(model, access) from None
        if not all(access.covers(name) for name in names):
            raise self.unknown(model, access)

    def resolve(self, model: str, access: Access) -> ResolvedAdapter | None:
        """The adapter that a model's name means, by its content now; None: the base.

        Raises:
            ApiError: as `require_model`.
            InputError: the adapter is damaged, or the name is a blend of adapters that can't be added.
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
        """404 with the nearest name that the sender may use. It does not tell what others have."""
        shown = shortened(model)
        hint = did_you_mean(shown, self.names(access)[:_COMPARED_NAMES])
        message = f"The model {shown!r} does not exist, or this key may not use it{hint}"
        return ApiError(404, message, "model", "model_not_found")


async def _result(future: Future[T]) -> T:
    """What a thread has found.

    Raises:
        ApiError: the engine has ended.
    """
    try:
        return await asyncio.wrap_future(future)
    except EngineDead as error:
        raise ApiError(503, f"The engine has ended: {error}") from None


def service_of(request: Request) -> Service:
    """The service of a request's app."""
    return request.app.state.service


def access_of(request: Request) -> Access:
    """What the sender may do; the guard has found it out."""
    return request.state.access


def require(request: Request, action: Action) -> Access:
    """What the sender may do.

    Raises:
        ApiError: 403, it may not do this.
    """
    access = access_of(request)
    if action not in access.may:
        raise ApiError(403, f"The key {access.name!r} may not {action} models on this server.", code="forbidden")
    return access
