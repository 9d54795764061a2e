"""Runs on preferences: they move the margin of held-out pairs, resume to the bit, and are refused what they can't have."""

from __future__ import annotations

import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.cli.main import main
from qvera.config.schema import Recipe, parse_recipe
from qvera.config.sections import LrRange
from qvera.training.plan import make_plan
from qvera.training.trainer import find_lr, train
from qvera.utils.errors import InputError
from tests.training.runs import cut_off, on_two_ranks, records, run_json, same, untimed, vectors

pytestmark = pytest.mark.process

WORDS = ["red", "blue", "green", "grey", "gold"]
STEPS = {"dpo": 12, "kto": 12, "orpo": 30}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """40 pairs, and as many judged answers: the word that was asked for is better than another one."""
    directory, chooser = tmp_path_factory.mktemp("preferences"), random.Random(0)
    files: dict[str, list[dict[str, Any]]] = {"preference": [], "unpaired-preference": []}
    for number in range(40):
        word, other = chooser.sample(WORDS, 2)
        prompt, good = f"say {word} {chooser.randint(0, 99)}", number % 2 == 0
        answers = {"chosen": f"{word} {word}", "rejected": f"{other} {word}"}
        files["preference"].append({"prompt": prompt, **answers})
        judged = {"completion": answers["chosen" if good else "rejected"], "label": good}
        files["unpaired-preference"].append({"prompt": prompt, **judged})
    for name, lines in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {name: directory / f"{name}.jsonl" for name in files}


@pytest.fixture(scope="module")
def recipe_of(make_recipe: Any, rows: dict[str, Path]) -> Any:
    def make(objective: str, **training: Any) -> Recipe:
        path = rows["unpaired-preference" if objective == "kto" else "preference"]
        training = {"objective": objective, "learning_rate": 0.2, **training}
        return make_recipe(data={"path": str(path)}, training=training)

    return make


trl = pytest.mark.skipif(find_spec("trl") is None, reason="pip install 'qvera[trl]'")


