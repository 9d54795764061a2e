"""Several sources in one run, each with its own format, template and weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from qvera.data import build_datasets, print_preflight
from qvera.errors import InputError
from qvera.recipe import DataSection, Source, parse_recipe

Write = Callable[..., str]


@pytest.fixture
def mixed(write: Write) -> DataSection:
    """Ten prompt-completion rows, and twice over six Alpaca rows of another template."""
    pairs = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(10)]
    alpaca = [{"instruction": f"do {i}", "output": f"done {i}"} for i in range(6)]
    more = Source(path=write(alpaca, "alpaca.jsonl"), template="chatml", weight=2.0)
    return DataSection(path=write(pairs, "pairs.jsonl"), weight=0.5, mixture=[more], seed=3)


def test_each_source_has_its_weight_format_and_template(
    mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build_datasets(mixed, base_tokenizer)
    texts = [base_tokenizer.decode(e.input_ids) for e in data.train]
    seen = Counter(e.source for e in data.train)
    first, second = mixed.path, mixed.mixture[0].path
    assert sorted(seen[f"{second}:{i}"] for i in range(1, 7)) == [2] * 6
    halves = [seen[f"{first}:{i}"] for i in range(1, 11)]
    assert sorted(halves) == [0] * 5 + [1] * 5
    assert sum("<|im_start|>" in text for text in texts) == 12 and sum("question" in text for text in texts) == 5
    assert data.stats.format == "prompt-completion, alpaca" and data.stats.train_rows == 17
    assert data.stats.to_dict()["sources"] == [
        {"path": first, "weight": 0.5, "rows": 10, "taken": 5},
        {"path": second, "weight": 2.0, "rows": 6, "taken": 12},
    ]


def test_the_seed_chooses_the_rows(mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast) -> None:
    def chosen(seed: int) -> list[str]:
        mixed.seed = seed
        return [e.source for e in build_datasets(mixed, base_tokenizer).train]

    assert chosen(3) == chosen(3)
    assert len({tuple(chosen(seed)) for seed in range(6)}) > 1


def test_every_source_holds_rows_out_and_none_of_them_is_trained(
    mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    mixed.eval_fraction, mixed.weight = 0.34, 3.0
    data = build_datasets(mixed, base_tokenizer)
    held, trained = {e.source for e in data.eval}, {e.source for e in data.train}
    assert len(held) == 3 + 2 and not held & trained
    assert Counter(e.source for e in data.train).most_common()[0][1] == 3
    assert len(trained) == 7 + 4


def test_a_small_weight_leaves_at_least_one_row(mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast) -> None:
    mixed.weight = 0.001
    assert build_datasets(mixed, base_tokenizer).stats.sources[0].taken == 1


def test_the_preflight_lists_the_sources(mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast) -> None:
    console = Console(record=True, width=200)
    print_preflight(build_datasets(mixed, base_tokenizer), base_tokenizer, console)
    said = console.export_text()
    assert f"5 from {mixed.path} (10 x 0.5)" in said and f"12 from {mixed.mixture[0].path} (6 x 2)" in said


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([{"path": "b", "wieght": 2}], r"data\.mixture\.0\.wieght: unknown key\. Did you mean `weight`\?"),
        ([{"path": "b", "weight": 0}], r"data\.mixture\.0\.weight: takes a number > 0, got 0"),
        ([{"path": "a"}, {"format": "text"}], r"data\.mixture\.1\.path: is missing"),
        ("b.jsonl", r"data\.mixture: takes a list of mappings of keys, got 'b\.jsonl'"),
        (["b.jsonl"], r"data\.mixture\.0: takes a mapping of keys, got 'b\.jsonl'"),
        ([{"path": "b", "max_length": 9}], r"data\.mixture\.0\.max_length: unknown key\."),
    ],
)
def test_a_wrong_mixture_is_named_by_key(mixture: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_recipe({"model": "m", "data": {"path": "a", "mixture": mixture}}, "x.yaml")
