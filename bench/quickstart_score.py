"""Scores for the quickstart's task, and what regular expressions written against the training templates reach."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.quickstart_words import TRAIN

FIELDS = ("count", "colour", "item", "to.name", "to.city", "to.floor", "day")


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many answers were right, whole and by field."""

    rows: int
    exact: int
    """Answers whose JSON equals the reference, whatever the order of keys and the spaces."""
    parsed: int
    """Answers that are JSON objects at all."""
    fields: dict[str, float]
    """Fraction of rows with that leaf right."""

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
    return value.get(inner, missing) if isinstance(value, dict) else missing


# The baseline: what a careful person writes after reading the training templates, without knowing held-out words.
_CAPITALIZED = r"[A-Z][a-z]+"
_NAME = rf"{_CAPITALIZED} {_CAPITALIZED}"
_NAME_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        rf"(?:this is|I am|I'm|it's|Name:|from|From:|Contact|[Aa]sk for|writing for|friend|Customer|Who:) ({_NAME})",
        rf"(?:As|Send|give|Call|called|reach|that is) ({_NAME})",
        rf"(?:Yours|Thanks|Thank you), ({_NAME})",
        rf"(?:to|for) ({_NAME})(?:,| in )",
        rf"\b({_NAME})(?: speaking| here| from|, who)",
        rf"({_NAME})\.?$",
        rf"\b({_NAME})\b",  # no template has this: any two capitalized words
    )
]
_DAYS = "(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_CITY_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        rf"\b(?:live|lives|be|am|here) in ({_CAPITALIZED})",
        rf"(?:City|Town|In): ({_CAPITALIZED})",
        rf"(?:As {_NAME} of|The place is|the driver it's|Urgent:|^From|^In) ({_CAPITALIZED})",
        rf"({_CAPITALIZED}) is where I live",
        rf"{_NAME}, ({_CAPITALIZED})[:.,]",
        rf"\b(?:to|To|agreed on) ({_CAPITALIZED})(?:[., ]|$)(?!{_CAPITALIZED})",
        rf"^(?:Hello from )?({_CAPITALIZED})[:!]",
        rf"{_NAME} (?:from|in) ({_CAPITALIZED})[:., ]",
        rf"(?:[.!?] |for )({_CAPITALIZED}), please",
        rf"\b(?:in|at|for) (?!{_DAYS})({_CAPITALIZED})\b(?! [A-Z])",  # no template has this: any likely preposition
    )
]
_DAY = re.compile(rf"\b({_DAYS})\b")
_COLOURS = "|".join(sorted({*TRAIN.colours, "brown", "orange", "pink", "purple", "grey"}))
_THING = rf"(?:(?P<colour>{_COLOURS}) )?(?P<item>(?:(?!of\b)[a-z]+ )?(?!this\b)[a-z]+s)\b"
_THING_PATTERNS = [
    re.compile(rf"(?:I forgot the|ran out of|From: {_NAME}\.) {_THING}.*?\b(?P<count>\d+)\b"),
    re.compile(
        rf"(?:always buy|short of|calling about|forgot to order|want to have|What about|run out of) {_THING}"
        r".*?(?<!loor )(?<!loor: )\b(?P<count>\d{1,2})\b(?! cats| days| times| weeks| pounds)"
    ),
    re.compile(rf"(?<!loor )(?<!loor: )\b(?P<count>\d+) (?!pounds|weeks|days|cats|tons|times|euros|years){_THING}"),
]
_COLOUR_AFTER = re.compile(rf"(?: in |, |, all | \()({_COLOURS})\b")
_COLOUR_ONES = re.compile(rf"\b({_COLOURS}) ones\b")
_FLOOR = re.compile(r"\bfloor:? (\d+)", re.IGNORECASE)


def regex_baseline(text: str) -> dict[str, Any]:
    """An answer to one message from regular expressions.

    Written against the training templates and words, plus what anyone would add unasked: all seven days, the
    common colours, and a guess where no pattern fits.
    """

    def first(patterns: Sequence[re.Pattern[str]]) -> re.Match[str] | None:
        return next((found for pattern in patterns if (found := pattern.search(text))), None)

    name, city, thing = first(_NAME_PATTERNS), first(_CITY_PATTERNS), first(_THING_PATTERNS)
    floor, day = _FLOOR.search(text), _DAY.search(text)
    colour = thing["colour"] if thing else None
    if thing and colour is None and (after := _COLOUR_AFTER.match(text, thing.end("item"))):
        colour = after[1]
    elif thing and colour is None and (ones := _COLOUR_ONES.search(text)):
        colour = ones[1]
    return {
        "count": int(thing["count"]) if thing else None,
        "colour": colour,
        "item": thing["item"] if thing else None,
        "to": {
            "name": name[1] if name else None,
            "city": city[1] if city else None,
            "floor": int(floor[1]) if floor else None,
        },
        "day": day[1] if day else None,
    }
