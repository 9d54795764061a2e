"""Where the answers are in a rendered text, in characters.

They are never searched for: a row's text could contain anything, the template's own markers included. There are three
ways to know, each for templates that the others can't do:

- The author's ``{% generation %}`` blocks, where there are any. Blocks differ in what they include, which one of the
  next two settles.
- The layout: the literal text that the template writes around the contents of a conversation of this shape, learned
  once a shape, by rendering slots in place of the contents.
- Prefixes: the conversation is rendered up to and without each answer. That is six times as slow, and is for tool calls
  and for templates that rewrite contents. It can't do templates that write something else once a later turn follows.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qvera.data.conversations import Conversation

if TYPE_CHECKING:
    from qvera.data.chat_template import ChatTemplate

Message = dict[str, Any]
"""One message as ``apply_chat_template`` takes it."""
Tools = list[dict[str, Any]] | None
"""The JSON schemas of the tools that a conversation offers."""


class TemplateError(Exception):
    """The template itself refused the conversation."""


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """Where one assistant turn is, in characters of the rendered text.

    Attributes:
        turn: its index in the conversation.
        header: where the template text that opens it starts (the previous content ends there).
        start: the first character that the model writes itself: the generation prompt ends here.
        end: one past its end-of-turn marker.
        marked: the template writes an end-of-turn marker (one token of the vocabulary) after this answer.
    """

    turn: int
    header: int
    start: int
    end: int
    marked: bool


class _Slot(NamedTuple):
    """A place for a content: the template's literal text before it, and what the template strips from it.

    ``answer``, of an assistant's content: characters from the answer's start to the content, from the content's end to
    the answer's end, and whether that end is a marker.
    """

    literal: str
    turn: int
    name: str
    strip_left: bool
    strip_right: bool
    answer: tuple[int, int, bool] | None

    def content(self, messages: list[Message]) -> str:
        content: str = messages[self.turn][self.name]
        content = content.lstrip() if self.strip_left else content
        return content.rstrip() if self.strip_right else content


Layout = tuple[list[_Slot], str]
"""What a template writes for conversations of one shape: slots with their literals, and the literal after the last."""
Layouts = dict[object, Layout | None]
"""One template's layouts, by shape and tools; None: that shape has none."""
MOST_LAYOUTS = 4096
"""A server is sent conversations of any shape for months: the oldest layouts are forgotten."""


def answer_spans(
    template: ChatTemplate, layouts: Layouts, text: str, messages: list[Message], conversation: Conversation
) -> list[AnswerSpan]:
    """The answers' places in ``text``; an answer that can't be placed is left out.

    Args:
        layouts: the template's layouts of earlier rows; this row's is added.
        text: what the template renders for the conversation.
        messages: the conversation's turns, from `ChatTemplate.messages`.

    Raises:
        TemplateError: the template takes the row, and refuses a part of it.
    """
    spans = _layout_spans(template, layouts, text, messages, conversation)
    blocks = _generation_blocks(template, text, messages, conversation)
    if spans is None:
        spans = _prefix_spans(template, text, messages, conversation)
    if blocks is None:
        return spans
    measured = {span.turn: span for span in spans}
    return [_within_block(template, text, turn, *block, measured.get(turn)) for turn, block in blocks.items()]


def _generation_blocks(
    template: ChatTemplate, text: str, messages: list[Message], conversation: Conversation
) -> dict[int, tuple[int, int]] | None:
    """The author's own ``{% generation %}`` blocks by turn, where there is one for each assistant turn."""
    if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template.jinja):
        return None
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, blocks = render_jinja_template(
            [messages],
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
    template: ChatTemplate, text: str, turn: int, start: int, end: int, measured: AnswerSpan | None
) -> AnswerSpan:
    """The answer of a block [start, end): without the turn's heading, and with its end of turn but nothing behind that.

    Some blocks leave the end of turn outside, some hold the turn's heading or the line break behind its end.
    """
    header = start
    if measured is not None:
        header = min(measured.header, start)
        start = max(start, measured.start)
        # the end of turn stands right behind a block that leaves it outside; one that stops earlier means to
        closes = measured.marked and template.special.fullmatch(text, end, measured.end)
        if end >= measured.end or closes:
            return AnswerSpan(turn, header, start, measured.end, measured.marked)
    ends = [found.end() for found in template.special.finditer(text, start, end)]
    if ends and not text[ends[-1] : end].strip():
        return AnswerSpan(turn, header, start, ends[-1], True)
    following = template.special.match(text, end)
    if following is not None and not text[start:end].endswith("\n"):
        return AnswerSpan(turn, header, start, following.end(), True)
    return AnswerSpan(turn, header, start, end, False)


def _answer_start(
    template: ChatTemplate, before: list[Message], tools: Tools, text: str, earliest: int, content: int
) -> tuple[int, int]:
    """Where in ``text`` the answer starts whose content is at ``content``, and its heading before that.

    An answer starts where the generation prompt for the turns ``before`` ends. Llama-2's start with a space after
    ``[/INST]``, and Qwen3's with an empty think block: both are the model's to write, since a generation prompt stops
    before them.

    Args:
        earliest: an earlier start is none.
    """
    try:
        prompt = template.render(before, tools, prompt=True) if before else ""
        bare = template.render(before, tools) if before else ""
    except TemplateError:
        return content, content
    # A template that knows no generation prompt writes a heading, which is still not the model's to write.
    has_heading = prompt == bare and bool(text[len(prompt) : content].strip())
    if has_heading or not text.startswith(prompt) or not earliest <= len(prompt) <= content:
        return content, min(len(bare), content)
    return len(prompt), min(len(bare), len(prompt))


