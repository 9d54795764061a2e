"""Answers beside their references: whether one equals a reference, and which words differ."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from qvera.evaluation.metrics import exact_match

Sample = dict[str, Any]
"""A prompt with its answers, each cut where it differs from the nearest reference, and its references."""

_TOKENS = re.compile(r"\w+|\s+|[^\w\s]")
_MAX_TOKENS = 2_000
"""Matching is quadratic. Longer answers are shown unmarked."""

_MIN_RATIO = 0.35
"""Texts with less in common than this are shown unmarked: marks would cover everything."""


class DiffSpan(NamedTuple):
    """A stretch of an answer: its text ("" where words are missing), and what the other text has in its place."""

    text: str
    differs: bool = False
    missing: str = ""


def make_sample(title: str, prompt: str, answers: Sequence[tuple[str, str, str]], references: Sequence[str]) -> Sample:
    """Compare the answers to one prompt, for the macro `sample` of templates/parts.html.

    Args:
        answers: Who gave it, the answer, and a note below it. It is compared with the reference that it shares the most
            words with; without any, with the first answer.
    """
    shown = []
    for name, answer, note in answers:
        equal = [reference for reference in references if exact_match(answer, reference)]
        other = _nearest(answer, references) if references else answers[0][1]
        spans = [DiffSpan(answer)] if equal else word_diff(answer, other)
        verdict = _verdict(answer, references, equal)
        shown.append({"name": name, "spans": spans, "equal": bool(equal), "verdict": verdict, "note": note})
    return {"title": title, "prompt": prompt, "answers": shown, "references": references}


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
    """The comparison in words, or ""."""
    if not answer.strip():
        return "empty"
    if not references:
        return ""
    if not equal:
        return "differs"
    which = "the reference" if len(references) == 1 else "a reference"
    same = any(answer.split() == reference.split() for reference in equal)
    return f"equals {which}" if same else f"same JSON as {which}"
