"""Scores for the quickstart's task, and what regular expressions written against the training templates reach."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .words import TRAIN

FIELDS = ("item", "count", "colour", "to.name", "to.street", "to.city", "when.date", "when.time", "gift")


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many answers were right, whole and by field."""

    rows: int
    exact: int
    """Answers whose JSON equals the reference, whatever the order of keys and the spaces."""
    parsed: int
    """Answers that are JSON objects at all."""
    fields: dict[str, float]
    """Fraction of rows with that leaf right. An absent `when` counts as both its leaves null."""

    @property
    def exact_match(self) -> float:
        """``exact`` as a fraction of the rows."""
        return self.exact / self.rows


def parse_answer(text: str) -> dict[str, Any] | None:
    """The JSON object that ``text`` is, or None. Text around it makes it wrong: a script would fail on it too."""
    try:
        value = json.loads(text.strip())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def same_json(left: Any, right: Any) -> bool:
    """Equality as JSON has it: the order of keys is free, but ``1``, ``1.0`` and ``true`` differ (Python's == is lax)."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def score(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Compare answers with the references' JSON.

    Raises:
        ValueError: the two differ in length, there are no rows, or a reference is not a JSON object.
    """
    if len(answers) != len(references) or not references:
        raise ValueError(f"{len(answers)} answers for {len(references)} references; need the same number, at least one")
    exact = parsed = 0
    right = dict.fromkeys(FIELDS, 0)
    for text, reference in zip(answers, references, strict=True):
        expected, found = parse_answer(reference), parse_answer(text)
        if expected is None:
            raise ValueError(f"a reference is not a JSON object: {reference!r}")
        if found is None:
            continue
        parsed += 1
        exact += same_json(found, expected)
        for field in FIELDS:
            right[field] += same_json(_leaf(found, field, _MISSING), _leaf(expected, field, None))
    rows = len(references)
    return Score(rows=rows, exact=exact, parsed=parsed, fields={key: hits / rows for key, hits in right.items()})


_MISSING = "(missing)"


def _leaf(tree: dict[str, Any], field: str, missing: Any) -> Any:
    outer, _, inner = field.partition(".")
    value = tree.get(outer, missing)
    if not inner:
        return value
    if value is None and outer == "when":
        return None
    return value.get(inner, missing) if isinstance(value, dict) else missing


# The baseline. What a careful person writes after reading the training templates, without knowing held-out words.
_CAPITALIZED = r"[A-Z][a-zé]+"
_NAME = rf"{_CAPITALIZED} {_CAPITALIZED}"
_STREET = re.compile(rf"\b(\d+ {_CAPITALIZED} {_CAPITALIZED})\b")
_NAME_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        rf"(?:this is|I am|I'm|it's|Name:|from|From:|Contact|[Aa]sk for|writing for|mother|Customer) ({_NAME})",
        rf"(?:Yours|Thanks|Thank you), ({_NAME})",
        rf"(?:to|for) ({_NAME}),? (?:at )?\d",
        rf"\b({_NAME}) (?:speaking|here|from|who)",
        rf"^({_NAME}),",
        rf"({_NAME})\.?$",
    )
]
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"\b(\d{{1,2}} (?:{_MONTHS}))\b")
_TIME = re.compile(r"\b(\d{1,2} [ap]m|noon)\b")
_COUNT_WORDS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen twenty thirty forty fifty"
).split()
_COUNT_VALUES = [*range(2, 16), 20, 30, 40, 50]
_COLOURS = sorted({*TRAIN.colours, "brown", "orange", "pink", "purple"})
_COUNTED = re.compile(
    rf"\b(?P<count>\d+|{'|'.join(_COUNT_WORDS)}) (?:(?P<colour>{'|'.join(_COLOURS)}) )?(?P<item>(?:[a-z]+ )?[a-z]+s)\b"
)
_COUNT_AFTER = re.compile(
    rf"(?:I forgot the|ran out of|From: {_NAME}\.) (?:(?P<colour>{'|'.join(_COLOURS)}) )?(?P<item>(?:[a-z]+ )?[a-z]+s)\b"
    rf".*?\b(?P<count>\d+|{'|'.join(_COUNT_WORDS)})\b"
)
_COLOUR_AFTER = re.compile(rf"(?: in |, |, all | \()({'|'.join(_COLOURS)})\b")
_GIFT = re.compile(r"\b(?:gift|present|birthday|surprise|wrap|giving them)\b")
_NO_GIFT = re.compile(r"not a gift|No gift|for myself|for our office")


def regex_baseline(text: str) -> dict[str, Any]:
    """An answer to one message from regular expressions.

    Written against the training templates and words, plus what anyone would add unasked: all months, number words and
    the common colours.
    """
    street = _STREET.search(text)
    city = None
    if street:
        after = re.match(rf"(?:,| in) ({_CAPITALIZED})", text[street.end() :])
        before = re.search(rf"(?:^|from )({_CAPITALIZED})(?:, \d| orders|!)", text)
        city = after[1] if after else before[1] if before else None
    name = next((found[1] for pattern in _NAME_PATTERNS if (found := pattern.search(text))), None)
    thing = _COUNT_AFTER.search(text) or _COUNTED.search(text)
    count = thing["count"] if thing else None
    colour = thing["colour"] if thing else None
    if thing and colour is None and (after := _COLOUR_AFTER.match(text, thing.end("item"))):
        colour = after[1]
    date, time = _DATE.search(text), _TIME.search(text)
    return {
        "item": thing["item"] if thing else None,
        "count": None if count is None else int(count) if count.isdigit() else _COUNT_VALUES[_COUNT_WORDS.index(count)],
        "colour": colour,
        "to": {"name": name, "street": street[1] if street else None, "city": city},
        "when": {"date": date[1], "time": time[1] if time else None} if date else None,
        "gift": bool(_GIFT.search(text)) and not _NO_GIFT.search(text),
    }
