"""Raw rows → conversations: detect the format and check each row. Also reads prompts and preferences."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qvera.config.schema import DataSection
from qvera.data.readers import RawRow, describe, read_file, read_lines, read_rows
from qvera.utils.errors import InputError, did_you_mean

# The fields of each format: those that every row must have, then those it may have. Detection tries them in this order.
_FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "prompt-completion": (("prompt", "completion"), ("system", "tools")),
    "text": (("text",), ()),
    "classification": (("text", "label"), ("text_pair",)),
    "image": (("image", "label"), ()),
    "preference": (("chosen", "rejected"), ("prompt", "system", "tools")),
    "unpaired-preference": (("prompt", "completion", "label"), ("system", "tools")),
}
PREFERENCES = ("preference", "unpaired-preference")
"""Formats for preferences, as TRL has them: pairs of answers, or single judged answers."""
LABELLED = ("classification", "image")
UNRENDERED = ("text", *LABELLED)
"""Formats whose texts are taken as they are, without a template."""
_DETECTED = [name for name in _FORMATS if name not in (*LABELLED, *PREFERENCES)]
"""Labels and preferences are read only if the recipe's task or objective asks for them."""
_USUAL_TEXTS = (
    ("text", "text_pair"), ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("sentence",), ("question",),
)  # fmt: skip
"""Usual names of text columns, GLUE's among them."""
_ALIASES = {
    "system": ("developer",),
    "user": ("human",),
    "assistant": ("gpt", "chatgpt", "model", "bot", "function_call"),
    "tool": ("function", "observation", "ipython"),
}
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Message keys for what an assistant thought before its answer."""
_ROLES = {alias: role for role, aliases in _ALIASES.items() for alias in (role, *aliases)}
_PASSED_ON = ("tool_calls", "name", "tool_call_id", *REASONING)
"""Message keys that only some templates read."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of a data set look."""

    name: str
    columns: dict[str, str]  # our field name → the data set's column
    unused: list[str]  # columns of the first row that nothing reads

    def column(self, name: str) -> str:
        """The data set's column for our field name."""
        return self.columns.get(name, name)


class UnknownFormat(InputError):
    """The columns match no format. The recipe can name them."""


class MissingColumn(InputError):
    """The rows lack a column of the chosen format. The recipe can name it."""


class UnaskedPreferences(InputError):
    """The rows are pairs of answers, but the recipe has no objective for them."""


def detect_format(row: RawRow, format: str = "auto", columns: dict[str, str] | None = None) -> RowFormat:
    """Find the rows' format from the first row. ``columns`` is ``data.columns``: our field name → the file's column.

    Raises:
        InputError: an unknown field or a missing column; see also the three errors above.
    """
    columns = columns or {}
    if format in LABELLED:
        columns = {**_usual_columns(format, row.fields, columns), **columns}
    known = sorted({name for required, optional in _FORMATS.values() for name in required + optional})
    found = ", ".join(map(str, row.fields)) or "none"
    for ours, theirs in columns.items():
        if ours not in known:
            hint = did_you_mean(ours, known)
            raise InputError(f"data.columns: {ours!r} is not a field that rows have{hint} Fields: {', '.join(known)}.")
        if theirs not in row.fields:
            hint = did_you_mean(theirs, row.fields)
            raise InputError(f"{row.source}: no column {theirs!r} (data.columns.{ours}){hint} Columns found: {found}.")
    present = {name for name in known if name in columns or name in row.fields}
    if format == "auto":
        matches = [name for name in _DETECTED if present.issuperset(_FORMATS[name][0])]
        # A column that the recipe names is meant to be read: formats that read it come first.
        matches.sort(key=lambda name: not set(columns) & {*_FORMATS[name][0], *_FORMATS[name][1]})
        if not matches:
            shapes = "; ".join(f"{name} ({', '.join(_FORMATS[name][0])})" for name in _DETECTED)
            if present.issuperset(_FORMATS["preference"][0]):
                raise UnaskedPreferences(
                    f"{row.source}: has a chosen and a rejected answer. Set training.objective: dpo (or orpo) to train "
                    "on such pairs."
                )
            raise UnknownFormat(
                f"{row.source}: the columns match no known format. Columns found: {found}. Known: {shapes}. "
                "Name yours in the recipe, for example data.columns: {prompt: question, completion: answer}."
            )
        format = matches[0]
    required, optional = _FORMATS[format]
    missing = [name for name in required if name not in present]
    if missing:
        raise MissingColumn(
            f"{row.source}: format {format} needs the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
            f"Columns found: {found}. Name yours in data.columns ({{{missing[0]}: YOUR_COLUMN}}) or set another "
            "data.format."
        )
    # optional columns are read wherever a row has them, though the first row may not
    read = {name: columns.get(name, name) for name in required + optional}
    for ours in columns:
        if ours not in read:
            raise InputError(
                f"data.columns: format {format} does not read {ours!r}; it reads {', '.join(required + optional)}."
            )
    unused = [str(name) for name in row.fields if name not in read.values()]
    return RowFormat(format, read, unused)


