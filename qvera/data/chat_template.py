"""Conversations → the text a model reads, and which characters of it are answers.

Answers are never searched for: a row's text may hold anything, even the template's markers. Instead, an answer's
content is found by rendering a slot (a made-up word) in its place. Its two ends are found by rendering the turns up to
it, and the prompt for it (`_place`). There are three ways, in this order:

- ``{% generation %}`` blocks. Only they place an answer that a later turn makes the template rewrite.
- A *layout*: all contents of a conversation are replaced by slots at once. This is done once for each shape of
  conversation, and places the answers of every row that it fits. It is nine times faster than one by one, and it also
  works for templates that write more around an answer once a later turn follows, such as Qwen3's.
- Each answer by itself, for rows with tool calls, reasoning or empty answers, or whose contents the template changes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvera.data.conversations import REASONING, UNRENDERED, Conversation, Turn
from qvera.utils.errors import InputError, did_you_mean, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer"
"""The name of the chat template that came with the tokenizer."""
NAMED_TEMPLATES = {
    file.stem: file.read_text(encoding="utf-8")
    for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
"""Templates that a recipe can name, for tokenizers that have none or the wrong one."""
MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""The tokenizer must have these as single tokens, or the model could not learn to stop. The last one ends a turn."""
_DAY = {
    "%d": "26", "%e": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday",
    "%a": "Fri", "%H": "00", "%M": "00", "%S": "00",
}  # fmt: skip
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DAY.items())
    + " }}{%- endmacro %}"
)
"""Templates that ask for today's date get 26 Jul 2024, Llama 3's default, so rows are the same on every day and rank.

It is a macro because transformers passes no function of ours to a template.
"""
_THOUGHTS = "the words before </think> in an answer"
Message = dict[str, Any]
"""One message as ``apply_chat_template`` takes it."""
Place = tuple[int, int]  # in characters of a text
Tools = list[dict[str, Any]] | None
"""JSON schemas of the tools that a conversation offers."""


class TemplateError(Exception):
    """The template itself refused the conversation."""


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """The place of one assistant turn, in characters of the rendered text."""

    turn: int
    header: int  # where the template text that opens it starts, right after the previous content
    start: int  # the first character that the model writes; the generation prompt ends here
    end: int  # one past its end-of-turn marker
    marked: bool  # whether an end-of-turn marker (one token) follows the answer


class _Slot(NamedTuple):
    """The place where a layout writes the content of one message."""

    literal: str  # the template's text before it
    turn: int
    name: str
    part: int | None  # of a content with images; None: the content is text
    strip_left: bool  # whether the template strips white space there
    strip_right: bool
    answer: tuple[int, int, bool] | None  # characters before and after the content, and whether a marker ends it


_Layout = tuple[list[_Slot], str]
"""The layout of a template for one shape of conversation: its slots, and the literal after the last one."""
_MOST_LAYOUTS = 4096
"""The oldest layouts are forgotten, because a server may see ever new shapes for months."""


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase, format: str = "messages") -> ChatTemplate:
    """The template that ``data.template`` means for this tokenizer and rows of this format.

    ``auto`` is the tokenizer's own if it has one. Else it is ``plain`` for prompt-completion rows and texts, which say
    everything themselves, and ``alpaca`` for others. Raises InputError: an unknown name, or the tokenizer lacks the
    template or its markers.
    """
    try:
        own = tokenizer.get_chat_template() if tokenizer.chat_template else None
    except ValueError as error:  # several named templates and none called "default"
        raise InputError(f"data.template: the tokenizer's chat template can't be chosen: {error} Name one.") from None
    if name == "auto":
        name = OWN if own else "plain" if format in ("prompt-completion", *UNRENDERED) else "alpaca"
    if name == OWN:
        if not own:
            raise InputError(
                f"data.template: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template. "
                f"Name one: {', '.join(NAMED_TEMPLATES)}."
            )
        return ChatTemplate(OWN, own, tokenizer)
    if name not in NAMED_TEMPLATES:
        known = ["auto", OWN, *NAMED_TEMPLATES]
        hint = did_you_mean(name, known)
        raise InputError(f"data.template: no template is called {name!r}{hint} Known: {', '.join(known)}.")
    vocabulary = tokenizer.get_vocab()
    absent = {each: [m for m in MARKERS.get(each, ()) if m not in vocabulary] for each in NAMED_TEMPLATES}
    if absent[name]:
        usable = [each for each in NAMED_TEMPLATES if not absent[each]]
        raise InputError(
            f"data.template: {name} needs {', '.join(absent[name])}, which the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} does not have as single tokens. Templates that work with "
            f"it: {', '.join(usable)}. Or add them with model.added_tokens (and set model.eos_token to the one that "
            f"ends a turn), which a run of many adapters does not take."
        )
    return ChatTemplate(name, NAMED_TEMPLATES[name], tokenizer)


