"""Recipes: read strictly, every problem at once, each with what to write instead; and the way back to YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvera.config.load import load_recipe
from qvera.config.schema import Recipe, parse_recipe
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
    section, name = key.split(".")
    return {**MINIMAL, section: {**MINIMAL.get(section, {}), name: value}}


def test_the_minimal_recipe_has_every_default() -> None:
    recipe = parse_recipe(MINIMAL, "my.yaml")
    assert (recipe.model.quantization, recipe.model.double_quant, recipe.adapter.rank) == ("nf4", True, 256)
    assert (recipe.adapter.d_initial, recipe.adapter.targets) == (0.1, "all-linear")
    assert recipe.training.gradient_checkpointing is True


def test_a_string_is_short_for_the_models_path() -> None:
    recipe = parse_recipe({**MINIMAL, "model": "some/model"}, "my.yaml")
    assert recipe == parse_recipe(MINIMAL, "my.yaml")


def test_all_problems_are_reported_at_once() -> None:
    tree = {
        "model": {"path": "", "quantisation": "nf4"},
        "adapter": {"rank": 0, "dropout": 1.0, "targets": []},
        "training": {"learning_rate": -1, "max_step": 3},
        "datta": {},
    }
    found = problems(tree)
    assert found.keys() == {
        "model.path", "model.quantisation", "adapter.rank", "adapter.dropout", "adapter.targets",
        "training.learning_rate", "training.max_step", "datta", "data",
    }  # fmt: skip
    assert found["data"] == "is missing and has no default."


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.quantisation", "quantization"),
        ("model.compute_type", "compute_dtype"),
        ("adapter.ranks", "rank"),
        ("adapter.target", "targets"),
        ("adapter.drop_out", "dropout"),
        ("data.train_in", "train_on"),
        ("training.learning_rates", "learning_rate"),
        ("training.global_batchsize", "global_batch_size"),
        ("training.warmup_ration", "warmup_ratio"),
        ("export.dtypes", "dtype"),
    ],
)
def test_a_misspelt_key_gets_the_nearest_name(key: str, near: str) -> None:
    assert problems(with_value(key, 1)) == {key: f"unknown key. Did you mean `{near}`?"}


def test_a_misspelt_section_gets_the_nearest_name() -> None:
    assert problems({**MINIMAL, "trainning": {}}) == {"trainning": "unknown key. Did you mean `training`?"}


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one() -> None:
    assert problems(with_value("model.rank", 8)) == {
        "model.rank": "unknown key. There is `adapter.rank`: move it there."
    }
    found = problems({**MINIMAL, "max_steps": 8})
    assert found == {"max_steps": "unknown key. There is `training.max_steps`: move it there."}


def test_an_unknown_key_like_no_other_gets_the_whole_list() -> None:
    sentence = problems(with_value("export.zzzzzz", 1))["export.zzzzzz"]
    assert sentence.startswith("unknown key. Known here: dtype, base, ")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("adapter.rank", 0, "takes a whole number >= 1, got 0."),
        ("adapter.rank", 8.5, "takes a whole number >= 1, got 8.5."),
        ("adapter.rank", "8", "takes a whole number >= 1, got '8'."),
        ("adapter.rank", True, "takes a whole number >= 1, got True."),
        ("adapter.rank", None, "takes a whole number >= 1, got None."),
        ("adapter.seed", -1, "takes a whole number >= 0 and < 2**64, got -1."),
        ("adapter.dropout", 1.0, "takes a number >= 0 and < 1, got 1.0."),
        ("adapter.d_initial", "much", "takes a number, got 'much'."),
        ("adapter.targets", 5, "takes all-linear or a non-empty list of non-empty strings, got 5."),
        ("adapter.init_from", 5, "takes a string or nothing (null), got 5."),
        ("model.double_quant", "yes", "takes true or false, got 'yes'."),
        ("model.double_quant", 1, "takes true or false, got 1."),
        ("model.quantization", "nf8", "takes one of nf4, fp4, int8, none, got 'nf8'."),
        ("model.path", "", "takes a non-empty string, got ''."),
        ("data.columns", ["a"], "takes a mapping of names to names, got ['a']."),
        ("data.max_length", 4, "takes a whole number >= 8, got 4."),
        ("training.learning_rate", 0, "takes a number > 0, got 0."),
        ("training.learning_rate", float("nan"), "takes a number > 0, got nan."),
        ("training.learning_rate", float("inf"), "takes a number > 0, got inf."),
        ("training.max_steps", -2, "takes a whole number >= -1, got -2."),
        ("training.lr_scheduler_type", "cosin", "takes one of cosine, linear, constant, got 'cosin'."),
        ("training.report_to", "tensorboard", "takes a list of non-empty strings, got 'tensorboard'."),
    ],
)
def test_a_wrong_value_says_what_is_taken(key: str, value: Any, sentence: str) -> None:
    assert problems(with_value(key, value)) == {key: sentence}


@pytest.mark.parametrize("section", ["model", "adapter", "data", "training", "export"])
@pytest.mark.parametrize("value", [7, ["a"], None])
def test_a_section_must_be_a_mapping(section: str, value: Any) -> None:
    assert problems({**MINIMAL, section: value}) == {section: f"takes a mapping of keys, got {value!r}."}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gradient_accumulation_steps", "set training.global_batch_size"),
        ("bf16", "set model.compute_dtype: bfloat16"),
        ("fp16", "set model.compute_dtype: float16"),
        ("logging_steps", "every step is logged"),
        ("eval_strategy", "set training.eval_steps"),
        ("save_strategy", "set training.save_steps"),
        ("resume_from_checkpoint", "--resume"),
        ("max_seq_length", "set data.max_length"),
        ("dataloader_num_workers", "TrainingArguments field that this loop does not have; remove it"),
        ("label_smoothing_factor", "TrainingArguments field that this loop does not have; remove it"),
    ],
)
def test_training_arguments_fields_get_advice(name: str, words: str) -> None:
    sentence = problems(with_value(f"training.{name}", 1))[f"training.{name}"]
    assert sentence.startswith("is not a key of this section: ")
    assert words in sentence


@pytest.mark.parametrize("tree", [None, [], "text", 5])
def test_a_recipe_is_a_mapping(tree: Any) -> None:
    with pytest.raises(InputError, match="a recipe is a mapping with at least `model` and `data`"):
        parse_recipe(tree, "my.yaml")


# From files.


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


BODY = "model: some/model\ndata:\n  path: rows.jsonl\n"


@pytest.mark.parametrize(
    ("written", "value"), [("4e-3", 4e-3), ("1E-4", 1e-4), ("4.5e+0", 4.5), ("0.004", 0.004), ("1", 1)]
)
def test_numbers_as_people_write_them(tmp_path: Path, written: str, value: float) -> None:
    recipe = load_recipe(write(tmp_path, f"{BODY}training:\n  learning_rate: {written}\n"))
    assert recipe.training.learning_rate == value
    assert isinstance(recipe.training.learning_rate, float)


def test_text_that_only_looks_like_a_number_is_refused(tmp_path: Path) -> None:
    for written in ("4e-3x", "'fast'", "e-3"):
        with pytest.raises(InputError, match="training.learning_rate: takes a number > 0"):
            load_recipe(write(tmp_path, f"{BODY}training:\n  learning_rate: {written}\n"))


def test_a_key_written_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the key 'rank' is written twice(.|\n)*line 6"):
        load_recipe(write(tmp_path, f"{BODY}adapter:\n  rank: 4\n  rank: 8\n"))
    with pytest.raises(InputError, match=r"the key 'data' is written twice(.|\n)*line 4"):
        load_recipe(write(tmp_path, f"{BODY}data:\n  path: b.jsonl\n"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: [unclosed", "not valid YAML"),
        (b"model: a\n\tdata: b", "not valid YAML"),
        (b"", "got an empty file"),
        (b"- a\n- b\n", "got list"),
        (b"\xff\xfe\x00", "can't be read as a recipe"),
        (b"model: !!python/object/apply:os.getcwd []", "not valid YAML"),
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
    with pytest.raises(InputError, match=r"recipes\.yaml: no such recipe file\. Did you mean .*recipe\.yaml\?"):
        load_recipe(tmp_path / "recipes.yaml")
    with pytest.raises(InputError, match=r"zzz: no such recipe file\.$"):
        load_recipe(tmp_path / "zzz")


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read as a recipe"):
        load_recipe(tmp_path)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, BODY)
    recipe = load_recipe(
        path,
        [
            "training.learning_rate=1e-2",
            "training.max_steps=7",
            "adapter.targets=[q_proj, v_proj]",
            "model.quantization=fp4",
            "model.double_quant=false",
            "data.eval_path=a=b.jsonl",
            "model.revision=",
        ],
    )
    assert recipe.training.learning_rate == 1e-2
    assert recipe.training.max_steps == 7
    assert recipe.adapter.targets == ["q_proj", "v_proj"]
    # the short form of `model` is kept when one of its keys is set
    assert (recipe.model.path, recipe.model.quantization, recipe.model.double_quant) == ("some/model", "fp4", False)
    assert recipe.data.eval_path == "a=b.jsonl"
    assert recipe.data.path == "rows.jsonl"
    assert recipe.model.revision is None
    assert load_recipe(path, ["model=other"]).model.path == "other"
    assert load_recipe(path, ["training.max_steps=1", "training.max_steps=2"]).training.max_steps == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_steps", "expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("training..max_steps=5", "expected section.key=value"),
        ("training.max_steps=[1", "the value is not valid YAML"),
        ("training.max_step=5", "Did you mean `max_steps`?"),
        ("training.max_steps=many", "takes a whole number >= -1, got 'many'"),
        ("adapter=5", "takes a mapping of keys, got 5"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, BODY), [override])
    assert words in str(caught.value)


def test_the_effective_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, f"{BODY}  system: 'Grüße: \"yes\"'\nadapter:\n  rank: 64\n  targets: [q_proj, up_proj]\n"),
        ["training.learning_rate=3e-3", "data.columns={prompt: frage}"],
    )
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    tree = yaml.safe_load(recipe.to_yaml())
    for section in dataclasses.fields(Recipe):  # every key of every section is written
        value = getattr(recipe, section.name)
        if section.name == "deepspeed":  # a key beside the sections
            assert tree["deepspeed"] is None
            continue
        assert tree[section.name].keys() == {f.name for f in dataclasses.fields(value)}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            {"training": {"global_batch_size": 7, "per_device_train_batch_size": 4}},
            "training.global_batch_size: 7 is not a",
        ),
        ({"training": {"eval_steps": 5}}, "training.eval_steps: needs held-out rows"),
        ({"training": {"early_stopping_patience": 2}}, "training.early_stopping_patience: needs held-out rows"),
        ({"training": {"load_best_model_at_end": True}}, "training.load_best_model_at_end: needs held-out rows"),
        (
            {"data": {"path": "a", "eval_fraction": 0.1}, "training": {"early_stopping_patience": 2}},
            "training.early_stopping_patience: needs training.eval_steps",
        ),
    ],
)
def test_keys_that_contradict_each_other(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe({**MINIMAL, **changes}, "my.yaml")
    assert str(caught.value).startswith("my.yaml: the recipe's keys contradict each other:\n")
    assert key in str(caught.value)


def test_defaults_are_not_shared_between_recipes() -> None:
    one, other = parse_recipe(MINIMAL, "x"), parse_recipe(MINIMAL, "x")
    one.training.report_to.append("wandb")
    one.data.columns["a"] = "b"
    assert other.training.report_to == ["auto"]
    assert other.data.columns == {}