def _usual_columns(format: str, fields: Mapping[str, object], named: Mapping[str, str]) -> dict[str, str]:
    """Columns of a labelled row with usual names. Text columns that the recipe names are left to it."""
    found: dict[str, str] = {}
    if format == "image":
        found = {"image": "img"} if "image" not in fields and "img" in fields else {}
    elif not named.keys() & {"text", "text_pair"}:
        texts = next((names for names in _USUAL_TEXTS if all(name in fields for name in names)), ())
        found = dict(zip(("text", "text_pair"), texts, strict=False))
    return found | ({"label": "labels"} if "label" not in fields and "labels" in fields else {})


@dataclass(frozen=True, slots=True)
class Turn:
    """One message."""

    role: str  # system, user, assistant or tool; only assistant turns can be trained
    content: str  # empty for an assistant turn that is only a tool call
    trained: bool | None = None  # the row's own ``weight`` or ``train``; None: ``train_on`` decides
    context: str | None = None  # Alpaca's ``input``; only the alpaca template has a heading for it
    extra: dict[str, Any] = field(default_factory=dict)  # keys that only some templates read, such as ``tool_calls``
    in_prompt: bool = False  # in a prompt-completion row's prompt, so not trained


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row of turns, with the JSON schemas of the tools it offers."""

    turns: list[Turn]
    source: str
    tools: list[dict[str, Any]] | None = None
    owner: str | None = None
    rejected: Turn | None = None  # the worse answer of a pair; the last turn is the better one
    desirable: bool | None = None  # whether a single judged answer is a good one


@dataclass(frozen=True, slots=True)
class Text:
    """A row of plain text; all of it is trained."""

    text: str
    source: str
    owner: str | None = None


def parse_row(
    row: RawRow, format: RowFormat, system: str | None = None, label_names: Sequence[str] = ()
) -> Conversation | Text:
    """Check one row and turn it into a conversation or a text.

    Args:
        system: for rows without a system prompt.
        label_names: the name of each integer label, from 0, if answers are such labels.

    Raises:
        InputError: a missing column, a wrong type, an unknown role or half a character; names the row's source.
    """
    if format.name in PREFERENCES:
        return _parse_preference(row, format, system)
    if format.name == "text":
        return Text(row_text(row, format, "text"), row.source, row.owner)
    tools = row_tools(row, format)
    own_system = row_optional_text(row, format, "system")
    is_chat = format.name in ("messages", "sharegpt")
    if format.name == "messages":
        turns = row_turns(row, format, "messages")
    elif format.name == "sharegpt":
        turns = row_turns(row, format, "conversations")
    elif format.name == "alpaca":
        context = row_optional_text(row, format, "input")
        question = Turn("user", row_text(row, format, "instruction"), context=context if context.strip() else None)
        turns = [question, Turn("assistant", _answer(row, format, "output", label_names))]
    elif messages_in(row_value(row, format, "prompt")) is not None:
        # TRL's conversational form: both sides are lists of messages, and the completion is trained
        is_chat = True
        asked = [replace(turn, in_prompt=True) for turn in row_turns(row, format, "prompt")]
        turns = asked + row_turns(row, format, "completion")
    else:
        answer = _answer(row, format, "completion", label_names)
        turns = [Turn("user", row_text(row, format, "prompt")), Turn("assistant", answer)]
    if label_names and is_chat:
        raise InputError(
            f"data.label_names: names the labels of a column of answers, and {row.source} has messages. Remove it."
        )
    if turns[0].role != "system" and (own_system or system):
        turns = [Turn("system", own_system or system or ""), *turns]
    return Conversation(turns, row.source, tools, row.owner)


def row_value(row: RawRow, format: RowFormat, name: str) -> object:
    """The row's value for our field name; InputError if the column is missing."""
    column = format.column(name)
    if column not in row.fields:
        raise InputError(
            f"{row.source}: the column {column!r} is missing here, though the first row has it. "
            f"Columns found: {', '.join(map(str, row.fields)) or 'none'}."
        )
    return row.fields[column]


