"""POST /v1/completions and /v1/chat/completions, answered whole or as a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from qvera.data import Turn
from qvera.serve.api.errors import ApiError, bad_request
from qvera.serve.api.generation import Call, Generation, Piece, ScoredToken, check_body, sampling_of, while_connected
from qvera.serve.api.schemas import ChatBody, CompletionBody
from qvera.serve.api.server import EventStream
from qvera.serve.api.service import Service, access_of, require, service_of
from qvera.serve.text import TokenTexts

if TYPE_CHECKING:
    from qvera.serve.api.schemas import GenerationBody

router = APIRouter()


class _Format:
    """How one of OpenAI's two APIs writes an answer."""

    whole: str  # ``object`` of a whole response
    chunk: str  # ``object`` of a chunk of a stream
    prefix: str  # of a response's id

    def __init__(self, texts: TokenTexts, logprobs: bool) -> None:
        self._texts, self._with_logprobs = texts, logprobs

    def choice(self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Chunks before an answer's first piece."""
        raise NotImplementedError

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        raise NotImplementedError


async def _answer(request: Request, body: GenerationBody, call: Call, form: _Format) -> Response:
    service = service_of(request)
    head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": body.model}
    answers = Generation(service, call, access_of(request))
    if not body.stream:
        texts = await while_connected(request.receive, _whole(answers, call))

        def response() -> Response:
            choices = [form.choice(index, *parts) for index, parts in enumerate(texts)]
            content = {"object": form.whole, "system_fingerprint": answers.fingerprint, "choices": choices}
            return JSONResponse({**head, **content, "usage": _usage(answers)})

        # the log-probabilities of many tokens are megabytes of JSON
        return response() if call.sampling.top_logprobs is None else await service.in_thread(response)
    await while_connected(request.receive, answers.start())
    head |= {"object": form.chunk, "system_fingerprint": answers.fingerprint}
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(_events(answers, call, form, head, with_usage), answers.close)


async def _whole(answers: Generation, call: Call) -> list[tuple[str, list[ScoredToken], str]]:
    """Text, tokens and finish reason of each answer."""
    count = len(call.prompts) * call.n
    texts: list[list[str]] = [[] for _ in range(count)]
    tokens: list[list[ScoredToken]] = [[] for _ in range(count)]
    ends = [""] * count
    await answers.start()
    try:
        async for piece in answers.pieces():
            texts[piece.index].append(piece.text)
            tokens[piece.index] += piece.tokens
            ends[piece.index] = piece.finish or ""
    finally:
        answers.close()
    return [("".join(texts[index]), tokens[index], ends[index]) for index in range(count)]


async def _events(
    answers: Generation, call: Call, form: _Format, head: dict[str, Any], with_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events, ended by ``data: [DONE]`` or by an event with an error."""
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    last = b"data: [DONE]\n\n"
    try:
        for index in range(len(call.prompts) * call.n):
            for choice in form.opening(index):
                yield _event({**head, "choices": [choice], **usage})
        async for piece in answers.pieces():
            for choice in form.deltas(piece):
                yield _event({**head, "choices": [choice], **usage})
        if with_usage:
            yield _event({**head, "choices": [], "usage": _usage(answers)})
    except ApiError as error:
        last = _event(error.body())
    yield last


def _usage(answers: Generation) -> dict[str, int]:
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": answers.new_tokens,
        "total_tokens": answers.prompt_tokens + answers.new_tokens,
    }


def _event(chunk: dict[str, Any]) -> bytes:
    # one line whatever a text holds: JSON escapes line breaks, and ASCII has no other ones
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


@router.post("/v1/chat/completions", response_model=None)
async def chat(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    access, service = require(request, "use"), service_of(request)
    stop = check_body(body, service)
    if len(body.messages) > service.limits.messages:
        raise bad_request(f"messages: at most {service.limits.messages} are taken.", "messages")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs: is only for logprobs: true.", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise bad_request("max_completion_tokens: is another name of max_tokens; give one.", "max_completion_tokens")

    def prompt() -> list[int]:
        service.require_model(body.model, access)
        return service.prompts.ids(_turns(body, service))

    prompts = [await while_connected(request.receive, service.read_prompts(access, prompt))]
    top = (body.top_logprobs or 0) if body.logprobs else None
    keys = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens", "top_logprobs"
    sampling = sampling_of(body, service, prompts, body.max_completion_tokens or body.max_tokens, top, keys)
    call = Call(body.model, prompts, body.n or 1, sampling, stop, continues=False, began=request.state.began)
    return await _answer(request, body, call, _ChatFormat(service.texts, top is not None))


def _turns(body: ChatBody, service: Service) -> list[Turn]:
    """The messages as turns. The recipe's system prompt goes first where they have none."""
    turns = [
        Turn(
            "system" if message.role == "developer" else message.role,
            message.text(),
            extra={} if message.name is None else {"name": message.name},
        )
        for message in body.messages
    ]
    if service.prompts.system and turns[0].role != "system":
        turns.insert(0, Turn("system", service.prompts.system))
    return turns


class _ChatFormat(_Format):
    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""}, (), None)]

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        out = []
        if piece.text or (piece.tokens and self._with_logprobs):
            out.append(self._delta(piece.index, {"content": piece.text}, piece.tokens, None))
        if piece.finish is not None:
            out.append(self._delta(piece.index, {}, (), piece.finish))
        return out

    def _delta(
        self, index: int, delta: dict[str, Any], tokens: Sequence[ScoredToken], finish: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._entry(token.event.token, token.event.logprob),
                "top_logprobs": [self._entry(each, value) for each, value in token.event.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._texts.shown(token),
            "logprob": logprob,
            "bytes": list(self._texts.bytes_of(token)),
        }


@router.post("/v1/completions", response_model=None)
async def complete(request: Request, body: CompletionBody) -> Response:
    """Go on with a text, or with each of several."""
    access, service = require(request, "use"), service_of(request)
    stop = check_body(body, service)

    def prompts() -> list[list[int]]:
        service.require_model(body.model, access)
        return _prompts(body, service)

    ids = await while_connected(request.receive, service.read_prompts(access, prompts))
    wanted = min(16, service.limits.new_tokens) if body.max_tokens is None else body.max_tokens
    sampling = sampling_of(body, service, ids, wanted, body.logprobs, ("max_tokens", "logprobs"))
    call = Call(body.model, ids, body.n or 1, sampling, stop, continues=True, began=request.state.began)
    return await _answer(request, body, call, _CompletionFormat(service.texts, body.logprobs is not None))


def _prompts(body: CompletionBody, service: Service) -> list[list[int]]:
    """Token ids of each prompt. Raises ApiError for none, too many, or an id outside the vocabulary."""
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) or _is_ids(body.prompt) else list(body.prompt)
    if not 1 <= len(given) <= service.limits.answers:
        raise bad_request(f"prompt: expected 1 to {service.limits.answers} prompts, got {len(given)}.", "prompt")
    out = []
    for prompt in given:
        if isinstance(prompt, str):
            out.append(service.prompts.encoder.encode_prompt(prompt))
            continue
        if prompt and max(prompt) >= service.vocabulary:
            raise bad_request(
                f"prompt: {max(prompt)} is no token of this model, whose vocabulary ends at {service.vocabulary - 1}.",
                "prompt",
            )
        out.append(list(prompt))
    return out


def _is_ids(prompt: Sequence[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


class _CompletionFormat(_Format):
    """Answers as text, with log-probabilities in the lists of OpenAI's older API."""

    whole, chunk, prefix = "text_completion", "text_completion", "cmpl-"

    def choice(self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        return [self.choice(piece.index, piece.text, piece.tokens, piece.finish)]

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [self._texts.shown(token.event.token) for token in tokens],
            "token_logprobs": [token.event.logprob for token in tokens],
            "top_logprobs": [{self._texts.shown(each): value for each, value in token.event.top} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }
