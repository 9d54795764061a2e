"""From a recipe's data section to examples: splits, truncation, counts, what is refused, what is shown."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from qvera.config.schema import DataSection, parse_recipe
from qvera.data import Datasets, build_datasets, print_preflight
from qvera.data.dataset import length_histogram
from qvera.data.source_rows import hold_out
from qvera.utils.errors import InputError
from tests.data.conftest import MakeTokenizer

Write = Callable[..., str]


def pairs(count: int, answer: str = "yes") -> list[dict[str, str]]:
    return [{"prompt": f"question {i} ->", "completion": f" {answer} {i}"} for i in range(count)]


def words(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(n=st.integers(2, 200), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**64))
def test_hold_out_leaves_rows_of_both_kinds(n: int, fraction: float, seed: int) -> None:
    held = hold_out(n, fraction, seed)
    assert len(held) == n
    assert held.any()
    assert not held.all()
    assert np.array_equal(held, hold_out(n, fraction, seed))
    assert abs(int(held.sum()) - n * fraction) <= 1


def test_hold_out_follows_the_seed() -> None:
    assert not np.array_equal(hold_out(100, 0.1, 0), hold_out(100, 0.1, 1))
    assert not hold_out(100, 0.0, 0).any()


def test_training_and_held_out_rows_are_the_file(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(pairs(30))
    data = build_datasets(DataSection(path=path, eval_fraction=0.3), base_tokenizer)
    numbers = [[int(e.source.rpartition(":")[2]) for e in rows] for rows in (data.train, data.eval)]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 31))
    assert all(part == sorted(part) for part in numbers)


def test_eval_fraction_eval_path_and_limit(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    path, other = write(pairs(10), "a.jsonl"), write([{"instruction": "i", "output": "o"}], "b.jsonl")
    split = build_datasets(DataSection(path=path, eval_fraction=0.2), base_tokenizer)
    assert (len(split.train), len(split.eval)) == (8, 2)
    limited = build_datasets(DataSection(path=path, limit=3, eval_path=other), base_tokenizer)
    assert [e.source for e in limited.train] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert limited.eval[0].reference == "o"
    with pytest.raises(InputError, match="data.eval_path: .* is data.path too"):
        build_datasets(DataSection(path=path, eval_path=path), base_tokenizer)
    with pytest.raises(InputError, match="is the only row, so none can be held out"):
        build_datasets(DataSection(path=path, limit=1, eval_fraction=0.5), base_tokenizer)


def test_held_out_rows_that_are_also_trained_on_are_counted(
    write: Write, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build_datasets(
        DataSection(path=write(pairs(4), "a.jsonl"), eval_path=write(pairs(6)[3:], "b.jsonl")), base_tokenizer
    )
    assert data.stats.repeated_rows == 1


def test_truncation_at_the_end(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([{"prompt": "question", "completion": " yes" * 40}, {"prompt": "q", "completion": " yes"}])
    whole = build_datasets(DataSection(path=path), base_tokenizer)
    cut = build_datasets(DataSection(path=path, max_length=20), base_tokenizer)
    assert cut.train[0].input_ids.tolist() == whole.train[0].input_ids[:20].tolist()
    assert cut.stats.truncated_rows == 1
    assert cut.stats.truncated_tokens == len(whole.train[0].input_ids) - 20
    assert cut.stats.tokens == 20 + len(whole.train[1].input_ids)
    assert cut.stats.dropped_rows == 0


def test_rows_without_a_trained_token_left_are_dropped_and_named(
    write: Write, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write([{"prompt": "long question " * 30, "completion": " yes"}, {"prompt": "q", "completion": " yes"}])
    data = build_datasets(DataSection(path=path, max_length=16), base_tokenizer)
    assert [e.source for e in data.train] == [f"{path}:2"]
    assert data.stats.dropped == {"cut to length, without a trained token": [f"{path}:1"]}
    assert data.stats.to_dict()["dropped_rows"] == 1
    assert data.stats.truncated_rows == 1
    long = write([{"prompt": "x " * 99, "completion": "y"}])
    with pytest.raises(InputError, match=r"no training row is left: .* within data\.max_length \(8\)"):
        build_datasets(DataSection(path=long, max_length=8), base_tokenizer)


def test_a_long_row_loses_its_start_where_the_recipe_says_so(
    write: Write, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write([{"prompt": "question " * 30, "completion": " yes" * 9}])
    (whole,) = build_datasets(DataSection(path=path), base_tokenizer).train
    data = build_datasets(DataSection(path=path, max_length=20, too_long="cut-start"), base_tokenizer)
    (cut,) = data.train
    assert base_tokenizer.bos_token_id == cut.input_ids[0]  # the BOS stays
    assert cut.input_ids[1:].tolist() == whole.input_ids[-19:].tolist()
    assert cut.trained[1:].tolist() == whole.trained[-19:].tolist()
    assert cut.prompt_ids.tolist() == cut.input_ids[: len(cut.prompt_ids)].tolist()
    assert cut.reference == whole.reference
    assert data.stats.truncated_tokens == len(whole.input_ids) - 20
    assert data.stats.dropped_rows == 0
    (inside,) = build_datasets(DataSection(path=path, max_length=8, too_long="cut-start"), base_tokenizer).train
    assert inside.trained[1:].all()
    assert not inside.trained[0]


@pytest.mark.parametrize("size", [8, 20, 33])
def test_the_parts_of_a_split_row_are_the_row(write: Write, base_tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    path = write([{"text": "one two three four five six seven " * 9}, {"text": "short"}])
    whole = build_datasets(DataSection(path=path), base_tokenizer).train[0]
    data = build_datasets(DataSection(path=path, max_length=size, too_long="split"), base_tokenizer)
    *parts, short = data.train
    assert short.source == f"{path}:2"
    assert all(part.source == f"{path}:1" for part in parts)
    assert all(part.input_ids[0] == base_tokenizer.bos_token_id and len(part.input_ids) <= size for part in parts)
    joined = np.concatenate([whole.input_ids[:1], *(part.input_ids[1:] for part in parts)])
    assert joined.tolist() == whole.input_ids.tolist()
    assert sum(part.trained_tokens for part in parts) == whole.trained_tokens  # each token of the text, once
    assert (data.stats.split_rows, data.stats.split_parts) == (1, len(parts))
    assert data.stats.truncated_rows == 0


def test_parts_without_a_trained_token_are_left_out(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([{"prompt": "question " * 30, "completion": " yes" * 9}])
    (whole,) = build_datasets(DataSection(path=path), base_tokenizer).train
    data = build_datasets(DataSection(path=path, max_length=16, too_long="split"), base_tokenizer)
    assert all(part.trained.any() and part.reference is None for part in data.train)
    assert sum(part.trained_tokens for part in data.train) == whole.trained_tokens
    assert len(data.train) == data.stats.split_parts < len(whole.input_ids) // 15


def test_long_rows_are_dropped_where_the_recipe_says_so(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([{"text": "word " * 30}, {"text": "short"}])
    data = build_datasets(DataSection(path=path, max_length=16, too_long="drop"), base_tokenizer)
    assert [e.source for e in data.train] == [f"{path}:2"]
    assert data.stats.dropped == {"longer than data.max_length (16)": [f"{path}:1"]}
    assert data.stats.truncated_rows == 0


def test_source_and_target_lengths(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = base_tokenizer
    path = write([{"instruction": "word " * 200, "output": "yes " * 100}])
    section = DataSection(path=path, max_source_length=60, max_target_length=25)
    example = build_datasets(section, tokenizer).train[0]
    first = int(np.argmax(example.trained))
    assert (first, len(example.input_ids) - first) == (60, 25)
    assert example.trained[first:].all()
    assert not example.trained[:first].any()
    source = tokenizer.decode(example.input_ids[:first], clean_up_tokenization_spaces=False)
    # The middle of the instruction goes; BOS, the introduction and the heading of the answer stay.
    assert source.startswith("<s>Below is an instruction")
    assert source.endswith("\n\n### Response:\n")
    assert example.prompt_ids.tolist() == example.input_ids[:first].tolist()
    whole = build_datasets(DataSection(path=path, max_length=100_000), tokenizer)
    truncated = build_datasets(section, tokenizer).stats
    assert truncated.truncated_tokens == whole.stats.tokens - 85
    assert truncated.truncated_rows == 1
    exact = DataSection(
        path=path, max_length=10_000, max_source_length=len(whole.train[0].prompt_ids), max_target_length=10_000
    )
    assert build_datasets(exact, tokenizer).stats.truncated_rows == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "completion": ""}], r":1: 1 row with no token to train on: its answer"),
        ([{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": " \n"}], r":2: 1 row with no token"),
        ([{"text": "a"}, {"text": ""}, {"text": " "}], r":2, .*:3: 2 rows with no token to train on"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "there is no assistant turn to train"),
        (
            [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}],
            "no token to train on",
        ),
    ],
)
def test_rows_with_nothing_to_train(
    rows: list[Any], message: str, write: Write, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match=message):
        build_datasets(DataSection(path=write(rows)), base_tokenizer)


def test_many_hollow_rows_make_one_short_message(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([{"prompt": "p", "completion": "" if i % 2 else "c"} for i in range(600)])
    with pytest.raises(InputError, match=r":2, .*:4, .*:6, .*:8, .*:10 and 295 more: 300 rows") as failure:
        build_datasets(DataSection(path=path), base_tokenizer)
    assert len(str(failure.value)) < 1000


def test_tokenizer_without_eos_or_pad(write: Write, make_tokenizer: MakeTokenizer) -> None:
    path = write(pairs(2))
    with pytest.raises(InputError, match="no end-of-sequence token"):
        build_datasets(DataSection(path=path), make_tokenizer(eos=None))
    tokenizer = make_tokenizer(pad=None)
    size = len(tokenizer)
    data = build_datasets(DataSection(path=path), tokenizer)
    assert data.pad_id == tokenizer.eos_token_id
    assert data.stats.pads_with_eos
    assert len(tokenizer) == size
    assert tokenizer.pad_token is None
    assert "padded with eos" in preflight(data, tokenizer)


def test_spelled_special_tokens_are_counted(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([{"prompt": "what is </s>?", "completion": "an end"}, {"prompt": "p", "completion": "c"}])
    data = build_datasets(DataSection(path=path), base_tokenizer)
    assert data.stats.special_token_rows == 1
    assert "which are read as those tokens: 1" in preflight(data, base_tokenizer)


def test_many_rows_are_in_file_order(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(pairs(2100))
    out = io.StringIO()
    data = build_datasets(DataSection(path=path), base_tokenizer, Console(file=out, force_terminal=True, width=100))
    assert [e.source for e in data.train] == [f"{path}:{n}" for n in range(1, 2101)]
    assert "Tokenizing" in out.getvalue()


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_histogram_covers_every_row(lengths: list[int]) -> None:
    edges, counts = length_histogram(np.array(lengths))
    assert len(edges) == len(counts) + 1 <= 11
    assert len(set(np.diff(edges))) == 1
    assert counts == [sum(low <= t < high for t in lengths) for low, high in zip(edges, edges[1:], strict=False)]
    assert sum(counts) == len(lengths)


def preflight(data: Datasets, tokenizer: PreTrainedTokenizerFast, width: int = 1000) -> str:
    out = io.StringIO()
    print_preflight(data, tokenizer, Console(file=out, width=width))
    return out.getvalue()


def test_preflight_shows_what_is_trained(write: Write, smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "[red] hi", "completion": f"yes [/b] {i}", "id": i} for i in range(5)]
    path = write([*rows, {"prompt": "long " * 300, "completion": "never", "id": 9}])
    data = build_datasets(DataSection(path=path, eval_fraction=0.5, max_length=100), smollm2_tokenizer)
    shown = preflight(data, smollm2_tokenizer)
    assert "prompt-completion, template: the tokenizer's own" in shown
    assert f"{data.stats.train_rows} to train on, {data.stats.eval_rows} held out" in shown
    assert f"{data.stats.trained_tokens} tokens, {data.stats.trained_tokens / data.stats.tokens:.1%}" in shown
    assert "Not read   columns id" in shown
    assert f"Dropped, cut to length, without a trained token: {path}:6" in shown
    assert "█" in shown
    # Two rows, with the mark that survives a log file; brackets in the data are not read as colours.
    for example in data.train[:2]:
        assert f"⟦{example.reference}<|im_end|>⟧" in shown
    assert shown.count("<|im_end|>⟧") == 2
    assert "[red] hi<|im_end|>" in shown


def test_preflight_shortens_long_rows(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    data = build_datasets(DataSection(path=write([{"text": "word " * 900}]), max_length=4000), base_tokenizer)
    shown = preflight(data, base_tokenizer)
    assert " tokens … " in shown
    assert len(shown) < 4000


def test_a_tokenizer_without_chat_template_is_warned_about(
    write: Write, base_tokenizer: PreTrainedTokenizerFast, smollm2_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(pairs(2))
    warning = "has no chat template, so rows are written with the template plain. Set data.template"
    assert warning in preflight(build_datasets(DataSection(path=path), base_tokenizer), base_tokenizer)
    for section, tokenizer in (
        (DataSection(path=path, template="plain"), base_tokenizer),
        (DataSection(path=path), smollm2_tokenizer),
        (DataSection(path=write([{"text": "a b"}], "text.jsonl")), base_tokenizer),
    ):
        assert "no chat template" not in preflight(build_datasets(section, tokenizer), tokenizer)


def test_labels_are_trained_by_their_names(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([{"text": "fine", "label": 1}, {"text": "bad", "label": 0}])
    columns = {"prompt": "text", "completion": "label"}
    section = DataSection(path=path, columns=columns, label_names=["negative", "positive"])
    assert [row.reference for row in build_datasets(section, base_tokenizer).train] == ["positive", "negative"]


def test_a_negative_number_of_rows_to_show_is_refused(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    data = build_datasets(DataSection(path=write(pairs(3))), base_tokenizer)
    with pytest.raises(InputError, match="--rows -3: takes a whole number of rows to show"):
        data.first_rows(-3)


def test_reading_rows_takes_no_torch() -> None:
    code = "import sys, qvera.data as data\nassert 'torch' not in sys.modules\nassert data.Example and data.DataStats"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_held_out_rows_may_be_another_split_of_a_hub_dataset(
    monkeypatch: pytest.MonkeyPatch, base_tokenizer: Any
) -> None:
    import datasets

    def load_dataset(path: str, split: str, **_: object) -> datasets.Dataset:
        return datasets.Dataset.from_list(pairs({"train": 6, "validation": 3}[split], f"{path} {split}"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = build_datasets(DataSection(path="owner/name", eval_split="validation", limit=4), base_tokenizer)
    assert [row.reference for row in data.eval] == [f" owner/name validation {n}" for n in range(3)]
    assert data.eval[0].source == "owner/name[validation] row 1"
    assert len(data.train) == 4
    data = build_datasets(DataSection(path="a/a", eval_path="b/b", eval_split="validation"), base_tokenizer)
    assert [row.reference for row in data.eval] == [f" b/b validation {n}" for n in range(3)]
    mixed = DataSection(path="a/a", eval_split="validation", mixture=[{"path": "b/b"}])  # type: ignore[list-item]
    assert [row.reference for row in build_datasets(mixed, base_tokenizer).eval] == [
        f" a/a validation {n}" for n in range(3)
    ]


def test_a_split_of_held_out_rows_must_be_another_one_of_a_hub_dataset(write: Write, base_tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"data\.eval_split: 'test' has a meaning for hub datasets only"):
        build_datasets(DataSection(path=write(pairs(4)), eval_split="test"), base_tokenizer)
    with pytest.raises(InputError, match=r"data\.split: 'validation' has a meaning for hub datasets only"):
        build_datasets(DataSection(path=write(pairs(4)), split="validation"), base_tokenizer)
    with pytest.raises(InputError, match=r"data\.label_names: names the labels of a column of answers, and .*:1 has"):
        chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "1"}]}
        build_datasets(DataSection(path=write([chat]), label_names=["no", "yes"]), base_tokenizer)
    with pytest.raises(InputError, match=r"data\.label_names: names a label twice"):
        parse_recipe({"model": "m", "data": {"path": "a/b", "label_names": ["x", "y", "y"]}}, "r.yaml")
    with pytest.raises(InputError, match=r"eval_split: is data\.split too \(train\), so nothing would be held out"):
        parse_recipe({"model": "m", "data": {"path": "a/b", "eval_split": "train"}}, "r.yaml")
    with pytest.raises(InputError, match=r"eval_fraction: held-out rows already come from data\.eval_split"):
        parse_recipe({"model": "m", "data": {"path": "a/b", "eval_split": "x", "eval_fraction": 0.5}}, "r.yaml")
