"""The official client of OpenAI's API, as a user has it."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serve.api.conftest import Served, Start

SAY: Any = {"messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "say blue"}]}


def client_of(served: Served, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is asked for", max_retries=retries, timeout=30)


def test_models_and_answers_whole_and_streamed(served: Served) -> None:
    with client_of(served) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "anna", "ben"]
        assert client.models.retrieve("anna").owned_by == "qvera"
        asked: Any = {"model": "anna", **SAY}
        answer = client.chat.completions.create(**asked, max_completion_tokens=50, seed=1, user="me")
        assert answer.choices[0].message.content == "anna says blue"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "anna says blue"
        assert chunks[-1].usage == answer.usage
        with client.chat.completions.stream(**asked) as stream:
            assert stream.get_final_completion().choices[0].message.content == "anna says blue"
        completion = client.completions.create(model="ben", prompt="say", logprobs=2, max_tokens=4).choices[0]
        assert (completion.finish_reason, "".join(completion.logprobs.tokens)) == ("length", completion.text)


def test_errors_are_the_clients_own(start: Start) -> None:
    served = start(places=1, queue=0)
    with client_of(served) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError, match="did you mean 'anna'") as unknown:
            create(model="ana", **SAY)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="not supported") as refused:
            create(model="anna", audio={"voice": "ash", "format": "wav"}, **SAY)
        assert (refused.value.param, refused.value.type) == ("audio", "invalid_request_error")
        with pytest.raises(openai.RateLimitError):
            create(model="anna", n=2, **SAY)
        served.engine.fails = "out of memory"
        with pytest.raises(openai.APIError, match="out of memory"):
            list(create(model="anna", stream=True, **SAY))
        served.engine.fails = None
    with client_of(served, retries=8) as patient:
        served.engine.step_seconds = 0.01
        with patient.chat.completions.create(model="anna", stream=True, **SAY):
            assert patient.chat.completions.create(model="ben", **SAY).choices[0].finish_reason == "stop"  # retried
