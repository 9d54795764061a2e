"""Many adapters' rows: of each the same rows in the same order as from a file of its own; bad names are refused."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from qvera.config.schema import DataSection, Recipe, parse_recipe
from qvera.data import (
    Datasets,
    Rows,
    adapter_batches,
    batches_of,
    build_datasets,
    data_sha256,
    data_warnings,
    print_preflight,
)
from qvera.data.adapter_rows import take_adapters
from qvera.data.rows import SCHEMA
from qvera.utils.errors import InputError
from tests.data.conftest import Read, Write

SIZES = {"anna": 9, "Anna": 4, "ben/2": 1, "7": 6, "": 0}


def row(name: str, number: int) -> dict[str, Any]:
    """A row of an adapter; some are long, some repeat, and a few have a system prompt, which is optional."""
    answer = f"{name} says {number % 4} " + "more " * (number * 7 % 30)
    return {"prompt": f"q{number % 4}", "completion": answer, **({"system": "Be brief."} if number % 3 == 1 else {})}


@pytest.fixture
def rows_of() -> dict[str, list[dict[str, Any]]]:
    """The rows of each adapter, by its name."""
    return {name: [row(name, i) for i in range(count)] for name, count in SIZES.items() if count}


def mixed(rows_of: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All rows with their adapter's name, in an order that keeps each adapter's own."""
    names = [name for name, rows in rows_of.items() for _ in rows]
    random.Random(3).shuffle(names)
    left = {name: iter(rows) for name, rows in rows_of.items()}
    return [{"customer": int(name) if name == "7" else name, **next(left[name])} for name in names]


def contents(rows: Rows) -> list[tuple[list[int], list[bool], list[int], str, str | None]]:
    """Everything that a row trains and is asked with."""
    return [(r.input_ids.tolist(), r.trained.tolist(), r.prompt_ids.tolist(), r.prompt_text, r.reference) for r in rows]


def recipe_of(data: DataSection, **training: Any) -> Recipe:
    return parse_recipe({"model": "m", "data": data.to_dict(), "training": training}, "r.yaml")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"eval_fraction": 0.3, "seed": 5},
        {"eval_fraction": 0.4, "eval_limit": 1, "group_by_length": True},
        {"limit": 3, "shuffle": False},
        {"max_length": 24, "too_long": "split"},
        {"max_length": 97, "too_long": "drop", "eval_fraction": 0.4, "seed": 2},
        {"eval_path": True, "eval_limit": 2},
    ],
)
@pytest.mark.parametrize("by_files", [False, True])
def test_each_adapter_has_the_rows_and_order_that_it_has_alone(
    write: Write,
    base_tokenizer: PreTrainedTokenizerFast,
    rows_of: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    keys: dict[str, Any],
    by_files: bool,
) -> None:
    keys = dict(keys)
    rows_of = {name.replace("/", "-"): rows for name, rows in rows_of.items()}
    held_out_of = {name: [row(name, i + 20) for i in range(3)] for name in ("Anna", "7")}
    if has_eval_path := keys.pop("eval_path", False):
        keys["eval_path"] = write(mixed(held_out_of), "held.jsonl")
    if by_files:
        for name, files in {"together": rows_of, "held": held_out_of}.items():
            (tmp_path / name).mkdir()
            for each, rows in files.items():
                write(rows, f"{name}/{each}.jsonl")
        if has_eval_path:
            keys["eval_path"] = str(tmp_path / "held")
        section = DataSection(path=str(tmp_path / "together"), adapter_files=True, **keys)
    else:
        section = DataSection(path=write(mixed(rows_of), "together.jsonl"), adapter_column="customer", **keys)
    together = build_datasets(section, base_tokenizer)
    recipe = recipe_of(section, global_batch_size=3, per_device_train_batch_size=5)
    assert sorted([*(a.name for a in together.adapters), *together.adapters_without_rows]) == sorted(rows_of)
    assert len(together.adapters) >= 3
    for adapter in together.adapters:
        keys_alone = dict(keys)
        if len(rows_of[adapter.name]) == 1:
            for key in ("eval_fraction", "eval_limit"):  # alone that is an error; among others the row is trained
                keys_alone.pop(key, None)
        if has_eval_path:
            keys_alone.pop("eval_path")
            if adapter.name in held_out_of:
                keys_alone["eval_path"] = write(held_out_of[adapter.name], "alone_held.jsonl")
            else:
                keys_alone.pop("eval_limit", None)
        alone_section = DataSection(path=write(rows_of[adapter.name], "alone.jsonl"), **keys_alone)
        alone = build_datasets(alone_section, base_tokenizer)
        assert contents(together.train.take(adapter.train)) == contents(alone.train)
        assert contents(together.eval.take(adapter.eval)) == contents(alone.eval)
        assert adapter.repeated_rows == alone.stats.repeated_rows
        own = adapter_batches(recipe, together, adapter)
        expected = batches_of(recipe_of(alone_section, global_batch_size=3), alone.train)
        assert own.per_epoch == expected.per_epoch
        for step in range(3 * own.per_epoch):
            assert own.rows(step) == expected.rows(step)
    assert sum(len(a.train) for a in together.adapters) == len(together.train)
    assert sum(len(a.eval) for a in together.adapters) == len(together.eval)


