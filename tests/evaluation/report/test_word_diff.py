"""Where two answers differ."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvera.evaluation.report.word_diff import Piece, mark, same_answer


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("yes", " yes\n", True),
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}', True),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ("1.0", "1", False),
        ("yes", "no", False),
        ("[" * 100_000, "x", False),
    ],
)
def test_same_answer(answer: str, reference: str, same: bool) -> None:
    assert same_answer(answer, reference) is same


def test_mark_names_what_is_wrong_and_what_is_missing() -> None:
    assert mark("on 3 July please", "on 3 June please") == [
        Piece("on 3 "),
        Piece("July", differs=True, missing="June"),
        Piece(" please"),
    ]
    assert mark("a b c d", "a b x c d") == [Piece("a b "), Piece("", missing="x "), Piece("c d")]


def test_little_in_common_is_not_marked() -> None:
    assert mark("I am sorry to hear that", '{"device": "dishwasher"}') == [Piece("I am sorry to hear that")]


@given(st.text(), st.text())
def test_pieces_join_to_the_answer(answer: str, other: str) -> None:
    assert "".join(piece.text for piece in mark(answer, other)) == answer


def test_a_very_long_answer_is_quick() -> None:
    start = time.monotonic()
    answer = "a b " * 50_000
    assert mark(answer, "b a " * 50_000) == [Piece(answer)]
    assert time.monotonic() - start < 5
