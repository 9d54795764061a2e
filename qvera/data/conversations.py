"""Raw rows → conversations, texts and labelled rows: `FORMATS` says how each format is read."""

import json
import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from qvera.data.images import PLACE, read_image, read_parts
from qvera.data.readers import RawRow, from_json, require_whole_characters, without_nulls
from qvera.utils.errors import InputError, did_you_mean
from qvera.utils.formatting import describe, first_of, is_number

_CALL = "function_call"
_ALIASES = {
    "system": ("developer",),
    "user": ("human",),
    "assistant": ("gpt", "chatgpt", "model", "bot", _CALL),
    "tool": ("function", "observation", "ipython"),
}
_ROLES = {alias: role for role, aliases in _ALIASES.items() for alias in (role, *aliases)}
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys for what an assistant thought before it answered
_PASSED_ON = ("tool_calls", "name", "tool_call_id", *REASONING)
"""Message keys that only some templates read."""
READ_KEYS = {"role", "content", "from", "value", "weight", "train", _CALL, *_PASSED_ON}
"""All message keys that are read."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # columns that the text of a row speaks of


@dataclass(frozen=True, slots=True)
class RowFormat:
    """The format of a data set's rows, and the columns that hold its fields."""

    name: str
    columns: dict[str, str]  # our field name → the data set's column
    unused: list[str]  # columns of the first row that nothing reads

    def column(self, name: str) -> str:
        """The data set's column for our field name."""
        return self.columns.get(name, name)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message."""

    role: str  # system, user, assistant or tool; only assistant turns can be trained
    content: str  # empty for an assistant turn that is only a tool call
    trained: bool | None = None  # the row's own ``weight`` or ``train``; None: ``train_on`` decides
    context: str | None = None  # Alpaca's ``input``; only the alpaca template has a heading for it
    extra: dict[str, Any] = field(default_factory=dict)  # keys that only some templates read, such as ``tool_calls``
    in_prompt: bool = False  # in a prompt-completion row's prompt, so not trained
    images: tuple[str | bytes, ...] = ()  # paths of files, or bytes, in the order of ``parts``
    parts: tuple[dict[str, str], ...] = ()  # texts and places of images as templates take them; empty without images

    @property
    def text(self) -> str:
        """The content, and its context behind it."""
        return self.content if self.context is None else f"{self.content}\n\n{self.context}"

    @property
    def reasoning(self) -> str:
        """What an assistant thought before it answered, if anything."""
        before, end, _ = self.content.partition("</think>")
        beside = next((str(self.extra[key]) for key in REASONING if key in self.extra), "")
        return (beside or (before.rpartition("<think>")[2] if end else "")).strip()


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row of turns, with the JSON schemas of the tools it offers."""

    turns: list[Turn]
    source: str
    tools: list[dict[str, Any]] | None = None
    owner: str | None = None
    rejected: Turn | None = None  # the worse answer of a pair; the last turn is the better one
    desirable: bool | None = None  # whether a single judged answer is a good one
    about: str | None = None  # for a prompt, JSON: [its last text, the raw row]; its last turn is a placeholder


