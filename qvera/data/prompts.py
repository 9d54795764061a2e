"""Prompts to be answered: the same files as for training, with or without answers, or plain lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qvera.config.schema import DataSection
from qvera.data.formats import Conversation, Text, Turn, detect_format, parse_row
from qvera.data.readers import RawRow, read_rows
from qvera.utils.errors import InputError


def read_prompts(path: Path, section: DataSection) -> list[Conversation]:
    """Read the prompts of a file; an answer at the end of a row is left out, the last turn is what is asked.

    Args:
        path: .txt (one prompt a line), or .jsonl, .json, .csv, .parquet with the columns of a training file, of which
            the answer's may be missing.
        section: says how columns are named, and the system prompt.

    Raises:
        InputError: no such file, no prompts in it, or a row that asks nothing; names file and line.
    """
    if path.suffix.lower() == ".txt":
        return _lines(path, section.system)
    conversations = []
    for row in read_rows(str(path)):
        filled = _with_answer_column(row, section.columns)
        parsed = parse_row(filled, detect_format(filled, section.format, section.columns), section.system)
        if isinstance(parsed, Text):
            raise InputError(
                f"{row.source}: is plain text, which asks nothing. Expected prompts, instructions or messages."
            )
        turns = list(parsed.turns)
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if not turns or turns[-1].role == "system":
            raise InputError(f"{row.source}: has no user turn to answer.")
        conversations.append(replace(parsed, turns=turns, source=row.source))
    return conversations


def _lines(path: Path, system: str | None) -> list[Conversation]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}).") from None
    opening = [Turn("system", system)] if system else []
    found = [
        Conversation([*opening, Turn("user", line)], f"{path.name}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise InputError(f"{path}: has no prompts in it (one a line).")
    return found


def _with_answer_column(row: RawRow, columns: dict[str, str]) -> RawRow:
    """The row with a placeholder where a prompt file has no answers, so that it is read like a training row."""
    fields = dict(row.fields)
    for question, answer in (("prompt", "completion"), ("instruction", "output")):
        asked, answered = columns.get(question, question), columns.get(answer, answer)
        if asked in fields and not fields.get(answered):
            fields[answered] = "-"
    return replace(row, fields=fields)
