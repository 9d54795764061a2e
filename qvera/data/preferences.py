"""Rows that say which answers are better: pairs of answers to one prompt, or single answers that were judged.

The formats are TRL's ``preference`` (chosen and rejected) and ``unpaired-preference`` (completion and label). Prompts
and answers are texts, or lists of messages. A pair without a ``prompt`` column has it in both lists: the messages that
they begin with in common.
"""

from __future__ import annotations

from qvera.data.conversations import (
    Conversation,
    Turn,
    messages_in,
    row_optional_text,
    row_text,
    row_tools,
    row_turns,
    row_value,
)
from qvera.data.readers import RawRow, describe
from qvera.data.row_format import RowFormat
from qvera.utils.errors import InputError


def parse_preference(row: RawRow, format: RowFormat, system: str | None = None) -> Conversation:
    """Check one row of a preference format and turn it into a conversation that ends with the (chosen) answer.

    Args:
        format: what `detect_format` found in the first row.
        system: the system prompt for rows that bring none.

    Raises:
        InputError: a missing column or a value that can't be used; names the row's source.
    """
    paired = format.name == "preference"
    names = ["chosen", "rejected"] if paired else ["completion"]
    if paired and format.column("prompt") not in row.fields:
        prompt, answers = _without_common_prompt(row, format)
    else:
        prompt = _turns(row, format, "prompt", "user")
        answers = [_answer(row, format, name, _turns(row, format, name, "assistant")) for name in names]
    if not prompt or prompt[-1].role in ("system", "assistant"):
        raise InputError(f"{row.source}: the prompt must end with a turn that asks for an answer, such as a user's.")
    own_system = row_optional_text(row, format, "system") or system
    if prompt[0].role != "system" and own_system:
        prompt = [Turn("system", own_system), *prompt]
    return Conversation(
        [*prompt, answers[0]],
        row.source,
        row_tools(row, format),
        rejected=answers[1] if paired else None,
        desirable=None if paired else _label(row, format),
    )


def _turns(row: RawRow, format: RowFormat, name: str, role: str) -> list[Turn]:
    """A list of messages as turns, or a text as one turn of this role."""
    if messages_in(row_value(row, format, name)) is not None:
        return row_turns(row, format, name)
    return [Turn(role, row_text(row, format, name))]


def _answer(row: RawRow, format: RowFormat, name: str, turns: list[Turn]) -> Turn:
    """The one assistant turn that an answer is."""
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
    """The turns that both lists begin with, and the answer that each ends with."""
    lists = [row_turns(row, format, name) for name in ("chosen", "rejected")]
    shared = 0
    # the last turn of each is its answer, even where both are the same
    while shared < min(map(len, lists)) - 1 and lists[0][shared] == lists[1][shared]:
        shared += 1
    names = zip(("chosen", "rejected"), lists, strict=True)
    return lists[0][:shared], [_answer(row, format, name, turns[shared:]) for name, turns in names]


def _label(row: RawRow, format: RowFormat) -> bool:
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