@dataclass(frozen=True, slots=True)
class Text:
    """A row of plain text; all of it is trained."""

    text: str
    source: str
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A text, a pair of texts or an image, with its label."""

    content: Any  # the (first) text; or an image's bytes or path
    label: str  # a name, or a number as text
    source: str
    owner: str | None = None
    text_pair: str | None = None  # None if missing or empty

    @property
    def whole(self) -> str:
        """The text, or the two texts of a pair on lines of their own, to show in messages."""
        return str(self.content) if self.text_pair is None else f"{self.content}\n{self.text_pair}"


Parsed = Conversation | Text | LabelledRow


def parse_row(row: RawRow, format: RowFormat, system: str | None = None, label_names: Sequence[str] = ()) -> Parsed:
    """Check one row, and parse it as its format says.

    Args:
        system: for rows without a system prompt.
        label_names: the name of each integer label, from 0, if answers are such labels; or the classes.

    Raises:
        InputError: a missing column, a wrong type, an unknown role, half a character, or a column of pictures, videos
            or sounds that the format does not read; names the row's source.
    """
    # in each row, since others than the first may have such a column; of a prompt, all columns are for the reward
    unread = [name for name in _MEDIA if name not in format.columns.values()] if format.name != "prompt" else []
    if shown := next((name for name in unread if without_nulls(row.fields.get(name))), None):
        raise InputError(
            f"{row.source}: the column {shown!r} is not read: rows of format {format.name} are text, and a model would "
            "learn to answer without what is in it. Remove the column if the text says it all."
        )
    cells = _Cells(row, format, system, label_names)
    parsed = FORMATS[format.name].parse(cells)
    turns = [*parsed.turns, parsed.rejected] if isinstance(parsed, Conversation) else []
    calls = [turn.extra.get("tool_calls") for turn in turns if turn is not None]
    for call in (call for each in calls if isinstance(each, list) for call in each):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and not isinstance(function["arguments"], dict):
            raise InputError(
                f"{row.source}: the arguments of a call of {function.get('name')!r} must be a JSON object such as "
                f'{{"team": "bug"}}, got {describe(function["arguments"])}. Fix the row.'
            )
    if cells.images:
        raise InputError(
            f"{cells.where('images')} has more images than places. Mark the place of each in the messages, by a part "
            f'{{"type": "image"}} or by {PLACE} in the text; or remove the column, if the text says it all.'
        )
    return parsed


@dataclass(frozen=True, slots=True)
class _Cells:
    """Reads and checks a row's values, by our field names. All methods raise InputError, which names the row."""

    row: RawRow
    format: RowFormat
    system: str | None
    label_names: Sequence[str]
    images: deque[Any] = field(init=False)  # of the column ``images``, those that have no place yet
    has_images: bool = field(init=False)  # whether there were any

    def __post_init__(self) -> None:
        found = from_json(self.row.fields.get(self.format.columns.get("images", "")))
        found = found if isinstance(found, list) else [found]
        object.__setattr__(
            self, "images", deque(image for image in found if without_nulls(image) not in (None, "", {}))
        )
        object.__setattr__(self, "has_images", bool(self.images))

    @property
    def directory(self) -> Path:
        """The directory at which relative paths of images start."""
        return Path() if self.row.file is None else self.row.file.parent

    def where(self, name: str) -> str:
        return f"{self.row.source}: {self.format.column(name)}"

    def value(self, name: str) -> Any:
        column, fields = self.format.column(name), self.row.fields
        if column not in fields:
            raise InputError(
                f"{self.row.source}: the column {column!r} is missing here, though the first row has it. "
                f"Columns found: {', '.join(map(str, fields)) or 'none'}. Rows of another format go into another file."
            )
        found = fields[column]
        # a turn by itself, as LLaMA-Factory has better and worse answers, is a list of one
        is_turn = isinstance(found, dict) and ({"role", "content"} <= found.keys() or {"from", "value"} <= found.keys())
        if isinstance(found, dict) and "messages" in found and not found.get("tools"):  # OpenAI's pairs have an object
            return found["messages"]
        return [found] if is_turn else found

    def text(self, name: str, optional: bool = False) -> str:
        """Text of whole characters. ``optional``: "" if it is missing."""
        if optional and self.row.fields.get(self.format.column(name)) is None:
            return ""
        value = self.value(name)
        if not isinstance(value, str):
            advice = "Write it as JSON text (json.dumps)" if isinstance(value, (dict, list)) else "Fix the row"
            raise InputError(f"{self.where(name)} must be text, got {describe(value)}. {advice}.")
        require_whole_characters(value, self.where(name))
        return value

    def turns(self, name: str) -> list[Turn]:
        value = from_json(self.value(name))
        if not isinstance(value, list):
            is_repr = isinstance(value, str) and value.lstrip().startswith("[{'")
            hint = " That is Python's repr; write it as JSON (json.dumps)." if is_repr else ""
            raise InputError(
                f'{self.where(name)} must be a list of turns such as {{"role": "user", "content": "..."}}, '
                f"got {describe(value)}.{hint}"
            )
        if not value:
            raise InputError(f"{self.where(name)} is an empty list. Expected at least one user and one assistant turn.")
        return [self._turn(item, f"{self.where(name)}[{index}]") for index, item in enumerate(value)]

    def _turn(self, item: object, where: str) -> Turn:
        if not isinstance(item, dict):
            raise InputError(
                f'{where} must be an object such as {{"role": "user", "content": "..."}}, got {describe(item)}.'
            )
        role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
        calls = self._calls(item, role_key, content_key, where)
        for key in (role_key, content_key):
            if key not in item and not (key == content_key and calls):
                raise InputError(f"{where} has no {key!r}; its keys are {', '.join(map(str, item)) or 'none'}.")
        role = _ROLES.get(item[role_key]) if isinstance(item[role_key], str) else None
        if role is None:
            hint = did_you_mean(item[role_key], _ROLES)
            raise InputError(f"{where}: unknown role {item[role_key]!r}{hint} Known roles: {', '.join(_ROLES)}.")
        extra = {k: item[k] for k in _PASSED_ON if item.get(k)}  # Arrow fills up with []
        if calls:
            extra["tool_calls"] = calls
        content, where_content = item.get(content_key), f"{where}.{content_key}"
        if item[role_key] == _CALL or (content is None and role == "assistant" and calls is not None):
            content = ""
        text, parts, images = self.content(content, where_content, role != "assistant")  # which may write of <image>
        if images and role == "assistant":
            raise InputError(
                f"{where_content} holds an image; a model answers with text only. Move it to another turn."
            )
        require_whole_characters(extra, where)
        if item.get("train_detail"):
            raise InputError(f"{where}.train_detail: a turn is trained whole or not at all. Split it, or set train.")
        # OpenAI's fine-tuning format has ``weight``, Axolotl's ``train``
        key, trained = next(((key, item[key]) for key in ("weight", "train") if item.get(key) is not None), ("", None))
        if trained not in (None, 0, 1):
            raise InputError(f"{where}.{key} must be 0 or 1 (false or true), got {describe(trained)}.")
        if trained and role != "assistant":
            raise InputError(f"{where}.{key}: only assistant turns can be trained; this is a {role} turn. Set it to 0.")
        return Turn(role, text, None if trained is None else bool(trained), None, extra, images=images, parts=parts)

    def _calls(self, item: dict[str, Any], role_key: str, content_key: str, where: str) -> Any:
        """The tool calls of a message, as OpenAI has them; None if it has no such key.

        Two older forms are read too: OpenAI's key ``function_call``, and LLaMA-Factory's turn of that role, whose text
        is a call, or a list of them, as JSON.
        """
        found, older = (self._written(item.get(key)) for key in ("tool_calls", _CALL))
        found = [older] if found is None and older else found
        if isinstance(found, dict) or found == "":  # a call by itself; an empty cell
            found = [found] if found else []
        if found is not None and not (isinstance(found, list) and all(isinstance(call, dict) for call in found)):
            example = '[{"function": {"name": "...", "arguments": {...}}}]'
            raise InputError(f"{where}.tool_calls must be a list of calls such as {example}, got {describe(found)}.")
        if item.get(role_key) == _CALL:
            text = from_json(item.get(content_key))
            found = text if isinstance(text, list) else [text]
            if not found or not all(isinstance(call, dict) and "name" in call for call in found):
                expected = 'must be a call as JSON, {"name": "...", "arguments": {...}}, or a list of them'
                raise InputError(f"{where}.{content_key} {expected}, got {describe(item.get(content_key))}.")
        elif found is None:
            others = [str(key) for key, value in item.items() if value and key not in _PASSED_ON]
            if near := get_close_matches("tool_calls", others, 1, 0.8):
                raise InputError(f"{where} has a key {near[0]!r}; did you mean 'tool_calls'?")
        calls = None if found is None else [_as_function(call) for call in found]
        for call in calls or ():
            if isinstance(call.get("function"), dict):
                call["function"].setdefault("arguments", {})
        return calls

    def _written(self, value: Any) -> Any:
        """Tools or calls, from JSON text too, without the nulls of other objects' keys that Arrow adds.

        Elsewhere a null within arguments or a schema was written by someone, and stays.
        """
        is_arrow = not isinstance(value, str) and (self.row.file is None or self.row.file.suffix.lower() == ".parquet")
        found = from_json(value)
        found = [from_json(each) for each in found] if isinstance(found, list) else found
        is_arrow = is_arrow and found == value  # a JSON text within a list has no keys of others either
        return without_nulls(found, () if is_arrow else ("arguments", "parameters"))

    def content(
        self, value: object, where: str, has_places: bool = True
    ) -> tuple[str, tuple[dict[str, str], ...], tuple[str | bytes, ...]]:
        """The text of a message, and if images stand in it, its parts and the images (see `read_parts`)."""
        parts, images = read_parts(value, where, self.images, self.directory, has_places and self.has_images)
        text = "".join(part.get("text", "") for part in parts)
        require_whole_characters(text, where)
        return text, parts if images else (), images

    def is_messages(self, name: str) -> bool:
        """Whether a value is a list of messages. CSV files hold such a list as JSON text."""
        value = self.value(name)
        found = from_json(value)
        if isinstance(value, list) or not isinstance(found, list):
            return isinstance(value, list)
        return bool(found) and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in found)

    def with_system(self, turns: list[Turn]) -> list[Turn]:
        """Put the row's own system prompt, or else the recipe's, before turns that do not begin with one.

        An empty one, which ShareGPT rows often have, is none: some templates refuse it, and others write its heading.
        """
        if len(turns) > 1 and turns[0].role == "system" and not (turns[0].content.strip() or turns[0].images):
            turns = turns[1:]
        own = self.text("system", optional=True)
        system = own if own.strip() else self.system
        return [Turn("system", system), *turns] if system and turns[0].role != "system" else turns

    def tools(self) -> list[dict[str, Any]] | None:
        """The JSON schemas of the row's tools; None if it offers none."""
        columns = self.format.columns
        tools = self._written(self.row.fields.get(columns["tools"])) if "tools" in columns else None
        require_whole_characters(tools, f"{self.row.source}: tools")
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise InputError(
                f"{self.row.source}: tools must be a list of JSON schemas (objects), got {describe(tools)}."
            )
        return [_as_function(tool) for tool in tools]