@pytest.fixture(scope="module")
def finished(recipe_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An objective → the recipe of a finished run, and its directory, with a checkpoint two steps before the end."""
    runs: dict[str, tuple[Recipe, Path]] = {}

    def run_of(objective: str) -> tuple[Recipe, Path]:
        if objective not in runs:
            steps, run_dir = STEPS[objective], tmp_path_factory.mktemp(objective) / "run"
            keys = {"max_steps": steps, "eval_steps": 6, "save_steps": steps - 2, "gradient_checkpointing": True}
            runs[objective] = recipe_of(objective, **keys, output_dir=str(run_dir)), run_dir
            assert train(*runs[objective]) is not None
        return runs[objective]

    return run_of


def scores_of(file: Path, *command: str) -> dict[str, Any]:
    """What ``qvera eval --json`` writes, without answers."""
    assert main(["eval", *command, "--no-generation", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    file.unlink()
    return found


@trl
@pytest.mark.parametrize("objective", STEPS)
def test_a_run_moves_the_margin_of_held_out_rows_and_resumes_to_the_bit(
    objective: str, finished: Any, tmp_path: Path
) -> None:
    recipe, run_dir = finished(objective)
    result, steps = run_json(run_dir)["result"], recipe.training.max_steps
    before, after = (result[when] for when in ("eval_before", "eval_after"))
    assert after["rewards/margins"] > before["rewards/margins"] + (0.01 if objective == "orpo" else 0.2)
    assert after["rows"] == 8
    wanted = {"loss", "learning_rate", "step_seconds", "rewards/chosen", "rewards/rejected", "rewards/margins"}
    wanted |= set() if objective == "kto" else {"rewards/accuracies"}
    assert all(wanted <= set(record) for record in records(run_dir))
    assert [record["step"] for record in records(run_dir, "eval")] == list(range(6, steps + 1, 6))
    page = (run_dir / "report.html").read_text()
    assert "Reward margin" in page and "held-out margin" in page
    # the same scores, of the adapter as it was saved
    again = scores_of(tmp_path / "scores.json", str(run_dir))["scores"]
    for key in ("loss", "rewards/margins", "rows"):
        assert again[key] == pytest.approx(after[key], rel=1e-4)
    cut = cut_off(run_dir, tmp_path / "cut", after=steps - 2)
    train(recipe, cut, resume=True)
    assert same(vectors(run_dir), vectors(cut))
    assert untimed(records(run_dir)) == untimed(records(cut))


@trl
def test_exports_are_compared_on_both_answers(finished: Any, tmp_path: Path, capsys: Any) -> None:
    run = str(finished("dpo")[1])
    assert main(["export", run, str(tmp_path / "merged")]) == 0
    assert "on 16 rows" in capsys.readouterr().out  # 8 held-out pairs
    assert main(["eval", str(tmp_path / "merged")]) == 2
    assert "so a merged export has none" in capsys.readouterr().err
    assert main(["eval", run, "--base"]) == 2
    assert main(["export", run, str(tmp_path / "lora"), "--to", "lora"]) == 0
    asked = [run], [str(tmp_path / "lora"), "--recipe", run]
    ours, exported = (scores_of(tmp_path / "scores.json", *words, "--with-base")["scores"] for words in asked)
    assert ours["rewards/margins"] == pytest.approx(exported["rewards/margins"], rel=1e-3)
    assert ours["rewards/margins"] > 0.1


@trl
def test_a_model_without_an_adapter_is_scored_by_orpo_and_its_base_beside_it(finished: Any, tmp_path: Path) -> None:
    """Its loss needs no reference."""
    run, merged, file = str(finished("orpo")[1]), str(tmp_path / "merged"), tmp_path / "scores.json"
    assert main(["export", run, merged, "--dtype", "float32", "--no-compare"]) == 0
    of_run, of_base = (scores_of(file, run, *more)["scores"]["loss"] for more in ([], ["--base"]))
    exported = scores_of(file, merged, "--recipe", run, "--with-base")
    assert of_run == pytest.approx(exported["scores"]["loss"], rel=1e-3)
    assert of_base > of_run
    assert exported["base_scores"]["loss"] == pytest.approx(of_base, rel=1e-3)


@trl
def test_how_pairs_are_divided_into_passes_changes_nothing(recipe_of: Any, tmp_path: Path) -> None:
    for pass_rows in (8, 2):
        train(recipe_of("dpo", max_steps=2, per_device_train_batch_size=pass_rows), tmp_path / f"by-{pass_rows}")
    for a, b in zip(records(tmp_path / "by-8"), records(tmp_path / "by-2"), strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4)


@trl
@pytest.mark.parametrize("method", ["lora-sb", "spiel"])
def test_methods_that_look_at_gradients_take_those_of_preferences(method: str, recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of("dpo", max_steps=3, learning_rate=0.02)
    train(recipe.replace(adapter=recipe.adapter.replace(method=method, rank=4)), tmp_path / "run")
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert losses[-1] < losses[0]


@trl
def test_a_range_test_of_rates_uses_the_objective(recipe_of: Any, tmp_path: Path) -> None:
    found = find_lr(recipe_of("dpo"), tmp_path / "out", LrRange(steps=10))
    assert found is not None and found.points[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_plan_counts_both_answers_of_a_pair(recipe_of: Any, make_recipe: Any) -> None:
    device = torch.device("cpu")
    recipes = recipe_of("dpo"), recipe_of("kto"), make_recipe()
    pairs, judged, imitated = (make_plan(recipe, device) for recipe in recipes)
    assert (pairs.batch.rows, judged.batch.rows, imitated.batch.rows) == (8, 4, 4)
    assert pairs.memory.total_bytes > judged.memory.total_bytes
    at_the_loss = make_plan(recipe_of("orpo"), device).memory.moments["loss"]
    assert "logits of all tokens" in {part.name for part in at_the_loss}


@pytest.mark.parametrize(("objective", "keys", "said"), [
    ("dpo", {"data": {"packing": True}}, "data.packing: is not built for training.objective: dpo"),
    ("dpo", {"data": {"too_long": "split"}}, "data.too_long: split would part an answer from its prompt"),
    ("dpo", {"data": {"train_on": "all"}}, "data.train_on"),
    ("dpo", {"data": {"max_target_length": 8}}, "data.max_target_length"),
    ("dpo", {"data": {"adapter_column": "who"}}, "training.objective: dpo is not built for many adapters"),
    ("dpo", {"data": {"format": "text"}}, "training.objective: dpo reads rows of the format preference; set this key to auto"),
    ("kto", {"data": {"format": "preference"}}, "training.objective: kto reads rows of the format unpaired-preference"),
    ("sft", {"data": {"format": "preference"}}, "preference is for training.objective: dpo or orpo. Set that"),
    ("sft", {"training": {"beta": 0.2}}, "training.beta: has no effect without"),
    ("orpo", {"training": {"loss_type": "ipo"}}, "training.loss_type: has no effect without training.objective: dpo"),
    ("dpo", {"data": {"mixture": [{"path": "y", "label_names": ["a", "b"]}]}}, "data.mixture.0.label_names: has no"),
    ("dpo", {"training": {"bilevel": True}}, "training.bilevel: is not built for"),
    ("dpo", {"training": {"torch_compile": True}}, "training.torch_compile: is not built for"),
    ("dpo", {"training": {"loss_chunk_tokens": 64}}, "training.loss_chunk_tokens"),
    ("kto", {"training": {"on_oom": "halve"}}, "halve changes the loss of training.objective: kto"),
    ("kto", {"training": {"per_device_train_batch_size": 1}}, "pairs each prompt with another row's answer"),
    ("dpo", {"adapter": {"dropout": 0.1}}, "adapter.dropout: TRL's losses are computed without dropout"),
    ("dpo", {"adapter": {"init_from": "x"}}, "the reference of training.objective: dpo is the base"),
])  # fmt: skip
def test_what_an_objective_can_not_have_is_refused_by_name(
    objective: str, keys: dict[str, Any], said: str, make_recipe: Any
) -> None:
    tree = make_recipe().to_dict() | {"data": {"path": "x.jsonl"}, "training": {"objective": objective}}
    for section, values in keys.items():
        tree[section] = {**tree[section], **values}
    with pytest.raises(InputError, match=re.escape(said)):
        parse_recipe(tree, "recipe")


def test_the_format_follows_the_objective_in_each_source(make_recipe: Any) -> None:
    recipe = make_recipe(training={"objective": "kto"}, data={"mixture": [{"path": "more.jsonl"}]})
    assert [source.format for source in (recipe.data, *recipe.data.mixture)] == ["unpaired-preference"] * 2


@trl
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("zero2", marks=pytest.mark.slow),
        *(pytest.param(s, marks=pytest.mark.matrix) for s in (None, "zero1")),
    ],
)
def test_two_processes_train_as_one_does(stage: str | None, recipe_of: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    train(recipe_of("dpo", **settings), tmp_path / "one")
    recipe = recipe_of("dpo", **settings, output_dir=str(tmp_path / "two")).replace(deepspeed=stage)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    on_two_ranks(["train", str(tmp_path / "recipe.yaml")], tmp_path / "logs")
    one, two = (vectors(tmp_path / name) for name in ("one", "two"))
    for name, vector in one.items():
        torch.testing.assert_close(vector, two[name], rtol=1e-3, atol=1e-4)
    (a,), (b,) = records(tmp_path / "one", "eval"), records(tmp_path / "two", "eval")
    for key in ("loss", "rewards/margins", "rewards/accuracies", "rows"):
        assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4)
