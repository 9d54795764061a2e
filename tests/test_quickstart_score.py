"""Exact match, fields, and the regex baseline."""

from __future__ import annotations

import json

import pytest

from bench import quickstart_rows
from bench.quickstart_rows import Split, generate, message_of
from bench.quickstart_score import FIELDS, regex_baseline, score

REFERENCE = json.dumps(
    {"item": "mugs", "count": 1, "colour": None, "day": None, "to": {"name": "Ann Ray", "city": "Bath", "floor": None}}
)


def changed(**parts: object) -> str:
    return json.dumps({**json.loads(REFERENCE), **parts})


def test_key_order_and_spaces_do_not_matter() -> None:
    other = json.dumps(dict(reversed(json.loads(REFERENCE).items())), indent=1)
    result = score([other], [REFERENCE])
    assert (result.rows, result.exact, result.parsed, result.exact_match) == (1, 1, 1, 1.0)
    assert result.fields == dict.fromkeys(FIELDS, 1.0)


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (changed(count=True), {"count"}),
        (changed(count=1.0), {"count"}),
        (changed(colour="red"), {"colour"}),
        (changed(to=None), {"to.name", "to.city", "to.floor"}),
        (changed(day="Friday"), {"day"}),
        (changed(to={"name": "Ann Ray", "floor": None}), {"to.city"}),
        (changed(to={"name": "Ann Ray", "city": "Bath", "floor": 0}), {"to.floor"}),
    ],
)
def test_a_wrong_leaf_costs_that_field_and_the_match(answer: str, wrong: set[str]) -> None:
    result = score([answer], [REFERENCE])
    assert (result.exact, result.parsed) == (0, 1)
    assert {field for field, right in result.fields.items() if right == 0.0} == wrong


def test_an_extra_key_is_no_match() -> None:
    assert score([changed(note="x")], [REFERENCE]).exact == 0


@pytest.mark.parametrize(
    "answer", ["", "null", "[1]", REFERENCE[:-1], f"Here it is: {REFERENCE}", f"```json\n{REFERENCE}\n```"]
)
def test_what_is_not_one_json_object_scores_nothing(answer: str) -> None:
    result = score([answer, REFERENCE], [REFERENCE, REFERENCE])
    assert (result.rows, result.exact, result.parsed) == (2, 1, 1)
    assert set(result.fields.values()) == {0.5}


@pytest.mark.parametrize(("answers", "references"), [([], []), (["{}"], []), (["{}"], ["[]"])])
def test_unusable_input_is_refused(answers: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError):
        score(answers, references)


def test_the_baseline_is_an_honest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It all but solves the templates it was written against, so its held-out score says something."""
    monkeypatch.setattr(quickstart_rows, "_COMPOSED", 0.0)  # whole templates only

    def exact(split: Split) -> float:
        rows = generate(split, 280, seed=2)
        answers = [json.dumps(regex_baseline(message_of(row["prompt"]))) for row in rows]
        return score(answers, [row["completion"] for row in rows]).exact_match

    assert exact("train") > 0.95
    assert 0.3 < exact("heldout") < 0.8
