"""Every file in recipes/ is a valid recipe and says what it claims to say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.paper import TABLES
from qvera.config.schema import Recipe, load_recipe, read_yaml

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SCHEMA = RECIPES.parent / "docs" / "recipe.schema.json"
OVER_LLAMA = [
    "customers", "e2e/smollm2-135m", "e2e/smollm2-135m-lora", "images/qwen3-vl-2b", "instruct/llama-13b", "instruct/llama-7b", "instruct/llama2-13b",
    "instruct/llama2-7b", "instruct/llama3.1-8b", "instruct/smollm2-135m", "preference/llama3-8b-dpo",
    "preference/llama3-8b-kto", "quickstart", "rewards/orders", "rewards/sums",
]  # fmt: skip
OF_THE_PAPER = [row.recipe for rows in TABLES.values() for row in rows.values()]
NAMES = sorted(OVER_LLAMA + OF_THE_PAPER)


def test_no_recipe_is_unknown_to_this_test() -> None:
    assert sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipe_parses_and_names_the_schema(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    recipe = load_recipe(path)
    assert (recipe.adapter.targets == "all-linear") == (name in OVER_LLAMA)
    assert recipe.model.quantization == ("nf4" if name in OVER_LLAMA else "none")
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    assert (path.parent / first.removeprefix("# yaml-language-server: $schema=")).samefile(SCHEMA)


def test_the_json_schema_accepts_the_recipes_and_marks_mistakes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for name in NAMES:
        path = RECIPES / f"{name}.yaml"
        assert not list(check.iter_errors(read_yaml(path.read_text(encoding="utf-8"), name)[0]))
    wrong = {"model": "a/model", "data": {"path": "rows.jsonl", "limt": 3}, "adapter": {"rank": 0, "targets": []}}
    assert {error.json_path for error in check.iter_errors(wrong)} == {"$.data", "$.adapter.rank", "$.adapter.targets"}


@pytest.mark.parametrize(("task", "results"), [("e2e", "e2e-sweep"), ("instruct", "alpaca")])
def test_presets_are_the_best_of_the_sweep_that_they_name(task: str, results: str) -> None:
    """By held-out loss, at the steps of the first trials; of two within 0.001 either will do."""
    recipe = load_recipe(RECIPES / task / "smollm2-135m.yaml")
    lines = (RECIPES.parent / "bench" / "results" / f"{results}.jsonl").read_text().splitlines()
    trials = [(line["trial"], line["held_out_loss"]) for line in map(json.loads, lines) if line["trial"]["steps"] == 50]
    ours = [(trial, loss) for trial, loss in trials if trial["method"] == "qvera"]
    assert len([1 for trial, _ in trials if trial["method"] == "lora"]) >= len(ours) >= 2
    training = recipe.training
    mine = {name: getattr(recipe.adapter, name) for name in ("rank", "targets", "b_groups", "input_scale")}
    mine |= {"learning_rate": training.learning_rate, "warmup_ratio": training.warmup_ratio}
    mine |= {"schedule": training.lr_scheduler_type}
    plain = {"b_groups": 1, "input_scale": False}  # lines from before these keys
    (found,) = [loss for trial, loss in ours if mine.items() <= (plain | trial).items() and not trial["d_initial"]]
    assert found < min(loss for _, loss in ours) + 1e-3


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("model", ["llama", "llama2"])
def test_llama_recipes_have_the_papers_settings(model: str, size: str) -> None:
    recipe = load_recipe(RECIPES / f"instruct/{model}-{size}.yaml")
    data, training = recipe.data, recipe.training
    assert recipe.model.path == {"llama": f"huggyllama/llama-{size}", "llama2": f"meta-llama/Llama-2-{size}-hf"}[model]
    assert (recipe.model.double_quant, recipe.adapter.rank, recipe.adapter.d_initial) == (True, 1024, 0.1)
    assert (data.path, data.template, data.train_on) == ("yahma/alpaca-cleaned", "alpaca", "assistant")
    assert (data.max_source_length, data.max_target_length) == (768, 256)
    assert (training.global_batch_size, training.per_device_train_batch_size) == (16, 4)
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_ratio) == (4e-3, "cosine", 0.1)
    assert (training.num_train_epochs, training.max_steps, training.weight_decay) == (1.0, -1, 0.0)


def test_quickstart_recipe_stays_small() -> None:
    recipe = load_recipe(RECIPES / "quickstart.yaml")
    assert recipe.adapter.rank == 256
    rows = recipe.training.max_steps * recipe.training.global_batch_size
    assert 0 < rows <= 1000, "the quickstart has six minutes on two cores"


# The paper's table of hyperparameters: epochs, VeRA's rate, the head's rate.
GLUE = {
    ("base", "sst2"): (60, 4e-3, 4e-3), ("base", "mrpc"): (30, 1e-2, 4e-3), ("base", "cola"): (80, 1e-2, 1e-2),
    ("base", "qnli"): (25, 1e-2, 4e-3), ("base", "rte"): (160, 4e-3, 1e-2), ("base", "stsb"): (80, 1e-2, 1e-2),
    ("large", "sst2"): (10, 1e-2, 6e-3), ("large", "mrpc"): (40, 3e-2, 3e-3), ("large", "cola"): (40, 1e-2, 6e-3),
    ("large", "qnli"): (20, 1e-2, 2e-4), ("large", "rte"): (40, 2e-2, 2e-3), ("large", "stsb"): (20, 2e-2, 2e-3),
}  # fmt: skip
SIZES = {"base": (1024, 64, 512), "large": (256, 128, 128)}  # rank, batch, most tokens


@pytest.mark.parametrize(("size", "task"), GLUE)
def test_glue_recipes_have_the_papers_settings(size: str, task: str) -> None:
    recipe = load_recipe(RECIPES / f"glue/{task}-roberta-{size}.yaml")
    training, data = recipe.training, recipe.data
    rates = training.num_train_epochs, training.learning_rate, training.head_learning_rate
    assert rates == GLUE[size, task]
    assert (recipe.adapter.rank, training.global_batch_size, data.max_length) == SIZES[size]
    assert recipe.adapter.targets == ["query", "value"]
    assert (training.lr_scheduler_type, training.warmup_ratio, training.optim) == ("linear", 0.06, "adamw")
    assert (data.path, data.config_name, data.eval_split) == ("nyu-mll/glue", task, "validation")
    assert (data.regression is True) == (task == "stsb")


@pytest.mark.parametrize(("size", "rate"), [("medium", 1e-1), ("large", 2e-2)])
def test_e2e_recipes_have_the_papers_settings(size: str, rate: float) -> None:
    recipe = load_recipe(RECIPES / f"e2e/gpt2-{size}.yaml")
    training = recipe.training
    assert (recipe.adapter.rank, training.learning_rate, training.num_train_epochs) == (1024, rate, 5)
    assert (training.global_batch_size, training.warmup_steps) == (8, 500)
    assert (training.weight_decay, training.label_smoothing) == (0.01, 0.1)


@pytest.mark.parametrize("name", TABLES["vision-base"])
@pytest.mark.parametrize("size", ["base", "large"])
def test_vision_recipes_have_the_papers_settings(size: str, name: str) -> None:
    recipe = load_recipe(RECIPES / f"vision/{name}-vit-{size}.yaml")
    assert recipe.model.path == f"google/vit-{size}-patch16-224-in21k"
    assert (recipe.adapter.rank, recipe.data.rows_per_label, recipe.training.num_train_epochs) == (256, 10, 10)
    assert 2e-2 <= recipe.training.learning_rate <= 7e-2


def test_every_source_of_a_mixture_takes_the_format_of_the_task_in_python_too() -> None:
    recipe = Recipe(model="m", data={"path": "a", "mixture": [{"path": "b"}, {"path": "c"}]})
    for changed, wanted in (
        ({"task": "sequence-classification"}, "classification"),
        ({"training": {"objective": "dpo"}}, "preference"),
    ):
        found = recipe.replace(**changed).data
        assert {source.format for _, source in found.sources("data")} == {wanted}
