"""Several sources in one run, each with its own format, template and weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from qvera.config.schema import DataSection, DataSource, parse_recipe
from qvera.data import build_datasets, print_preflight
from qvera.evaluation.load import template_of
from qvera.utils.errors import InputError

Write = Callable[..., str]


@pytest.fixture
def mixed(write: Write) -> DataSection:
    """Ten prompt-completion rows, and twice over six Alpaca rows of another template."""
    pairs = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(10)]
    alpaca = [{"instruction": f"do {i}", "output": f"done {i}"} for i in range(6)]
    more = DataSource(path=write(alpaca, "alpaca.jsonl"), template="chatml", weight=2.0)
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
    assert sum("<|im_start|>" in text for text in texts) == 12
    assert sum("question" in text for text in texts) == 5
    assert data.stats.format == "prompt-completion, alpaca"
    assert data.stats.train_rows == 17
    assert data.stats.to_dict()["sources"] == [
        {"path": first, "weight": 0.5, "rows": 10, "taken": 5, "format": "prompt-completion", "template": "plain"},
        {"path": second, "weight": 2.0, "rows": 6, "taken": 12, "format": "alpaca", "template": "chatml"},
    ]


def test_the_seed_chooses_the_rows(mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast) -> None:
    def chosen(seed: int) -> list[str]:
        return [e.source for e in build_datasets(mixed.replace(seed=seed), base_tokenizer).train]

    assert chosen(3) == chosen(3)
    assert len({tuple(chosen(seed)) for seed in range(6)}) > 1


def test_every_source_holds_rows_out_and_none_of_them_is_trained(
    mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build_datasets(mixed.replace(eval_fraction=0.34, weight=3.0), base_tokenizer)
    held, trained = {e.source for e in data.eval}, {e.source for e in data.train}
    assert len(held) == 3 + 2
    assert not held & trained
    assert Counter(e.source for e in data.train).most_common()[0][1] == 3
    assert len(trained) == 7 + 4


def test_a_small_weight_leaves_at_least_one_row(mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_datasets(mixed.replace(weight=0.001), base_tokenizer).stats.sources[0].taken == 1


def test_the_preflight_lists_the_sources(mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast) -> None:
    console = Console(record=True, width=200)
    print_preflight(build_datasets(mixed, base_tokenizer), base_tokenizer, console)
    said = console.export_text()
    assert f"5 from {mixed.path} (10 x 0.5): prompt-completion, template: plain" in said
    assert f"12 from {mixed.mixture[0].path} (6 x 2): alpaca, template: chatml" in said
    assert "⟦ answer" in said
    assert "⟦done 0" in said


def test_rows_to_look_at_are_of_each_source_in_turn_and_repeats_come_last(
    mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    mixed.mixture.append(DataSource(path=mixed.mixture[0].path, limit=1, template="alpaca", weight=3.0))
    data = build_datasets(mixed, base_tokenizer)
    everything = [e.source for e in data.train]
    first, second, third = everything[:5], everything[5:17], everything[17:]
    shown = [e.source for e in data.first_rows(100)]
    assert shown[:6] == [first[0], second[0], third[0], first[1], second[1], first[2]]
    assert shown[:12] == [*shown[:6], second[2], first[3], second[3], first[4], second[4], second[5]]
    assert Counter(shown) == Counter(everything)
    for count in (0, 1, 3, 12):
        assert [e.source for e in data.first_rows(count)] == shown[:count]


def test_rows_to_look_at_of_one_source_are_its_first(
    mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build_datasets(mixed.replace(mixture=[], weight=1.5), base_tokenizer)
    for count in (1, 4, 12, 99):
        assert [e.source for e in data.first_rows(count)] == [e.source for e in data.train[:count]]


def test_auto_is_what_the_first_source_was_trained_with(
    mixed: DataSection, base_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    stats = build_datasets(mixed, base_tokenizer).stats
    assert (stats.format, stats.template) == ("prompt-completion, alpaca", "plain, chatml")
    (tmp_path / "run.json").write_text(json.dumps({"data": stats.to_dict()}))
    recipe = parse_recipe({"model": "m", "data": {"path": mixed.path}}, "x.yaml")
    assert template_of(recipe, tmp_path) == "plain"


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([{"path": "b", "wieght": 2}], r"data\.mixture\.0\.wieght: unknown key\. Did you mean `weight`\?"),
        ([{"path": "b", "weight": 0}], r"data\.mixture\.0\.weight: should be greater than 0, got 0"),
        ([{"path": "a"}, {"format": "text"}], r"data\.mixture\.1\.path: is missing"),
        ("b.jsonl", r"data\.mixture: should be a valid list, got 'b\.jsonl'"),
        (["b.jsonl"], r"data\.mixture\.0: should be a mapping of keys, got 'b\.jsonl'"),
        ([{"path": "b", "max_length": 9}], r"data\.mixture\.0\.max_length: unknown key\."),
    ],
)
def test_a_wrong_mixture_is_named_by_key(mixture: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_recipe({"model": "m", "data": {"path": "a", "mixture": mixture}}, "x.yaml")
