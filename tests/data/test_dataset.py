"""From a recipe's data section to examples: splits, truncation, counts, mixtures, what is refused, what is shown."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qvera.config.schema import parse_recipe
from qvera.config.sections import DataSection, DataSource
from qvera.data import Datasets, build_datasets, data_sha256, data_warnings, print_preflight
from qvera.data import rows as rows_module
from qvera.data.dataset import length_histogram
from qvera.data.labelled import new_labels, rows_by_label
from qvera.data.rows import SCHEMA, Rows
from qvera.evaluation.load import template_name
from qvera.evaluation.report.pages import preview_page
from qvera.utils.errors import InputError
from tests.data.conftest import MakeTokenizer, Read, Write
from tests.data.rows import messages_of


def pairs(count: int, answer: str = "yes") -> list[dict[str, str]]:
    return [{"prompt": f"question {i} ->", "completion": f" {answer} {i}"} for i in range(count)]


def test_eval_fraction_eval_path_and_limit(read: Read, write: Write) -> None:
    split = read(pairs(30), eval_fraction=0.3)
    numbers = [[int(e.source.rpartition(":")[2]) for e in rows] for rows in (split.train, split.eval)]
    assert (len(split.train), len(split.eval)) == (21, 9)
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 31))
    assert all(part == sorted(part) for part in numbers)
    limited = read(pairs(10), limit=3, eval_path=write([{"instruction": "i", "output": "o"}], "b.jsonl"))
    path = limited.stats.sources[0].path
    assert [e.source for e in limited.train] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert limited.eval[0].reference == "o"
    with pytest.raises(InputError, match="data.eval_path: .* is data.path too"):
        read(pairs(10), eval_path=path)
    with pytest.raises(InputError, match="is the only row, so none can be held out"):
        read(pairs(10), limit=1, eval_fraction=0.5)
    assert "held out than trained on: 9 and 1." in "\n".join(data_warnings(read(pairs(10), eval_fraction=0.999).stats))
    assert read(pairs(4), eval_path=write(pairs(6)[3:], "c.jsonl")).stats.repeated_rows == 1


def test_long_rows_are_cut_and_those_without_a_trained_token_left_are_dropped_and_named(read: Read) -> None:
    long = {"prompt": "question", "completion": " yes" * 40}
    rows = [long, {"prompt": "long question " * 30, "completion": " yes"}, {"prompt": "q", "completion": " yes"}]
    whole, cut = read(rows), read(rows, max_length=20)
    path, lost = cut.stats.sources[0].path, [len(row.input_ids) - 20 for row in whole.train[:2]]
    assert [row.source for row in cut.train] == [f"{path}:1", f"{path}:3"]
    assert cut.train[0].input_ids.tolist() == whole.train[0].input_ids[:20].tolist()
    assert cut.stats.dropped == {"cut to length, without a trained token": [f"{path}:2"]}
    assert cut.stats.to_dict()["dropped_rows"] == 1
    assert (cut.stats.truncated_rows, cut.stats.truncated_tokens) == (2, sum(lost))
    said = "\n".join(data_warnings(cut.stats))
    # the second row's one target and the eos behind it are cut away whole
    targets = whole.stats.trained_tokens - cut.stats.trained_tokens
    assert (
        f"Cut to length: 2 rows lost {sum(lost)} tokens, {targets} of them trained ones. Raise data.max_length" in said
    )
    assert cut.stats.tokens == 20 + len(whole.train[2].input_ids)
    with pytest.raises(
        InputError, match=r"no row is left: .* without a trained token \(1\)\. .*raise data\.max_length \(8\)"
    ):
        read([{"prompt": "x " * 99, "completion": "y"}], max_length=8)


def test_source_and_target_lengths(read: Read, base_tokenizer: Any) -> None:
    rows = [{"instruction": "word " * 200, "output": "yes " * 100}]
    data = read(rows, max_source_length=60, max_target_length=25)
    example = data.train[0]
    first = int(np.argmax(example.trained))
    assert (first, len(example.input_ids) - first) == (60, 25)
    assert example.trained[first:].all() and not example.trained[:first].any()
    source = base_tokenizer.decode(example.input_ids[:first], clean_up_tokenization_spaces=False)
    # The middle of the instruction goes; BOS, the introduction and the heading of the answer stay.
    assert source.startswith("<s>Below is an instruction") and source.endswith("\n\n### Response:\n")
    assert example.prompt_ids.tolist() == example.input_ids[:first].tolist()
    whole = read(rows, max_length=100_000)
    assert (data.stats.truncated_tokens, data.stats.truncated_rows) == (whole.stats.tokens - 85, 1)
    exact = {"max_source_length": len(whole.train[0].prompt_ids), "max_target_length": 10_000}
    assert read(rows, max_length=10_000, **exact).stats.truncated_rows == 0


_HOLLOW = [{"prompt": "p", "completion": "" if i % 2 else "c"} for i in range(600)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "completion": ""}], r":1: 1 row with no token to train on: its answer"),
        ([{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": " \n"}], r":2: 1 row with no token"),
        ([{"text": "a"}, {"text": ""}, {"text": " "}], r":2, .*:3: 2 rows with no token to train on"),
        ([{"messages": messages_of("x")}], "there is no assistant turn to train"),
        (
            [{"messages": [*messages_of("x"), {"role": "assistant", "content": "y", "weight": 0}]}],
            "no token to train on",
        ),
        (_HOLLOW, r":2, .*:4, .*:6, .*:8, .*:10 \(and 295 more\): 300 rows"),
    ],
    ids=["empty", "blank", "text", "no answer", "untrained", "many"],
)
def test_rows_with_nothing_to_train(rows: list[Any], message: str, read: Read) -> None:
    with pytest.raises(InputError, match=message) as failure:
        read(rows)
    assert len(str(failure.value)) < 1000


def test_tokenizer_without_eos_or_pad(read: Read, make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(InputError, match="no end-of-sequence token"):
        read(pairs(2), make_tokenizer(eos=None))
    tokenizer = make_tokenizer(pad=None)
    size = len(tokenizer)
    data = read(pairs(2), tokenizer)
    assert data.stats.pads_with_eos and data.pad_id == tokenizer.eos_token_id
    assert len(tokenizer) == size and tokenizer.pad_token is None
    assert "padded with eos" in preflight(data, tokenizer)


def test_many_rows_are_in_file_order(write: Write, base_tokenizer: Any) -> None:
    path = write(pairs(2100))
    out = io.StringIO()
    data = build_datasets(DataSection(path=path), base_tokenizer, Console(file=out, force_terminal=True, width=400))
    assert [e.source for e in data.train] == [f"{path}:{n}" for n in range(1, 2101)]
    assert f"tokenizing {path}: 2,100/2,100" in out.getvalue()


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_histogram_covers_every_row(lengths: list[int]) -> None:
    edges, counts = length_histogram(np.array(lengths))
    assert len(edges) == len(counts) + 1 <= 11
    assert len(set(np.diff(edges))) == 1
    assert counts == [sum(low <= t < high for t in lengths) for low, high in zip(edges, edges[1:], strict=False)]
    assert sum(counts) == len(lengths)


def preflight(data: Datasets, tokenizer: Any, rows: int | None = None) -> str:
    out = io.StringIO()
    print_preflight(data, tokenizer, Console(file=out, width=1000), rows)
    return out.getvalue()


def test_preflight_names_the_first_row_in_which_one_says_nothing(read: Read, base_tokenizer: Any) -> None:
    rows = [{"prompt": prompt, "completion": "red"} for prompt in ("what is this?", "", " \n", "and this?")]
    data = read(rows)
    shown = preflight(data, base_tokenizer)
    assert f"Rows in which the user says nothing: {data.train[1].source} (and 1 more)." in shown
    assert "says nothing" not in preflight(read([rows[0], rows[3]]), base_tokenizer)
    said = [("user", "hi"), ("assistant", ""), ("user", "hello?"), ("assistant", "yes")]
    data = read([{"messages": [{"role": role, "content": content} for role, content in said]}])
    assert f"Rows in which the assistant says nothing: {data.train[0].source}. Fill" in preflight(data, base_tokenizer)


def test_preflight_asks_whether_the_roles_are_swapped(read: Read, base_tokenizer: Any) -> None:
    swapped = [("assistant", "what is red?"), ("user", "a colour")]
    turns = [("user", "hello"), *swapped]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for _ in range(4)]
    shown = preflight(read(rows), base_tokenizer)
    assert "Conversations that end with a user's or system turn: 4." in shown
    last = [{"messages": [*rows[0]["messages"][:2], {"role": "system", "content": "be brief"}]}] * 4
    assert "system turn: 4. Only what the assistant says is trained" in preflight(
        read(last, template="chatml"), base_tokenizer
    )
    assert "swapped" not in preflight(read([{"messages": rows[0]["messages"][:2]}]), base_tokenizer)


def test_preflight_draws_its_bars_in_a_narrow_terminal(read: Read, base_tokenizer: Any) -> None:
    data, out = read([{"prompt": "a " * i, "completion": "b"} for i in range(1, 40)]), io.StringIO()
    print_preflight(data, base_tokenizer, Console(file=out, width=40), 0)
    bars = [line for line in out.getvalue().splitlines() if "█" in line]
    assert len(bars) > 1 and all(line.rstrip()[-1].isdigit() for line in bars)


def test_preflight_of_rows_whose_label_is_not_read_names_the_classifier(read: Read, smollm2_tokenizer: Any) -> None:
    data = read([{"text": f"it is {i}", "label": "good"} for i in range(4)], smollm2_tokenizer)
    shown = preflight(data, smollm2_tokenizer)
    assert "Not read   columns label" in shown and "set task: sequence-classification" in shown
    assert " is 0" in shown and " is 0" not in preflight(data, smollm2_tokenizer, rows=0)


def test_preflight_shows_what_is_trained(read: Read, smollm2_tokenizer: Any) -> None:
    rows = [{"prompt": "[red] hi", "completion": f"yes [/b] {i}", "id": i} for i in range(5)]
    rows.append({"prompt": "long " * 300, "completion": "never", "id": 9})
    data = read(rows, smollm2_tokenizer, eval_fraction=0.5, max_length=100)
    shown, stats = preflight(data, smollm2_tokenizer), data.stats
    assert "prompt-completion, template: the tokenizer's own" in shown
    assert f"{stats.train_rows} to train on, {stats.eval_rows} held out" in shown
    assert f"{stats.trained_tokens} tokens, {stats.trained_tokens / stats.tokens:.1%}" in shown
    assert "Not read   columns id" in shown and "█" in shown and "sequence-classification" not in shown
    assert f"Dropped, cut to length, without a trained token: {stats.sources[0].path}:6" in shown
    # Two rows, with the mark that survives a log file; brackets in the data are not read as colours.
    for example in data.train[:2]:
        assert f"⟦{example.reference}<|im_end|>⟧" in shown
    assert shown.count("<|im_end|>⟧") == 2
    assert "[red] hi<|im_end|>" in shown


def test_preflight_shortens_long_rows_and_counts_special_tokens(read: Read, base_tokenizer: Any) -> None:
    shown = preflight(read([{"text": "word " * 900}], max_length=4000), base_tokenizer)
    assert " tokens … " in shown and len(shown) < 4000
    data = read([{"prompt": "what is </s>?", "completion": "an end"}, {"prompt": "p", "completion": "c"}])
    assert data.stats.special_token_rows == 1
    assert "which are read as those tokens: 1" in preflight(data, base_tokenizer)
    with pytest.raises(InputError, match="--rows -3: takes a whole number of rows to show"):
        data.first_rows(-3)


def test_a_tokenizer_without_chat_template_is_warned_about(
    read: Read, base_tokenizer: Any, smollm2_tokenizer: Any
) -> None:
    warning = "has no chat template, so rows are written with the template plain. Set data.template"
    assert warning in preflight(read(pairs(2)), base_tokenizer)
    assert "no chat template" not in preflight(read(pairs(2), template="plain"), base_tokenizer)
    assert "no chat template" not in preflight(read(pairs(2), smollm2_tokenizer), smollm2_tokenizer)
    assert "no chat template" not in preflight(read([{"text": "a b"}]), base_tokenizer)


def test_reading_rows_takes_no_torch() -> None:
    code = "import sys, qvera.data as data\nassert 'torch' not in sys.modules\nassert data.Example and data.DataStats"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_held_out_rows_may_be_another_split_of_a_hub_dataset(
    monkeypatch: pytest.MonkeyPatch, base_tokenizer: Any
) -> None:
    def load_dataset(path: str, split: str, **_: object) -> datasets.Dataset:
        return datasets.Dataset.from_list(pairs({"train": 6, "validation": 3}[split], f"{path} {split}"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    mixture = [DataSource(path="b/b")]
    for keys, name in (
        ({"path": "a/a", "limit": 4}, "a/a"),
        ({"path": "a/a", "eval_path": "b/b"}, "b/b"),
        ({"path": "a/a", "mixture": mixture}, "a/a"),
    ):
        data = build_datasets(DataSection(**keys, eval_split="validation"), base_tokenizer)
        assert [row.reference for row in data.eval] == [f" {name} validation {n}" for n in range(3)]
        assert data.eval[0].source == f"{name}[validation] row 1"
        assert len(data.train) == (4 if "limit" in keys else 12 if "mixture" in keys else 6)


def test_keys_that_do_not_suit_the_rows_are_refused(read: Read) -> None:
    for key, value in (("eval_split", "test"), ("split", "validation")):
        with pytest.raises(InputError, match=rf"data\.{key}: '{value}' has a meaning for hub datasets only"):
            read(pairs(4), **{key: value})
    rows = [{"text": "fine", "label": 1}, {"text": "bad", "label": 0}]
    data = read(rows, columns={"prompt": "text", "completion": "label"}, label_names=["negative", "positive"])
    assert [row.reference for row in data.train] == ["positive", "negative"]
    with pytest.raises(InputError, match=r"data\.label_names: names the labels of a column of answers, and .*:1 has"):
        read([{"messages": messages_of("x", "1")}], label_names=["no", "yes"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label_names": ["x", "y", "y"]}, r"data\.label_names: names a label twice"),
        ({"eval_split": "train"}, r"eval_split: is data\.split too \(train\), so nothing would be held out"),
        ({"eval_split": "x", "eval_fraction": 0.5}, r"eval_fraction: held-out rows already come from data\.eval_split"),
        ({"mixture": [{"path": "b", "wieght": 2}]}, r"data\.mixture\.0\.wieght: unknown key\. Did you mean `weight`\?"),
        (
            {"mixture": ["b.jsonl"]},
            r"data\.mixture\.0: should be a mapping of keys, got 'b\.jsonl'. Write \{path: b\.jsonl\}\.",
        ),
        ({"mixture": [{"path": "b", "max_length": 9}]}, r"data\.mixture\.0\.max_length: unknown key\."),
    ],
)
def test_wrong_keys_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_recipe({"model": "m", "data": {"path": "a/b", **keys}}, "x.yaml")


@pytest.fixture
def mixed(write: Write) -> DataSection:
    """Ten prompt-completion rows, and twice over six Alpaca rows of another template."""
    pairs = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(10)]
    alpaca = [{"instruction": f"do {i}", "output": f"done {i}"} for i in range(6)]
    more = DataSource(path=write(alpaca, "alpaca.jsonl"), template="chatml", weight=2.0)
    return DataSection(path=write(pairs, "pairs.jsonl"), weight=0.5, mixture=[more], seed=3)


def test_each_source_has_its_weight_format_and_template(mixed: DataSection, base_tokenizer: Any) -> None:
    data = build_datasets(mixed, base_tokenizer)
    texts = [base_tokenizer.decode(e.input_ids) for e in data.train]
    seen = Counter(e.source for e in data.train)
    first, second = mixed.path, mixed.mixture[0].path
    assert sorted(seen[f"{second}:{i}"] for i in range(1, 7)) == [2] * 6
    assert sorted(seen[f"{first}:{i}"] for i in range(1, 11)) == [0] * 5 + [1] * 5
    assert sum("<|im_start|>" in text for text in texts) == 12
    assert sum("question" in text for text in texts) == 5
    assert (data.stats.format, data.stats.train_rows) == ("prompt-completion, alpaca", 17)
    assert data.stats.to_dict()["sources"] == [
        {"path": first, "weight": 0.5, "rows": 10, "taken": 5, "format": "prompt-completion", "template": "plain"},
        {"path": second, "weight": 2.0, "rows": 6, "taken": 12, "format": "alpaca", "template": "chatml"},
    ]
    said = preflight(data, base_tokenizer)
    assert f"5 from {first} (10 x 0.5): prompt-completion, template: plain" in said
    assert f"12 from {second} (6 x 2): alpaca, template: chatml" in said
    assert "⟦ answer" in said and "⟦done 0" in said
    assert build_datasets(mixed.replace(weight=0.001), base_tokenizer).stats.sources[0].taken == 1

    def chosen(seed: int) -> list[str]:
        return [e.source for e in build_datasets(mixed.replace(seed=seed), base_tokenizer).train]

    # A changed choice would silently change what `--resume` goes on with.
    assert chosen(3) == [*(f"{first}:{i}" for i in (1, 2, 3, 4, 6)), *[f"{second}:{i}" for i in range(1, 7)] * 2]
    assert len({tuple(chosen(seed)) for seed in range(4)}) > 1


def test_every_source_holds_rows_out_and_none_of_them_is_trained(mixed: DataSection, base_tokenizer: Any) -> None:
    data = build_datasets(mixed.replace(eval_fraction=0.34, weight=3.0), base_tokenizer)
    held, trained = {e.source for e in data.eval}, {e.source for e in data.train}
    assert len(held) == 3 + 2
    assert not held & trained
    assert Counter(e.source for e in data.train).most_common()[0][1] == 3
    assert len(trained) == 7 + 4


def test_rows_to_look_at_are_of_each_source_in_turn_and_repeats_come_last(
    mixed: DataSection, base_tokenizer: Any
) -> None:
    mixed.mixture.append(DataSource(path=mixed.mixture[0].path, limit=1, template="alpaca", weight=3.0))
    data = build_datasets(mixed, base_tokenizer)
    everything = [e.source for e in data.train]
    first, second, third = everything[:5], everything[5:17], everything[17:]
    shown = [e.source for e in data.first_rows(100)]
    assert shown[:6] == [first[0], second[0], third[0], first[1], second[1], first[2]]
    assert shown[:12] == [*shown[:6], second[2], first[3], second[3], first[4], second[4], second[5]]
    assert Counter(shown) == Counter(everything)
    alone = build_datasets(mixed.replace(mixture=[], weight=1.5), base_tokenizer)
    for count in (0, 1, 3, 12):
        assert [e.source for e in data.first_rows(count)] == shown[:count]
        assert [e.source for e in alone.first_rows(count)] == [e.source for e in alone.train[:count]]


def test_auto_is_what_the_first_source_was_trained_with(
    mixed: DataSection, base_tokenizer: Any, tmp_path: Path
) -> None:
    stats = build_datasets(mixed, base_tokenizer).stats
    assert (stats.format, stats.template) == ("prompt-completion, alpaca", "plain, chatml")
    (tmp_path / "run.json").write_text(json.dumps({"data": stats.to_dict()}))
    recipe = parse_recipe({"model": "m", "data": {"path": mixed.path}}, "x.yaml")
    assert template_name(recipe, tmp_path) == "plain"


def test_prompts_that_the_model_answers_itself_are_shown_without_their_placeholder(
    read: Read, base_tokenizer: Any
) -> None:
    data, out = read([{"prompt": "say red"}], format="prompt"), io.StringIO()
    print_preflight(data, base_tokenizer, Console(file=out, width=1000))
    page = preview_page("p", "rows", data.stats, [], data.first_rows(1), base_tokenizer.decode)
    assert "Trained    the model answers them while it is trained" in out.getvalue()
    (row,) = data.train
    asked = base_tokenizer.decode(row.prompt_ids)
    assert f"⟦prompt⟧\n{asked.rstrip()}\n" in "\n".join(map(str.rstrip, out.getvalue().splitlines())) + "\n"
    assert "⟦-" not in out.getvalue() and "<mark>" not in page and "Tokens trained" not in page


def test_another_answer_for_the_reward_is_another_row_and_a_column_that_nothing_reads_is_not(read: Read) -> None:
    def sha256(format: str, column: str) -> str:
        return data_sha256(read([{"prompt": "1+1", "completion": "2", "answer": column}], format=format))

    assert sha256("prompt", "2") == sha256("prompt", "2") != sha256("prompt", "3")
    assert sha256("prompt-completion", "2") == sha256("prompt-completion", "3")


def test_a_system_prompt_that_rows_do_not_take_and_labels_that_none_has_are_told(read: Read) -> None:
    own = {"messages": [{"role": "system", "content": "You are a guide."}, *messages_of("x", "y")]}
    plain = {"messages": messages_of("x", "y")}
    for rows, count in (([own, own], 2), ([own, plain], 1), ([plain, plain], 0)):
        said = " ".join(data_warnings(read(rows, system="You are a pirate.", eval_fraction=0.0).stats))
        assert (f"data.system is not in {count} of 2 rows" in said) == (count > 0)
    numbered = [{"prompt": "x", "completion": 1}, {"prompt": "y", "completion": 2}]  # who counts from 1
    said = " ".join(data_warnings(read(numbered, label_names=["urgent", "soon", "routine"], eval_fraction=0.0).stats))
    assert "No row has urgent of data.label_names. Its first name is that of 0." in said


def test_labels_are_found_among_more_answers_than_an_array_holds() -> None:
    """An array of strings holds 2 GiB at most, and such a copy of all answers may not fit into RAM either."""

    def rows_of(answers: list[pa.Array], taken: list[int]) -> Rows:
        nothing = {"input_ids": [1], "rejected_ids": None, "trained_tokens": 1, "ids_hash": 0, "mask_hash": 0}
        table = pa.Table.from_pylist([nothing] * sum(map(len, answers)), SCHEMA)
        place = SCHEMA.get_field_index("reference")
        return Rows(table.set_column(place, SCHEMA.field(place), pa.chunked_array(answers))).take(np.array(taken))

    a, b, c = (pa.array([label]) for label in "abc")
    assert rows_by_label(rows_of([a, b, c], [2, 0, 2])) == {"a": 1, "c": 2}
    asked = rows_of([b, c, c], [2, 1, 0])
    assert new_labels(rows_of([a, b] * 20, list(range(40))), asked) == ["c"]
    assert new_labels(rows_of([c, *[a, b] * 20], list(range(1, 41))), asked) == ["c"], "its row is not trained on"
    assert new_labels(rows_of([a, b] * 20, list(range(19))), asked) == []
    long = pa.array(["x" * 2**24])
    many = rows_of([long] * 140, [*range(0, 140, 12), 12])
    assert new_labels(many, asked) == ["b", "c"] and list(rows_by_label(many).values()) == [13]


def test_more_answers_than_may_be_labels_are_not_counted_to_the_end(
    write: Write, base_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_BATCH_ROWS", 100)
    section = DataSection(path=write([{"prompt": "q", "completion": f"answer {i}"} for i in range(2000)]))
    rows = build_datasets(section, base_tokenizer).train
    assert len(rows_by_label(rows)) == len(rows_by_label(rows, 2000)) == 2000
    assert 20 < len(rows_by_label(rows, 20)) < 1000


def test_a_misspelt_label_among_held_out_answers_is_told(write: Write, base_tokenizer: Any) -> None:
    rows = [{"prompt": f"ticket {i}", "completion": ("access", "network")[i % 2]} for i in range(24)]
    held_out = [{"prompt": "a", "completion": "acces"}, {"prompt": "b", "completion": "network"}]
    told = "No training row has the answer 'acces', which a held-out row has. Is it misspelt?"
    for train, is_told in ((rows, True), ([*rows, *held_out], False), (rows[:10], False)):
        section = DataSection(path=str(write(train, "a.jsonl")), eval_path=str(write(held_out, "b.jsonl")))
        assert (told in data_warnings(build_datasets(section, base_tokenizer).stats)) == is_told
    unanswered = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    chats = write([{"messages": unanswered}], "c.jsonl")  # whose last turn is no answer
    section = DataSection(path=str(write(rows, "a.jsonl")), eval_path=str(chats))
    assert "No training row has" not in " ".join(data_warnings(build_datasets(section, base_tokenizer).stats))


def test_judged_rows_of_one_kind_are_told(read: Read) -> None:
    good, bad = ({"prompt": "x", "completion": "a", "label": label} for label in (True, False))
    one_kind = data_warnings(read([good, good], format="unpaired-preference").stats)
    assert one_kind[-1] == "All rows are good answers, and kto learns from both kinds. Add rows with the label false."
    assert "kto" not in " ".join(data_warnings(read([good, bad], format="unpaired-preference").stats))
