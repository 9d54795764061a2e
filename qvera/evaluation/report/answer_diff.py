"""Answers beside their references: whether one equals a reference, and which words differ."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_TOKENS = re.compile(r"\w+|\s+|[^\w\s]")
_MAX_TOKENS = 2_000
"""Matching is quadratic. Longer answers are shown unmarked."""

_MIN_RATIO = 0.35
"""Texts with less in common than this are shown unmarked: marks would cover everything."""


@dataclass(frozen=True)
class DiffSpan:
    """A stretch of an answer.

    Attributes:
        text: The stretch itself; "" where words are missing.
        differs: The other text does not have it here.
        missing: What the other text has here and the answer lacks.
    """

    text: str
    differs: bool = False
    missing: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer as a page shows it.

    Attributes:
        name: Who gave it.
        spans: Its text, cut where it differs from the nearest reference.
        equal: Whether it equals a reference.
        verdict: The comparison in words, or "".
        note: Text below it.
    """

    name: str
    spans: list[DiffSpan]
    equal: bool
    verdict: str
    note: str


@dataclass(frozen=True)
class Sample:
    """A prompt, its answers and its references."""

    title: str
    prompt: str
    answers: list[Answer]
    references: Sequence[str]


def make_sample(title: str, prompt: str, answers: Sequence[tuple[str, str, str]], references: Sequence[str]) -> Sample:
    """Compare the answers to one prompt.

    Args:
        title: Heading.
        prompt: The prompt's text.
        answers: Who gave it, the answer, and a note below it.
        references: An answer is compared with the one that it shares the most words with; without any, with the first
            answer.
    """
    shown = []
    for index, (name, answer, note) in enumerate(answers):
        equal = [reference for reference in references if same_answer(answer, reference)]
        other = _nearest(answer, references) if references else (answers[0][1] if index else "")
        spans = word_diff(answer, other) if other and not equal else [DiffSpan(answer)]
        shown.append(Answer(name, spans, bool(equal), _verdict(answer, references, equal), note))
    return Sample(title, prompt, shown, references)


def same_answer(answer: str, reference: str) -> bool:
    """Equal but for surrounding blanks, or the same JSON value (the order of keys does not count)."""
    if answer.strip() == reference.strip():
        return True
    try:
        left, right = json.loads(answer), json.loads(reference)
    except (ValueError, RecursionError):
        return False
    # Python calls 1 == True and 1 == 1.0 equal; as JSON text they differ.
    return isinstance(left, dict | list) and json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def word_diff(answer: str, other: str) -> list[DiffSpan]:
    """Cut ``answer`` into spans that ``other`` has too and spans that it does not have.

    The texts of the spans joined are ``answer``. Texts with little in common come back as one unmarked span.
    """
    left, right = _TOKENS.findall(answer), _TOKENS.findall(other)
    plain = [DiffSpan(answer)]
    if not left or not right or max(len(left), len(right)) > _MAX_TOKENS:
        return plain
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    if matcher.ratio() < _MIN_RATIO:
        return plain
    return [
        DiffSpan("".join(left[i:j]), tag in ("replace", "delete"), "" if tag == "equal" else "".join(right[k:m]))
        for tag, i, j, k, m in matcher.get_opcodes()
    ]


def _nearest(answer: str, references: Sequence[str]) -> str:
    """The reference that shares the most words with an answer."""

    def shared(reference: str) -> float:
        words, others = set(answer.split()), set(reference.split())
        return len(words & others) / (len(words | others) or 1)

    return max(references, key=shared)


def _verdict(answer: str, references: Sequence[str], equal: Sequence[str]) -> str:
    if not answer.strip():
        return "empty"
    if not references:
        return ""
    if not equal:
        return "differs"
    which = "the reference" if len(references) == 1 else "a reference"
    same = any(answer.strip() == reference.strip() for reference in equal)
    return f"equals {which}" if same else f"same JSON as {which}"
