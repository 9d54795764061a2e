"""Pages of every kind are the ones that were looked at, load nothing, and mark where two answers differ."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvera.evaluation.metrics import exact_match
from qvera.evaluation.report.pages import DiffSpan, make_sample, word_diff
from tests.evaluation.report.pages import SNAPSHOTS, Build, Page

LOADS = {"src", "srcset", "xlink:href", "action", "data", "poster"}


@pytest.mark.parametrize("kind", SNAPSHOTS)
def test_a_page_is_the_one_that_was_looked_at_and_loads_nothing(kind: str, build_run: Build, tmp_path: Path) -> None:
    """``REWRITE=1`` writes the snapshots anew: look at what changed in them."""
    source = SNAPSHOTS[kind](build_run, tmp_path).read_text(encoding="utf-8")
    parsed = Page(source)
    names = [(tag, name) for tag, attributes in parsed.elements for name in attributes if name in LOADS]
    links = [attributes["href"] or "" for tag, attributes in parsed.elements if "href" in attributes]
    assert names == [] and links[0] == "data:,"
    assert not [link for link in links[1:] if ":" in link]
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", source)
    (policy,) = (attributes["content"] or "" for _, attributes in parsed.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert parsed.count("script") == 1
    # neither what all pages share, nor every default of today
    others = (
        r"(<style>).*?(</style>)",
        r"(<script>).*?(</script>)",
        r"('sha256-)[^']*(')",
        r"(default</summary><pre>).*?(</pre>)",
    )
    for part in others:
        source = re.sub(part, r"\1\2", source, flags=re.DOTALL)
    source = re.sub(r">\s*<", ">\n<", source) + "\n"
    stored = Path(__file__).parent / "snapshots" / f"{kind}.html"
    if os.environ.get("REWRITE"):
        stored.parent.mkdir(exist_ok=True)
        stored.write_text(source, encoding="utf-8")
    assert source.splitlines() == stored.read_text(encoding="utf-8").splitlines()


def test_the_verdict_is_that_of_the_exact_match_score() -> None:
    for answer, reference, verdict in (
        ("yes", " yes\n", "equals the reference"),
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}', "same JSON as the reference"),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', "differs"),
        ("[" * 100_000, "x", "differs"),
        (" ", "no", "empty"),
    ):
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
    # little in common is not marked
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