class ChatTemplate:
    """A chat template bound to a tokenizer.

    ``name`` is as `resolve_template` takes it; ``jinja`` is for tokenizer.chat_template beside an adapter.
    """

    def __init__(self, name: str, jinja: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.jinja, self.tokenizer = name, jinja, tokenizer
        added, named = tokenizer.added_tokens_decoder.values(), list(tokenizer.all_special_tokens)
        self.special = _any_of([token.content for token in added if token.special] + named)  # finds special tokens
        self.source = _CLOCK + jinja if "strftime_now" in jinja else jinja  # what is rendered: with a fixed date
        self.layouts: dict[
            object, _Layout | None
        ] = {}  # by a conversation's shape and tools; None: none can be learned
        self._added = _any_of([token.content for token in added] + named)
        self._written: set[tuple[str, bool]] = set()

    def with_system(self, system: str | None) -> str:
        """Return the template's text; conversations without a system prompt begin with ``system``, if there is one.

        So other programs, which read no recipe, ask as in training.
        """
        if not system:
            return self.jinja
        [message] = self.in_parts([{"role": "system", "content": system}])
        literal = json.dumps(message, ensure_ascii=False)  # which Jinja reads too
        default = f"{{% set messages = [{literal}] + messages %}}"
        return f"{{% if not messages or messages[0]['role'] != 'system' %}}{default}{{% endif %}}{self.jinja}"

    def beside(self, system: str | None) -> str | None:
        """Return `with_system`, for a file beside an adapter; None: it is what the base's tokenizer has."""
        return None if self.name == OWN and not system else self.with_system(system)

    def messages(self, turns: list[Turn]) -> list[Message]:
        """Return turns as the messages that ``apply_chat_template`` takes."""
        out = []
        for turn in turns:
            message = {"role": turn.role, "content": list(turn.parts) or turn.text, **turn.extra}
            if turn.context is not None and self.name == "alpaca":
                message |= {"content": turn.content, "context": turn.context}
            out.append(message)
        return out

    def render(self, messages: list[Message], tools: Tools = None, prompt: bool = False) -> str:
        """The text of ``messages``. With ``prompt`` it ends with the opening of an assistant turn.

        Raises TemplateError: the template refuses the messages; the text is its reason.
        """
        import jinja2

        try:
            return self._rendered(self.in_parts(messages), tools, prompt)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateError(one_line(error)) from None

    def in_parts(self, messages: list[Message]) -> list[Message]:
        """Return messages with contents as lists of parts if the template writes only those (as SmolVLM's does)."""
        if not self._only_parts:
            return messages
        return [
            {**m, "content": [{"type": "text", "text": text}] if isinstance(text := m["content"], str) else text}
            for m in messages
        ]

    @functools.cached_property
    def _only_parts(self) -> bool:
        mark = "QveraSlot"
        with contextlib.suppress(Exception):  # of any kind: the template is not made for this message
            if mark in self._rendered([{"role": "user", "content": mark}], None, False):
                return False
            return mark in self._rendered([{"role": "user", "content": [{"type": "text", "text": mark}]}], None, False)
        return False

    def _rendered(self, messages: list[Message], tools: Tools, prompt: bool) -> str:
        # Named templates are given eos and bos as text even where a tokenizer has none, so that they render at all.
        blanks = {k: "" for k in ("bos_token", "eos_token") if getattr(self.tokenizer, k, None) is None}
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self.source, tokenize=False, add_generation_prompt=prompt, **blanks
        )

    def marker_end(self, text: str, start: int, stop: int, last: bool = False) -> int | None:
        """Find where the end-of-turn marker in text [start, stop) ends: the first special token, or the ``last``."""
        # Fine-tuned models exist whose <|im_end|> was added as an ordinary token, hence the second pattern. It only
        # comes second, since <tool_call> and <think> are ordinary added tokens that end nothing.
        for pattern in (self.special, self._added):
            found = list(pattern.finditer(text, start, stop))
            if found:
                return found[-1 if last else 0].end()
        return None

    def prompt(self, turns: list[Turn], tools: Tools = None) -> tuple[str, list[int]]:
        """The text that an answer to ``turns`` is generated from, as in training, and where its earlier answers start.

        It differs from `render` with ``prompt=True`` for templates that ignore ``add_generation_prompt``. Raises
        InputError: the template refuses the turns, or leaves a part of them out.
        """
        conversation = Conversation([*turns, Turn("assistant", "x")], "The conversation", tools)
        try:
            text, (*earlier, last) = self.lay_out(conversation, [len(turns)])
        except InputError:  # a template may take the question and refuse or rewrite such an answer
            messages = self.messages(turns)
            self._require_written(conversation.source, messages, tools, prompt=True)
            try:
                return self.render(messages, tools, prompt=True), []
            except TemplateError as error:
                raise InputError(f"The chat template ({self.name}) refuses the messages: {error}.") from None
        return text[: last.start], [answer.start for answer in earlier]

    def lay_out(self, conversation: Conversation, needed: list[int]) -> tuple[str, list[AnswerSpan]]:
        """Render a row: its text, and the places of its answers in order. Only the turns ``needed`` must get a place.

        Raises InputError: the template refuses the row, leaves a part out, or rewrites it so that answers can't be
        placed.
        """
        turns = conversation.turns
        messages = self.messages(turns)
        self._require_written(conversation.source, messages, conversation.tools, needed=needed)
        try:
            text = self.render(messages, conversation.tools)
            answers = _answer_spans(self, text, messages, conversation)
        except TemplateError as error:
            raise InputError(
                f"{conversation.source}: the chat template ({self.name}) refuses the row: {error}. Its roles are "
                f"{', '.join(turn.role for turn in turns)}. Change the row, or name another data.template."
            ) from None
        lost = set(needed) - {answer.turn for answer in answers}
        if lost:
            way = "Set data.train_on: last, keep only the final answer in the row"
            if max(needed) in lost:  # which the final answer alone would not mend
                way = "Write the answer's reasoning, if it has any, as reasoning_content"
            raise InputError(
                f"{conversation.source}: the chat template ({self.name}) rewrites turn {min(lost) + 1}, so it can't be "
                f"told which tokens are the answer. {way}, or name another data.template "
                f"({', '.join(NAMED_TEMPLATES)})."
            )
        return text, answers

    def _require_written(
        self, source: str, messages: list[Message], tools: Tools, prompt: bool = False, needed: Sequence[int] = ()
    ) -> None:
        """Refuse a row with a part that the template does not write: training would not see it."""
        # A part is written if the text becomes another one when the part is removed, or its texts are changed.
        changes: list[tuple[str, list[Message], Tools]] = [("tools", messages, None)] if tools else []
        for key in ("tool_calls", *REASONING):
            if any(key in message for message in messages):
                changes.append((key, [{k: m[k] for k in m if k != key} for m in messages], tools))
        # Templates drop the reasoning of earlier answers on purpose, but a trained one's must be there.
        if thoughts := {at for at in needed if "</think>" in messages[at]["content"]}:
            other = [
                {**m, "content": m["content"].replace("</think>", "x</think>")} if at in thoughts else m
                for at, m in enumerate(messages)
            ]
            changes.append((_THOUGHTS, other, tools))
        for at, message in enumerate(messages):
            pieces = list(_pieces(message))
            if message["role"] in ("tool", "system") and any(text.strip() for *_, text in pieces):
                later = "system turns behind the first turn"
                part = later if message["role"] == "system" and at else f"turns of the role {message['role']}"
                longer = _with_texts(message, [f"{text}x" for *_, text in pieces])
                changes.append((part, [*messages[:at], longer, *messages[at + 1 :]], tools))
        # A template that wrote a part once writes it in other rows too, so each part is tried once.
        unseen = [change for change in changes if (change[0], prompt) not in self._written]
        if not unseen:
            return
        try:
            whole = self.render(messages, tools, prompt)
        except TemplateError:  # the caller, who renders it too, says so
            return
        for part, changed, other_tools in unseen:
            with contextlib.suppress(TemplateError):  # what it refuses it has read
                if self.render(changed, other_tools, prompt) == whole:
                    raise InputError(f"{source}: {self._unwritten_text(part)}")
        self._written.update((part, prompt) for part, *_ in unseen)

    def _unwritten_text(self, part: str) -> str:
        text = f"the chat template ({self.name}) does not write {part}, so the model would not see them. "
        others = ", ".join(name for name in NAMED_TEMPLATES if name != self.name)
        if part == _THOUGHTS:  # which all named templates leave where they are
            return f"{text}Name another data.template ({others}), or take them out of the rows."
        if "turns" in part:  # all named templates write every role, and none writes tools or reasoning
            return f"{text}Name another data.template ({others}), or leave them out of the rows and of data.system."
        own = self.tokenizer.chat_template
        if part.startswith("tool") and self.name == OWN and isinstance(own, dict) and "tool_use" in own:
            return f"{text}Make the tokenizer's template tool_use its only one, or take them out of the rows."
        way = "a base whose own chat template writes them"
        way = way if self.name == OWN else f"{way}, with data.template: {OWN}"
        return f"{text}Take them out of the rows, or train {way}."


