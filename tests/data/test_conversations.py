"""Detection of formats, and every row checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from qvera.config.sections import DataSection
from qvera.data.conversations import (
    FORMATS,
    Conversation,
    LabelledRow,
    Text,
    Turn,
    parse_row,
    read_messages,
)
from qvera.data.detect import UnaskedPreferences, detect_format
from qvera.data.readers import RawRow
from qvera.data.source import read_prompts
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
    ("fields", "name", "unused"),
    [
        ({"instruction": "i", "output": "o"}, "alpaca", []),
        ({"instruction": "i", "input": "x", "output": "o", "text": "joined"}, "alpaca", ["text"]),
        ({"messages": [USER, ASSISTANT], "prompt": "hi"}, "messages", ["prompt"]),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "sharegpt", []),
        ({"prompt": "p", "completion": "c"}, "prompt-completion", []),
        ({"instruction": "i", "context": "x", "response": "o", "category": "c"}, "alpaca", ["category"]),
        ({"text": "t", "id": 3}, "text", ["id"]),
        ({"text": "a CV", "role": "engineer"}, "text", ["role"]),
    ],
)
def test_detection(fields: dict[str, Any], name: str, unused: list[str]) -> None:
    found = detect_format(RawRow(fields, "f:1"))
    assert (found.name, found.unused) == (name, unused)
    assert {*get_args(DataSection.model_fields["format"].annotation)} == {"auto", *FORMATS}, "a recipe takes every one"


def test_rows_of_text_with_videos_or_pictures_beside_them_are_refused() -> None:
    row = {"messages": [{"role": "user", "content": "What is it?"}], "videos": ["cat.mp4"]}
    with pytest.raises(InputError, match="l:7: the column 'videos' is not read: rows of format messages are text"):
        parse(row)
    first = detect_format(RawRow({**row, "videos": []}, "f:1"))
    assert first.unused == ["videos"]
    for later in (row, {**row, "audio": {"bytes": b"RIFF"}, "videos": []}):
        with pytest.raises(InputError, match="f:2: the column '(videos|audio)' is not read"):
            parse_row(RawRow(later, "f:2"), first)
    assert parse_row(RawRow({**row, "videos": [], "audio": {"bytes": None}}, "f:2"), first)
    with pytest.raises(InputError, match="l:7: the column 'images' is not read: rows of format text are text"):
        parse({"text": "a cat", "images": ["cat.png"]})


def test_every_format_becomes_the_same_conversation() -> None:
    for fields in (
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        {"conversations": [USER, ASSISTANT]},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "hi", "output": "yes", "input": None},
        {"messages": json.dumps([USER, ASSISTANT])},
    ):
        assert turns(fields) == [("user", "hi"), ("assistant", "yes")]
    renamed = turns({"question": "hi", "answer": "yes"}, columns={"prompt": "question", "completion": "answer"})
    assert renamed == [("user", "hi"), ("assistant", "yes")]
    assert parse({"text": "hi"}) == Text("hi", "f.jsonl:7")
    alpaca = parse({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert isinstance(alpaca, Conversation)
    assert alpaca.turns == [Turn("user", "Add.", context="1, 2"), Turn("assistant", "3")], "the input stays apart"
    assert parse({"instruction": "Add.", "context": "1, 2", "response": "3"}) == alpaca, "Dolly's columns"
    row = {"instruction": "And 4?", "input": "", "output": "7", "history": [["Add 1, 2", "3"]]}
    followed = parse(row)
    assert isinstance(followed, Conversation), "LLaMA-Factory's turns before"
    assert [(turn.role, turn.content) for turn in followed.turns] == [
        ("user", "Add 1, 2"), ("assistant", "3"), ("user", "And 4?"), ("assistant", "7"),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"history must be a list of \[question, answer\] pairs, got"):
        parse({**row, "history": ["Add 1, 2"]})


def test_named_columns_decide_the_format() -> None:
    fields = {"instruction": "i", "output": "o", "body": "t"}
    assert parse(fields, columns={"text": "body"}) == Text("t", "f.jsonl:7")
    named = turns({"text": "ignored", "prompt": "p", "completion": "c"}, format="prompt-completion")
    assert named == [("user", "p"), ("assistant", "c")]


def test_system_prompt_only_where_the_row_has_none() -> None:
    own = {"role": "system", "content": "own"}
    assert turns({"prompt": "p", "completion": "c"}, system="S")[0] == ("system", "S")
    assert turns({"prompt": "p", "completion": "c", "system": "own"}, system="S")[0] == ("system", "own")
    brought = turns({"messages": [own, USER, ASSISTANT]}, system="S")
    assert brought[0] == ("system", "own") and len(brought) == 3
    for empty in (
        {"messages": [{**own, "content": " "}, USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "system": " "},
    ):
        assert turns(empty) == [("user", "hi"), ("assistant", "yes")], "an empty one is none"
        assert turns(empty, system="S") == [("system", "S"), ("user", "hi"), ("assistant", "yes")]


def test_roles_parts_tools_and_weights() -> None:
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "yes", "weight": 0},
        {"role": "assistant", "content": "no", "train": True},
    ]
    conversation = parse({"messages": messages, "tools": [{"type": "function"}]})
    assert isinstance(conversation, Conversation)
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "tool", *["assistant"] * 2]
    assert [turn.trained for turn in conversation.turns] == [None, None, None, None, False, True]
    assert conversation.turns[1].content == "ab"
    assert conversation.turns[2].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert conversation.tools == [{"type": "function"}]


CALL = {"name": "f", "arguments": {"team": "bug"}}
AS_OPENAI = [{"type": "function", "function": CALL}]


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        (
            {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"team": "bug"}'}},
            AS_OPENAI,
        ),
        ({"role": "assistant", "content": None, "function_call": CALL, "tool_calls": None}, AS_OPENAI),
        ({"from": "function_call", "value": json.dumps(CALL)}, AS_OPENAI),
        ({"from": "function_call", "value": json.dumps([CALL, CALL])}, AS_OPENAI * 2),
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, AS_OPENAI),
        ({"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}, AS_OPENAI),
        ({"role": "assistant", "content": "", "tool_calls": CALL}, AS_OPENAI),
    ],
    ids=[
        "OpenAI's older key",
        "that beside a null",
        "LLaMA-Factory's role",
        "two in one turn",
        "without its type",
        "as JSON text",
        "without a list",
    ],
)
def test_calls_in_older_forms_are_tool_calls(called: dict[str, Any], expected: list[Any]) -> None:
    role, text = ("from", "value") if "from" in called else ("role", "content")
    messages = [
        {role: "user", text: "it crashes"},
        called,
        {role: "function", text: "ok"},
        {role: "assistant", text: "Done"},
    ]
    for tool in ({"name": "f", "parameters": {}}, '{"name": "f", "parameters": {}}'):  # the second in When2Call
        found = parse({"messages": messages, "functions": [tool]})
        assert isinstance(found, Conversation)
        assert [turn.role for turn in found.turns] == ["user", "assistant", "tool", "assistant"]
        assert (found.turns[1].content, found.turns[1].extra["tool_calls"]) == ("", expected)
        assert found.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_a_null_that_someone_wrote_is_part_of_a_call_and_one_that_arrow_added_is_not() -> None:
    schema = {"type": "object", "properties": {"unit": {"type": "string", "default": None}}}
    call = {"id": None, "function": {"name": "f", "arguments": {"city": "Oslo", "unit": None}}}
    said = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for file, as_text, is_kept in (
        ("f.jsonl", False, True), ("f.parquet", False, False), ("f.parquet", True, True), (None, False, False),
    ):  # fmt: skip
        tools: Any = [{"name": "f", "parameters": schema}]
        fields = {"messages": said, "tools": json.dumps(tools) if as_text else tools}
        row = RawRow(fields, "f 7", file=None if file is None else Path(file))
        found = parse_row(row, detect_format(row))
        assert isinstance(found, Conversation) and found.tools is not None
        (called,) = found.turns[1].extra["tool_calls"]
        assert "id" not in called and ("unit" in called["function"]["arguments"]) == (is_kept and not as_text)
        assert ("default" in found.tools[0]["function"]["parameters"]["properties"]["unit"]) == is_kept


def test_keys_of_turns_that_nothing_reads_are_told_and_parts_of_turns_refused() -> None:
    turns = [{**USER, "id": 7, "mask": None}, {**ASSISTANT, "training": False, "weight": 0}]
    for written in (turns, json.dumps(turns)):
        row = RawRow({"messages": written, "tag": 1}, "a test")
        assert detect_format(row).unused == ["tag", "messages[].id", "messages[].training"]
    assert detect_format(RawRow({"prompt": '[{"a": 1}]', "completion": "JSON, and no turn"}, "a test")).unused == []
    with pytest.raises(InputError, match=r"\[1\]\.train_detail: a turn is trained whole or not at all"):
        parse(
            {"messages": [USER, {**ASSISTANT, "train_detail": [{"begin_offset": 0, "end_offset": 8, "train": False}]}]}
        )


def test_a_call_that_is_none_is_named() -> None:
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "arguments": "{team: bug}"}]}]
    with pytest.raises(InputError, match=r"the arguments of a call of 'f' must be a JSON object .*, got .*Fix the row"):
        parse({"messages": turns})
    with pytest.raises(InputError, match=r"the arguments of a call of 'f' must be a JSON object"):
        parse({"prompt": "hi", "chosen": [ASSISTANT], "rejected": turns[1:]}, format="preference")
    assert read_messages(turns, "a request")[1].extra["tool_calls"], (
        "what another model has called is no row to train on"
    )
    for called, said in (
        ({"from": "function_call", "value": "open a ticket"}, r"\[1\]\.value must be a call as JSON, \{\"name\""),
        (
            {"from": "gpt", "value": "", "toolcalls": [CALL]},
            r"\[1\] has a key 'toolcalls'; did you mean 'tool_calls'\?",
        ),
    ):
        with pytest.raises(InputError, match=said):
            parse({"conversations": [{"from": "human", "value": "it crashes"}, called]})


@pytest.mark.parametrize(
    ("fields", "kwargs", "message"),
    [
        ({"role": "user", "content": "hi"}, {}, "is a single turn, and a row is a whole conversation"),
        (
            {"text": "hi", "role": "prompter", "parent_id": None},
            {},
            "is a single turn, and a row is a whole conversati",
        ),
        ({"q": "x", "a": "y"}, {}, "match no known format. Columns found: q, a. Known: .*alpaca .instruction, output"),
        ({"q": "x"}, {"format": "text"}, "format text needs the column text. Columns found: q"),
        ({"q": "x"}, {"format": "text"}, r"or set another data\.format\.$"),
        ({"text": "x"}, {"format": "alpaca"}, r"or set another data\.format: auto reads it as text\.$"),
        ({"text": "x"}, {"format": "preference"}, r"\(\{chosen: YOUR_COLUMN\}\)\.$"),
        ({"q": "x"}, {"format": "alpaca"}, "format alpaca needs the columns instruction, output"),
        ({"q": "x"}, {"columns": {"text": "Q"}}, r"did you mean 'q'\? Columns found: q\. Rename the one"),
        ({"question": "x"}, {"columns": {"text": "questoin"}}, "did you mean 'question'"),
        ({"q": "x"}, {"columns": {"promt": "q"}}, "'promt' is not a field that rows have; did you mean 'prompt'"),
        ({"q": "x"}, {"columns": {"q": "prompt"}}, "'q' is not a field that rows have. Turn it around: .prompt: q."),
        (
            {"q": "x", "a": "y"},
            {"columns": {"text": "q", "label": "a"}},
            "format text reads text, not 'label'. To train a classifier, set task: sequence-classification.",
        ),
        (
            {"text": "x", "q": "y"},
            {"format": "text", "columns": {"prompt": "q"}},
            "format text reads text, not 'prompt'. Leave it out",
        ),
        ({"text": 5}, {}, r"f\.jsonl:7: text must be text, got a number .5"),
        ({"text": None}, {}, "text must be text, got null"),
        ({"prompt": "p", "completion": float("nan")}, {}, "7: completion must be text or a number, got nan"),
        ({"prompt": "p", "completion": True}, {}, "completion must be text, got a boolean"),
        ({"instruction": "i", "output": ["o"]}, {}, r"output must be text, got a list.*json\.dumps"),
        ({"q": 1, "a": "b"}, {"columns": {"prompt": "q", "completion": "a"}}, "7: q must be text, got a number"),
        ({"messages": "hi"}, {}, "messages must be a list of turns .*got a string .'hi'"),
        (
            {"messages": "[{'role': 'user'}]"},
            {},
            r"got a string .*\. That is Python's repr; write it as JSON .json\.dumps",
        ),
        ({"messages": {"role": "user"}}, {}, "messages must be a list of turns .*got an object"),
        ({"messages": []}, {}, "messages is an empty list"),
        ({"messages": [USER, "yes"]}, {}, r"messages\[1\] must be an object .*got a string"),
        ({"messages": [USER, {"role": "assistant"}]}, {}, r"messages\[1\] has no 'content'; its keys are role"),
        ({"messages": [{"content": "x"}]}, {}, r"messages\[0\] has no 'role'; its keys are content"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, {}, "unknown role 'asistant'; did you mean 'assistant'"),
        ({"messages": [{"role": None, "content": "x"}]}, {}, "unknown role None"),
        ({"messages": [{"role": "user", "content": None}]}, {}, r"messages\[0\]\.content must be text, got null"),
        ({"messages": [{"role": "user", "content": 3.5}]}, {}, r"content must be text, got a number .3\.5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            {},
            "'input_audio'; only texts and images",
        ),
        ({"conversations": [{"from": "human"}]}, {}, r"conversations\[0\] has no 'value'"),
        ({"messages": [{**USER, "weight": 1}]}, {}, "only assistant turns can be trained; this is a user turn"),
        ({"messages": [{**ASSISTANT, "weight": 0.5}]}, {}, "weight must be 0 or 1"),
        ({"messages": [USER], "tools": "f"}, {}, "tools must be a list of JSON schemas"),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": "f()"}]},
            {},
            r"\[1\]\.tool_calls must be a list of calls such",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": ["f"]}]},
            {},
            r"\[1\]\.tool_calls must be a list of calls such",
        ),
    ],
)
def test_bad_row(fields: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as failure:
        parse(fields, **kwargs)
    assert "\n" not in str(failure.value)


def test_an_answer_that_is_a_number_becomes_text_and_a_label_its_name() -> None:
    assert turns({"prompt": "2 + 2", "completion": 4})[1] == ("assistant", "4")
    assert turns({"instruction": "half", "output": 0.5})[1] == ("assistant", "0.5")
    names = ["negative", "positive"]
    row_format = detect_format(
        RawRow({"text": "good", "label": 1}, ""), columns={"prompt": "text", "completion": "label"}
    )
    for label in (1, "1"):
        found = parse_row(RawRow({"text": "good", "label": label}, ""), row_format, label_names=names)
        assert isinstance(found, Conversation) and found.turns[1] == Turn("assistant", "positive")
    for wrong in (2, -1, 1.0, True, "positive", None):
        with pytest.raises(InputError, match=r"f\.jsonl:7: label must be a label, 0 to 1 .data\.label_names has 2."):
            parse_row(RawRow({"text": "x", "label": wrong}, "f.jsonl:7"), row_format, label_names=names)
    with pytest.raises(InputError, match=r"f\.jsonl:2: the column 'label' is missing here"):
        parse_row(RawRow({"text": "x"}, "f.jsonl:2"), row_format)


def test_prompts_under_another_name_are_told_that_they_need_no_answers(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("question,reply\nWhat is 2 + 2?,4\n")
    for format in ("auto", "prompt-completion"):
        with pytest.raises(InputError, match=r"p.csv:2: .*question, reply.* a column called prompt is enough\."):
            read_prompts(file, DataSection(path="rows.jsonl", format=format))


def test_prompts_may_have_another_format_than_the_rows_that_trained(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    for format in ("alpaca", "messages", "text", "prompt-completion"):
        found = read_prompts(file, DataSection(path="rows.jsonl", format=format))
        assert [row.turns[-1].content for row in found] == ["a", "b"]
    file.write_text('{"instruction": "Add.", "context": "1, 2"}\n')  # Dolly's, without its response
    (asked,) = read_prompts(file, DataSection(path="rows.jsonl", format="alpaca"))
    assert asked.turns == [Turn("user", "Add.", context="1, 2")]


def test_prompts_of_pairs_are_those_that_training_reads(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    first, second = ({"role": "user", "content": text} for text in "ac")
    said, good, bad = ({"role": "assistant", "content": text} for text in "bxy")
    chosen, rejected = ([first, said, second, answer] for answer in (good, bad))
    of_openai = {"preferred_output": [good], "non_preferred_output": [bad]}
    for row in (
        {"chosen": chosen, "rejected": rejected},
        {"prompt": "c", "chosen": chosen, "rejected": rejected},  # Tulu's
        {"input": {"messages": [first, said, second]}, **of_openai},
        {"prompt": [first, said, second], "chosen": "x", "rejected": ""},  # answers play no part here
    ):
        file.write_text(json.dumps(row) + "\n")
        (asked,) = read_prompts(file, DataSection(path="rows.jsonl", format="preference"))
        assert [turn.content for turn in asked.turns] == ["a", "b", "c"]
    file.write_text(json.dumps({"better": chosen, "worse": rejected}) + "\n")
    columns = {"chosen": "better", "rejected": "worse"}
    (asked,) = read_prompts(file, DataSection(path="rows.jsonl", format="preference", columns=columns))
    assert len(asked.turns) == 3
    file.write_text(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    for format in ("auto", "alpaca", "unpaired-preference"):  # of runs on other rows
        (asked,) = read_prompts(file, DataSection(path="rows.jsonl", format=format))
        assert len(asked.turns) == 3


def test_prompts_have_the_recipes_column_or_are_written_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    section = DataSection(path="rows.jsonl", columns={"completion": "cuisine", "prompt": "dish"})
    file.write_text('{"text": "sushi"}\n')
    with pytest.raises(InputError, match=r"Columns found: text\. Call that of the prompts dish or prompt, or"):
        read_prompts(file, section)
    file.write_text('{"dish": "sushi"}\n{"dish": "pizza", "cuisine": "italian"}\n')
    assert [row.turns[-1].content for row in read_prompts(file, section)] == ["sushi", "pizza"]
    for row in ({"prompt": "a"}, {"instruction": "a"}, {"messages": [{"role": "user", "content": "a"}]}):
        file.write_text(json.dumps(row) + "\n")
        assert [turn.content for row in read_prompts(file, section) for turn in row.turns] == ["a"]
    file.write_text('{"dsh": "a", "cuisine": "thai"}\n')
    said = r"p.jsonl:1: no column 'dish'; did you mean 'dsh'\? Columns found: dsh, cuisine\. Rows to answer need no"
    with pytest.raises(InputError, match=said):
        read_prompts(file, section)
    with pytest.raises(InputError, match=r"promt.txt: no such file or directory\. Did you mean .*prompt.txt\?"):
        file.rename(tmp_path / "prompt.txt")
        read_prompts(tmp_path / "promt.txt", section)


def test_pairs_of_llama_factory_are_read_as_they_are() -> None:
    said = lambda text: {"from": "gpt", "value": text}  # noqa: E731
    question = {"from": "human", "value": "Order 5 tea"}
    row = {"conversations": [question], "chosen": said("5 x tea"), "rejected": said("You want tea, I think.")}
    found = parse(row, format="preference")
    assert isinstance(found, Conversation) and found.rejected is not None
    assert [turn.content for turn in (*found.turns, found.rejected)] == [
        "Order 5 tea", "5 x tea", "You want tea, I think.",
    ]  # fmt: skip


def test_pairs_of_openai_are_read_as_they_are() -> None:
    good, bad = ([{"role": "assistant", "content": text}] for text in ("5 x tea", "Tea, I think."))
    asked = {"messages": [{"role": "user", "content": "Order 5 tea"}], "tools": [], "parallel_tool_calls": True}
    row = {"input": asked, "preferred_output": good, "non_preferred_output": bad}
    found = parse(row, format="preference")
    assert isinstance(found, Conversation) and found.rejected is not None
    assert [turn.content for turn in (*found.turns, found.rejected)] == ["Order 5 tea", "5 x tea", "Tea, I think."]
    with pytest.raises(UnaskedPreferences):
        parse(row)
    with pytest.raises(InputError, match="input"):
        parse({**row, "input": asked | {"tools": [{"type": "function"}]}}, format="preference")


def test_a_file_without_a_header_is_told_to_get_one() -> None:
    row = RawRow({"the mouse is broken": "hardware", "no": "1"}, "t.csv:2", file=Path("t.csv"))
    for columns in ({}, {"prompt": "message", "completion": "category"}):
        with pytest.raises(InputError, match=r"If line 1 is a row already, write a line of names above it\.$"):
            detect_format(row, columns=columns)
    for format in ("classification", "preference", "prompt-completion"):
        with pytest.raises(InputError, match=r"If line 1 is a row already"):
            detect_format(row, format)


def test_half_a_character_is_named_wherever_it_stands() -> None:
    for fields, format in (
        ({"text": "a", "label": "\ud83d"}, "classification"),
        ({"prompt": "a", "for the reward": ["\ud83d"]}, "prompt"),
    ):
        with pytest.raises(InputError, match=r"f\.jsonl:7.* holds half a character, '\\ud83d'"):
            parse(fields, format=format)
