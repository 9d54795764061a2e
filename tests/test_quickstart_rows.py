"""The task: deterministic, and held out in words, values and templates."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.quickstart_rows import INSTRUCTION, Split, generate, message_of, render, write_rows
from bench.quickstart_words import HELDOUT, TRAIN
from qvera.cli.quickstart import recipe_path

VALUE_TABLES = ("first_names", "last_names", "cities", "counts", "colours", "items", "days", "floor_numbers")
TEXT_TABLES = ("floors", "asides", "templates")


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}".strip("."))]
    return [(path, tree)]


def values(split: Split) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    for row in generate(split, 2000, seed=3):
        for path, value in leaves(json.loads(row["completion"])):
            if value is not None and not isinstance(value, bool):
                found.setdefault(path, set()).add(value)
    return found


@pytest.mark.parametrize("table", VALUE_TABLES + TEXT_TABLES)
def test_tables_share_no_entry_and_repeat_none(table: str) -> None:
    train, heldout = getattr(TRAIN, table), getattr(HELDOUT, table)
    assert not set(train) & set(heldout)
    assert len(set(train)) == len(train)
    assert len(set(heldout)) == len(heldout)


def test_templates_are_many_and_different_when_only_their_words_are_compared() -> None:
    def skeleton(template: str) -> str:
        return re.sub(r"[\W_]+", " ", template).lower().strip()

    train, heldout = {skeleton(t) for t in TRAIN.templates}, {skeleton(t) for t in HELDOUT.templates}
    assert len(train) >= 24
    assert len(heldout) >= 10
    assert not train & heldout


def test_no_sentence_of_the_training_part_stands_in_a_heldout_template() -> None:
    def plain(template: str) -> str:
        return " ".join(re.sub(r"[^\w{}]+", " ", template).lower().split())

    heldout = [plain(template) for template in HELDOUT.templates]
    parts = ("orders", "places", "people", "people_in_places", "orders_for_people", "times")
    sentences = [plain(sentence) for part in parts for sentence in getattr(TRAIN, part)]
    assert len(sentences) > 90
    for sentence in sentences:
        words = re.sub(r"{\w+}", " ", sentence).split()
        if len(words) >= 3:  # "I am {name}" is a phrase, not a template
            assert not any(f" {sentence} " in f" {template} " for template in heldout), sentence


def test_generated_answers_share_no_value() -> None:
    train, heldout = values("train"), values("heldout")
    assert train.keys() == heldout.keys()
    assert len(train) == 7
    for path, seen in train.items():
        assert not seen & heldout[path], path


def test_names_and_cities_share_no_word() -> None:
    def words(split: Split) -> set[str]:
        found = values(split)
        return {word for path in ("to.name", "to.city") for value in found[path] for word in value.split()}

    assert not words("train") & words("heldout")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_copied_value_stands_in_the_text(split: Split) -> None:
    vocabulary = TRAIN if split == "train" else HELDOUT
    for row in generate(split, 600, seed=1):
        text, answer = message_of(row["prompt"]), json.loads(row["completion"])
        assert row["completion"] == json.dumps(answer, separators=(",", ":"), ensure_ascii=False)
        for path, value in leaves(answer):
            if path == "count":
                assert re.search(rf"\b{value}\b", text)
            elif path == "to.floor":
                assert (value is not None) == any(
                    sentence.format(floor=number) in text
                    for sentence in vocabulary.floors
                    for number in vocabulary.floor_numbers
                )
                assert value is None or re.search(rf"floor:? {value}\b", text, re.IGNORECASE)
            elif value is not None:
                assert value in text, (path, value, text)
        assert not re.search(r"[\[\]{}]|  | [.,?]|\.\.|,,|^\W", text), text


def test_optional_parts_come_and_go_and_templates_are_balanced() -> None:
    answers = [json.loads(row["completion"]) for row in generate("heldout", 600, seed=1)]
    for absent in (
        sum(a["colour"] is None for a in answers),
        sum(a["day"] is None for a in answers),
        sum(a["to"]["floor"] is None for a in answers),
    ):
        assert 60 < absent < 540
    assert len({row["prompt"] for row in generate("train", 2000)}) == 2000
    assert min(Counter(a["count"] for a in answers).values()) > 50


def test_the_instruction_carries_the_whole_schema() -> None:
    schema = re.search(r"\{.*\}", INSTRUCTION)
    assert schema is not None
    as_json = re.sub(r"\b(string|integer|boolean)(\|null)?", '"leaf"', schema[0])
    row = generate("train", 1)[0]
    paths = [path for path, _ in leaves(json.loads(row["completion"]))]
    assert [path for path, _ in leaves(json.loads(as_json))] == paths
    assert len(paths) >= 6
    assert row["prompt"].startswith(f"{INSTRUCTION}\n\n")


def test_render_drops_nested_parts_with_their_absent_facts() -> None:
    template = "Come[ on {date}[ at {time}]]. {aside} Bye."
    assert render(template, {"date": "3 May", "time": "noon", "aside": None}) == "Come on 3 May at noon. Bye."
    assert render(template, {"date": "3 May", "time": None, "aside": "Hi."}) == "Come on 3 May. Hi. Bye."
    assert render(template, {"date": None, "time": None, "aside": None}) == "Come. Bye."


def test_the_shipped_rows_are_those_of_the_script(tmp_path: Path) -> None:
    write_rows(tmp_path)
    for name, rows in (("train.jsonl", 960), ("heldout.jsonl", 256)):
        shipped = recipe_path(f"quickstart/{name}").read_bytes()
        assert shipped == (tmp_path / name).read_bytes()
        assert len(shipped.splitlines()) == rows