def _pieces(message: Message) -> Iterator[tuple[str, int | None, str]]:
    """The texts of a message: key, place among the parts of a content with images (else None), and text."""
    for name in ("content", "context"):
        value = message.get(name)
        if isinstance(value, list):
            yield from ((name, place, part["text"]) for place, part in enumerate(value) if part.get("text"))
        elif value or (name == "context" and name in message):
            yield name, None, str(value)


def _form(content: str | list[dict[str, str]]) -> object:
    if isinstance(content, str):
        return bool(content)
    return tuple((part["type"], bool(part.get("text"))) for part in content)


def _with_texts(message: Message, texts: list[str]) -> Message:
    """The message with other texts in place of its `_pieces`."""
    found = dict(message)
    for (name, place, _), text in zip(_pieces(message), texts, strict=True):
        if place is None:
            found[name] = text
        else:
            found[name] = [{**part, "text": text} if at == place else part for at, part in enumerate(found[name])]
    return found


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    longest_first = sorted({token for token in tokens if token.strip()}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _answer_spans(
    template: ChatTemplate, text: str, messages: list[Message], conversation: Conversation
) -> list[AnswerSpan]:
    """The answers' places in the rendered text. Answers that can't be placed are left out."""
    spans = _layout_spans(template, text, messages, conversation)
    blocks = _generation_blocks(template, text, messages, conversation)
    if spans is None:
        spans = _slow_spans(template, text, messages, conversation)
    if blocks is None:
        return spans
    placed = {span.turn: span for span in spans}
    return [_within_block(template, text, turn, *block, placed.get(turn)) for turn, block in blocks.items()]


def _generation_blocks(
    template: ChatTemplate, text: str, messages: list[Message], conversation: Conversation
) -> dict[int, tuple[int, int]] | None:
    """Map each assistant turn to its ``{% generation %}`` block, [start, end); None unless every one has a block."""
    if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template.jinja):
        return None
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, blocks = render_jinja_template(
            [template.in_parts(messages)],
            tools=conversation.tools,
            chat_template=template.source,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **{"bos_token": "", "eos_token": "", **template.tokenizer.special_tokens_map},
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):
        return None
    assistants = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    if rendered[0] != text or len(blocks[0]) != len(assistants):
        return None
    return dict(zip(assistants, blocks[0], strict=True))