def row_text(row: RawRow, format: RowFormat, name: str) -> str:
    """As `row_value`; InputError if it is not text, or holds half a character."""
    value, column = row_value(row, format, name), format.column(name)
    if not isinstance(value, str):
        raise InputError(f"{row.source}: {column} must be text, got {describe(value)}. Fix the row.")
    _require_whole_characters(value, f"{row.source}: {column}")
    return value


def row_optional_text(row: RawRow, format: RowFormat, name: str) -> str:
    """As `row_text`, but "" if the field is missing."""
    return "" if row.fields.get(format.column(name)) is None else row_text(row, format, name)


def _answer(row: RawRow, format: RowFormat, name: str, label_names: Sequence[str]) -> str:
    value, column = row_value(row, format, name), format.column(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if label_names:
        digits = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
        if not re.fullmatch(r"[0-9]+", digits) or int(digits) >= len(label_names):
            raise InputError(
                f"{row.source}: {column} must be a label, 0 to {len(label_names) - 1} (data.label_names has "
                f"{len(label_names)}), got {describe(value)}. Fix the row, or data.label_names."
            )
        return label_names[int(digits)]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{row.source}: {column} must be text or a number, got {value}. Fix the row, or leave it out.")
    return str(value) if is_number else row_text(row, format, name)


def _require_whole_characters(value: object, where: str) -> None:
    r"""Refuse half a character: JSON can hold one ("\ud83d"), but no tokenizer takes it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds half a character, {text[error.start]!a}, behind {text[: error.start][-20:]!r}: a text was "
            "cut within a character, and that is no text. Write the whole character, or remove the half."
        ) from None


def row_tools(row: RawRow, format: RowFormat) -> list[dict[str, Any]] | None:
    """The JSON schemas of the row's tools; None if it offers none."""
    if "tools" not in format.columns:
        return None
    tools = _from_json(row.fields.get(format.columns["tools"]))
    _require_whole_characters(tools, f"{row.source}: tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{row.source}: tools must be a list of JSON schemas (objects), got {describe(tools)}.")
    found: list[dict[str, Any]] = _without_nulls(tools)
    return found


def _without_nulls(value: Any) -> Any:
    """Drop keys whose value is null: Parquet gives every object the keys of all objects."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _calls(calls: Any) -> Any:
    """Parse the arguments of tool calls: OpenAI's API has them as JSON text, templates take objects."""
    calls = _without_nulls(calls)
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(arguments := _from_json(function.get("arguments")), dict):
            function["arguments"] = arguments
    return calls


def messages_in(value: object) -> list[Any] | None:
    """The value as a list of messages, also from JSON text (as in CSV); None if it is no such list."""
    found = _from_json(value)
    if not isinstance(found, list):
        return None
    are_turns = bool(found) and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in found)
    return found if isinstance(value, list) or are_turns else None


