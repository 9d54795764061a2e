"""Where an answer differs from another one, by words."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import SequenceMatcher

_PIECES = re.compile(r"\w+|\s+|[^\w\s]")
_MOST_PIECES = 2_000
"""Matching is quadratic; longer answers are shown unmarked."""

_ALIKE = 0.35
"""Below this ratio marks would cover everything and say nothing."""


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer.

    Attributes:
        text: the stretch itself; "" where words are missing.
        differs: the other text does not have it here.
        missing: what the other text has here and this one lacks.
    """

    text: str
    differs: bool = False
    missing: str = ""


def same_answer(answer: str, reference: str) -> bool:
    """Equal but for surrounding blanks, or the same JSON value (the order of keys does not count)."""
    if answer.strip() == reference.strip():
        return True
    try:
        left, right = json.loads(answer), json.loads(reference)
    except (ValueError, RecursionError):
        return False
    # Python calls 1 == True and 1 == 1.0 equal; JSON text that says one of them does not say the other.
    return isinstance(left, dict | list) and json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def mark(answer: str, other: str) -> list[Piece]:
    """Cut ``answer`` into pieces that ``other`` shares and pieces that it does not.

    The texts of the pieces joined are ``answer`` again. Texts with little in common come back as one unmarked piece.
    """
    left, right = _PIECES.findall(answer), _PIECES.findall(other)
    plain = [Piece(answer)]
    if not left or not right or max(len(left), len(right)) > _MOST_PIECES:
        return plain
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return plain
    pieces = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            pieces.append(Piece("".join(left[i:j])))
        elif tag == "insert":
            pieces.append(Piece("", missing="".join(right[k:m])))
        else:
            pieces.append(Piece("".join(left[i:j]), differs=True, missing="".join(right[k:m])))
    return pieces
