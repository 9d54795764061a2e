"""The quickstart's task: deterministic, held out in words, values and templates, and scored by the exact JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import quickstart_rows
from bench.quickstart_rows import Split, generate, message_of, write_rows
from bench.quickstart_score import FIELDS, regex_baseline, score
from bench.quickstart_words import HELDOUT, TRAIN
from qvera.cli.quickstart import recipe_path

TABLES = (
    "first_names", "last_names", "cities", "counts", "colours", "items", "days", "floor_numbers", "floors", "asides", "templates"
)  # fmt: skip


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}".strip("."))]
    return [(path, tree)]


def test_held_out_rows_share_no_words_templates_or_values_with_training_rows() -> None:
    def plain(template: str) -> str:
        return " ".join(re.sub(r"[^\w{}]+", " ", template).lower().split())

    def values(split: Split) -> dict[str, set[Any]]:
        found: dict[str, set[Any]] = {}
        for row in generate(split, 2000, seed=3):
            for path, value in leaves(json.loads(row["completion"])):
                if value is not None and not isinstance(value, bool):
                    found.setdefault(path, set()).add(value)
        return found

    for table in TABLES:
        train, heldout = getattr(TRAIN, table), getattr(HELDOUT, table)
        assert not set(train) & set(heldout), table
        assert len(set(train)) == len(train) and len(set(heldout)) == len(heldout), table
    held = {plain(template) for template in HELDOUT.templates}
    assert len(held) >= 10 and not held & {plain(template) for template in TRAIN.templates}
    parts = ("orders", "places", "people", "people_in_places", "orders_for_people", "times")
    sentences = [plain(sentence) for part in parts for sentence in getattr(TRAIN, part)]
    assert len(sentences) > 90
    for sentence in sentences:
        if len(re.sub(r"{\w+}", " ", sentence).split()) >= 3:  # "I am {name}" is a phrase, not a template
            assert not any(f" {sentence} " in f" {template} " for template in held), sentence
    of_train, of_heldout = values("train"), values("heldout")
    assert of_train.keys() == of_heldout.keys() and len(of_train) == 7
    for path, seen in of_train.items():
        assert not seen & of_heldout[path], path
    words = [
        {word for path in ("to.name", "to.city") for value in of[path] for word in value.split()}
        for of in (of_train, of_heldout)
    ]
    assert not words[0] & words[1]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_copied_value_stands_in_the_text(split: Split) -> None:
    vocabulary = TRAIN if split == "train" else HELDOUT
    floors = {one.format(floor=number) for one in vocabulary.floors for number in vocabulary.floor_numbers}
    rows = generate(split, 600, seed=1)
    for row in rows:
        text, answer = message_of(row["prompt"]), json.loads(row["completion"])
        assert row["completion"] == json.dumps(answer, separators=(",", ":"), ensure_ascii=False)
        for path, value in leaves(answer):
            if path == "count":
                assert re.search(rf"\b{value}\b", text)
            elif path == "to.floor":
                assert (value is not None) == any(sentence in text for sentence in floors)
                assert value is None or re.search(rf"floor:? {value}\b", text, re.IGNORECASE)
            elif value is not None:
                assert value in text, (path, value, text)
        assert not re.search(r"[\[\]{}]|  | [.,?]|\.\.|,,|^\W", text), text
    answers = [dict(leaves(json.loads(row["completion"]))) for row in rows]
    for optional in ("colour", "day", "to.floor"):
        assert 60 < sum(answer[optional] is None for answer in answers) < 540
    assert min(Counter(answer["count"] for answer in answers).values()) > 20


def test_the_shipped_rows_are_those_of_the_script(tmp_path: Path) -> None:
    write_rows(tmp_path)
    for name, rows in (("train.jsonl", 960), ("heldout.jsonl", 256)):
        shipped = recipe_path(f"quickstart/{name}").read_bytes()
        assert shipped == (tmp_path / name).read_bytes()
        assert len(set(shipped.splitlines())) == rows


ANSWER: dict[str, Any] = {"item": "mugs", "count": 1, "colour": None, "day": None}
ANSWER["to"] = {"name": "Ann Ray", "city": "Bath", "floor": None}
REFERENCE = json.dumps(ANSWER)


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"count": True}, {"count"}),
        ({"count": 1.0}, {"count"}),
        ({"to": None}, {"to.name", "to.city", "to.floor"}),
        ({"to": {"name": "Ann Ray", "city": "Bath", "floor": 0}}, {"to.floor"}),
        ({"note": "x"}, set()),
    ],
)
def test_a_wrong_leaf_costs_that_field_and_the_match(changed: dict[str, Any], wrong: set[str]) -> None:
    result = score([json.dumps({**ANSWER, **changed})], [REFERENCE])
    assert (result.exact, result.parsed) == (0, 1)
    assert {field for field, right in result.fields.items() if right == 0.0} == wrong


def test_only_one_json_object_scores_whatever_its_order_and_spaces() -> None:
    right = json.dumps(dict(reversed(ANSWER.items())), indent=1)
    for answer in ("", "[1]", REFERENCE[:-1], f"Here it is: {REFERENCE}", f"```json\n{REFERENCE}\n```"):
        result = score([answer, right], [REFERENCE, REFERENCE])
        assert (result.rows, result.exact, result.parsed, result.exact_match) == (2, 1, 1, 0.5)
        assert result.fields == dict.fromkeys(FIELDS, 0.5)
    for answers, references in ((["{}"], []), (["{}"], ["[]"])):
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
