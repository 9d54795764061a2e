"""Calls of tools are read out of an answer's text as the base's chat template would write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qvera.data import resolve_template
from qvera.serve.tool_calls import CallReader, ToolFormat
from qvera.utils.errors import InputError
from tests.conftest import CHATML, small_tokenizer
from tests.serve.tool_templates import CODER, HERMES, LLAMA, STRANGE

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in [("stock", {"color": {"type": "string"}, "count": {"type": "integer"}}), ("time", {})]
]
CALL = '{"name": "stock", "arguments": {"color": "grün", "count": 3}}'
XML = "<function=stock>\n<parameter=color>\ngrün\n</parameter>\n<parameter=count>\n3\n</parameter>\n</function>\n"
STOCK = ("stock", {"color": "grün", "count": 3})


def format_of(template: str, **settings: Any) -> ToolFormat:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    for key, value in settings.items():
        setattr(tokenizer, key, value)
    return ToolFormat.of(resolve_template("auto", tokenizer))


def read(form: ToolFormat, text: str, size: int, prompt: str = "", **settings: Any) -> tuple[str, list[Any]]:
    """What is shown, and the calls; the text comes in pieces of a size."""
    reader, shown, calls = CallReader(form, TOOLS, prompt, **settings), "", list[Any]()
    for begin in range(0, len(text), size):
        one, found = reader.read(text[begin : begin + size], ends=begin + size >= len(text))
        shown, calls = shown + one, calls + found
    assert len({call.id for call in calls}) == reader.count == len(calls)
    return shown, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("template", "text", "shown", "calls"),
    [
        (HERMES, f"Let me see. <tool_call>\n{CALL}\n</tool_call>", "Let me see.", [STOCK]),
        (HERMES, f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "time", "arguments": {{}}}}</tool_call>', "", [STOCK, ("time", {})]),
        (HERMES, f"a <tool_call>{CALL}</tool_call> b", "a b", [STOCK]),
        (HERMES, "a <tool_call>{'name': stock}</tool_call> b < c", None, []),
        (HERMES, 'a <tool_call>{"name": "shop", "arguments": {}}</tool_call> b', None, []),
        (HERMES, f"a <tool_call>{CALL[:-1]}", None, []),
        (HERMES, "a\n\n<tool", None, []),
        (LLAMA, CALL.replace("arguments", "parameters"), "", [STOCK]),
        (LLAMA, f" <|python_tag|>{CALL}", "", [STOCK]),
        (LLAMA, '{"color": "red"}', None, []),
        (LLAMA, f"It is {CALL}", None, []),
        (CODER, f"Now\n<tool_call>\n{XML}</tool_call>", "Now", [STOCK]),
        (CODER, "<tool_call>\n<function=shop>\n</function>\n</tool_call> and on", None, []),
    ],
)  # fmt: skip
def test_calls_are_read_and_what_is_none_stays_text(
    template: str, text: str, shown: str | None, calls: list[Any], size: int
) -> None:
    assert read(format_of(template), text, size) == (text if shown is None else shown, calls)


def test_an_answer_ends_with_the_last_call_that_it_may_have() -> None:
    assert read(format_of(HERMES), f"<tool_call>{CALL}</tool_call>" * 2, 5, at_most=1) == ("", [STOCK])


def test_the_checkpoints_own_response_template_comes_first_and_sees_the_prompt() -> None:
    calls = {"open": "[", "close": "]", "repeats": True, "content": "json", "transform": {"function": "{content}"}}
    own = {"start_anchor": "assistant\n", "fields": {"tool_calls": calls, "content": {"content": "text"}}}
    form = format_of(STRANGE, response_template=own)
    assert form.literals is None
    assert read(form, f"{CALL}] done", 3, prompt="user\n[x] assistant\n[") == (" done", [STOCK])
    with pytest.raises(InputError, match=r"response_template is invalid: .*start_anchor"):
        CallReader(format_of(STRANGE, response_template={"fields": {"tool_calls": {"open": "["}}}), TOOLS)


@pytest.mark.parametrize(
    ("template", "message"), [(STRANGE, r"as .\[CALL\] qvera_probe"), (CHATML, "has no calls of tools")]
)
def test_a_template_without_calls_that_can_be_read_is_named(template: str, message: str) -> None:
    with pytest.raises(InputError, match=f"tools: this model's chat template .*{message}"):
        format_of(template)
