"""Where the answers lie in a rendered text: three ways to know, the surest first.

It is never searched for: a row's text could contain anything, the template's own markers included. The author's own
``{% generation %}`` blocks say it, or the row's contents in the template's literal text do (see `skeletons`). Templates
that rewrite contents are measured by rendering prefixes instead.
"""

from __future__ import annotations

import re
from typing import Any

from qvera.data.formats import Conversation
from qvera.data.rendering import Renderer, TemplateError
from qvera.data.template_parts import Skeletons, skeleton_spans
from qvera.data.text_spans import AnswerSpan


def answer_spans(
    renderer: Renderer, skeletons: Skeletons, text: str, messages: list[dict[str, Any]], conversation: Conversation
) -> list[AnswerSpan]:
    """The answers' places in ``text``; an answer that can't be placed is left out.

    Args:
        renderer: the template.
        skeletons: its skeletons of earlier rows; this row's is added.
        text: what it renders for the conversation.
        messages: the conversation's turns, from `Renderer.messages`.
        conversation: the row.

    Raises:
        TemplateError: the template takes the row, and refuses a part of it.
    """
    blocks = _generation_spans(renderer, skeletons, text, messages, conversation)
    return _measured_spans(renderer, skeletons, text, messages, conversation) if blocks is None else blocks


def _generation_spans(
    renderer: Renderer, skeletons: Skeletons, text: str, messages: Any, conversation: Conversation
) -> list[AnswerSpan] | None:
    """The author's own ``{% generation %}`` blocks, where there is one for each assistant turn.

    Blocks say what an author wants trained, but differ in what they take along: some leave the end of turn outside, some
    hold the turn's heading or the line break behind its end. What is measured without them settles that.
    """
    if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", renderer.jinja):
        return None
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, blocks = render_jinja_template(
            [messages],
            tools=conversation.tools,
            chat_template=renderer.jinja,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **{"bos_token": "", "eos_token": "", **renderer.tokenizer.special_tokens_map},
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):
        return None
    assistants = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    if rendered[0] != text or len(blocks[0]) != len(assistants):
        return None
    measured = {span.turn: span for span in _measured_spans(renderer, skeletons, text, messages, conversation)}
    answers: list[AnswerSpan] = []
    for turn, (start, end) in zip(assistants, blocks[0], strict=True):
        answers.append(_within_block(renderer, text, turn, start, end, measured.get(turn)))
    return answers


def _within_block(
    renderer: Renderer, text: str, turn: int, start: int, end: int, measured: AnswerSpan | None
) -> AnswerSpan:
    """The answer of a block [start, end): without the turn's heading, and with its end of turn but nothing behind that."""
    header = start
    if measured is not None:
        header = min(measured.header, start)
        start = max(start, measured.start)
        # the end of turn stands right behind a block that leaves it outside; one that stops earlier means to
        closes = measured.marked and renderer.special.fullmatch(text, end, measured.end)
        if end >= measured.end or closes:
            return AnswerSpan(turn, header, start, measured.end, measured.marked)
    ends = [found.end() for found in renderer.special.finditer(text, start, end)]
    if ends and not text[ends[-1] : end].strip():
        return AnswerSpan(turn, header, start, ends[-1], True)
    following = renderer.special.match(text, end)
    if following is not None and not text[start:end].endswith("\n"):
        return AnswerSpan(turn, header, start, following.end(), True)
    return AnswerSpan(turn, header, start, end, False)


def _measured_spans(
    renderer: Renderer, skeletons: Skeletons, text: str, messages: Any, conversation: Conversation
) -> list[AnswerSpan]:
    spans = skeleton_spans(renderer, skeletons, text, messages, conversation)
    return _prefix_spans(renderer, text, messages, conversation) if spans is None else spans


def _prefix_spans(renderer: Renderer, text: str, messages: Any, conversation: Conversation) -> list[AnswerSpan]:
    """Render the conversation through and without each answer; left out where that is not how the text begins."""
    answers = []
    for turn, item in enumerate(conversation.turns):
        if item.role != "assistant":
            continue
        bare = renderer.attempt(messages[:turn], conversation.tools) if turn else ""
        prompt = renderer.attempt(messages[:turn], conversation.tools, prompt=True) if turn else ""
        through = renderer.attempt(messages[: turn + 1], conversation.tools)
        if not text.startswith(through):
            continue
        found = _content_place(renderer, messages[: turn + 1], conversation.tools, through)
        if found is None:
            continue  # rewritten beyond recognition: a marker inside of it could be mistaken for its end
        content, behind = found
        # as `skeletons._generation_start` has it; an answer may leave out the end of the generation prompt
        start = len(prompt) if through.startswith(prompt) and len(prompt) <= content else content
        if prompt == bare and text[start:content].strip():
            start = content
        header = len(bare) if prompt.startswith(bare) and len(bare) <= start else start
        # A tool call is written behind the content, and may open with a special token of its own.
        marker_end = renderer.marker_end(through, behind, len(through), last="tool_calls" in item.extra)
        answers.append(AnswerSpan(turn, header, start, marker_end or len(through), marker_end is not None))
    return answers


def _content_place(
    renderer: Renderer, messages: list[dict[str, Any]], tools: Any, through: str
) -> tuple[int, int] | None:
    """Where in ``through`` the last message's content starts and ends.

    A slot is put in its place: what the template writes before and behind the slot stands around the content too. A template
    that leaves the content of such a message out (as some do with tool calls) has it nowhere: both ends are where the turn
    starts to differ from its prompt.

    Returns:
        None where the template does something else with this content.
    """
    last = messages[-1]
    mark = "QveraSlot"
    spelled = repr(messages) + repr(tools)
    while mark in spelled:
        mark += "Z"
    try:
        slotted = renderer.attempt([*messages[:-1], {**last, "content": f"\t{mark}\t"}], tools)
        empty = renderer.attempt([*messages[:-1], {**last, "content": ""}], tools)
    except TemplateError:
        return None
    pieces = re.split(rf"(\t?){mark}(\t?)", slotted)
    if len(pieces) != 4:
        if len(pieces) == 1 and slotted == through:
            bare = renderer.attempt(messages[:-1], tools, prompt=True) if messages[:-1] else ""
            return (len(bare), len(bare)) if through.startswith(bare) else None
        return None
    before, left, right, behind = pieces
    content = last["content"]
    content = content if left else content.lstrip()
    content = content if right else content.rstrip()
    if through == before + content + behind:
        return len(before), len(before) + len(content)
    if not content and through == empty:
        # The template writes less around nothing at all: what it shares with the other text at its end is behind it.
        return _around_nothing(through, before, behind)
    if through.startswith(before) and through.endswith(behind) and len(through) >= len(before) + len(behind):
        # it rewrites the content in its place (line breaks stripped, say)
        return len(before), len(through) - len(behind)
    return None


def _around_nothing(text: str, before: str, behind: str) -> tuple[int, int]:
    """Where ``text`` stops being like ``before``, and from where on it is like ``behind``; not before that."""
    shared = 0
    while shared < min(len(text), len(behind)) and text[-1 - shared] == behind[-1 - shared]:
        shared += 1
    opening = 0
    while opening < min(len(text), len(before)) and text[opening] == before[opening]:
        opening += 1
    return opening, max(opening, len(text) - shared)
