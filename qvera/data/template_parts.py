"""Where the answers lie in a rendered text, known piece by piece.

The template is rendered once per shape (roles in order) with slots in place of the contents; that gives the literal
pieces between the slots. A row's text is then known piece by piece, and is compared with what the template really
renders for it.
"""

from __future__ import annotations

import re
from typing import Any

from qvera.data.formats import Conversation
from qvera.data.rendering import Renderer, TemplateError
from qvera.data.text_spans import AnswerSpan, Skeleton, Slot

Skeletons = dict[Any, Skeleton | None]
"""One template's, by shape and tools, of the shapes met so far; None: that shape has no skeleton."""


def skeleton_spans(
    renderer: Renderer, skeletons: Skeletons, text: str, messages: Any, conversation: Conversation
) -> list[AnswerSpan] | None:
    """Piece the text together from the shape's literals and the row's contents; None where that is not the text."""
    if any(turn.extra or (turn.role == "assistant" and not turn.content) for turn in conversation.turns):
        return None
    shape = tuple((m["role"], "context" in m, not m["content"]) for m in messages)
    key = (shape, repr(conversation.tools) if conversation.tools else None)
    if key not in skeletons:
        skeletons[key] = _build_skeleton(renderer, messages, conversation.tools)
    skeleton = skeletons[key]
    if skeleton is None:
        return None
    parts = [skeleton.literals[0]]
    length = len(parts[0])
    previous_end = 0
    answers = []
    for slot, literal in zip(skeleton.slots, skeleton.literals[1:], strict=True):
        content = messages[slot.turn]["context" if slot.is_context else "content"]
        if slot.strip_left:
            content = content.lstrip()
        if slot.strip_right:
            content = content.rstrip()
        end = length + len(content)
        if slot.turn in skeleton.before and not slot.is_context:
            start = length - skeleton.before[slot.turn]
            close = end + skeleton.after[slot.turn]
            answers.append(AnswerSpan(slot.turn, previous_end, start, close, skeleton.marked[slot.turn]))
        parts += (content, literal)
        previous_end = end
        length = end + len(literal)
    return answers if "".join(parts) == text else None


def _build_skeleton(renderer: Renderer, messages: list[dict[str, Any]], tools: Any) -> Skeleton | None:
    marks: dict[str, tuple[int, bool]] = {}
    slotted = []
    for index, message in enumerate(messages):
        copy = dict(message)
        for name in ("content", "context"):
            if name in copy and (copy[name] or name == "context"):
                mark = f"QveraSlot{len(marks):04d}Zq7"
                marks[mark] = (index, name == "context")
                copy[name] = f"\t{mark}\t"  # a tab that is gone afterwards: the template strips
        slotted.append(copy)
    try:
        text = renderer.attempt(slotted, tools)
    except TemplateError:
        return None
    pieces = re.split(r"(\t?)(QveraSlot\d{4}Zq7)(\t?)", text)
    if [pieces[i] for i in range(2, len(pieces), 4)] != list(marks):
        return None  # a content is left out, written twice or moved
    slots, literals, contents = [], [pieces[0]], []
    length = len(pieces[0])
    for i in range(1, len(pieces), 4):
        left, mark, right, literal = pieces[i : i + 4]
        turn, is_context = marks[mark]
        slots.append(Slot(turn, is_context, not left, not right))
        contents.append((length, length + len(left + mark + right)))
        literals.append(literal)
        length = contents[-1][1] + len(literal)
    skeleton = Skeleton(literals, slots, {}, {}, {})
    for number, slot in enumerate(slots):
        if messages[slot.turn]["role"] != "assistant" or slot.is_context:
            continue
        start, end = contents[number]
        skeleton.before[slot.turn] = start - _generation_start(
            renderer, slotted[: slot.turn], tools, text, start - len(literals[number]), start
        )
        close, marked = _end_of_turn(
            renderer, slotted[: slot.turn + 1], tools, text, end, end + len(literals[number + 1]), len(slotted)
        )
        skeleton.after[slot.turn] = close - end
        skeleton.marked[slot.turn] = marked
    return skeleton


def _generation_start(renderer: Renderer, slotted: Any, tools: Any, text: str, earliest: int, content: int) -> int:
    """Where in ``text`` the prompt ends that an answer's content (at ``content``) is generated from.

    Llama-2's answers start with a space after ``[/INST]``, and Qwen3's with an empty think block: both are the
    model's to write, since a generation prompt stops before them.
    """
    try:
        prompt = renderer.attempt(slotted, tools, prompt=True) if slotted else ""
        bare = renderer.attempt(slotted, tools) if slotted else ""
    except TemplateError:
        return content
    if not prompt or not text.startswith(prompt) or not earliest <= len(prompt) <= content:
        return content
    if prompt == bare and text[len(prompt) : content].strip():
        return content  # the template knows no generation prompt; its heading is still not the model's to write
    return len(prompt)


def _end_of_turn(
    renderer: Renderer, slotted: Any, tools: Any, text: str, end: int, latest: int, turns: int
) -> tuple[int, bool]:
    """Where in ``text`` the answer's turn ends whose content ends at ``end``, and whether by a marker."""
    close: int | None = latest
    if len(slotted) < turns:  # what follows up to the next content holds the next turn's heading too
        try:
            alone = renderer.attempt(slotted, tools)
        except TemplateError:
            alone = ""
        close = len(alone) if text.startswith(alone) and end <= len(alone) <= latest else None
    marker_end = renderer.marker_end(text, end, latest if close is None else close)
    if marker_end is not None:
        return marker_end, True
    # No marker: what the template itself puts behind an answer (a line break, say) is all there is to learn from.
    return (end if close is None else close), False