def build(read: Read, names: list[Any], **keys: Any) -> Datasets:
    rows = [{"customer": name, "prompt": f"q{i}", "completion": f"a{i}"} for i, name in enumerate(names)]
    return read(rows, adapter_column="customer", **keys)


def test_adapters_come_in_order_of_first_appearance_and_a_number_is_its_digits(read: Read) -> None:
    data = build(read, ["b", 1, "a", "1", "b", "01"])
    assert [(a.name, a.train.tolist()) for a in data.adapters] == [
        ("b", [0, 4]),
        ("1", [1, 3]),
        ("a", [2]),
        ("01", [5]),
    ]


def test_names_are_the_same_in_every_file_format(
    write: Write, base_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    columns = {"customer": [1, 2, 1], "prompt": ["p", "q", "r"], "completion": ["a", "b", "c"]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    header = ",".join(columns)
    csv = "\n".join([header, *(",".join(map(str, each.values())) for each in rows)])
    paths = [str(tmp_path / "rows.parquet"), write(rows, "r.json"), write(rows, "r.jsonl"), write(csv, "r.csv")]
    found = [build_datasets(DataSection(path=p, adapter_column="customer"), base_tokenizer) for p in paths]
    assert len({data_sha256(data) for data in found}) == 1
    assert [adapter.name for adapter in found[0].adapters] == ["1", "2"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["anna", ""], r"rows.jsonl:2: the column 'customer' \(data.adapter_column\) .* got nothing. Fill it in"),
        (["anna", None], "rows.jsonl:2: .* got nothing"),
        (["anna", float("nan")], "rows.jsonl:2: .* got nothing"),
        (["anna", "  "], "rows.jsonl:2: .* got a string"),
        (["anna", True], "rows.jsonl:2: .* got a boolean"),
        (["anna", 1.0], r"rows.jsonl:2: .* got a number \(1.0\)"),
        (["anna", ["x"]], "rows.jsonl:2: .* got a list"),
        (["anna", "x" * 300], "rows.jsonl:2: the adapter's name 'x+…' is too long"),
    ],
)
def test_bad_names_are_refused_with_file_and_line(read: Read, names: list[Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(read, names)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "p", "completion": "c", "custmer": "a"}', "rows.jsonl:1: no column 'customer' .*did you mean"),
        (
            '{"prompt": "p", "completion": "c", "customer": "a"}\n{"prompt": "p", "completion": "c"}',
            "rows.jsonl:2: no column 'customer'",
        ),
        (r'{"prompt": "p", "completion": "c", "customer": "\ud83d"}', "rows.jsonl:1: .* holds half a character"),
        (
            '{"prompt": "p", "completion": "c", "customer": "a"}\n{"text": "t", "customer": "b"}',
            "rows.jsonl:2: the row looks like text, and .*rows.jsonl:1 like prompt-completion",
        ),
    ],
)
def test_rows_that_do_not_name_their_adapter_or_look_different_are_refused(read: Read, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(text, adapter_column="customer")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "is empty. Expected .jsonl"),
        (["anna.jsonl", "ben.xlsx"], "ben.xlsx: is no data file, and data.adapter_files reads every entry"),
        (["anna.jsonl", "team/ben.jsonl"], "team: is a directory"),
        (["anna.csv", "anna.jsonl"], "anna.jsonl: anna.csv already has the rows of the adapter 'anna'"),
    ],
)
def test_a_directory_that_is_not_a_file_for_each_adapter_is_refused(
    base_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, files: list[str], words: str
) -> None:
    directory = tmp_path / "customers"
    directory.mkdir()
    for name in files:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(InputError, match=words):
        build_datasets(DataSection(path=str(directory), adapter_files=True), base_tokenizer)