def _layout_spans(
    template: ChatTemplate, layouts: Layouts, text: str, messages: list[Message], conversation: Conversation
) -> list[AnswerSpan] | None:
    """The answers where the layout's literals and the row's contents are the text, else None."""
    if any(turn.extra or (turn.role == "assistant" and not turn.content) for turn in conversation.turns):
        return None
    shape = tuple((m["role"], "context" in m, not m["content"]) for m in messages)
    key = (shape, repr(conversation.tools) if conversation.tools else None)
    if key in layouts:
        layout = layouts[key]
    else:
        layout = _learn_layout(template, messages, conversation.tools)
        if len(layouts) >= MOST_LAYOUTS:
            layouts.pop(next(iter(layouts)), None)
        layouts[key] = layout
    if layout is None:
        return None
    written = ""
    answers = []
    slots, closing = layout
    for slot in slots:
        header, written = len(written), written + slot.literal
        start, written = len(written), written + slot.content(messages)
        if slot.answer is not None:
            before, after, marked = slot.answer
            answers.append(AnswerSpan(slot.turn, header, start - before, len(written) + after, marked))
    return answers if written + closing == text else None


def _learn_layout(template: ChatTemplate, messages: list[Message], tools: Tools) -> Layout | None:
    """Render slots in place of the contents; None where the template does more than to write each in its place."""
    marks: dict[str, tuple[int, str]] = {}
    slotted = []
    for turn, message in enumerate(messages):
        copy = dict(message)
        for name in ("content", "context"):
            if copy.get(name) or name == "context" in copy:
                mark = f"QveraSlot{len(marks):04d}Zq7"
                marks[mark] = (turn, name)
                copy[name] = f"\t{mark}\t"  # a tab that is gone afterwards: the template strips
        slotted.append(copy)
    try:
        text = template.render(slotted, tools)
    except TemplateError:
        return None
    *parts, closing = re.split(r"(\t?)(QveraSlot\d{4}Zq7)(\t?)", text)
    if parts[2::4] != list(marks):
        return None  # a content is left out, written twice or moved
    slots: list[_Slot] = []
    end = 0
    following = [*parts[4::4], closing]
    for literal, left, mark, right, behind in zip(*(parts[i::4] for i in range(4)), following, strict=True):
        turn, name = marks[mark]
        earliest, start = end, end + len(literal)
        end = start + len(left + mark + right)
        answer = None
        if messages[turn]["role"] == "assistant" and name == "content":
            begins, _ = _answer_start(template, slotted[:turn], tools, text, earliest, start)
            closes, marked = _slotted_end(template, slotted, turn, tools, text, end, end + len(behind))
            answer = (start - begins, closes - end, marked)
        slots.append(_Slot(literal, turn, name, not left, not right, answer))
    return slots, closing


def _slotted_end(
    template: ChatTemplate, slotted: list[Message], turn: int, tools: Tools, text: str, end: int, latest: int
) -> tuple[int, bool]:
    """Where in ``text`` the answer's turn ends whose content ends at ``end``, and whether by a marker."""
    # What follows up to the next content holds the next turn's heading too. Without a marker, what the template itself
    # puts behind an answer (a line break, say) is all there is to learn from.
    close = latest if turn + 1 == len(slotted) else end
    with contextlib.suppress(TemplateError):
        alone = template.render(slotted[: turn + 1], tools)
        if text.startswith(alone) and end <= len(alone) <= latest:
            close = latest = len(alone)
    marker_end = template.marker_end(text, end, latest)
    return (marker_end or close), marker_end is not None


def _prefix_spans(
    template: ChatTemplate, text: str, messages: list[Message], conversation: Conversation
) -> list[AnswerSpan]:
    """Render the conversation through and without each answer; left out where that is not how the text begins."""
    answers = []
    tools = conversation.tools
    for turn, item in enumerate(conversation.turns):
        if item.role != "assistant":
            continue
        through = template.render(messages[: turn + 1], tools)
        place = _content_place(template, messages[: turn + 1], tools, through) if text.startswith(through) else None
        if place is None:
            continue  # rewritten beyond recognition: a marker inside of it could be mistaken for its end
        content, behind = place
        start, header = _answer_start(template, messages[:turn], tools, through, 0, content)
        # A tool call is written behind the content, and may open with a special token of its own.
        marker_end = template.marker_end(through, behind, len(through), last="tool_calls" in item.extra)
        answers.append(AnswerSpan(turn, header, start, marker_end or len(through), marker_end is not None))
    return answers


def _content_place(
    template: ChatTemplate, messages: list[Message], tools: Tools, through: str
) -> tuple[int, int] | None:
    """Where in ``through`` the last message's content starts and ends.

    A slot is put in its place: what the template writes before and behind the slot stands around the content too. None
    where the template does something else with this content.
    """
    *earlier, last = messages
    mark = "QveraSlot"
    while mark in repr(messages) + repr(tools):
        mark += "Z"
    try:
        slotted = template.render([*earlier, {**last, "content": mark}], tools)
    except TemplateError:
        return None
    if slotted == through:  # the content is left out, as some templates do with tool calls
        prompt = template.render(earlier, tools, prompt=True) if earlier else ""
        return (len(prompt), len(prompt)) if through.startswith(prompt) else None
    before, _, behind = slotted.partition(mark)
    if slotted != before + mark + behind or mark in behind:
        return None
    if through.startswith(before) and through.endswith(behind) and len(through) >= len(before) + len(behind):
        return len(before), len(through) - len(behind)
    if not last["content"].strip():
        # The template writes less around nothing at all: what it shares with the other text at its end is behind it.
        opening = _shared(through, before)
        return opening, max(opening, len(through) - _shared(through[::-1], behind[::-1]))
    return None


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
