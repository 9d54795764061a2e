"""One call's answers: requests to the engine, and their tokens as text. Nothing here blocks the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from qvera.serve.api.errors import ApiError, ClientGone, bad_request
from qvera.serve.api.server import wait_until_gone
from qvera.serve.requests import (
    AdapterChanged,
    Busy,
    EndEvent,
    Event,
    GenerationRequest,
    ResolvedAdapter,
    Sampling,
    TokenEvent,
)
from qvera.serve.text import TextStream

if TYPE_CHECKING:
    from starlette.types import Receive

    from qvera.serve.api.access import Access
    from qvera.serve.api.schemas import GenerationBody
    from qvera.serve.api.service import Service

T = TypeVar("T")
_TRIES = 3  # to resolve an adapter whose file is replaced meanwhile


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of an answer, the character at which its text begins, and log-probabilities if asked for."""

    event: TokenEvent
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The new part of one answer."""

    index: int  # of the answer in its call
    text: str
    tokens: Sequence[ScoredToken]
    finish: Literal["stop", "length"] | None = None  # only in an answer's last piece


@dataclass(frozen=True, slots=True)
class Call:
    """A call: ``n`` answers to each prompt, in the order of the prompts."""

    model: str
    prompts: Sequence[Sequence[int]]
    n: int
    sampling: Sampling
    stop: Sequence[str]
    continues: bool  # answers continue the prompt's text, and are not turns of a chat
    began: float


def check_body(body: GenerationBody, service: Service) -> list[str]:
    """Check what chat and completions share, and return the stop strings. Raises ApiError 400 that names the key."""
    body.require_supported()
    limits = service.limits
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    if len(stop) > limits.stop_strings:
        raise bad_request(f"stop: at most {limits.stop_strings} texts are taken, got {len(stop)}.", "stop")
    if any(not text or len(text) > limits.stop_characters for text in stop):
        raise bad_request(f"stop: expected texts of 1 to {limits.stop_characters} characters.", "stop")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options: is only for stream: true.", "stream_options")
    return stop


def sampling_of(
    body: GenerationBody,
    service: Service,
    prompts: Sequence[Sequence[int]],
    wanted: int | None,
    top: int | None,
    keys: tuple[str, str],
) -> Sampling:
    """How a call's tokens are drawn. Raises ApiError 400 if a prompt, or the number of answers, is beyond a limit.

    Args:
        wanted: new tokens per answer; None: as many as fit.
        top: number of likely tokens to list; None: no log-probabilities at all.
        keys: the body's keys for ``wanted`` and ``top``, for messages.
    """
    limits, longest = service.limits, max(map(len, prompts))
    context = service.engine.longest_tokens
    answers = len(prompts) * (body.n or 1)
    if answers > limits.answers:
        raise bad_request(f"n: a call has at most {limits.answers} answers, and this one asks {answers}.", "n")
    if not min(map(len, prompts)):
        raise bad_request("prompt: is empty; expected at least one token.", "prompt")
    if longest > limits.prompt_tokens or longest + (wanted or 1) > context:
        most = min(limits.prompt_tokens, context - (wanted or 1))
        raise bad_request(
            f"The prompt has {longest:,} tokens, and with {wanted or 1:,} new ones at most {max(most, 0):,} are taken. "
            "Shorten it or ask for fewer new tokens.",
            code="context_length_exceeded",
        )
    if wanted is not None and wanted > limits.new_tokens:
        raise bad_request(f"{keys[0]}: at most {limits.new_tokens:,} are taken, got {wanted:,}.", keys[0])
    if top is not None and top > limits.top_logprobs:
        raise bad_request(f"{keys[1]}: at most {limits.top_logprobs} are taken, got {top}.", keys[1])
    return Sampling(
        max_tokens=wanted or min(limits.new_tokens, context - longest),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        top_logprobs=top,
        stop_tokens=service.stop_tokens,
    )


class Generation:
    """The answers to a call: `start`, then `pieces`, and always `close`.

    Attributes:
        fingerprint: identifies the weights: the base's, or the content of the adapter.
        prompt_tokens: each prompt counts once, whatever ``n`` is.
    """

    def __init__(self, service: Service, call: Call, access: Access) -> None:
        self._service, self._call, self._access = service, call, access
        self.prompt_tokens, self.new_tokens = sum(map(len, call.prompts)), 0
        self.fingerprint = "fp_base"
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open: dict[int, str] = {}  # index of an answer → the id of its request
        self._closed, self._counted = False, 0
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Send the call's requests to the engine.

        Raises ApiError (unknown model, full queue) or InputError (damaged adapter, prompt that does not fit).
        """
        count = len(self._call.prompts) * self._call.n
        self._service.open_answers(self._access, count)
        self._counted = count
        try:
            await self._service.in_thread(self._submit)
        except Busy:
            self.close()
            raise ApiError(
                429,
                "As many requests wait as may wait; ask again later.",
                code="queue_full",
                retry_seconds=self._service.limits.retry_seconds,
            ) from None
        except BaseException:
            self.close()
            raise

    def _submit(self) -> None:
        for tries in range(_TRIES):
            adapter = self._service.resolve(self._call.model, self._access)
            try:
                for index in range(len(self._open), len(self._call.prompts) * self._call.n):
                    self._submit_one(index, adapter)
            except AdapterChanged:
                if tries + 1 == _TRIES:
                    raise
                # all answers of a call come from one adapter
                self._cancel_all()
                self._events = asyncio.Queue()
                continue
            self.fingerprint = "fp_base" if adapter is None else f"fp_{adapter.identity[:16]}"
            return

    def _submit_one(self, index: int, adapter: ResolvedAdapter | None) -> None:
        call, events, sampling = self._call, self._events, self._call.sampling
        prompt, repetition = call.prompts[index // call.n], index % call.n
        if sampling.seed is not None:  # several answers with one seed would all be the same
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + repetition + 2**63) % 2**64 - 2**63)
        request = GenerationRequest(uuid.uuid4().hex, tuple(prompt), adapter, sampling)

        def on_event(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(events.put_nowait, (index, event))

        self._open[index] = request.id
        try:
            self._service.engine.submit(request, on_event)
        except BaseException:
            self._open.pop(index, None)
            raise
        if self._closed:  # the client went away meanwhile; perhaps before the engine knew the request
            self._service.engine.cancel(request.id)
            raise ClientGone

    def close(self) -> None:
        """Cancel unfinished answers, without waiting."""
        self._closed = True
        self._cancel_all()
        if self._counted:
            self._service.open_answers(self._access, -self._counted)
            self._counted = 0

    def _cancel_all(self) -> None:
        for index in list(self._open):
            self._cancel(index)

    def _cancel(self, index: int) -> None:
        identifier = self._open.pop(index, None)
        if identifier is not None:
            self._service.cancel_soon(identifier)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all answers as they come. Raises ApiError if the engine fails or the call takes too long."""
        call = self._call
        texts = [self._stream(prompt) for prompt in call.prompts for _ in range(call.n)]
        waiting: list[list[ScoredToken]] = [[] for _ in texts]  # tokens whose text is still held back
        left, first = len(texts), True
        while left:
            index, event = await self._next()
            if index not in self._open:
                continue  # ended by a stop string
            stream = texts[index]
            if isinstance(event, EndEvent):
                del self._open[index]
                left -= 1
                text = stream.finish()
                yield Piece(index, text, _within(waiting[index], stream), _finish(event, stream))
                continue
            if first:
                first = False
                self._service.metrics.first_token_seconds.observe(time.monotonic() - call.began)
            self.new_tokens += 1
            waiting[index].append(ScoredToken(event, stream.length))
            text = stream.add(event.token)
            if stream.stopped:
                self._cancel(index)
                left -= 1
                yield Piece(index, text, _within(waiting[index], stream), "stop")
            elif text:
                tokens, waiting[index] = waiting[index], []
                yield Piece(index, text, tokens)

    async def _next(self) -> tuple[int, Event]:
        seconds = self._service.limits.seconds
        try:
            async with asyncio.timeout(max(0.0, seconds - (time.monotonic() - self._call.began))):
                return await self._events.get()
        except TimeoutError:
            raise ApiError(504, f"The answer took longer than {seconds:g} s.", code="timeout") from None

    def _stream(self, prompt: Sequence[int]) -> TextStream:
        context = prompt[-_CONTEXT_TOKENS:] if self._call.continues else ()
        return TextStream(self._service.texts, self._call.stop, context)


_CONTEXT_TOKENS = 5
"""Prompt tokens that are decoded with a continuation: enough for a cut character and the word before."""


def _within(tokens: list[ScoredToken], stream: TextStream) -> list[ScoredToken]:
    """Tokens whose text begins before the stop string, if one was found; else all."""
    return [token for token in tokens if token.offset < stream.length] if stream.stopped else tokens


def _finish(event: EndEvent, stream: TextStream) -> Literal["stop", "length"]:
    if event.reason == "error":
        raise ApiError(500, f"The engine failed: {event.message}", code="engine_error")
    if event.reason == "cancelled":
        raise ApiError(503, "The server is stopping.", code="cancelled")
    return "stop" if stream.stopped else event.reason


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Await ``work``. If the client disconnects, ``work`` is cancelled and ClientGone raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(wait_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
