"""Recipes: read strictly, every problem at once, each with what to write instead; and the way back to YAML."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvera.adapters.methods import check_recipe
from qvera.config.schema import Recipe, load_recipe, parse_recipe
from qvera.config.sections import AdapterSection, ModelSection
from qvera.utils.errors import InputError

MINIMAL: dict[str, Any] = {"model": {"path": "some/model"}, "data": {"path": "rows.jsonl"}}


def problems(tree: Any) -> dict[str, str]:
    """key → sentence of each problem that parsing this tree reports."""
    with pytest.raises(InputError) as caught:
        parse_recipe(tree, "my.yaml")
    first, *lines = str(caught.value).splitlines()
    count = len(lines)
    assert first == f"my.yaml: {count} problem{'s' if count > 1 else ''} in the recipe:"
    return dict(line.strip().split(": ", 1) for line in lines)


def with_value(key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    return {**MINIMAL, section: {**MINIMAL.get(section, {}), name: value}} if section else {**MINIMAL, key: value}


def test_the_minimal_recipe_has_every_default() -> None:
    recipe = parse_recipe(MINIMAL, "my.yaml")
    assert (recipe.model.quantization, recipe.model.double_quant, recipe.adapter.rank) == ("nf4", True, 256)
    assert (recipe.adapter.d_initial, recipe.adapter.targets) == (0.1, "all-linear")
    assert recipe.training.gradient_checkpointing == "auto"
    assert parse_recipe({**MINIMAL, "model": "some/model"}, "my.yaml") == recipe, "short for the model's path"
    other = parse_recipe(MINIMAL, "my.yaml")
    recipe.training.report_to.append("wandb")
    recipe.data.columns["a"] = "b"
    assert (other.training.report_to, other.data.columns) == (["auto"], {}), "defaults are not shared"
    with pytest.raises(InputError, match="rank: a recipe does not change; its `replace` makes"):
        recipe.adapter.rank = 8  # type: ignore[misc]


def test_all_problems_are_reported_at_once() -> None:
    tree = {
        "model": {"path": "", "quantisation": "nf4"},
        "adapter": {"rank": 0, "dropout": 1.0, "targets": []},
        "training": {"learning_rate": -1, "max_step": 3},
        "datta": {},
        "task": ["image-classification"],
    }
    found = problems(tree)
    assert found.keys() == {
        "model.path", "model.quantisation", "adapter.rank", "adapter.dropout", "adapter.targets",
        "training.learning_rate", "training.max_step", "datta", "data", "task",
    }  # fmt: skip
    assert found["data"] == "is missing and has no default."
    # contradictions, too, of several sections
    model = {"path": "a", "quantization": "int8", "compute_dtype": "float32"}
    adapter = {"rank": 8, "b_groups": 3, "train_d": False, "input_scale": True}
    found = problems({"model": model, "data": {"path": "b", "max_length": 1}, "adapter": adapter})
    assert found.keys() == {"model.compute_dtype", "data.max_length", "adapter.b_groups", "adapter.input_scale"}
    same = {"path": "b", "columns": {"prompt": "review", "completion": "review"}}
    for data, key in ((same, "data.columns"), ({"path": "a", "mixture": [same]}, "data.mixture.0.columns")):
        assert problems({**MINIMAL, "data": data})[key].startswith("prompt and completion are one column, 'review'.")


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("model.quantisation", "Did you mean `quantization`?"),
        ("training.learning_rates", "Did you mean `learning_rate`?"),
        ("trainning", "Did you mean `training`?"),
        ("rank", "There is `adapter.rank`: move it there."),
        ("model.rank", "There is `adapter.rank`: move it there."),
        ("max_steps", "There is `training.max_steps`: move it there."),
        ("training.lr", "Did you mean `learning_rate`?"),
        ("r", "There is `adapter.rank`"),
        ("adapter.r", "Did you mean `rank`?"),
        ("adapter.lora_alpha", "Did you mean `alpha`?"),
        ("lr", "There is `training.learning_rate`: move it there."),
        ("num_epochs", "There is `training.num_train_epochs`."),
        ("micro_batch_size", "There is `training.per_device_train_batch_size`: move it there."),
        ("path", "There is `model.path` or `data.path`: move it there."),
        ("adapter.bias", "Known here: method, rank, "),
        ("training.num_generations", "Did you mean `group_size`?"),
        ("training.completion_only_loss", "There is `data.train_on`: move it there."),
        ("data.dataset_text_field", "Known here: path, weight, "),
        ("model.max_seq_length", "There is `data.max_length`: move it there."),
        ("data.path:rows", "Put a space after the colon."),
        ("export.zzzzzz", "Known here: dtype, base, "),
    ],
)
def test_an_unknown_key_gets_the_nearest_name_or_its_section_or_all_that_are_known(key: str, sentence: str) -> None:
    found = problems(with_value(key, 1))
    assert found.keys() == {key} and found[key].startswith(f"unknown key. {sentence}")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("adapter.rank", 0, "should be greater than or equal to 1, got 0."),
        ("adapter.rank", 8.5, "should be a whole number, got 8.5."),
        ("adapter.rank", True, "should be a whole number, got True."),
        ("adapter.rank", 10**20, f"should be less than or equal to 65536, got {10**20}."),
        ("data.limit", 10**20, f"should be less than 2147483648, got {10**20}."),
        ("data.weight", 1e9, "should be less than or equal to 1000000, got 1000000000.0."),
        ("adapter.d_initial", -1e39, f"should be greater than or equal to {-3 * 10**38}, got -1e+39."),
        ("adapter.d_initial", "abc", "should be a valid number, got 'abc'."),
        ("adapter.seed", -1, "should be greater than or equal to 0, got -1."),
        ("adapter.seed", 2**64, f"should be less than {2**64}, got {2**64}."),
        ("adapter.dropout", 1.0, "should be less than 1, got 1.0."),
        ("adapter.targets", 5, "should be 'all-linear', got 5. Or: should be a valid list, got 5."),
        ("adapter.init_from", 5, "should be a valid string, got 5. Write it in quotes."),
        ("model.double_quant", "yes", "should be true or false, got 'yes'."),
        ("model.double_quant", 1, "should be true or false, got 1."),
        ("model.quantization", "nf8", "should be 'nf4', 'fp4', 'int8' or 'none', got 'nf8'."),
        ("model.path", "", "string should have at least 1 character, got ''."),
        ("model.path", ["x" * 500], f"should be a valid string, got {['x' * 198]!r}".removesuffix("']") + "...."),
        ("data.columns", ["a"], "should be a mapping, got ['a']."),
        ("data.columns", {"prompt:ask": None}, "should be a valid string, got None. Put a space after each colon."),
        ("training.learning_rate", float("nan"), "should be a finite number, got nan."),
        ("training.report_to", "tensorboard", "should be a valid list, got 'tensorboard'. Write [tensorboard]."),
    ],
)
def test_a_wrong_value_says_what_is_taken(key: str, value: Any, sentence: str) -> None:
    assert problems(with_value(key, value)) == {key: sentence}


def test_a_section_must_be_a_mapping() -> None:
    for section, value in (("model", 7), ("adapter", ["a"]), ("training", 7)):
        assert problems({**MINIMAL, section: value}) == {section: f"should be a mapping of keys, got {value!r}."}
    assert problems({**MINIMAL, "data": None}) == {"data": "is missing and has no default."}
    # all keys of it are comments
    assert parse_recipe({**MINIMAL, "training": None, "export": None}, "r.yaml") == parse_recipe(MINIMAL, "r.yaml")


ADVICE = {
    "gradient_accumulation_steps": "set training.global_batch_size", "bf16": "set model.compute_dtype: bfloat16",
    "fp16": "set model.compute_dtype: float16", "logging_steps": "every step is logged",
    "eval_strategy": "set training.eval_steps", "save_strategy": "set training.save_steps",
    "resume_from_checkpoint": "--resume", "max_seq_length": "set data.max_length",
    "dataloader_num_workers": "TrainingArguments field that this loop does not have; remove it",
    "label_smoothing_factor": "TrainingArguments field that this loop does not have; remove it",
}  # fmt: skip


def test_training_arguments_fields_get_advice() -> None:
    for name, words in ADVICE.items():
        sentence = problems(with_value(f"training.{name}", 1))[f"training.{name}"]
        assert sentence.startswith("is not a key here: ") and words in sentence
    assert ADVICE["bf16"] in problems(with_value("bf16", True))["bf16"], "beside the sections, as Axolotl has it"
    for key, advice in (
        ("sequence_len", "set data.max_length"),
        ("training.gradient_accumulation", "global_batch_size"),
    ):
        assert advice in problems(with_value(key, 1))[key], "by another tool's name"


# From files.


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


BODY = "model: some/model\ndata:\n  path: rows.jsonl\n"


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    for written, value in (("4e-3", 4e-3), ("1E-4", 1e-4), ("4.5e+0", 4.5), ("0.004", 0.004), ("1", 1)):
        found = load_recipe(write(tmp_path, f"{BODY}training:\n  learning_rate: {written}\n")).training.learning_rate
        assert found == value and isinstance(found, float)
    for written in ("4e-3x", "'fast'", "e-3"):
        with pytest.raises(InputError, match=r"line 5, training.learning_rate: should be a valid number"):
            load_recipe(write(tmp_path, f"{BODY}training:\n  learning_rate: {written}\n"))


def test_a_key_written_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    for text, key, first, second in (
        ("adapter:\n  rank: 4\n  rank: 8\n", "rank", 5, 6),
        ("data:\n  path: b.jsonl\n", "data", 2, 4),
        ("adapter: {rank: 4, rank: 8}\n", "rank", 4, 4),
    ):
        words = rf"the key '{key}' is written twice, first in line {first}(.|\n)*line {second}"
        with pytest.raises(InputError, match=words):
            load_recipe(write(tmp_path, BODY + text))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: [unclosed", "not valid YAML"),
        (b"model: a\ndata:\n\tpath: b", "Indent with spaces, not with tabs."),
        (b"", "a recipe is a mapping with at least `model` and `data`, got nothing"),
        (b"- a\n- b\n", "got a list"),
        (b"data:\n  system: Answer: a code\n", "A text with a colon and a space in it has to be in quotes."),
        ("model: a".encode("utf-16"), "the file looks like UTF-16. Convert it, for example: iconv -f UTF-16"),
        (
            b"model: a\ndata:\n  path: b\n\n # c\n limit: 3\n  seed: 1",
            "line 6 is indented by 1 space, line 3 by 2 and line 7 by 2.",
        ),
        (
            b"model: a\ndata:\n  path: b\n    limit: 3",
            "line 4 is indented by 4 spaces, line 3 by 2. Keys of one section",
        ),
        (b"model: a\ndata:\n  path: b: c", "mapping values are not allowed here"),
        (b"model small\ndata:\n  path: b", "line 1 is no key with its value. Write `model: small`."),
        (b"model: a\nadapter:\n  rank:256\n  seed: 1", "line 3 is no key with its value. Write `rank: 256`."),
        (b"model: a\nadapter:\n  seed: 1\n  rank 256\n  # c\n\ndata: b", "Write `rank: 256`."),
        (b"model: a\nadapter:\n  targets: [q_proj,\n    v_proj\n  seed: 1", "expected ',' or ']'"),
        (b"model: a\ndata:\n  system: You are\n    a helper\n    in: b", "mapping values are not allowed here"),
        (b"model: a\ndata", "line 2 is no key with its value. Write `data: VALUE`."),
        (rb'model: "C:\Users\me"', "In double quotes a backslash begins an escape: use single quotes."),
        (rb'model: "C:\models\me"', "In double quotes a backslash begins an escape: use single quotes."),
        (b"model: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"model: a\ndata: b\x0cc", "line 2 holds the character U+000C, which YAML does not take. Remove it."),
        (b'model: "a\n# b" : c', "mapping values are not allowed here"),  # a text with a line that looks like a comment
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, BODY)
    with pytest.raises(InputError, match=r"recipes\.yaml: no such recipe file; did you mean '/.*/recipe\.yaml'\?"):
        load_recipe(tmp_path / "recipes.yaml")
    for far in ("zzz", "zzz.yaml"):  # which has the ending in common
        with pytest.raises(InputError, match=rf"{far}: no such recipe file\.$"):
            load_recipe(tmp_path / far)
    with pytest.raises(InputError, match="can't be read as a recipe"):
        load_recipe(tmp_path)  # a directory


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, BODY)
    recipe = load_recipe(path, [
        "training.learning_rate=1e-2", "training.max_steps=7", "adapter.targets=[q_proj, v_proj]", "model.quantization=fp4",
        "model.double_quant=false", "data.eval_path=a=b.jsonl", "model.revision=",
    ])  # fmt: skip
    assert (recipe.training.learning_rate, recipe.training.max_steps) == (1e-2, 7)
    assert recipe.adapter.targets == ["q_proj", "v_proj"]
    # the short form of `model` is kept when one of its keys is set
    assert (recipe.model.path, recipe.model.quantization, recipe.model.double_quant) == ("some/model", "fp4", False)
    assert (recipe.data.path, recipe.data.eval_path, recipe.model.revision) == ("rows.jsonl", "a=b.jsonl", None)
    assert load_recipe(path, ["model=other"]).model.path == "other"
    half = write(tmp_path, "model: some/model\ndata: {path: rows.jsonl, eval_fraction: 0.1}\n")  # as init writes it
    data = load_recipe(half, ["data.eval_path=test.jsonl"]).data
    assert (data.eval_path, data.eval_fraction) == ("test.jsonl", 0.0), "one way to hold out rows replaces the other"
    assert load_recipe(half, ["data.eval_split=test"]).data.eval_fraction == 0.0
    with pytest.raises(InputError, match="remove one of the two"):
        load_recipe(half, ["data.eval_path=test.jsonl", "data.eval_fraction=0.2"])
    long = write(tmp_path, "model: some/model\ndata: rows.jsonl\ntraining: {max_steps: 400}\n")
    assert load_recipe(long, ["training.num_train_epochs=3"]).training.max_steps == -1
    assert load_recipe(long, ["training.num_train_epochs=3", "training.max_steps=9"]).training.max_steps == 9
    assert load_recipe(write(tmp_path, "model: some/model\ndata: rows.jsonl\n")).data.path == "rows.jsonl"
    assert load_recipe(path, ["training.max_steps=1", "training.max_steps=2"]).training.max_steps == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_steps", "expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("training.max_steps=[1", "--set training.max_steps=[1: not valid YAML"),
        ("training.max_step=5", "Did you mean `max_steps`?"),
        ("adapter.rank=", "adapter.rank: should be a whole number, got None. Leave the key out for its default."),
        ("adapter.rank=64,training.max_steps=3", "got '64,training.max_steps=3'. Each key takes its own --set."),
        (
            "data.system=Answer: one word",
            "data.system: should be a valid string, got {'Answer': 'one word'}. Write it in quotes.",
        ),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, BODY), [override])
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["Team #1 only, please", "#1 only", "'Team #1'", "null", " a  b "])
def test_a_text_of_an_override_is_taken_whole(tmp_path: Path, text: str) -> None:
    found = load_recipe(write(tmp_path, BODY), [f"data.system={text}"]).data.system
    assert found == (None if text == "null" else text.strip().strip("'"))


def test_the_effective_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, f"{BODY}  system: 'Grüße: \"yes\"'\nadapter:\n  rank: 64\n  targets: [q_proj, up_proj]\n"),
        ["training.learning_rate=3e-3", "data.columns={prompt: frage}"],
    )
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    tree = yaml.safe_load(recipe.to_yaml())
    assert (tree.pop("deepspeed"), tree.pop("task")) == (None, "causal-lm")  # keys beside the sections
    for name, keys in tree.items():  # every key of every section is written
        assert keys.keys() == type(getattr(recipe, name)).model_fields.keys()
    assert tree.keys() == Recipe.model_fields.keys() - {"deepspeed", "task"}


HELD_OUT = {"path": "a", "eval_fraction": 0.1}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            {"training": {"global_batch_size": 7, "per_device_train_batch_size": 4}},
            "training.global_batch_size: 7 is not a",
        ),
        ({"training": {"eval_steps": 5}}, "training.eval_steps: needs held-out rows"),
        (
            {"data": HELD_OUT, "training": {"early_stopping_patience": 2}},
            "training.early_stopping_patience: needs training.eval_steps",
        ),
        ({"data": {**HELD_OUT, "eval_path": "b"}}, "data.eval_fraction: held-out rows already come"),
        ({"adapter": {"rank": 8, "b_groups": 3}}, "adapter.b_groups: 3 does not divide adapter.rank (8)"),
    ],
)
def test_keys_that_contradict_each_other(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe({**MINIMAL, **changes}, "my.yaml")
    assert str(caught.value).startswith("my.yaml: 1 problem in the recipe:\n")
    assert key in str(caught.value)


_TASKS = {"data.sampling": "task", "data.task_column": "t", "data.held_out_tasks": 1}
_SPIEL = {"adapter.method": "spiel", "adapter.growth": "momentum"}
# keys, the first of which has no effect; what it needs; a value that gives it that
IDLE: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"training.bilevel_share": 0.3}, "training.bilevel", {"training.bilevel": True}),
    ({"training.resample_momentum": "move"}, "training.resample_every", {"training.resample_every": 5}),
    ({"training.adapt_rows": 4, **_TASKS}, "training.adapt_steps", {"training.adapt_steps": 3}),
    ({"data.held_out_tasks": ["a"]}, "data.sampling: task", {}),
    ({"data.eval_limit": 9}, "data.eval_path, data.eval_split, data.eval_fraction", {"data.eval_path": "b"}),
    ({"training.exact_match_rows": 9}, "data.eval_path", {"data.eval_fraction": 0.1}),
    ({"training.initial_scale_power": 9, "model.compute_dtype": "bfloat16"}, "model.compute_dtype: float16",
     {"model.compute_dtype": "float16"}),
    ({"training.adam_beta2": 0.99, **_SPIEL}, "adapter.growth: accumulated-gradient",
     {"adapter.growth": "accumulated-gradient"}),
    ({"model.quant_storage": "uint8", "model.quantization": "none"}, "model.quantization: nf4",
     {"model.quantization": "fp4"}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "switch", "on"), IDLE, ids=[next(iter(case[0])) for case in IDLE])
def test_a_key_whose_switch_is_off_is_refused(changes: dict[str, Any], switch: str, on: dict[str, Any]) -> None:
    def recipe(changes: dict[str, Any], drop_idle_keys: bool = False) -> Any:
        tree: dict[str, Any] = {"model": {"path": "a"}, "data": {"path": "a"}}
        for path, value in changes.items():
            section, _, name = path.partition(".")
            tree.setdefault(section, {})[name] = value
        return parse_recipe(tree, "my.yaml", drop_idle_keys=drop_idle_keys)

    key = next(iter(changes))
    with pytest.raises(InputError) as caught:
        recipe(changes)
    assert f"1 problem in the recipe:\n  {key}: has no effect without {switch}" in str(caught.value)
    if on:
        recipe({**changes, **on})
    assert recipe(changes, drop_idle_keys=True) == recipe({k: v for k, v in changes.items() if k != key})


def test_sizes_and_paths_that_follow_from_what_is_written() -> None:
    for rows, size in ((1, 1), (2, 2), (3, 3), (7, 1), (8, 4), (16, 4), (10, 2)):
        training = parse_recipe(with_value("training.global_batch_size", rows), "my.yaml").training
        assert (training.global_batch_size, training.per_device_train_batch_size) == (rows, size)
    # resolved without a folder on the way
    paths = {"runs/../x": "x", "a//b/./c/": "a/b/c", "../x": "../x", "/a/../b": "/b", "~/x/../y": "~/y"}
    for written, path in paths.items():
        assert parse_recipe(with_value("training.output_dir", written), "my.yaml").training.output_dir == path


def test_a_source_of_a_mixture_has_no_key_whose_switch_is_off() -> None:
    tree = {**MINIMAL, "task": "sequence-classification"}
    tree["data"] = {"path": "a", "mixture": [{"path": "b"}, {"path": "c", "system": "Be brief."}]}
    assert list(problems(tree)) == ["data.mixture.1.system"]
    assert parse_recipe(tree, "x", drop_idle_keys=True).data.mixture[1].system is None


def test_a_changed_copy_and_a_section_made_in_python_are_checked_like_a_file() -> None:
    recipe = parse_recipe(MINIMAL, "my.yaml")
    other = recipe.replace(adapter=recipe.adapter.replace(rank=8))
    assert other.replace(adapter={"dropout": 0.5}).adapter == other.adapter.replace(dropout=0.5)
    assert (other.adapter.rank, recipe.adapter.rank) == (8, 256)
    assert other.model == recipe.model
    for rows, size in ((6, 3), (2, 2), (8, 4)):  # what was not written follows the changed keys
        recipe = recipe.replace(training={"global_batch_size": rows})
        assert recipe.training.per_device_train_batch_size == size
    with pytest.raises(InputError, match=r"6 is not a multiple of training\.per_device_train_batch_size \(4\)"):
        recipe.replace(training={"per_device_train_batch_size": 4}).replace(training={"global_batch_size": 6})
    with pytest.raises(InputError, match=r"adapter\.rank: has no default for adapter\.method lora"):
        check_recipe(recipe.replace(adapter={"method": "lora"}))
    with pytest.raises(InputError, match=r"limit: should be greater than or equal to 1, got -3\."):
        recipe.data.replace(limit=-3)
    with pytest.raises(InputError, match="b_groups: 3 does not divide"):
        recipe.adapter.replace(b_groups=3)
    with pytest.raises(InputError, match=r"^path: string should have at least 1 character, got ''\.$"):
        ModelSection(path="")
    with pytest.raises(InputError, match="ranc: unknown key. Did you mean `rank`?"):
        AdapterSection(ranc=8)  # type: ignore[call-arg]


def test_an_old_name_of_a_key_works_with_a_warning_that_names_the_new_one(caplog: pytest.LogCaptureFixture) -> None:
    tree = {**MINIMAL, "training": {"rehearse_longest_batch": False}}
    with caplog.at_level(logging.WARNING):
        assert parse_recipe(tree, "my.yaml").training.try_longest_batch is False
    assert caplog.messages == [
        "my.yaml: training.rehearse_longest_batch is now called training.try_longest_batch. The old name still works; "
        "please rename it."
    ]
    assert tree["training"] == {"rehearse_longest_batch": False}
    both = {"rehearse_longest_batch": False, "try_longest_batch": True}
    assert problems({**tree, "training": both}).keys() == {"training.rehearse_longest_batch"}


def test_a_removed_key_loads_with_its_default_and_says_what_to_do_with_another() -> None:
    assert parse_recipe({**MINIMAL, "training": {"loss_scale_window": 2000}}, "old.yaml") == parse_recipe(MINIMAL, "x")
    tree = {**MINIMAL, "training": {"loss_scale_window": 9}}
    (sentence,) = problems(tree).values()
    assert "remove it; a float16 run doubles its loss scale after 2,000 steps" in sentence
    assert parse_recipe(tree, "old.yaml", drop_idle_keys=True) == parse_recipe(MINIMAL, "x")


def test_the_schema_needs_neither_torch_nor_transformers() -> None:
    """In a process where `qvera` itself is empty, so that only `qvera.config` and `qvera.utils.errors` are imported."""
    code = f"""
import sys, types
qvera = types.ModuleType('qvera'); qvera.__path__ = [{str(Path(__file__).parents[2] / "qvera")!r}]
sys.modules['qvera'] = qvera
from qvera.config.schema import load_recipe
from qvera.config.schema import parse_recipe
try: parse_recipe({{'model': 'a', 'data': {{'path': 'b'}}, 'training': {{'label_smoothing_factor': 1}}}}, 'x')
except Exception as error: print('TrainingArguments' in str(error))
print(sorted({{'torch', 'transformers', 'peft', 'numpy'}} & set(sys.modules)))"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "True\n[]\n"