def _from_json(value: object) -> object:
    # CSV has no lists and some Parquet exports write nested values as JSON text.
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def row_turns(row: RawRow, format: RowFormat, name: str) -> list[Turn]:
    """The turns of a field; InputError if it is not a list of messages."""
    value, column = _from_json(row_value(row, format, name)), format.column(name)
    if not isinstance(value, list):
        raise InputError(
            f'{row.source}: {column} must be a list of turns such as {{"role": "user", "content": "..."}}, '
            f"got {describe(value)}."
        )
    if not value:
        raise InputError(f"{row.source}: {column} is an empty list. Expected at least one user and one assistant turn.")
    return [_turn(item, f"{row.source}: {column}[{index}]") for index, item in enumerate(value)]


def _turn(item: object, where: str) -> Turn:
    if not isinstance(item, dict):
        raise InputError(
            f'{where} must be an object such as {{"role": "user", "content": "..."}}, got {describe(item)}.'
        )
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    for key in (role_key, content_key):
        if key not in item and not (key == content_key and item.get("tool_calls")):
            raise InputError(f"{where} has no {key!r}; its keys are {', '.join(map(str, item)) or 'none'}.")
    role = _ROLES.get(item[role_key]) if isinstance(item[role_key], str) else None
    if role is None:
        hint = did_you_mean(item[role_key], _ROLES)
        raise InputError(f"{where}: unknown role {item[role_key]!r}{hint} Known roles: {', '.join(_ROLES)}.")
    extra = {k: item[k] for k in _PASSED_ON if item.get(k)}  # Arrow fills up with []
    if "tool_calls" in extra:
        extra["tool_calls"] = _calls(extra["tool_calls"])
    calls_tools = role == "assistant" and item.get("tool_calls") is not None
    content = _content(item.get(content_key), f"{where}.{content_key}", optional=calls_tools)
    _require_whole_characters(content, f"{where}.{content_key}")
    _require_whole_characters(extra, where)
    return Turn(role, content, _trained(item, role, where), None, extra)


def _content(value: object, where: str, optional: bool) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list):  # OpenAI's content parts
        parts = []
        for part in value:
            text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else describe(part)
                raise InputError(f"{where}: a part of it is {kind!r}; only text parts can be trained on. Remove it.")
            parts.append(text)
        return "".join(parts)
    if not isinstance(value, str):
        raise InputError(f"{where} must be text, got {describe(value)}. Fix the row.")
    return value


def _trained(item: dict[str, Any], role: str, where: str) -> bool | None:
    for key in ("weight", "train"):  # OpenAI's fine-tuning format; Axolotl's
        value = item.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise InputError(f"{where}.{key} must be 0 or 1 (false or true), got {describe(value)}.")
        if value and role != "assistant":
            raise InputError(f"{where}.{key}: only assistant turns can be trained; this is a {role} turn. Set it to 0.")
        return bool(value)
    return None


def _parse_preference(row: RawRow, format: RowFormat, system: str | None) -> Conversation:
    """The conversation ends with the (chosen) answer.

    Without a ``prompt`` column, the prompt is what both lists of messages begin with.
    """
    paired = format.name == "preference"
    names = ["chosen", "rejected"] if paired else ["completion"]
    if paired and format.column("prompt") not in row.fields:
        prompt, answers = _without_common_prompt(row, format)
    else:
        prompt = _text_or_turns(row, format, "prompt", "user")
        answers = [_one_answer(row, format, name, _text_or_turns(row, format, name, "assistant")) for name in names]
    if not prompt or prompt[-1].role in ("system", "assistant"):
        raise InputError(f"{row.source}: the prompt must end with a turn that asks for an answer, such as a user's.")
    own_system = row_optional_text(row, format, "system") or system
    if prompt[0].role != "system" and own_system:
        prompt = [Turn("system", own_system), *prompt]
    return Conversation(
        [*prompt, answers[0]],
        row.source,
        row_tools(row, format),
        row.owner,
        rejected=answers[1] if paired else None,
        desirable=None if paired else _judgement(row, format),
    )