def _within_block(
    template: ChatTemplate, text: str, turn: int, start: int, end: int, placed: AnswerSpan | None
) -> AnswerSpan:
    """Return the answer of a block [start, end). A block may leave out the end of turn, or hold the heading too."""
    header = start
    if placed is not None:
        header = min(placed.header, start)
        start = max(start, placed.start)
        # the end of turn stands right behind a block that leaves it outside; one that stops earlier means to
        closes = placed.marked and template.special.fullmatch(text, end, placed.end)
        if end >= placed.end or closes:
            return AnswerSpan(turn, header, start, placed.end, placed.marked)
    ends = [found.end() for found in template.special.finditer(text, start, end)]
    if ends and not text[ends[-1] : end].strip():
        return AnswerSpan(turn, header, start, ends[-1], True)
    following = template.special.match(text, end)
    if following is not None and not text[start:end].endswith("\n"):
        return AnswerSpan(turn, header, start, following.end(), True)
    return AnswerSpan(turn, header, start, end, False)


def _place(
    template: ChatTemplate,
    text: str,
    messages: list[Message],
    turn: int,
    tools: Tools,
    content: tuple[int, int],
    latest: int,
    earliest: int = 0,
) -> AnswerSpan:
    """The answer around its ``content`` in the text of ``messages``; it starts at ``earliest`` and ends at ``latest``.

    The generation prompt for the turns before ends at its start. So the answer includes the space after Llama-2's
    ``[/INST]`` and Qwen3's empty think block, which the model has to write.
    """
    before = messages[:turn]
    start = header = content[0]
    with contextlib.suppress(TemplateError):
        prompt = template.render(before, tools, prompt=True) if before else ""
        bare = template.render(before, tools) if before else ""
        # A template that knows no generation prompt writes a heading, which is still not the model's to write.
        has_heading = prompt == bare and bool(text[len(prompt) : start].strip())
        if not has_heading and text.startswith(prompt) and earliest <= len(prompt) <= start:
            start = len(prompt)
        # A prompt may close a think block that this answer fills: what follows their common opening is the model's.
        elif not has_heading and text.startswith(bare) and len(bare) < (common := shared(text, prompt)) <= start:
            start = max(common, earliest)
        header = min(len(bare), start)
    # What follows up to the next content holds the next turn's heading too. Without a marker, what the template itself
    # puts behind an answer (a line break, say) is all there is to learn from.
    close = latest
    if turn + 1 < len(messages):
        close = content[1]
        with contextlib.suppress(TemplateError):
            alone = template.render(messages[: turn + 1], tools)
            if text.startswith(alone) and close <= len(alone) <= latest:
                close = latest = len(alone)
    # A tool call is written behind the content, and may open with a special token of its own.
    marker_end = template.marker_end(text, content[1], latest, last="tool_calls" in messages[turn])
    return AnswerSpan(turn, header, start, marker_end or close, marker_end is not None)