def _as_function(value: Any) -> Any:
    """A tool or a call as templates read it: with its type around it, and with an object for a call's arguments."""
    if isinstance(value, dict) and "name" in value and not {"type", "function"} & value.keys():
        value = {"type": "function", "function": value}
    function = value.get("function") if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(arguments := from_json(function.get("arguments")), dict):
        function["arguments"] = arguments
    return value


# --- conversations and texts


def _parse_text(cells: _Cells) -> Text:
    return Text(cells.text("text"), cells.row.source, cells.row.owner)


def _parse_conversation(cells: _Cells) -> Conversation:
    tools, source = cells.tools(), cells.row.source
    first, *others = FORMATS[cells.format.name].required
    if others and (cells.format.name == "alpaca" or not cells.is_messages(first)):
        context = cells.text("input", optional=True) if cells.format.name == "alpaca" else ""
        text, parts, images = cells.content(cells.text(first), cells.where(first))
        question = Turn("user", text, context=context if context.strip() else None, images=images, parts=parts)
        turns = [*_history(cells), question, Turn("assistant", _answer(cells, others[0]))]
    else:
        turns, is_text = cells.turns(first), bool(others) and not cells.is_messages(others[0])
        if others:  # TRL's conversational form: the prompt is a list of messages, and the completion is trained
            answer = [Turn("assistant", _answer(cells, others[0]))] if is_text else cells.turns(others[0])
            turns = [replace(turn, in_prompt=True) for turn in turns] + answer
        if cells.label_names and not is_text:
            raise InputError(
                f"data.label_names: names the labels of a column of answers, and {source} has messages. Remove it."
            )
    return Conversation(cells.with_system(turns), source, tools, cells.row.owner)


