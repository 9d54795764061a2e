"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qvera.data import Turn
from qvera.serve.api.answer import answer
from qvera.serve.api.errors import bad_request
from qvera.serve.api.generation import Call, Piece, ScoredToken, check_body, sampling_of, while_connected
from qvera.serve.api.schemas import ChatBody
from qvera.serve.api.service import Service, require, service_of
from qvera.serve.text import TokenTexts

router = APIRouter()


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
    return await answer(request, body, call, ChatForm(service.texts, top is not None))


def _turns(body: ChatBody, service: Service) -> list[Turn]:
    """The messages as turns, behind the recipe's system prompt where they have none."""
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


class ChatForm:
    """Answers as messages."""

    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, texts: TokenTexts, logprobs: bool) -> None:
        self._texts, self._with_logprobs = texts, logprobs

    def choice(self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role of the answer."""
        return [self._delta(index, {"role": "assistant", "content": ""}, (), None)]

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece of text, and the end."""
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