def _layout_spans(
    template: ChatTemplate, text: str, messages: list[Message], conversation: Conversation
) -> list[AnswerSpan] | None:
    """Place the answers by the layout; None if its literals and the row's contents do not make up the text."""
    if any(turn.extra or (turn.role == "assistant" and not turn.content) for turn in conversation.turns):
        return None
    # Two conversations have one shape if their roles agree, and which contents are empty or hold images.
    shape = tuple((m["role"], "context" in m, _form(m["content"])) for m in messages)
    key = (shape, repr(conversation.tools) if conversation.tools else None)
    layouts = template.layouts
    if key not in layouts:
        # A dict keeps the order of insertion, so the first key is the oldest layout.
        if len(layouts) >= _MOST_LAYOUTS:
            layouts.pop(next(iter(layouts)), None)
        layouts[key] = _learn_layout(template, messages, conversation.tools)
    layout = layouts[key]
    if layout is None:
        return None
    written, answers = "", []
    for slot in layout[0]:
        header, written = len(written), written + slot.literal
        content = messages[slot.turn][slot.name]
        content = content if slot.part is None else content[slot.part]["text"]
        content = content.lstrip() if slot.strip_left else content
        start, written = len(written), written + (content.rstrip() if slot.strip_right else content)
        if slot.answer is not None:
            before, after, marked = slot.answer
            answers.append(AnswerSpan(slot.turn, header, start - before, len(written) + after, marked))
    # Only a layout that gives the very text of the row is trusted: a template may strip or escape other contents.
    return answers if written + layout[1] == text else None


