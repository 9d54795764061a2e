"""Places in rendered text: where the answers are, and where a template puts a row's contents."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: what the template writes.
        answers: the assistant turns in order.
        append_eos: the last answer ends the text and has no end-of-turn token of its own: one eos has to follow.
    """

    text: str
    answers: list[AnswerSpan]
    append_eos: bool


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a content goes: the turn, whether it is the context, and whether the template strips it on either side."""

    turn: int
    is_context: bool
    strip_left: bool
    strip_right: bool


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The literal text around the slots (one more than slots) and where the answer of each assistant turn is.

    It starts ``before`` characters before the content and ends ``after`` characters behind it, ``marked`` or not.
    """

    literals: list[str]
    slots: list[Slot]
    before: dict[int, int]
    after: dict[int, int]
    marked: dict[int, bool]
