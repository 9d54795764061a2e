"""The official client of OpenAI's API, as a user has it."""

from __future__ import annotations

from typing import Any, cast

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


def test_responses_are_the_chats_answers_in_items_and_events(start: Start) -> None:
    served = start(template=HERMES)
    with client_of(served) as client:
        asked: Any = {"model": "anna", "instructions": "be short", "input": "say blue"}
        found = client.responses.create(**asked, store=False)
        assert (found.status, found.output_text, found.model) == ("completed", "anna says blue", "anna")
        client.chat.completions.create(model="anna", **SAY)
        one, other = served.engine.requests
        assert one.prompt == other.prompt
        assert found.usage is not None
        assert found.usage.input_tokens == len(one.prompt)
        assert found.usage.input_tokens_details.cached_tokens == 3
        events = list(client.responses.create(**asked, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        opening = ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"]
        closing = ["output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"]
        assert (kinds[:5], kinds[-5:]) == (
            [f"response.{each}" for each in opening],
            [f"response.{each}" for each in closing],
        )
        with client.responses.stream(**asked) as stream:
            assert stream.get_final_response().output_text == "anna says blue"
        cut: Any = list(client.responses.create(**asked, max_output_tokens=4, stream=True))[-1]
        last = cut.response
        assert (cut.type, last.incomplete_details.reason) == ("response.incomplete", "max_output_tokens")
        assert 0 < len(last.output_text) < len(found.output_text)
        served.said["anna"] = ""
        assert [item.type for item in client.responses.create(**asked).output] == ["message"]
        served.engine.fails = "out of memory"
        failed: Any = list(client.responses.create(**asked, stream=True))[-1]
        assert (failed.type, failed.response.error.message) == ("response.failed", "The engine failed: out of memory")


def test_a_loop_of_function_calls_by_responses(start: Start) -> None:
    served = start(template=HERMES)
    call = '<tool_call>\n{"name": "stock", "arguments": {"color": "red"}}\n</tool_call>'
    tools: Any = [{"type": "function", "name": "stock", "parameters": {"type": "object"}, "strict": False}]
    served.said["anna"] = f"I look.\n{call}"
    with client_of(served) as client:
        items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "red mugs?"}]}]
        found = client.responses.create(model="anna", input=items, tools=tools)
        assert [item.type for item in found.output] == ["message", "function_call"]
        with client.responses.stream(model="anna", input=items, tools=tools) as stream:
            said, made = cast(Any, stream.get_final_response().output)
        assert (said.content[0].text, made.name, made.arguments) == ("I look.", "stock", '{"color": "red"}')
        output: Any = [{"type": "input_text", "text": "7"}]  # the Agents SDK sends parts, others a text
        items += [
            *found.output,
            {"type": "function_call_output", "call_id": cast(Any, found.output[1]).call_id, "output": output},
        ]
        served.said["anna"] = "7."
        more: Any = {"stream_options": {"include_obfuscation": False}}  # has no effect
        assert client.responses.create(model="anna", input=items, tools=tools, **more).output_text == "7."
        shown = served.prompts.encoder.tokenizer.decode(served.engine.requests[-1].prompt)
        assert (
            f"red mugs?<|im_end|>\n<|im_start|>assistant\nI look.{call}<|im_end|>\n<|im_start|>tool\n7<|im_end|>"
            in shown.replace("I look.\n", "I look.")
        )
        refused: list[tuple[dict[str, Any], str, str]] = [
            ({"previous_response_id": found.id}, "previous_response_id", "Here it is the earlier items, sent again"),
            ({"tools": [{"type": "web_search", "name": "x"}]}, "tools", "should be .function"),
            ({"extra_body": {"messages": []}}, "messages", "Unknown key 'messages'; here it is 'input'"),
            ({"tools": [{"type": "web_search"}]}, "tools", "tools.0.type: Input should be .function"),
            ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
            ({"tools": tools, "tool_choice": {"type": "function", "name": "!"}}, "tool_choice", "tool_choice"),
            ({"input": [{"content": "x"}]}, "input", "input.0.role"),
            ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "input.0.type: an item_reference .* Send the item itself"),
            ({"input": [{"role": "user"}]}, "input", "input.0: a message has content"),
            ({"input": [{"role": "user"}], "instructions": "Be brief."}, "input", "input: a message has content"),
            ({"input": [{"role": "user", "content": [{"type": "text"}]}]}, "input", "input.0.content.0.type: .*input_text"),
            ({"max_output_tokens": 999}, "", "999 new ones are asked for"),
            ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "thing"}}}}, "text", "text.format.schema"),
            ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", "text.format.schema: Input should be"),
        ]  # fmt: skip
        for keys, param, message in refused:
            with pytest.raises(openai.BadRequestError, match=message) as error:
                client.responses.create(**{"model": "anna", "input": "x", **keys})
            assert (error.value.param or "") == param


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
