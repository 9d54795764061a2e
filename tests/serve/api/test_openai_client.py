"""The official client of OpenAI's API, as a user has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.api.conftest import Served, Start


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is asked for", max_retries=0, timeout=30) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "anna", "ben"]
    assert client.models.retrieve("anna").owned_by == "qvera"


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "be short"}, {"role": "user", "content": "say blue"}]
    answer = client.chat.completions.create(
        model="anna", messages=messages, max_completion_tokens=50, seed=1, user="me"
    )
    assert answer.choices[0].message.content == "anna says blue"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="anna", messages=messages, stream=True, stream_options=options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "anna says blue"
    assert chunks[-1].usage == answer.usage
    with client.chat.completions.stream(model="anna", messages=messages) as stream:
        assert stream.get_final_completion().choices[0].message.content == "anna says blue"


def test_completions_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="ben", prompt="say", logprobs=2, max_tokens=4, temperature=0)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].finish_reason == "length"
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert len(logprobs.top_logprobs) == 4
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


def test_errors_are_the_clients_own(start: Start) -> None:
    served = start(places=1, queue=0)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=30) as client:
        say: Any = {"messages": [{"role": "user", "content": "hi"}]}
        with pytest.raises(openai.NotFoundError, match="did you mean 'anna'") as unknown:
            client.chat.completions.create(model="ana", **say)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="not supported") as refused:
            client.chat.completions.create(model="anna", presence_penalty=1, **say)
        assert (refused.value.param, refused.value.type) == ("presence_penalty", "invalid_request_error")
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="anna", n=2, **say)
        served.engine.fails = "out of memory"
        with pytest.raises(openai.APIError, match="out of memory"):
            list(client.chat.completions.create(model="anna", stream=True, **say))
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", timeout=30, max_retries=8) as patient:
        served.engine.fails = None
        served.engine.step_seconds = 0.01
        for _ in patient.chat.completions.create(model="anna", stream=True, **say):
            assert patient.chat.completions.create(model="ben", **say).choices[0].finish_reason == "stop"  # retried
            break
