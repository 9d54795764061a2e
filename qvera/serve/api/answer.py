"""From a call to its response: whole, or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from qvera.serve.api.event_stream import EventStream
from qvera.serve.api.generation import Call, Generation, Piece, ScoredToken, while_connected
from qvera.serve.api.service import access_of, service_of
from qvera.serve.api.stream import chunk_events

if TYPE_CHECKING:
    from qvera.serve.api.schemas import GenerationBody


class ResponseFormat(Protocol):
    """How one of OpenAI's two APIs writes an answer.

    Attributes:
        whole: the name of a whole response's object.
        chunk: that of a stream's chunk.
        prefix: of a response's id.
    """

    whole: str
    chunk: str
    prefix: str

    def choice(self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str) -> dict[str, Any]:
        """A whole answer."""

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream says of an answer before its first piece."""

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """What a stream says of a piece."""


async def answer(request: Request, body: GenerationBody, call: Call, form: ResponseFormat) -> Response:
    """Answer a call as its body asks, whole or as a stream.

    Raises:
        ApiError: the model is unknown, the queue is full, the engine failed, or it took too long.
        InputError: the adapter is damaged.
        ClientGone: nobody waits for the answer any more.
    """
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
    chunks = _chunks(answers, call, form, head, with_usage)
    return EventStream(chunk_events(chunks), answers.close)


async def _whole(answers: Generation, call: Call) -> list[tuple[str, list[ScoredToken], str]]:
    """Text, tokens and end of each answer."""
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


async def _chunks(
    answers: Generation, call: Call, form: ResponseFormat, head: dict[str, Any], with_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    for index in range(len(call.prompts) * call.n):
        for choice in form.opening(index):
            yield {**head, "choices": [choice], **usage}
    async for piece in answers.pieces():
        for choice in form.deltas(piece):
            yield {**head, "choices": [choice], **usage}
    if with_usage:
        yield {**head, "choices": [], "usage": _usage(answers)}


def _usage(answers: Generation) -> dict[str, int]:
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": answers.new_tokens,
        "total_tokens": answers.prompt_tokens + answers.new_tokens,
    }