def _history(cells: _Cells) -> list[Turn]:
    """The turns before an Alpaca row's, as LLaMA-Factory has them: pairs of a question and its answer."""
    found = from_json(cells.row.fields.get(cells.format.columns.get("history", "")))
    if found in (None, "", []):
        return []
    if not isinstance(found, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in found):
        raise InputError(f"{cells.where('history')} must be a list of [question, answer] pairs, got {describe(found)}.")
    texts = [cells.content(text, cells.where("history"))[0] for pair in found for text in pair]
    return [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]


def _answer(cells: _Cells, name: str) -> str:
    value, names = cells.value(name), cells.label_names
    if names:
        digits = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
        if not re.fullmatch(r"[0-9]+", digits) or int(digits) >= len(names):
            raise InputError(
                f"{cells.where(name)} must be a label, 0 to {len(names) - 1} (data.label_names has {len(names)}), got "
                f"{describe(value)}. Fix the row, or data.label_names."
            )
        return names[int(digits)]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{cells.where(name)} must be text or a number, got {value}. Fix the row, or leave it out.")
    return str(value) if is_number(value) else cells.text(name)


# --- preferences


def _parse_preference(cells: _Cells) -> Conversation:
    """The last turn is the (chosen) answer. Lists may begin with the prompt; without a ``prompt`` column both do.

    So they do where that column has only one user's text of longer conversations, as in Tulu's pairs.
    """
    paired, source = cells.format.name == "preference", cells.row.source
    names = ["chosen", "rejected"] if paired else ["completion"]
    is_whole = paired and cells.format.column("prompt") not in cells.row.fields
    if paired and not is_whole and not cells.is_messages("prompt") and all(map(cells.is_messages, names)):
        asked = cells.text("prompt").strip()
        before = [turn.content.strip() for turn in cells.turns("chosen")[:-1] if turn.role == "user"]
        is_whole = asked in before and cells.turns("chosen")[0] == cells.turns("rejected")[0]
    if is_whole:
        if not cells.is_messages("chosen"):
            raise InputError(
                f"{cells.where('prompt')} is missing. Add it, name its column in data.columns ({{prompt: YOURS}}), "
                "or make both answers lists of turns that begin with it."
            )
        lists = [cells.turns(name) for name in names]
        shared = 0
        # the last turn of each is its answer, even where both are the same
        while shared < min(map(len, lists)) - 1 and lists[0][shared] == lists[1][shared]:
            shared += 1
        prompt, lists = lists[0][:shared], [turns[shared:] for turns in lists]
    else:
        roles = {"prompt": "user", **dict.fromkeys(names, "assistant")}
        prompt, *lists = (
            cells.turns(name) if cells.is_messages(name) else [Turn(role, cells.text(name))]
            for name, role in roles.items()
        )
        lists = [turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns for turns in lists]
    for name, turns in zip(names, lists, strict=True):
        if [turn.role for turn in turns] != ["assistant"]:
            advice = "Both lists must begin with the same turns, and end with an answer each"
            raise InputError(
                f"{cells.where(name)} must be one assistant turn after the prompt; its turns are "
                f"{', '.join(turn.role for turn in turns) or 'none'}. "
                f"{advice if is_whole else 'Put earlier turns into the prompt'}."
            )
        if not turns[0].content.strip() and not turns[0].extra.get("tool_calls"):
            raise InputError(f"{cells.where(name)} is empty. Fill it in, or remove the row.")
    if not prompt or prompt[-1].role in ("system", "assistant"):
        raise InputError(f"{source}: the prompt must end with a turn that asks for an answer, such as a user's.")
    found = Conversation([*cells.with_system(prompt), *lists[0]], source, cells.tools(), cells.row.owner)
    if paired:
        return replace(found, rejected=lists[1][0])
    value = cells.value("label")
    word = value.strip().lower() if isinstance(value, str) else value  # CSV has no booleans
    yes, no = (True, "true", "1", "1.0"), (False, "false", "0", "0.0")
    if word not in (*yes, *no):
        raise InputError(
            f"{cells.where('label')} must be true (a good answer) or false, got {describe(value)}. Fix the row."
        )
    return replace(found, desirable=word in yes)


