"""The official client of OpenAI's API, as a user has it."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serve.api.conftest import Served, Start
from tests.serve.tool_templates import HERMES

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


def test_a_loop_of_tool_calls_goes_on_from_their_results(start: Start) -> None:
    served = start(template=HERMES)
    properties = {"color": {"type": "string"}}
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name in ("stock", "price")
    ]
    messages: list[Any] = [{"role": "user", "content": "red mugs?"}]
    call = '<tool_call>\n{"name": "%s", "arguments": {"color": "red"}}\n</tool_call>'
    served.said["anna"] = f"I look.\n{call % 'stock'}\n{call % 'price'}"
    with client_of(served) as client:
        asked: Any = {"model": "anna", "tools": tools}
        [choice] = client.chat.completions.create(messages=messages, **asked).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        calls: Any = choice.message.tool_calls
        assert [(one.function.name, one.function.arguments) for one in calls] == [
            ("stock", '{"color": "red"}'),
            ("price", '{"color": "red"}'),
        ]
        with client.chat.completions.stream(messages=messages, **asked) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert streamed.message.tool_calls is not None
        assert [one.function.arguments for one in streamed.message.tool_calls] == ['{"color": "red"}'] * 2
        assert (streamed.finish_reason, streamed.message.content) == ("tool_calls", "I look.")
        one = client.chat.completions.create(messages=messages, parallel_tool_calls=False, **asked).choices[0]
        assert [each.function.name for each in one.message.tool_calls or []] == ["stock"]
        messages.append(choice.message)
        messages += [{"role": "tool", "tool_call_id": each.id, "content": "7"} for each in calls]
        served.said["anna"] = "7 each."
        [last] = client.chat.completions.create(messages=messages, **asked).choices
        assert (last.finish_reason, last.message.content, last.message.tool_calls) == ("stop", "7 each.", None)
        shown = served.prompts.encoder.tokenizer.decode(served.engine.requests[-1].prompt)
        written = ["stock", f"I look.\n{call % 'stock'}\n{call % 'price'}<|im_end|>", "tool\n7<|im_end|>"]
        assert all(text in shown for text in written), shown
        client.chat.completions.create(messages=messages[:1], tool_choice="none", **asked)
        assert "stock" not in served.prompts.encoder.tokenizer.decode(served.engine.requests[-1].prompt)


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
