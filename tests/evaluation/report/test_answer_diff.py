"""Where two answers differ."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvera.evaluation.metrics import exact_match
from qvera.evaluation.report.pages import DiffSpan, make_sample, word_diff


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("yes", " yes\n", "equals the reference"),
        ("  red \n blue", "red blue", "equals the reference"),
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}', "same JSON as the reference"),
        ('{"a": 1}', '{"a": "1"}', "differs"),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', "differs"),
        ("yes", "no", "differs"),
        ("[" * 100_000, "x", "differs"),
        (" ", "no", "empty"),
    ],
)
def test_the_verdict_is_that_of_the_exact_match_score(answer: str, reference: str, verdict: str) -> None:
    (shown,) = make_sample("Prompt", "?", [("Adapter", answer, "")], [reference])["answers"]
    assert shown["verdict"] == verdict
    assert shown["equal"] is exact_match(answer, reference)


def test_mark_names_what_is_wrong_and_what_is_missing() -> None:
    assert word_diff("on 3 July please", "on 3 June please") == [
        DiffSpan("on 3 "),
        DiffSpan("July", differs=True, missing="June"),
        DiffSpan(" please"),
    ]
    assert word_diff("a b c d", "a b x c d") == [DiffSpan("a b "), DiffSpan("", missing="x "), DiffSpan("c d")]


def test_little_in_common_is_not_marked() -> None:
    assert word_diff("I am sorry to hear that", '{"device": "dishwasher"}') == [DiffSpan("I am sorry to hear that")]


@settings(max_examples=30)
@given(st.text(), st.text())
def test_pieces_join_to_the_answer(answer: str, other: str) -> None:
    assert "".join(piece.text for piece in word_diff(answer, other)) == answer


def test_a_very_long_answer_is_quick() -> None:
    start = time.monotonic()
    answer = "a b " * 50_000
    assert word_diff(answer, "b a " * 50_000) == [DiffSpan(answer)]
    assert time.monotonic() - start < 5
