"""Rows that say which answers are better: what they become, and what is wrong with those that can't be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvera.config.schema import DataSection
from qvera.data import Datasets, Encoder, Example, Turn, build_datasets, decode
from qvera.utils.errors import InputError
from tests.conftest import small_tokenizer


def read(directory: Path, rows: list[dict[str, Any]], format: str = "preference", **keys: Any) -> Datasets:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_datasets(DataSection(path=str(path), format=format, **keys), small_tokenizer())


def texts(example: Example) -> list[str]:
    """Prompt, chosen and rejected as text."""
    tokenizer, start = small_tokenizer(), example.answer_start
    assert example.rejected_ids is not None
    parts = example.input_ids[:start], example.input_ids[start:], example.rejected_ids
    return [decode(tokenizer, ids.tolist()) for ids in parts]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PROMPT = "<|im_start|>user\nsay red<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": "say red", "chosen": "red", "rejected": "blue"}, {}),
        ({"q": "say red", "good": "red", "rejected": "blue"}, {"columns": {"prompt": "q", "chosen": "good"}}),
        (
            {
                "prompt": [turn("user", "say red")],
                "chosen": [turn("assistant", "red")],
                "rejected": [turn("assistant", "blue")],
            },
            {},
        ),
        (
            {
                "chosen": [turn("user", "say red"), turn("assistant", "red")],
                "rejected": [turn("user", "say red"), turn("assistant", "blue")],
            },
            {},
        ),
    ],
    ids=["texts", "renamed columns", "messages", "prompt within the messages"],
)
def test_a_pair_has_the_prompt_that_chat_has(row: dict[str, Any], keys: dict[str, Any], tmp_path: Path) -> None:
    datasets = read(tmp_path, [row], **keys)
    (pair,) = datasets.train
    assert texts(pair) == [PROMPT, "red<|im_end|>", "blue<|im_end|>"]
    text, starts = datasets.template.prompt([Turn("user", "say red")])
    asked = Encoder(small_tokenizer()).encode_prompt(text, starts)
    assert pair.input_ids[: pair.answer_start].tolist() == pair.prompt_ids.tolist() == asked


def test_earlier_answers_of_a_prompt_are_not_compared(tmp_path: Path) -> None:
    prompt = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    (pair,) = read(tmp_path, [{"prompt": prompt, "chosen": "d", "rejected": "e"}], system="be kind").train
    shown, chosen, rejected = texts(pair)
    assert shown.startswith("<|im_start|>system\nbe kind<|im_end|>") and "assistant\nb<|im_end|>" in shown
    assert (chosen, rejected) == ("d<|im_end|>", "e<|im_end|>")


def test_lengths_and_counts_are_those_of_both_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b" * n} for n in (3, 40)]
    datasets = read(tmp_path, rows)
    for pair, length, both in zip(datasets.train, datasets.train.lengths, datasets.train.all_tokens, strict=True):
        ids = [example.input_ids for _, example in pair.shown()]
        assert length == max(map(len, ids)) and both == sum(map(len, ids)) == sum(pair.row_tokens)
        assert [word for word, _ in pair.shown()] == ["chosen", "rejected"]
    assert datasets.stats.tokens == sum(sum(pair.row_tokens) for pair in datasets.train)
    assert len(np.unique(datasets.train.ids_hash)) == 2  # they differ in the rejected answer only


def test_max_length_cuts_each_answer_and_leaves_out_a_pair_without_one(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "chosen": "a", "rejected": "b" * 70},  # the rejected answer alone is too long
        {"prompt": "x" * 90, "chosen": "a", "rejected": "b"},  # no answer is left
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "x", "chosen": "a", "rejected": "b"},
    ]
    cut = read(tmp_path, rows, max_length=60)
    assert [max(pair.row_tokens) for pair in cut.train] == [60, 12]
    dropped = {reason: [source.rsplit(":")[-1] for source in lost] for reason, lost in cut.stats.dropped.items()}
    assert dropped == {"cut to length, without a trained token": ["2"], "chosen and rejected are the same": ["3"]}
    whole = read(tmp_path, rows, max_length=60, too_long="drop")
    assert [pair.source[-1] for pair in whole.train] == ["4"]


def test_where_no_pair_is_left_the_error_says_why(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "chosen": "same", "rejected": "same"}] * 2
    with pytest.raises(InputError, match=r"all 2 are left out: chosen and rejected are the same \(2\)\. Fix the rows"):
        read(tmp_path, rows)


def test_judged_answers_keep_their_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "completion": "a", "label": label} for label in (True, False, 1, "False")]
    examples = list(read(tmp_path, rows, "unpaired-preference").train)
    assert [example.desirable for example in examples] == [True, False, True, False]
    assert [word for example in examples for word, _ in example.shown()] == ["good answer", "bad answer"] * 2
    assert [example.reference for example in examples] == ["a", None, "a", None]


PAIR = {"prompt": "x", "chosen": "a", "rejected": "b"}
JUDGED = {"prompt": "x", "completion": "a", "label": True}


@pytest.mark.parametrize(
    ("row", "format", "said"),
    [
        (PAIR | {"chosen": None}, "preference", "rows.jsonl:2: chosen must be text"),
        (PAIR | {"rejected": " "}, "preference", "rows.jsonl:2: rejected is empty"),
        (PAIR | {"chosen": [turn("user", "a")]}, "preference", "chosen must be one assistant turn"),
        (PAIR | {"prompt": [turn("assistant", "a")]}, "preference", "the prompt must end with a turn that asks"),
        ({"chosen": "a", "rejected": "b"}, "preference", "rows.jsonl:2: chosen must be a list of turns"),
        (
            JUDGED | {"label": "maybe"},
            "unpaired-preference",
            "rows.jsonl:2: label must be true (a good answer) or false",
        ),
        ({"prompt": "x", "completion": "a"}, "unpaired-preference", "the column 'label' is missing here"),
    ],
)
def test_a_row_that_can_not_be_used_is_named(row: dict[str, Any], format: str, said: str, tmp_path: Path) -> None:
    good = PAIR if format == "preference" else JUDGED
    with pytest.raises(InputError, match="rows.jsonl:2") as error:
        read(tmp_path, [good, row], format)
    assert said in str(error.value)


def test_pairs_are_not_taken_for_rows_to_imitate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Set training.objective: dpo \(or orpo\)"):
        read(tmp_path, [{"prompt": "x", "chosen": "a", "rejected": "b"}], "auto")