def _learn_layout(template: ChatTemplate, messages: list[Message], tools: Tools) -> _Layout | None:
    """Render slots in place of the contents; None if the template does more than put each in its place."""
    marks: dict[str, tuple[int, str, int | None]] = {}
    slotted = []
    for turn, message in enumerate(messages):
        slots_of = {f"QveraSlot{len(marks) + n:04d}Zq7": piece for n, piece in enumerate(_pieces(message))}
        marks |= {mark: (turn, name, part) for mark, (name, part, _) in slots_of.items()}
        # tabs, which are gone afterwards where the template strips
        slotted.append(_with_texts(message, [f"\t{mark}\t" for mark in slots_of]))
    try:
        text = template.render(slotted, tools)
    except TemplateError:
        return None
    # Three groups, so each slot gives four parts: the literal before it, a tab or nothing, the mark, a tab or nothing.
    *parts, closing = re.split(r"(\t?)(QveraSlot\d{4}Zq7)(\t?)", text)
    if parts[2::4] != list(marks):
        return None  # a content is left out, written twice or moved
    slots: list[_Slot] = []
    end = 0
    following = [*parts[4::4], closing]
    for literal, left, mark, right, behind in zip(*(parts[i::4] for i in range(4)), following, strict=True):
        turn, name, part = marks[mark]
        earliest, start = end, end + len(literal)
        end = start + len(left + mark + right)
        answer = None
        if messages[turn]["role"] == "assistant" and name == "content":
            span = _place(template, text, slotted, turn, tools, (start, end), end + len(behind), earliest)
            answer = (start - span.start, span.end - end, span.marked)
        slots.append(_Slot(literal, turn, name, part, not left, not right, answer))
    return slots, closing


def _slow_spans(
    template: ChatTemplate, text: str, messages: list[Message], conversation: Conversation
) -> list[AnswerSpan]:
    """Place each answer by itself, in the text of the turns up to it or in the whole; leave out those rewritten."""
    answers, tools = [], conversation.tools
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            upto = messages[: turn + 1]
            through = template.render(upto, tools)
            content = _content_place(template, upto, turn, tools, through)
            if content is not None and not text.startswith(through):
                through, content = _place_within(template, text, messages, turn, tools, through, content)
            if content is not None:  # else rewritten: a marker inside of it could be mistaken for its end
                answers.append(_place(template, through, upto, turn, tools, content, len(through)))
    return answers


def _place_within(
    template: ChatTemplate, text: str, messages: list[Message], turn: int, tools: Tools, through: str, own: Place
) -> tuple[str, Place | None]:
    """Find an answer around which the template writes something else once turns follow, as Qwen3's and gpt-oss' do.

    Returns the text up to its end, and its content's place; None if it is rewritten, or its reasoning dropped.
    ``through``, ``own``: the text of the turns up to it, and its content's place there.
    """
    message = messages[turn]
    if "</think>" in message["content"] or any(key in message for key in REASONING):
        return "", None
    with contextlib.suppress(TemplateError):
        content = _content_place(template, messages, turn, tools, text)
        bare = template.render(messages[:turn], tools) if turn else ""
        if content is not None and text.startswith(bare) and text[slice(*content)] == through[slice(*own)]:
            if text.startswith(through[own[1] :], content[1]):
                return text[: content[1] + len(through) - own[1]], content
            marker = template.special.match(text, content[1])
            if marker is not None and "tool_calls" not in message:
                return text[: marker.end()], content
    return "", None


def _content_place(template: ChatTemplate, messages: list[Message], turn: int, tools: Tools, text: str) -> Place | None:
    """Find a turn's content in the text of ``messages``, by rendering a slot instead of it; None if that fails."""
    mark, content = "QveraSlot", messages[turn]["content"]
    # The slot must be a text that the conversation does not hold.
    while mark in repr(messages) + repr(tools):
        mark += "Z"
    # A template may take reasoning out of the content and write it by itself. Then only the rest has a place.
    reasoning = "".join(content.rpartition("</think>")[:2]) if "</think>" in content else ""
    for kept in dict.fromkeys(("", reasoning)):
        slot = {**messages[turn], "content": kept + mark}
        try:
            slotted = template.render([*messages[:turn], slot, *messages[turn + 1 :]], tools)
        except TemplateError:
            return None
        if slotted == text:  # the content is left out, as some templates do with tool calls
            prompt = template.render(messages[:turn], tools, prompt=True) if turn else ""
            return (len(prompt), len(prompt)) if text.startswith(prompt) else None
        before, _, behind = slotted.partition(mark)
        if slotted != before + mark + behind or mark in behind:
            return None
        if text.startswith(before) and text.endswith(behind) and len(text) >= len(before) + len(behind):
            return len(before), len(text) - len(behind)
    if not content[len(reasoning) :].strip():
        # The template writes less around nothing at all: what it shares with the other text at its end is behind it.
        opening = shared(text, before)
        return opening, max(opening, len(text) - shared(text[::-1], behind[::-1]))
    return None


def shared(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common prefix of two texts, or lists of tokens."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
