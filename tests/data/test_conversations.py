"""Detection of formats, and every row checked."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from qvera.config.schema import DataSection
from qvera.data.conversations import FORMATS, Conversation, LabelledRow, Text, Turn, detect_format, parse_row
from qvera.data.readers import RawRow
from qvera.utils.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def parse(fields: dict[str, Any], system: str | None = None, **kwargs: Any) -> Conversation | Text | LabelledRow:
    row = RawRow(fields, "f.jsonl:7")
    return parse_row(row, detect_format(row, **kwargs), system)


def turns(fields: dict[str, Any], **kwargs: Any) -> list[tuple[str, str]]:
    conversation = parse(fields, **kwargs)
    assert isinstance(conversation, Conversation)
    assert conversation.source == "f.jsonl:7"
    return [(turn.role, turn.content) for turn in conversation.turns]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"instruction": "i", "output": "o"}, "alpaca"),
        ({"instruction": "i", "input": "x", "output": "o", "text": "joined"}, "alpaca"),
        ({"messages": [USER, ASSISTANT], "prompt": "hi"}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "sharegpt"),
        ({"prompt": "p", "completion": "c"}, "prompt-completion"),
        ({"text": "t", "id": 3}, "text"),
    ],
)
def test_detection(fields: dict[str, Any], name: str) -> None:
    assert detect_format(RawRow(fields, "f:1")).name == name


def test_unused_columns_are_listed() -> None:
    found = detect_format(RawRow({"prompt": "p", "completion": "c", "id": 1}, "f:1"))
    assert found.unused == ["id"]


def test_every_format_becomes_the_same_conversation() -> None:
    expected = [("user", "hi"), ("assistant", "yes")]
    assert turns({"messages": [USER, ASSISTANT]}) == expected
    assert turns({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}) == expected
    assert turns({"conversations": [USER, ASSISTANT]}) == expected
    assert turns({"prompt": "hi", "completion": "yes"}) == expected
    assert turns({"prompt": [USER], "completion": [ASSISTANT]}) == expected
    assert turns({"instruction": "hi", "output": "yes", "input": None}) == expected
    assert (
        turns({"question": "hi", "answer": "yes"}, columns={"prompt": "question", "completion": "answer"}) == expected
    )
    assert (
        turns({"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]'}) == expected
    )
    assert parse({"text": "hi"}) == Text("hi", "f.jsonl:7")


def test_alpaca_input_stays_apart() -> None:
    conversation = parse({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert isinstance(conversation, Conversation)
    assert conversation.turns == [Turn("user", "Add.", context="1, 2"), Turn("assistant", "3")]


def test_named_columns_decide_the_format() -> None:
    fields = {"instruction": "i", "output": "o", "body": "t"}
    assert parse(fields, columns={"text": "body"}) == Text("t", "f.jsonl:7")
    assert turns({"text": "ignored", "prompt": "p", "completion": "c"}, format="prompt-completion")[1] == (
        "assistant",
        "c",
    )


def test_system_prompt_only_where_the_row_has_none() -> None:
    assert turns({"prompt": "p", "completion": "c"}, system="S")[0] == ("system", "S")
    assert turns({"prompt": "p", "completion": "c", "system": "own"}, system="S")[0] == ("system", "own")
    brought = turns({"messages": [{"role": "system", "content": "own"}, USER, ASSISTANT]}, system="S")
    assert brought[0] == ("system", "own")
    assert len(brought) == 3


def test_roles_parts_tools_and_weights() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    conversation = parse(
        {
            "messages": [
                {"role": "developer", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                call,
                {"role": "tool", "content": "42", "tool_call_id": "1"},
                {"role": "assistant", "content": "yes", "weight": 0},
                {"role": "assistant", "content": "no", "train": True},
            ],
            "tools": [{"type": "function"}],
        }
    )
    assert isinstance(conversation, Conversation)
    assert [turn.role for turn in conversation.turns] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "assistant",
    ]
    assert [turn.trained for turn in conversation.turns] == [None, None, None, None, False, True]
    assert conversation.turns[1].content == "ab"
    assert conversation.turns[2].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert conversation.tools == [{"type": "function"}]


@pytest.mark.parametrize(
    ("fields", "kwargs", "message"),
    [
        ({"q": "x", "a": "y"}, {}, "match no known format. Columns found: q, a. Known: .*alpaca .instruction, output"),
        ({"q": "x"}, {"format": "text"}, "format text needs the column text. Columns found: q"),
        ({"q": "x"}, {"format": "alpaca"}, "format alpaca needs the columns instruction, output"),
        ({"q": "x"}, {"columns": {"text": "Q"}}, r"no column 'Q' .data\.columns\.text.. Columns found: q"),
        ({"question": "x"}, {"columns": {"text": "questoin"}}, "did you mean 'question'"),
        ({"q": "x"}, {"columns": {"promt": "q"}}, "'promt' is not a field that rows have; did you mean 'prompt'"),
        ({"text": "x", "q": "y"}, {"format": "text", "columns": {"prompt": "q"}}, "format text does not read 'prompt'"),
        ({"text": 5}, {}, r"f\.jsonl:7: text must be text, got a number .5"),
        ({"text": None}, {}, "text must be text, got null"),
        ({"prompt": "p", "completion": float("nan")}, {}, "7: completion must be text or a number, got nan"),
        ({"instruction": "i", "output": ["o"]}, {}, "output must be text, got a list"),
        ({"q": 1, "a": "b"}, {"columns": {"prompt": "q", "completion": "a"}}, "7: q must be text, got a number"),
        ({"messages": "hi"}, {}, "messages must be a list of turns .*got a string .'hi'"),
        ({"messages": {"role": "user"}}, {}, "messages must be a list of turns .*got an object"),
        ({"messages": []}, {}, "messages is an empty list"),
        ({"messages": [USER, "yes"]}, {}, r"messages\[1\] must be an object .*got a string"),
        ({"messages": [USER, {"role": "assistant"}]}, {}, r"messages\[1\] has no 'content'; its keys are role"),
        ({"messages": [{"content": "x"}]}, {}, r"messages\[0\] has no 'role'; its keys are content"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, {}, "unknown role 'asistant'; did you mean 'assistant'"),
        ({"messages": [{"role": None, "content": "x"}]}, {}, "unknown role None"),
        ({"messages": [{"role": "user", "content": None}]}, {}, r"messages\[0\]\.content must be text, got null"),
        ({"messages": [{"role": "user", "content": 3.5}]}, {}, r"content must be text, got a number .3\.5"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {}, "'image_url'; only text parts"),
        ({"conversations": [{"from": "human"}]}, {}, r"conversations\[0\] has no 'value'"),
        ({"messages": [{**USER, "weight": 1}]}, {}, "only assistant turns can be trained; this is a user turn"),
        ({"messages": [{**ASSISTANT, "weight": 0.5}]}, {}, "weight must be 0 or 1"),
        ({"messages": [USER], "tools": "f"}, {}, "tools must be a list of JSON schemas"),
    ],
)
def test_bad_row(fields: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as failure:
        parse(fields, **kwargs)
    assert "\n" not in str(failure.value)


def test_later_row_without_the_column() -> None:
    format = detect_format(RawRow({"prompt": "p", "completion": "c"}, "f.jsonl:1"))
    with pytest.raises(InputError, match=r"f\.jsonl:2: the column 'completion' is missing here"):
        parse_row(RawRow({"prompt": "p"}, "f.jsonl:2"), format)


def test_an_answer_that_is_a_number_becomes_text() -> None:
    assert turns({"prompt": "2 + 2", "completion": 4})[1] == ("assistant", "4")
    assert turns({"instruction": "half", "output": 0.5})[1] == ("assistant", "0.5")
    with pytest.raises(InputError, match="completion must be text, got a boolean"):
        parse({"prompt": "p", "completion": True})


@pytest.mark.parametrize("label", [1, "1"])
def test_an_integer_label_becomes_its_name(label: int | str) -> None:
    row = RawRow({"text": "good", "label": label}, "f.jsonl:7")
    format = detect_format(row, columns={"prompt": "text", "completion": "label"})
    conversation = parse_row(row, format, label_names=["negative", "positive"])
    assert isinstance(conversation, Conversation)
    assert conversation.turns[1] == Turn("assistant", "positive")
    for wrong in (2, -1, 1.0, True, "positive", None):
        with pytest.raises(InputError, match=r"f\.jsonl:7: label must be a label, 0 to 1 .data\.label_names has 2."):
            parse_row(RawRow({"text": "x", "label": wrong}, row.source), format, label_names=["negative", "positive"])


def test_the_recipe_takes_every_format() -> None:
    assert {*get_args(DataSection.model_fields["format"].annotation)} == {"auto", *FORMATS}
