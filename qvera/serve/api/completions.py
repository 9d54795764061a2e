"""POST /v1/completions and /v1/chat/completions, answered whole or as a stream. Nothing here blocks the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, TypeAlias

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from qvera.data import Turn
from qvera.data.images import StoredImage
from qvera.serve.api.access import Limits
from qvera.serve.api.errors import ApiError, bad_request
from qvera.serve.api.schemas import ChatBody, CompletionBody, GenerationBody
from qvera.serve.api.server import ClientGone, EventStream, sse
from qvera.serve.api.service import Sender, Service, User
from qvera.serve.grammars import Grammar
from qvera.serve.requests import AdapterChanged, EndEvent, Event, GenerationRequest, Sampling, TokenEvent
from qvera.serve.text import TextStream
from qvera.serve.tool_calls import CallReader, ToolCall

_TRIES = 3  # to resolve an adapter whose file is replaced meanwhile
_CONTEXT_TOKENS = 5
"""Prompt tokens that are decoded with a continuation: enough for a cut character and the word before."""
ScoredToken: TypeAlias = tuple[TokenEvent, int]
"""A token of an answer, with log-probabilities if asked for, and the character at which its text begins."""

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(sender: User, body: ChatBody) -> Response:
    """Answer a conversation."""
    answers = await asked_chat(sender, body)
    return await _answer(sender, body, answers, _ChatFormat(answers))


async def asked_chat(sender: Sender, body: ChatBody) -> Generation:
    """Check a conversation and write its prompt. Raises ApiError 400 that names the key, and others as routes do."""
    access, service = sender.access, sender.service
    stop = _stop_strings(body, service)
    if len(body.messages) > service.limits.messages:
        raise bad_request(f"messages: at most {service.limits.messages} are taken.", "messages")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs: is only for logprobs: true.", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_completion_tokens: is another name of max_tokens; give one.", "max_completion_tokens")
    tools, prompts = body.offered(), service.prompts

    def prompt() -> tuple[list[int], tuple[StoredImage, ...], Grammar | None, list[CallReader]]:
        service.require_model(body.model, access)
        turns = body.turns()
        if prompts.system and turns[0].role != "system":  # the recipe's
            turns.insert(0, Turn("system", prompts.system))
        if not tools:
            return prompts.ids(turns), prompts.images(turns), body.grammar(service.grammars), []
        form, ids = service.tool_format, prompts.ids(turns, tools)
        before = service.texts.decode(ids, special=True) if form.is_own else ""
        readers = [CallReader(form, tools, before, body.most_calls) for _ in range(body.n or 1)]
        return ids, prompts.images(turns), body.grammar_with(service.grammars, form), readers

    one, images, grammar, readers = await sender.hold(service.read_prompts(access, prompt))
    top = (body.top_logprobs or 0) if body.logprobs else None
    keys = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens", "top_logprobs"
    sampling = _sampling(body, service, [one], body.max_completion_tokens or body.max_tokens, top, keys, grammar)
    streams = [TextStream(service.texts, stop, special=bool(tools)) for _ in range(body.n or 1)]
    return Generation(sender, body.model, [one], sampling, streams, images, readers)


@router.post("/v1/completions")
async def complete(sender: User, body: CompletionBody) -> Response:
    """Go on with a text, or with each of several."""
    access, service = sender.access, sender.service
    stop = _stop_strings(body, service)

    def prompts() -> tuple[list[list[int]], Grammar | None]:
        service.require_model(body.model, access)
        is_one = isinstance(body.prompt, str) or (bool(body.prompt) and isinstance(body.prompt[0], int))
        given: list[Any] = [body.prompt] if is_one else list(body.prompt)
        if not 1 <= len(given) <= service.limits.answers:
            raise bad_request(f"prompt: expected 1 to {service.limits.answers} prompts, got {len(given)}.", "prompt")
        for prompt in given:
            if not isinstance(prompt, str) and prompt and max(prompt) >= service.texts.size:
                raise bad_request(f"prompt: token ids of this model are 0 to {service.texts.size - 1:,}.", "prompt")
        encode = service.prompts.encoder.encode_prompt
        ids = [encode(each) if isinstance(each, str) else list(each) for each in given]
        return ids, body.grammar(service.grammars)

    ids, grammar = await sender.hold(service.read_prompts(access, prompts))
    wanted = min(16, service.limits.new_tokens) if body.max_tokens is None else body.max_tokens
    sampling = _sampling(body, service, ids, wanted, body.logprobs, ("max_tokens", "logprobs"), grammar)
    streams = [TextStream(service.texts, stop, prompt[-_CONTEXT_TOKENS:]) for prompt in ids for _ in range(body.n or 1)]
    answers = Generation(sender, body.model, ids, sampling, streams)
    return await _answer(sender, body, answers, _CompletionFormat(answers))


def _stop_strings(body: GenerationBody, service: Service) -> list[str]:
    """Check what chat and completions share, and return the stop strings. Raises ApiError 400 that names the key."""
    body.require_supported()
    limits = service.limits
    _require_answers(body.n or 1, limits)  # before anything is made for each of them
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    if len(stop) > limits.stop_strings:
        raise bad_request(f"stop: at most {limits.stop_strings} texts are taken, got {len(stop)}.", "stop")
    if any(not text or len(text) > limits.stop_characters for text in stop):
        raise bad_request(f"stop: expected texts of 1 to {limits.stop_characters} characters.", "stop")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options: is only for stream: true.", "stream_options")
    return stop


def _require_answers(count: int, limits: Limits) -> None:
    if count > limits.answers:
        raise bad_request(f"n: a call has at most {limits.answers} answers, and this one asks {count}.", "n")


def _sampling(
    body: GenerationBody,
    service: Service,
    prompts: Sequence[Sequence[int]],
    wanted: int | None,
    top: int | None,
    keys: tuple[str, str],
    grammar: Grammar | None,
) -> Sampling:
    """Return a call's settings of sampling. Raises ApiError 400 if a prompt or the number of answers is over a limit.

    Args:
        wanted: new tokens per answer; None: as many as fit.
        top: number of likely tokens to list; None: no log-probabilities at all.
        keys: the body's keys for ``wanted`` and ``top``, for messages.
    """
    limits, longest = service.limits, max(map(len, prompts))
    context = service.engine.longest_tokens
    _require_answers(len(prompts) * (body.n or 1), limits)
    if not min(map(len, prompts)):
        raise bad_request("prompt: is empty; expected at least one token.", "prompt")
    if longest > limits.prompt_tokens or longest + (wanted or 1) > context:
        raise bad_request(
            # LiteLLM knows the error by OpenAI's first words
            f"This model's maximum context length is {context:,} tokens. The prompt has {longest:,}, and "
            f"{wanted or 1:,} new ones are asked for. A prompt may have {min(limits.prompt_tokens, context - 1):,}, an "
            f"answer {min(limits.new_tokens, context - 1):,}. Shorten it or ask for fewer.",
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
        top_k=max(body.top_k or 0, 0),
        seed=body.seed,
        top_logprobs=top,
        stop_tokens=service.stop_tokens,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=tuple((body.logit_bias or {}).items()),
        grammar=grammar,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """The new part of one answer."""

    index: int  # of the answer in its call
    text: str
    tokens: Sequence[ScoredToken]
    finish: Literal["stop", "length", "tool_calls"] | None = None  # only in an answer's last piece
    calls: Sequence[ToolCall] = ()


class Generation:
    """The answers to a call: `whole`, or `start`, then `pieces`, and always `close`.

    Attributes:
        fingerprint: identifies the weights: the base's, or the content of the adapter.
        prompt_tokens: each prompt counts once, however many answers it gets.
    """

    def __init__(
        self,
        sender: Sender,
        model: str,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        streams: Sequence[TextStream],
        images: tuple[StoredImage, ...] = (),
        readers: Sequence[CallReader] = (),
    ) -> None:
        """Take the parts of a call's answers. Nothing is sent yet.

        Args:
            streams: the text of each answer, in the order of the prompts; each prompt has equally many.
            images: those of each prompt.
            readers: one for the calls of tools in each answer; empty where no tools are offered.
        """
        self._images, self._readers = images, readers
        self._service, self._access, self._model, self._prompts = sender.service, sender.access, model, prompts
        self.sampling, self.streams = sampling, streams
        self._began: float = sender.request.state.began  # when the call arrived (`time.monotonic`)
        self.prompt_tokens, self.new_tokens = sum(map(len, prompts)), 0
        self.cached_tokens = 0  # of prompts, summed over the answers
        self.fingerprint, self.texts = "fp_base", self._service.texts
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open: dict[int, str] = {}  # index of an answer → the id of its request
        self._closed = False
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Send the call's requests to the engine.

        Raises ApiError (unknown model), InputError (damaged adapter, prompt that does not fit), Busy, or EngineDead.
        """
        self._service.open_answers(self._access, len(self.streams))
        try:
            await self._service.in_thread(self._submit)
        except BaseException:
            self.close()
            raise

    def _submit(self) -> None:
        """Submit all of the call's requests to one version of its adapter. Runs in a thread."""
        for tries in range(_TRIES):
            adapter = self._service.resolve(self._model, self._access)
            events, per_prompt = self._events, len(self.streams) // len(self._prompts)
            try:
                for index in range(len(self.streams)):
                    sampling, repetition = self.sampling, index % per_prompt
                    if sampling.seed is not None:  # several answers with one seed would all be the same
                        seed = (sampling.seed + repetition + 2**63) % 2**64 - 2**63  # wraps around in int64
                        sampling = dataclasses.replace(sampling, seed=seed)
                    prompt = tuple(self._prompts[index // per_prompt])
                    asked = GenerationRequest(uuid.uuid4().hex, prompt, adapter, sampling, self._images)
                    self._submit_one(index, asked, events)
            except AdapterChanged:
                if tries + 1 == _TRIES:
                    raise
                # all answers of a call come from one adapter
                self._cancel(*self._open)
                self._events = asyncio.Queue()
                continue
            self.fingerprint = "fp_base" if adapter is None else f"fp_{adapter.identity[:16]}"
            return

    def _submit_one(self, index: int, request: GenerationRequest, events: asyncio.Queue[tuple[int, Event]]) -> None:
        def on_event(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(events.put_nowait, (index, event))

        self._open[index] = request.id
        try:
            self._service.engine.submit(request, on_event)
        except BaseException:
            self._open.pop(index, None)
            raise
        if self._closed:  # the client went away meanwhile, perhaps before the engine knew the request
            self._service.engine.cancel(request.id)
            raise ClientGone

    def close(self) -> None:
        """Cancel unfinished answers, without waiting. Call it once, and not if `start` has failed."""
        self._closed = True
        self._cancel(*self._open)
        self._service.open_answers(self._access, -len(self.streams))

    def _cancel(self, *indexes: int) -> None:
        for index in indexes:
            if (request_id := self._open.pop(index, None)) is not None:
                self._service.engine.cancel(request_id)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all answers as they come. Raises ApiError if the engine fails or the call takes too long."""
        waiting: list[list[ScoredToken]] = [[] for _ in self.streams]  # tokens whose text is still held back
        left, seconds = len(self.streams), self._service.limits.seconds
        while left:
            try:
                async with asyncio.timeout(max(0.0, seconds - (time.monotonic() - self._began))):
                    index, event = await self._events.get()
            except TimeoutError:
                text = f"The answer took longer than {seconds:g} s."
                raise ApiError(504, text, code="timeout", retried=False) from None
            if index not in self._open:
                continue  # ended here already, by a stop string or a call of a tool
            stream, calls = self.streams[index], list[ToolCall]()
            finish: Literal["stop", "length", "tool_calls"] | None = None
            if isinstance(event, EndEvent):
                del self._open[index]
                text = stream.finish()
                if event.reason == "error":
                    text = f"The engine failed: {event.message}"
                    raise ApiError(500, text, code="engine_error", retried=False)
                if event.reason == "cancelled":
                    raise ApiError(503, "The server is stopping.", code="cancelled")
                finish = event.reason
            else:
                assert isinstance(event, TokenEvent)  # no prompt is scored here
                if not self.new_tokens:
                    self._service.metrics.first_token_seconds.observe(time.monotonic() - self._began)
                self.new_tokens += 1
                self.cached_tokens += event.cached_tokens
                waiting[index].append((event, stream.length))
                text = stream.add(event.token)
            tokens = waiting[index]
            if stream.stopped:
                self._cancel(index)
                # tokens whose text begins behind the stop string are not shown
                finish, tokens = "stop", [token for token in tokens if token[1] < stream.length]
            if self._readers:
                reader = self._readers[index]
                text, calls = reader.read(text, ends=finish is not None)
                if reader.is_full:
                    self._cancel(index)
                if reader.is_full or (finish == "stop" and reader.count):
                    finish = "tool_calls"
            # else the tokens wait for the text that they are part of
            if text or calls or finish is not None:
                waiting[index] = []
                left -= finish is not None
                yield Piece(index, text, tokens, finish, calls)

    async def whole(self) -> list[list[Piece]]:
        """The pieces of each answer, once all have ended. Raises as `start` and `pieces`."""
        found: list[list[Piece]] = [[] for _ in self.streams]
        await self.start()
        try:
            async for piece in self.pieces():
                found[piece.index].append(piece)
        finally:
            self.close()
        return found


class _Format:
    """The form in which one of OpenAI's two APIs writes an answer."""

    def __init__(self, answers: Generation) -> None:
        self.texts, self.with_logprobs = answers.texts, answers.sampling.top_logprobs is not None


class _ChatFormat(_Format):
    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, answers: Generation) -> None:
        super().__init__(answers)
        self._called: Counter[int] = Counter()  # calls that each answer has shown

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text, calls = "".join(piece.text for piece in pieces), [call for piece in pieces for call in piece.calls]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
        logprobs = self._logprobs([token for piece in pieces for token in piece.tokens])
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": pieces[-1].finish}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Chunks before an answer's first piece."""
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        out = []
        if piece.text or (piece.tokens and self.with_logprobs):
            out.append(self._delta(piece.index, {"content": piece.text}, piece.tokens))
        for call in piece.calls:
            number = self._called[piece.index]
            self._called[piece.index] += 1
            out.append(self._delta(piece.index, {"tool_calls": [{"index": number, **_call(call)}]}))
        if piece.finish is not None:
            out.append(self._delta(piece.index, {}, finish=piece.finish))
        return out

    def _delta(
        self, index: int, delta: dict[str, Any], tokens: Sequence[ScoredToken] = (), finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            return {
                "token": self.texts.shown(token),
                "logprob": logprob,
                "bytes": list(self.texts.bytes_of(token)),
            }

        content = [
            {**entry(event.token, event.logprob), "top_logprobs": [entry(*each) for each in event.top]}
            for event, _ in tokens
        ]
        return {"content": content, "refusal": None}


class _CompletionFormat(_Format):
    """Answers as text, with log-probabilities in the lists of OpenAI's older API."""

    whole, chunk, prefix = "text_completion", "text_completion", "cmpl-"

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        shown, logprobs = self.texts.shown, None
        tokens = [token for piece in pieces for token in piece.tokens]
        if self.with_logprobs:
            logprobs = {
                "tokens": [shown(event.token) for event, _ in tokens],
                "token_logprobs": [event.logprob for event, _ in tokens],
                "top_logprobs": [{shown(each): value for each, value in event.top} for event, _ in tokens],
                "text_offset": [offset for _, offset in tokens],
            }
        text = "".join(piece.text for piece in pieces)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": pieces[-1].finish}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        return [self.choice(piece.index, [piece])]


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def _answer(
    sender: Sender, body: GenerationBody, answers: Generation, form: _ChatFormat | _CompletionFormat
) -> Response:
    """Answer whole or as a stream. Raises as `Generation.whole` or `Generation.start`."""
    head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": body.model}
    if body.stream:
        await sender.hold(answers.start())  # before the stream: its errors have a status yet
        head |= {"object": form.chunk, "system_fingerprint": answers.fingerprint}
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(answers, form, head, with_usage), answers.close)
    whole = await sender.hold(answers.whole())

    def response() -> Response:
        choices = [form.choice(index, pieces) for index, pieces in enumerate(whole)]
        content = {"object": form.whole, "system_fingerprint": answers.fingerprint, "choices": choices}
        return JSONResponse({**head, **content, "usage": _usage(answers)})

    # the log-probabilities of many tokens are megabytes of JSON
    return response() if answers.sampling.top_logprobs is None else await sender.service.in_thread(response)


async def _events(
    answers: Generation, form: _ChatFormat | _CompletionFormat, head: dict[str, Any], with_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events, ended by ``data: [DONE]`` or by an event with an error."""
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    last = b"data: [DONE]\n\n"
    try:
        for index in range(len(answers.streams)):
            for choice in form.opening(index):
                yield sse({**head, "choices": [choice], **usage})
        async for piece in answers.pieces():
            for choice in form.deltas(piece):
                yield sse({**head, "choices": [choice], **usage})
        if with_usage:
            yield sse({**head, "choices": [], "usage": _usage(answers)})
    except ApiError as error:
        last = sse(error.body())
    yield last


def _usage(answers: Generation) -> dict[str, int]:
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": answers.new_tokens,
        "total_tokens": answers.prompt_tokens + answers.new_tokens,
    }