def _parse_prompt(cells: _Cells) -> Conversation:
    """A prompt that training answers by itself. Answers at its end are left out."""
    turns = cells.turns("prompt") if cells.is_messages("prompt") else [Turn("user", cells.text("prompt"))]
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns or turns[-1].role == "system":
        raise InputError(f"{cells.where('prompt')} must end with a turn that asks for an answer, such as a user's.")
    if any(turn.images for turn in turns):
        raise InputError(f"{cells.where('prompt')} holds an image; rewards are of answers to text only. Remove it.")
    about = json.dumps([turns[-1].content, cells.row.fields], ensure_ascii=False, default=str)
    require_whole_characters(about, cells.row.source)
    # The placeholder makes the template write the prompt up to where an answer begins.
    turns = [*cells.with_system(turns), Turn("assistant", "-")]
    return Conversation(turns, cells.row.source, cells.tools(), cells.row.owner, about=about)


# --- rows with a label


def _parse_classification(cells: _Cells) -> LabelledRow:
    pair, label = cells.text("text_pair", optional=True), _label(cells)
    return LabelledRow(cells.text("text"), label, cells.row.source, cells.row.owner, pair if pair.strip() else None)


def _parse_image(cells: _Cells) -> LabelledRow:
    """The content is the image's bytes or its file's path. A relative path starts at the data file."""
    content = read_image(cells.value("image"), cells.where("image"), cells.directory)
    return LabelledRow(content, _label(cells), cells.row.source, cells.row.owner)