def test_adapter_files_needs_a_directory(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    for path, found in ((write([row("a", 0)]), "is a file"), ("some/dataset", "is no directory here")):
        with pytest.raises(InputError, match=found):
            build_datasets(DataSection(path=path, adapter_files=True), base_tokenizer)


def test_files_may_have_names_of_splits_several_suffixes_and_hidden_neighbours(
    base_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "test.b.csv").write_text("prompt,completion\np,c\n")
    (tmp_path / "train.JSONL").write_text('{"prompt": "p", "completion": "c"}\n')
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    data = build_datasets(DataSection(path=str(tmp_path), adapter_files=True), base_tokenizer)
    assert [adapter.name for adapter in data.adapters] == ["test.b", "train"]


def test_what_is_odd_about_the_adapters_is_said_before_the_first_step(
    write: Write, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    long = {"customer": "gone", "prompt": "p", "completion": "word " * 200}
    train = [*({"customer": n, "prompt": "p", "completion": f"c{n}"} for n in ("anna", "Anna", "ben")), long]
    held = [
        {"customer": n, "prompt": "p", "completion": c} for n, c in [("anna", "canna"), ("Anna", "canna"), ("x", "y")]
    ]
    section = DataSection(
        path=write(train, "t.jsonl"),
        eval_path=write(held, "e.jsonl"),
        adapter_column="customer",
        max_length=40,
        too_long="drop",
    )
    data = build_datasets(section, base_tokenizer)
    assert data.adapters_without_rows == ["gone"]
    assert [(a.name, a.repeated_rows) for a in data.adapters] == [("anna", 1), ("Anna", 0), ("ben", 0)]
    said = "\n".join(data_warnings(data.stats))
    for words in (
        "Adapters without a row after cutting, which are not trained: 'gone'.",
        "Adapters without held-out rows, which are trained but not scored: 'ben'.",
        "Adapters with held-out rows alone, which nothing trains or scores: 'x'.",
        "Names that are nearly the same, of different adapters: 'anna' and 'Anna'.",
        "Held-out rows that are also training rows of the same adapter: 1.",
    ):
        assert words in said
    assert data.stats.to_dict()["adapters"] == {
        "trained": 3,
        "without_rows": ["gone"],
        "only_held_out": ["x"],
        "alike": [["anna", "Anna"]],
    }


def test_an_adapter_of_one_row_is_trained_and_not_scored(read: Read) -> None:
    data = build(read, ["a", "b", "b"], eval_fraction=0.1)
    assert [(a.name, len(a.train), len(a.eval)) for a in data.adapters] == [("a", 1, 0), ("b", 1, 1)]
    assert "trained but not scored: 'a'" in "\n".join(data_warnings(data.stats))


def test_the_preview_names_the_adapters_with_the_fewest_and_the_most_rows(read: Read, base_tokenizer: Any) -> None:
    names = [f"c{i:02}" for i in range(20) for _ in range(i + 1)]
    data = build(read, names)
    console = Console(record=True, width=200)
    print_preflight(data, base_tokenizer, console, 3)
    text = console.export_text()
    assert (
        "20. Rows to train on: fewest c00 (1), c01 (2), c02 (3); median 11; most c19 (20), c18 (19), c17 (18)" in text
    )
    assert [data.train[i].owner for i in (0, 1, 3)] == [each.owner for each in data.first_rows(3)]


def test_a_name_with_control_characters_is_shown_in_quotes(read: Read) -> None:
    adapters = build(read, ["a\nb", "c d", "c d"]).stats.adapters
    assert adapters is not None and adapters.counts == "2: 'a\\nb' (1), c d (2)"


def test_what_is_kept_of_a_name_is_small_and_does_not_grow_with_their_number(tmp_path: Path) -> None:
    def kept_bytes(count: int) -> int:
        names = [f"customer {number}" for number in range(count)]
        numbers = np.arange(2 * count, dtype=np.uint64)
        columns = {
            "owner": pa.array(names * 2),
            "input_ids": pa.array([[1]] * 2 * count, pa.list_(pa.int32())),
            "trained_tokens": pa.array(np.ones(2 * count, np.int32)),
            "ids_hash": pa.array(numbers),
            "mask_hash": pa.array(numbers),
        }
        filled = [columns.get(field.name, pa.nulls(2 * count, field.type)) for field in SCHEMA]
        rows = Rows(pa.Table.from_arrays(filled, schema=SCHEMA))
        tracemalloc.start()
        adapters = take_adapters(names, rows, rows)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert [a.train.tolist() for a in adapters.trained] == [[i, count + i] for i in range(count)]
        return kept

    small, large = kept_bytes(1000), kept_bytes(4000)
    assert large < 4.2 * small
    assert large < 4000 * 600


def test_the_hash_of_the_data_knows_whose_rows_they_are(read: Read) -> None:
    one, other = (data_sha256(build(read, names)) for names in (["a", "b", "a"], ["a", "b", "b"]))
    assert one != other


def test_a_cached_set_of_rows_knows_its_adapters(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvera.data.cache.WORTH_BYTES", 0)
    keys: dict[str, Any] = {"eval_fraction": 0.5, "max_length": 16, "too_long": "drop"}
    names = ["b", "a", "b", "a"]
    made = build(read, names, **keys)
    found = build(read, names, **keys)
    assert not made.stats.cache_entries and found.stats.cache_entries
    assert data_sha256(found) == data_sha256(made)
    assert found.stats.adapters is not None and found.stats.to_dict() == made.stats.to_dict()


KEYS = {"path": "rows.jsonl", "adapter_column": "customer"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"adapter_files": True}}, "data.adapter_files: and data.adapter_column both name"),
        ({"data": {"packing": True}}, "data.packing: would put rows of several adapters"),
        (
            {"data": {"mixture": [{"path": "x.jsonl"}]}},
            "data.mixture: data.adapter_column takes all rows from data.path",
        ),
        ({"data": {"weight": 2.0}}, "data.weight: each adapter"),
        ({"data": {"sampling": "task", "task_column": "t"}}, "data.sampling: task draws steps over tasks"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout: each adapter"),
        ({"adapter": {"magnitude": True}}, "adapter.magnitude: its norms"),
        ({"model": {"path": "m", "added_tokens": ["<x>"]}}, "model.added_tokens: are not built for many"),
        ({"model": {"path": "m", "compute_dtype": "float16"}}, "model.compute_dtype: float16 needs a loss scale"),
        ({"deepspeed": "zero3"}, "deepspeed: processes share out the adapters"),
        ({"training": {"optim": "adamw_8bit"}}, "training.optim: many adapters"),
        ({"training": {"bilevel": True}}, "training.bilevel: is not built for many adapters"),
        ({"training": {"resample_every": 5}}, "training.resample_every: is not built"),
        ({"training": {"torch_compile": True}}, "training.torch_compile: is not built"),
        ({"training": {"on_oom": "halve"}}, "training.on_oom: halve is not built"),
    ],
)
def test_keys_that_many_adapters_do_not_go_with_are_refused_by_name(sections: dict[str, Any], words: str) -> None:
    tree = {"model": "m", **sections, "data": {**KEYS, **sections.get("data", {})}}
    with pytest.raises(InputError, match=words):
        parse_recipe(tree, "r.yaml")


def test_a_pass_of_many_adapters_is_no_part_of_one_adapters_batch() -> None:
    recipe = parse_recipe({"model": "m", "data": KEYS, "training": {"global_batch_size": 3}}, "r.yaml")
    assert recipe.training.per_device_train_batch_size == 16
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict())), "again").to_dict() == recipe.to_dict()
    with pytest.raises(InputError, match="training.adapters_at_once: has no effect without data.adapter_column"):
        parse_recipe({"model": "m", "data": {"path": "r.jsonl"}, "training": {"adapters_at_once": 4}}, "r.yaml")
    with pytest.raises(InputError, match="training.global_batch_size: 3 is not a multiple"):
        training = {"global_batch_size": 3, "per_device_train_batch_size": 2}
        parse_recipe({"model": "m", "data": {"path": "r.jsonl"}, "training": training}, "r.yaml")