def _text_or_turns(row: RawRow, format: RowFormat, name: str, role: str) -> list[Turn]:
    if messages_in(row_value(row, format, name)) is not None:
        return row_turns(row, format, name)
    return [Turn(role, row_text(row, format, name))]


def _one_answer(row: RawRow, format: RowFormat, name: str, turns: list[Turn]) -> Turn:
    if [turn.role for turn in turns] != ["assistant"]:
        roles = ", ".join(turn.role for turn in turns) or "none"
        raise InputError(
            f"{row.source}: {format.column(name)} must be one assistant turn after the prompt; its turns are {roles}. "
            "Put earlier turns into the prompt."
        )
    if not turns[0].content.strip() and not turns[0].extra.get("tool_calls"):
        raise InputError(f"{row.source}: {format.column(name)} is empty. Fill it in, or remove the row.")
    return turns[0]


def _without_common_prompt(row: RawRow, format: RowFormat) -> tuple[list[Turn], list[Turn]]:
    lists = [row_turns(row, format, name) for name in ("chosen", "rejected")]
    shared = 0
    # the last turn of each is its answer, even where both are the same
    while shared < min(map(len, lists)) - 1 and lists[0][shared] == lists[1][shared]:
        shared += 1
    names = zip(("chosen", "rejected"), lists, strict=True)
    return lists[0][:shared], [_one_answer(row, format, name, turns[shared:]) for name, turns in names]


def _judgement(row: RawRow, format: RowFormat) -> bool:
    value = row_value(row, format, "label")
    word = value.strip().lower() if isinstance(value, str) else value  # CSV has no booleans
    if word in (True, 1, "true", "1"):
        return True
    if word in (False, 0, "false", "0"):
        return False
    raise InputError(
        f"{row.source}: {format.column('label')} must be true (a good answer) or false, got {describe(value)}. Fix the "
        "row."
    )


def read_prompts(path: Path, section: DataSection, owner_columns: Sequence[str] = ()) -> list[Conversation]:
    """Read the prompts of a file. Answers at the end of a row are left out.

    Args:
        path: .txt (one prompt a line), or a data file like a training file; its answers may be missing.
        section: gives the column names and the system prompt.
        owner_columns: the first of these columns with a value becomes ``owner``, as text.

    Raises:
        InputError: no such file, no prompts in it, or a row that asks nothing; names file and line.
    """
    is_text = path.suffix.lower() == ".txt"
    format, columns = ("prompt-completion", {}) if is_text else (section.format, section.columns)
    if format in PREFERENCES:  # its prompts, whose answers play no part here
        format, columns = "prompt-completion", {name: columns[name] for name in ("prompt", "system") if name in columns}
    conversations = []
    for row in read_file(path, read_lines) if is_text else read_rows(str(path)):
        fields = dict(row.fields)
        for question, answer in (("prompt", "completion"), ("instruction", "output")):
            asked, answered = (columns.get(name, name) for name in (question, answer))
            if asked in fields and not fields.get(answered):
                fields[answered] = "-"  # a row without its answer is read like a training row
        filled = replace(row, fields=fields)
        parsed = parse_row(filled, detect_format(filled, format, columns), section.system)
        if isinstance(parsed, Text):
            raise InputError(
                f"{row.source}: is plain text, which asks nothing. Expected prompts, instructions or messages."
            )
        turns = list(parsed.turns)
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if not turns or turns[-1].role == "system":
            raise InputError(f"{row.source}: has no user turn to answer.")
        owner = next((row.fields[name] for name in owner_columns if row.fields.get(name) not in (None, "")), None)
        conversations.append(replace(parsed, turns=turns, owner=None if owner is None else str(owner)))
    return conversations