def _label(cells: _Cells) -> str:
    """The label as text, "" for rows without one. It may be a class's number, from 0, if no class name is a number."""
    if cells.format.column("label") == "":  # a file to be labelled (`qvera eval`)
        return ""
    value, where, names = cells.value("label"), cells.where("label"), cells.label_names
    if value is None or (isinstance(value, str) and not value.strip()) or (is_number(value) and value != value):
        raise InputError(f"{where} is empty. Each row needs its label: fill it in, or remove the row.")
    if not isinstance(value, (int, float, str)) or value in (math.inf, -math.inf):
        raise InputError(f"{where} must be a label (a name or a number), got {describe(value)}. Fix the row.")
    # A file may hold whole numbers as floats: 1.0 is the label 1.
    label = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    require_whole_characters(label, where)
    if not names or label in names:
        return label
    is_count = re.compile(r"[0-9]+").fullmatch
    may_count = not any(map(is_count, names))  # a class that is called 1 is not the one after the first
    if may_count and is_count(label) and int(label) < len(names):
        return names[int(label)]
    or_number = f", or a number from 0 to {len(names) - 1}" if may_count else ""
    raise InputError(
        f"{where} is {describe(value)}, which is no label of data.label_names{did_you_mean(label, names)} Expected "
        f"{first_of(names, 8)}{or_number}. Fix the row, or leave it out."
    )


# --- the table of formats

_CHAT = ("system", "tools")
_SHOWN = (*_CHAT, "images")


@dataclass(frozen=True, slots=True)
class Format:
    """A format of rows: its fields, and the function that parses it."""

    trains: Literal["answers", "texts", "labels", "preferences", "prompts"]
    """The last three are read only if the recipe's task or objective asks for them."""
    required: tuple[str, ...]  # fields that every row must have
    optional: tuple[str, ...]  # fields that it may have
    parse: Callable[[_Cells], Parsed]

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields."""
        return self.required + self.optional


FORMATS = {
    "messages": Format("answers", ("messages",), _SHOWN, _parse_conversation),
    "sharegpt": Format("answers", ("conversations",), _SHOWN, _parse_conversation),
    "alpaca": Format("answers", ("instruction", "output"), ("input", "system", "history"), _parse_conversation),
    "prompt-completion": Format("answers", ("prompt", "completion"), _SHOWN, _parse_conversation),
    "text": Format("texts", ("text",), (), _parse_text),
    "classification": Format("labels", ("text", "label"), ("text_pair",), _parse_classification),
    "image": Format("labels", ("image", "label"), (), _parse_image),
    "preference": Format("preferences", ("chosen", "rejected"), ("prompt", *_CHAT), _parse_preference),
    "prompt": Format("prompts", ("prompt",), _CHAT, _parse_prompt),
    "unpaired-preference": Format("preferences", ("prompt", "completion", "label"), _CHAT, _parse_preference),
}
"""All data formats, in the order in which they are looked for. The recipe's ``data.format`` takes these names."""
PREFERENCES = tuple(name for name, kind in FORMATS.items() if kind.trains == "preferences")
LABELLED = tuple(name for name, kind in FORMATS.items() if kind.trains == "labels")
UNRENDERED = tuple(name for name, kind in FORMATS.items() if kind.trains in ("texts", "labels"))
"""Formats whose texts are taken as they are, without a template."""


def read_messages(messages: Sequence[Any], source: str) -> list[Turn]:
    """Turn messages, in the form that rows hold them, into turns. Raises InputError that names ``source``."""
    row = RawRow({"messages": list(messages)}, source)
    return _Cells(row, RowFormat("messages", {}, []), None, ()).turns("messages")
