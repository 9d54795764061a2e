"""Numbers as words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qvera.utils.formatting import (
    axis_labels,
    count,
    counted,
    duration,
    first_of,
    folded,
    moment,
    percent,
    significant,
    size,
)

TEXTS: dict[Callable[[float], str], dict[float, str]] = {
    count: {
        0: "0", 7: "7", 9_871: "9,871", 9_999.4: "9,999", 9_999.6: "10.0 k", 209_280: "209 k", 999_400: "999 k",
        999_600: "1.00 M", 1_417_216: "1.42 M", 6_738_415_616: "6.74 B",
    },
    size: {
        0: "0 B", 512: "512 B", 838_112: "838 kB", 999_700: "1.00 MB", 1_182_000_000: "1.18 GB", 2e12: "2.00 TB",
    },
    duration: {
        0: "0 s", 0.85: "0.85 s", 8.53: "8.5 s", 9.97: "10 s", 59.4: "59 s", 59.6: "1 min 00 s", 192.4: "3 min 12 s",
        3_599.6: "1 h 00 min", 7_500: "2 h 05 min", 273_600: "3 d 4 h",
    },
    significant: {
        2.31: "2.31", 0.0412: "0.0412", 0.04116: "0.0412", 1234.5: "1,234", 0: "0", 0.00004: "4e-5", 1.23e9: "1.2e9",
        -2.5: "-2.50", float("inf"): "inf",
    },
    percent: {0.875: "87.5 %", 1.0: "100 %"},
}  # fmt: skip


@pytest.mark.parametrize("text_of", list(TEXTS))
def test_a_number_as_text(text_of: Callable[[float], str]) -> None:
    assert {value: text_of(value) for value in TEXTS[text_of]} == TEXTS[text_of]


def test_a_number_has_a_noun_that_fits() -> None:
    assert [counted(n, "thread") for n in (0, 1, 2, 1234)] == ["0 threads", "1 thread", "2 threads", "1,234 threads"]


def test_an_answer_of_one_line_again_and_again_is_short_on_a_terminal() -> None:
    assert folded("```\n\n" * 40 + "end") == "``` (x 40)\nend"
    assert folded("\n".join("abcdefghij")).splitlines() == [*"abcdefgh", "… 2 more lines"]
    assert folded("") == "" and folded("one\n  two") == "one\n  two"


def test_a_moment_as_text() -> None:
    assert moment("2026-11-24T15:16:58+00:00") == "24 November 2026, 15:16 UTC"
    assert moment("2026-11-24T15:16:58") == "24 November 2026, 15:16"
    assert moment("yesterday") == "yesterday"


@pytest.mark.parametrize(
    ("ticks", "kind", "labels"),
    [
        ([0, 0.5, 1.0], "number", ["0", "0.5", "1.0"]),
        ([0, 0.002, 0.004], "number", ["0", "0.002", "0.004"]),
        ([0, 1e-5, 2e-5], "number", ["0", "1e-5", "2e-5"]),
        ([0, 500e6, 1e9], "bytes", ["0", "0.5 GB", "1.0 GB"]),
        ([0, 200e6, 400e6], "bytes", ["0", "200 MB", "400 MB"]),
        ([0, 1000, 2000], "count", ["0", "1,000", "2,000"]),
        ([0, 20_000, 40_000], "count", ["0", "20 k", "40 k"]),
        ([0.02, 0.5, 1, 20], "log", ["0.02", "0.5", "1", "20"]),
    ],
)
def test_axis_labels(ticks: list[float], kind: str, labels: list[str]) -> None:
    assert axis_labels(ticks, kind) == labels


def test_the_first_of_some_names_counts_the_others_only_where_there_are_some() -> None:
    assert [first_of(names) for names in (["a"], ["a", "b", "c"])] == ["a", "a (and 2 more)"]
    assert [first_of("abc", shown) for shown in (2, 3)] == ["a, b (and 1 more)", "a, b, c"]
