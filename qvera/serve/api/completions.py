"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qvera.serve.api.answer import answer
from qvera.serve.api.errors import bad_request
from qvera.serve.api.generation import Call, Piece, ScoredToken, check_body, sampling_of, while_connected
from qvera.serve.api.schemas import CompletionBody
from qvera.serve.api.service import Service, require, service_of
from qvera.serve.text import TokenTexts

router = APIRouter()


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
    return await answer(request, body, call, CompletionForm(service.texts, body.logprobs is not None))


def _prompts(body: CompletionBody, service: Service) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
        ApiError: there is no prompt, too many, or an id is none of the vocabulary.
    """
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


class CompletionForm:
    """Answers as text, with log-probabilities in the lists of OpenAI's older API."""

    whole, chunk, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, texts: TokenTexts, logprobs: bool) -> None:
        self._texts, self._with_logprobs = texts, logprobs

    def choice(self, index: int, text: str, tokens: Sequence[ScoredToken], finish: str | None) -> dict[str, Any]:
        """A whole answer, or a piece of one."""
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Nothing comes before the text."""
        return []

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece of text, or the end, or both."""
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
