"""Many adapters' rows: of each the same rows in the same order as from a file of its own; bad names are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from qvera.config.schema import Recipe, parse_recipe
from qvera.config.sections import DataSection
from qvera.data import (
    Datasets,
    Rows,
    batches_of,
    build_datasets,
    data_sha256,
    data_warnings,
    print_preflight,
)
from qvera.utils.errors import InputError
from tests.data.conftest import Read, Write

SIZES = {"anna": 9, "Anna": 4, "ben/2": 1, "7": 6}


def row(name: str, number: int) -> dict[str, Any]:
    """A row of an adapter; some are long, some repeat, and a few have a system prompt, which is optional."""
    answer = f"{name} says {number % 4} " + "more " * (number * 7 % 30)
    return {"prompt": f"q{number % 4}", "completion": answer, **({"system": "Be brief."} if number % 3 == 1 else {})}


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
    ("by_files", "keys"),
    [
        (True, {}),
        (False, {"eval_fraction": 0.3, "seed": 5}),
        (True, {"eval_fraction": 0.4, "eval_limit": 1, "group_by_length": True}),
        (False, {"limit": 3, "shuffle": False}),
        (True, {"max_length": 24, "too_long": "split"}),
        (False, {"max_length": 97, "too_long": "drop", "eval_fraction": 0.4, "seed": 2}),
        (False, {"eval_path": "held", "eval_limit": 2}),
        (True, {"eval_path": "held", "eval_limit": 2}),
    ],
)
def test_each_adapter_has_the_rows_and_order_that_it_has_alone(
    by_files: bool, keys: dict[str, Any], write: Write, base_tokenizer: Any, tmp_path: Path
) -> None:
    rows_of = {name.replace("/", "-"): [row(name, i) for i in range(count)] for name, count in SIZES.items()}
    held_of = {name: [row(name, i + 20) for i in range(3)] for name in ("Anna", "7")} if "eval_path" in keys else {}
    paths = {}
    for key, owned in {"path": rows_of, "eval_path": held_of}.items():
        if owned and by_files:
            (tmp_path / key).mkdir()
            paths[key] = str(tmp_path / key)
            for name, rows in owned.items():
                write(rows, f"{key}/{name}.jsonl")
        elif owned:
            paths[key] = write(mixed(owned), f"{key}.jsonl")
    owner = {"adapter_files": True} if by_files else {"adapter_column": "customer"}
    section = DataSection(**{**keys, **paths, **owner})
    together = build_datasets(section, base_tokenizer)
    recipe = recipe_of(section, global_batch_size=3, per_device_train_batch_size=5)
    assert sorted([*(a.name for a in together.adapters), *together.adapters_without_rows]) == sorted(rows_of)
    assert len(together.adapters) >= 3
    for adapter in together.adapters:
        keys_alone = {**keys, "path": write(rows_of[adapter.name], "alone.jsonl")}
        if len(rows_of[adapter.name]) == 1:  # alone that is an error; among others the row is trained
            keys_alone = {k: v for k, v in keys_alone.items() if k not in ("eval_fraction", "eval_limit")}
        if adapter.name in held_of:
            keys_alone["eval_path"] = write(held_of[adapter.name], "alone_held.jsonl")
        elif held_of:
            keys_alone = {k: v for k, v in keys_alone.items() if k not in ("eval_path", "eval_limit")}
        alone_section = DataSection(**keys_alone)
        alone = build_datasets(alone_section, base_tokenizer)
        assert contents(together.train.take(adapter.train)) == contents(alone.train)
        assert contents(together.eval.take(adapter.eval)) == contents(alone.eval)
        assert adapter.repeated_rows == alone.stats.repeated_rows
        own = batches_of(recipe, together.train.take(adapter.train))
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
    found = {a.name: a.train.tolist() for a in data.adapters}
    assert list(found.items()) == [("b", [0, 4]), ("1", [1, 3]), ("a", [2]), ("01", [5])]
    others = build(read, ["b", 1, "a", "1", "1", "01"])
    assert data_sha256(data) != data_sha256(others), "the hash of the data knows whose rows they are"


def test_names_are_the_same_in_every_file_format(write: Write, base_tokenizer: Any, tmp_path: Path) -> None:
    columns = {"customer": [1, 2, 1], "prompt": ["p", "q", "r"], "completion": ["a", "b", "c"]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    header = ",".join(columns)
    csv = "\n".join([header, *(",".join(map(str, each.values())) for each in rows)])
    paths = [str(tmp_path / "rows.parquet"), write(rows, "r.json"), write(rows, "r.jsonl"), write(csv, "r.csv")]
    found = [build_datasets(DataSection(path=p, adapter_column="customer"), base_tokenizer) for p in paths]
    assert len({data_sha256(data) for data in found}) == 1
    assert [adapter.name for adapter in found[0].adapters] == ["1", "2"]


PAIR = '{"prompt": "p", "completion": "c"'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'{PAIR}, "customer": ""}}', r"1: the column 'customer' \(data.adapter_column\) .* got nothing. Fill it in"),
        (f'{PAIR}, "customer": null}}', "1: .* got nothing"),
        (f'{PAIR}, "customer": NaN}}', "1: .* got nothing"),
        (f'{PAIR}, "customer": "  "}}', "1: .* got a string"),
        (f'{PAIR}, "customer": true}}', "1: .* got a boolean"),
        (f'{PAIR}, "customer": 1.0}}', r"1: .* got a number \(1.0\)"),
        (f'{PAIR}, "customer": ["x"]}}', "1: .* got a list"),
        (f'{PAIR}, "customer": "{"x" * 300}"}}', "1: the adapter's name 'x+…' is too long"),
        (rf'{PAIR}, "customer": "\ud83d"}}', "1: .* holds half a character"),
        (f'{PAIR}, "custmer": "a"}}', "1: no column 'customer' .*did you mean"),
        (f'{PAIR}, "customer": "a"}}\n{PAIR}}}', "2: no column 'customer'"),
        (
            f'{PAIR}, "customer": "a"}}\n{{"text": "t", "customer": "b"}}',
            "2: the row looks like text, and .*rows.jsonl:1 like prompt-completion",
        ),
    ],
)
def test_rows_without_a_good_name_or_that_look_different_are_refused(read: Read, text: str, words: str) -> None:
    with pytest.raises(InputError, match=f"rows.jsonl:{words}"):
        read(text, adapter_column="customer")


@pytest.mark.parametrize(
    ("files", "path", "words"),
    [
        ([], "customers", "is empty. Expected .jsonl"),
        (
            ["anna.jsonl", "ben.xlsx"],
            "customers",
            "ben.xlsx: is no data file, and data.adapter_files reads every entry",
        ),
        (["anna.jsonl", "team/ben.jsonl"], "customers", "team: is a directory"),
        (["anna.csv", "anna.jsonl"], "customers", "anna.jsonl: anna.csv already has the rows of the adapter 'anna'"),
        (["anna.jsonl"], "customers/anna.jsonl", "is a file"),
        ([], "some/dataset", "is no directory here"),
    ],
)
def test_a_directory_that_is_not_a_file_for_each_adapter_is_refused(
    files: list[str], path: str, words: str, base_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("customers").mkdir()
    for name in files:
        Path("customers", name).parent.mkdir(exist_ok=True)
        Path("customers", name).write_text(PAIR + "}\n")
    with pytest.raises(InputError, match=words):
        build_datasets(DataSection(path=path, adapter_files=True), base_tokenizer)


def test_files_may_have_names_of_splits_several_suffixes_and_hidden_neighbours(
    base_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "test.b.csv").write_text("prompt,completion\np,c\n")
    (tmp_path / "train.JSONL").write_text('{"prompt": "p", "completion": "c"}\n')
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    data = build_datasets(DataSection(path=str(tmp_path), adapter_files=True), base_tokenizer)
    assert [adapter.name for adapter in data.adapters] == ["test.b", "train"]


def test_what_is_odd_about_the_adapters_is_said_before_the_first_step(write: Write, base_tokenizer: Any) -> None:
    train = [("anna", "canna"), ("Anna", "cAnna"), ("ben", "cben"), ("gone", "word " * 200)]
    held = [("anna", "canna"), ("Anna", "canna"), ("x", "y")]
    paths = [
        write([{"customer": name, "prompt": "p", "completion": text} for name, text in rows], f"{len(rows)}.jsonl")
        for rows in (train, held)
    ]
    keys: dict[str, Any] = {"adapter_column": "customer", "max_length": 40, "too_long": "drop"}
    data = build_datasets(DataSection(path=paths[0], eval_path=paths[1], **keys), base_tokenizer)
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
    names = {"without_rows": ["gone"], "only_held_out": ["x"], "similar": [["anna", "Anna"]]}
    assert data.stats.to_dict()["adapters"] == {"trained": 3, **names}


def test_the_preview_names_the_adapters_with_the_fewest_and_the_most_rows(read: Read, base_tokenizer: Any) -> None:
    data = build(read, [f"c{i:02}" for i in range(20) for _ in range(i + 1)])
    console = Console(record=True, width=200)
    print_preflight(data, base_tokenizer, console, 3)
    found = "20. Rows to train on: fewest c00 (1), c01 (2), c02 (3); median 11; most c19 (20), c18 (19), c17 (18)"
    assert found in console.export_text()
    assert [data.train[i].owner for i in (0, 1, 3)] == [each.owner for each in data.first_rows(3)]
    few = build(read, ["a\nb", "c d", "c d"], eval_fraction=0.1)
    assert few.stats.adapters is not None and few.stats.adapters.counts == "2: 'a\\nb' (1), c d (1)"
    assert "trained but not scored: 'a\\nb'" in "\n".join(data_warnings(few.stats))  # one row is not held out


def test_the_column_of_answers_names_no_adapters(read: Read) -> None:
    for column in ("prompt", "completion"):
        with pytest.raises(
            InputError, match=f"data.adapter_column: '{column}' is the column of the prompt-completion r"
        ):
            read([{"prompt": "a", "completion": "b"}] * 2, adapter_column=column)


def test_a_cached_set_of_rows_knows_its_adapters(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvera.data.cache.WORTH_BYTES", 0)
    keys: dict[str, Any] = {"eval_fraction": 0.5, "max_length": 16, "too_long": "drop"}
    made, found = (build(read, ["b", "a", "b", "a"], **keys) for _ in range(2))
    assert not made.stats.cache_entries and found.stats.cache_entries
    assert data_sha256(found) == data_sha256(made)
    assert found.stats.adapters is not None and found.stats.to_dict() == made.stats.to_dict()


KEYS = {"path": "rows.jsonl", "adapter_column": "customer"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"adapter_files": True}}, "data.adapter_files: and data.adapter_column both name"),
        ({"data": {"packing": True}}, "data.packing: would put rows of several adapters"),
        ({"data": {"mixture": [{"path": "x"}]}}, "data.mixture: data.adapter_column takes all rows from data.path"),
        ({"data": {"weight": 2.0}}, "data.weight: each adapter"),
        ({"data": {"sampling": "task", "task_column": "t"}}, "data.sampling: task draws steps over tasks"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout: each adapter"),
        ({"adapter": {"magnitude": True}}, "adapter.magnitude: its norms"),
        ({"model": {"path": "m", "added_tokens": ["<x>"]}}, "model.added_tokens: is not built for many"),
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
    for training, words in (
        ({"adapters_at_once": 4}, "training.adapters_at_once: has no effect without data.adapter_column"),
        ({"global_batch_size": 3, "per_device_train_batch_size": 2}, "training.global_batch_size: 3 is not a multiple"),
    ):
        with pytest.raises(InputError, match=words):
            parse_recipe({"model": "m", "data": {"path": "r.jsonl"}, "training": training}, "r.yaml")
