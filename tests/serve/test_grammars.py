"""Answers that must follow a grammar do, in batches with others, which it does not concern."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from qvera.serve.grammars import Grammars
from qvera.serve.requests import EndEvent
from qvera.serve.text import TokenTexts
from qvera.utils.errors import InputError
from tests.conftest import small_tokenizer
from tests.serve.helpers import ENGINES, assert_same, expected_of, request, store_of, submit, write_adapters
from tests.serve.test_text import both

pytest.importorskip("llguidance")


class Day(BaseModel, extra="forbid"):
    hours: Annotated[list[bool], Field(min_length=1, max_length=3)]


class Mug(BaseModel, extra="forbid"):
    color: Literal["red", "blue", "grün"]
    count: Annotated[int, Field(ge=0, le=99)]
    day: Day | None


MUG = Mug.model_json_schema()
TOKENIZER = small_tokenizer()
GRAMMARS = Grammars(TokenTexts(TOKENIZER), frozenset({TOKENIZER.eos_token_id}))


@both
@pytest.mark.parametrize("has_end", [True, False])
def test_whatever_allowed_tokens_are_drawn_the_text_is_json_of_the_schema(tokenizer: Any, has_end: bool) -> None:
    texts, chooser, seen = TokenTexts(tokenizer), random.Random(0), set[str]()
    ends = frozenset({tokenizer.eos_token_id}) if has_end else frozenset[int]()
    grammar = Grammars(texts, ends).of_schema(MUG, "schema")
    for _ in range(20):
        walk, ids = grammar.copy(), list[int]()
        while not walk.finished:
            allowed = walk.allowed(len(tokenizer) + 14)  # a head is often wider than the vocabulary
            assert not allowed[len(tokenizer) :].any()
            ids.append(chooser.choice(allowed.nonzero()[0].tolist()))
            walk.take(ids[-1])
        seen.add(Mug.model_validate_json(texts.decode(ids), strict=True).model_dump_json())
    assert len(seen) > 10


@pytest.fixture(scope="module")
def mixed(alone: Any, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """Requests to each of three models, with a grammar and without, and what each gets alone."""
    root = tmp_path_factory.mktemp("mixed")
    write_adapters(root, tiny_model_dir, {"vera": 1})
    write_adapters(root, tiny_model_dir, {"lora": 2}, method="lora", rank=4)
    store, ends, asked = store_of(root), frozenset({TOKENIZER.eos_token_id}), []
    for i, name in enumerate(["base", "vera", "lora"] * 2):
        settings: dict[str, Any] = {"stop_tokens": ends, "temperature": 1.0, "seed": i, "top_logprobs": 1}
        if i % 2 == 0:
            settings["grammar"] = GRAMMARS.of_schema(MUG, "schema")
            settings["logit_bias"] = tuple((token, -100.0) for token in range(290) if TOKENIZER.decode(token).isspace())
        asked.append(request([3 + i, 9, 7], store.resolve(name), 100, **settings))
    return asked, expected_of(alone, root, asked)


@pytest.mark.parametrize("kind", ENGINES)
def test_requests_with_and_without_grammars_share_batches_of_vera_and_lora(
    kind: str, engine_with: Any, mixed: tuple[list[Any], list[Any]]
) -> None:
    asked, expected = mixed
    with engine_with(kind, max_running=4) as engine:
        answers = [submit(engine, one) for one in asked]
        for i, (answer, events) in enumerate(zip(answers, expected, strict=True)):
            assert_same(answer, events)
            if i % 2 == 0:
                assert answer.end() == EndEvent("stop")
                Mug.model_validate_json(TOKENIZER.decode(answer.tokens, skip_special_tokens=True), strict=True)


def test_a_grammar_that_becomes_too_large_ends_its_own_answer_only(engine_with: Any) -> None:
    large = GRAMMARS.of_schema({"type": "string", "pattern": "(a|b)*" * 300}, "schema")
    with engine_with() as engine:
        other = submit(engine, request([5, 6], max_tokens=60))
        other.wait_for_token()
        end = submit(engine, request([5, 6], max_tokens=60, grammar=large)).end()
        assert (end.reason, "its grammar can't go on" in end.message) == ("error", True), end
        assert other.end() == EndEvent("length")


@pytest.mark.parametrize(
    ("schema", "place", "message"),
    [
        (
            {"type": "object", "properties": {"a": {"items": {"not": {}}, "type": "array"}}},
            "s.properties.a.items",
            "not",
        ),
        ({"$defs": {"N": {"type": "array", "uniqueItems": True}}, "$ref": "#/$defs/N"}, "s.$defs.N", "uniqueItems"),
        ({"anyOf": [{"type": "null"}, {"type": "text"}]}, "s.anyOf.1", "Invalid type: text"),
        ({"properties": {"a": {"$ref": "#/$defs/M"}}}, "s.properties.a", "does not exist"),
        ({"$ref": "http://127.0.0.1/s.json"}, "s", "not fetch"),
        ({"enum": [str(n) for n in range(100_000)]}, "s", "too big"),
    ],
)
def test_a_schema_that_cant_be_kept_to_is_refused_with_the_place(
    schema: dict[str, Any], place: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"^{place.replace('$', '.')}: .*{message}"):
        GRAMMARS.of_schema(schema, "s")


def test_keys_that_forbid_no_answer_do_not_refuse_a_schema() -> None:
    """Clients send `format`s of their own, `uniqueItems: false`, and names that are texts, as all names in JSON are."""
    colour = {"type": "string", "format": "colour"}
    tags = {"type": "array", "uniqueItems": False, "items": colour}
    schema: dict[str, Any] = {"type": "object", "propertyNames": {"type": "string"}, "properties": {"format": tags}}
    schema |= {"required": ["format", "kind"], "additionalProperties": False}
    schema["properties"]["kind"] = {"const": {"format": "pdf", "uniqueItems": False}}  # a value, and no schema
    grammar = GRAMMARS.of_schema(schema, "s")
    for token in TOKENIZER('{"format": ["red", "red"], "kind": {"format": "pdf", "uniqueItems": false}}')["input_ids"]:
        assert grammar.allowed(len(TOKENIZER))[token]
        grammar.take(token)
    assert grammar.finished
    with pytest.raises(InputError, match=r"^s: .*propertyNames"):
        GRAMMARS.of_schema({**schema, "propertyNames": {"pattern": "^a"}}, "s")
