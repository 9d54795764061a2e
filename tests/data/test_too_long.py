"""Rows longer than data.max_length: what the parts of a split row train, what is counted, what is said when none is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qvera.config.schema import DataSection
from qvera.data import Encoder, Example, build_datasets, resolve_template
from qvera.data.conversations import parse_row
from qvera.data.readers import RawRow
from qvera.data.row_format import detect_format
from qvera.data.tokenization import RowCounts, RowTokenizer
from qvera.utils.errors import InputError
from tests.data.conftest import MakeTokenizer

Write = Callable[..., str]

WORDS = st.lists(
    st.sampled_from(["say", "colour", "yes,", "calling\n\n", "é", "🙂", "#", "12"]), min_size=1, max_size=30
).map(" ".join)
CHATS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
LENGTHS = st.none() | st.integers(1, 40)


@pytest.fixture(params=["BOS", "no BOS"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer() if request.param == "BOS" else make_tokenizer(bos=None)


def messages(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    turns = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def examples(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **keys: Any) -> tuple[list[Example], RowCounts]:
    """What one row becomes under these keys of ``data``."""
    raw, section = RawRow(row, "rows.jsonl:1"), DataSection(path="rows.jsonl", **keys)
    row_format = detect_format(raw)
    template = resolve_template("plain" if row_format.name == "text" else "chatml", tokenizer)
    encoder = RowTokenizer(section, Encoder(tokenizer), template, row_format)
    return encoder.encode([parse_row(raw, row_format)])


def targets(rows: list[Example]) -> list[int]:
    return [token for row in rows for token in row.input_ids[row.trained].tolist()]


def steps(rows: list[Example]) -> list[tuple[int, int]]:
    """Each trained token after the token that it is read from."""
    return [
        (int(row.input_ids[i - 1]), int(row.input_ids[i])) for row in rows for i in np.flatnonzero(row.trained).tolist()
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=CHATS.map(messages) | WORDS.map(lambda text: {"text": text}),
    size=st.integers(8, 40),
    source=LENGTHS,
    target=LENGTHS,
    train_on=st.sampled_from(["assistant", "last", "all"]),
)
def test_the_parts_of_a_split_row_train_each_of_its_tokens_once(
    row: dict[str, Any],
    size: int,
    source: int | None,
    target: int | None,
    train_on: str,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    keys = {"max_source_length": source, "max_target_length": target, "train_on": train_on}
    (whole,), unsplit = examples(row, tokenizer, max_length=100_000, **keys)
    parts, counts = examples(row, tokenizer, max_length=size, too_long="split", **keys)
    assert targets(parts) == targets([whole])
    assert all(len(part.input_ids) <= size and part.trained.any() and not part.trained[0] for part in parts)
    if tokenizer.bos_token_id is not None and whole.input_ids[0] == tokenizer.bos_token_id:
        assert all(part.input_ids[0] == tokenizer.bos_token_id for part in parts)
    else:
        assert steps(parts) == steps([whole])
    is_split = len(whole.input_ids) > size
    assert (counts.split_rows, counts.split_parts) == ((1, len(parts)) if is_split else (0, 0))
    # the parts lose nothing beyond what the row does without a split
    assert (counts.truncated_rows, counts.truncated_tokens) == (unsplit.truncated_rows, unsplit.truncated_tokens)


@pytest.mark.parametrize("source", [None, 2])
def test_a_cut_at_the_start_keeps_the_bos_of_a_row_that_has_one_left(
    source: int | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    row, keys = messages([("question " * 20, "yes " * 30)]), {"max_source_length": source}
    (whole,), _ = examples(row, tokenizer, max_length=100_000, **keys)
    (cut,), counts = examples(row, tokenizer, max_length=12, too_long="cut-start", **keys)
    ids = whole.input_ids.tolist()
    with_bos = ids[0] == tokenizer.bos_token_id
    assert with_bos == (
        tokenizer.bos_token_id is not None and source is None
    )  # two tokens are the answer's heading alone
    assert cut.input_ids.tolist() == ids[:with_bos] + ids[-12 + with_bos :]
    assert counts.truncated_rows == 1


def test_a_row_whose_prompt_is_cut_off_is_text_without_one(make_tokenizer: MakeTokenizer) -> None:
    row = messages([("question", "yes " * 30)])
    (cut,), _ = examples(row, make_tokenizer(bos=None), max_length=8, too_long="cut-start")
    assert (len(cut.prompt_ids), cut.prompt_text, cut.reference) == (0, "", None)
    assert not cut.is_labelled


@pytest.mark.parametrize("too_long", ["split", "drop"])
def test_what_a_long_row_lost_to_its_source_and_target_length_is_counted(
    too_long: str, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = {"prompt": "question " * 60, "completion": " yes" * 60}
    path = write([long, {"prompt": "q", "completion": " yes"}])
    whole, _short = build_datasets(DataSection(path=path, max_length=100_000), tokenizer).train
    first = int(np.argmax(whole.trained))
    after = len(whole.input_ids) - first
    for keys, lost in (
        ({"max_target_length": 12}, after - 12),
        ({"max_source_length": 30}, first - 30),
        ({"max_source_length": 30, "max_target_length": 12}, first - 30 + after - 12),
        ({}, 0),
    ):
        data = build_datasets(DataSection(path=path, max_length=40, too_long=too_long, **keys), tokenizer)
        assert lost >= 0
        assert data.stats.truncated_tokens == lost
        assert data.stats.truncated_rows == bool(lost)
        left = [row for row in data.train if row.source == whole.source]
        if too_long == "drop":
            assert left == []
            assert data.stats.dropped == {"longer than data.max_length (40)": [whole.source]}
        else:
            expected = min(keys.get("max_target_length", after), after)
            assert sum(row.trained_tokens for row in left) == expected
            assert data.stats.split_rows == 1


def test_rows_that_their_own_lengths_make_short_enough_are_neither_split_nor_dropped(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write([{"prompt": "question " * 60, "completion": " yes" * 60}])
    for too_long in ("split", "drop"):
        section = DataSection(path=path, max_length=40, too_long=too_long, max_source_length=25, max_target_length=15)
        data = build_datasets(section, tokenizer)
        assert len(data.train[0].input_ids) == 40
        assert data.stats.truncated_rows == 1
        assert data.stats.split_rows == data.stats.dropped_rows == 0


def test_dropping_every_row_for_its_length_is_said_as_that(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([{"text": "word " * 99}, {"text": "more " * 99}])
    section = DataSection(path=path, max_length=8, too_long="drop")
    with pytest.raises(InputError) as failure:
        build_datasets(section, tokenizer)
    said = str(failure.value)
    assert said.startswith(f"{path}: no training row is left: all 2 are longer than data.max_length (8)")
    assert "data.too_long is drop" in said
    assert "Raise data.max_length" in said
    assert "trained token" not in said
    assert "data.max_source_length below" not in said
    section = section.replace(too_long="split")  # one of the ways out that it names
    assert build_datasets(section, tokenizer).train
