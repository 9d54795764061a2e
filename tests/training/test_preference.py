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
from safetensors.torch import load_file

from qvera.cli.main import main
from qvera.config.schema import Recipe
from qvera.training.loop import AloneLoop
from qvera.training.plan import make_plan
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.training.runs import cut_off, records, same, untimed, vectors

pytestmark = pytest.mark.process

WORDS = ["red", "blue", "green", "grey", "gold"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """40 pairs, and as many judged answers: the word that was asked for is better than another one."""
    directory, chooser = tmp_path_factory.mktemp("preferences"), random.Random(0)
    pairs, judged = [], []
    for number in range(40):
        word, other = chooser.sample(WORDS, 2)
        prompt = f"say {word} {chooser.randint(0, 99)}"
        pairs.append({"prompt": prompt, "chosen": f"{word} {word}", "rejected": f"{other} {word}"})
        good = number % 2 == 0
        judged.append({"prompt": prompt, "completion": f"{word if good else other} {word}", "label": good})
    files: dict[str, list[dict[str, Any]]] = {"preference": pairs, "unpaired-preference": judged}
    for name, lines in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {name: directory / f"{name}.jsonl" for name in files}


@pytest.fixture(scope="module")
def recipe_of(make_recipe: Any, rows: dict[str, Path]) -> Any:
    def make(objective: str, data: dict[str, Any] | None = None, **training: Any) -> Recipe:
        path = rows["unpaired-preference" if objective == "kto" else "preference"]
        training = {"objective": objective, "learning_rate": 0.1, **training}
        return make_recipe(data={"path": str(path), **(data or {})}, training=training)

    return make


trl = pytest.mark.skipif(find_spec("trl") is None, reason="pip install 'qvera[trl]'")


@pytest.fixture(scope="module")
def finished(recipe_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An objective → the recipe of a finished run, and its directory, with a checkpoint two steps before the end."""
    runs: dict[str, tuple[Recipe, Path]] = {}

    def run_of(objective: str) -> tuple[Recipe, Path]:
        if objective not in runs:
            steps, run_dir = 60 if objective == "orpo" else 24, tmp_path_factory.mktemp(objective) / "run"
            settings = {"max_steps": steps, "eval_steps": 12, "save_steps": steps - 2, "gradient_checkpointing": True}
            runs[objective] = recipe_of(objective, **settings, output_dir=str(run_dir)), run_dir
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
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_run_moves_the_margin_of_held_out_rows_and_resumes_to_the_bit(
    objective: str, finished: Any, tmp_path: Path
) -> None:
    recipe, run_dir = finished(objective)
    result, steps = json.loads((run_dir / "run.json").read_text())["result"], recipe.training.max_steps
    before, after = (result[when] for when in ("eval_before", "eval_after"))
    assert after["rewards/margins"] > before["rewards/margins"] + (0.01 if objective == "orpo" else 0.2)
    assert after["rows"] == 8
    wanted = {"loss", "learning_rate", "step_seconds", "rewards/chosen", "rewards/rejected", "rewards/margins"}
    wanted |= set() if objective == "kto" else {"rewards/accuracies"}
    assert all(wanted <= set(record) for record in records(run_dir))
    assert [record["step"] for record in records(run_dir, "eval")] == list(range(12, steps + 1, 12))
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
    for rows_of_pass in (8, 2):
        recipe = recipe_of("dpo", max_steps=2, per_device_train_batch_size=rows_of_pass)
        train(recipe, tmp_path / f"by-{rows_of_pass}")
    one, two = (records(tmp_path / name) for name in ("by-8", "by-2"))
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4)


@trl
@pytest.mark.parametrize("method", ["lora", "lora-sb", "lorta", "spiel"])
def test_other_methods_train_on_preferences_too(method: str, recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of("dpo", max_steps=5, learning_rate=0.02)
    train(recipe.replace(adapter=recipe.adapter.replace(method=method, rank=4)), tmp_path / "run")
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert losses[-1] < losses[0]


@trl
def test_a_loss_that_is_not_finite_ends_the_run(
    recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nll = AloneLoop.nll

    def spoilt(trainer: AloneLoop, *arguments: Any) -> Any:
        total, count = nll(trainer, *arguments)
        return (total * float("nan") if trainer.state.step == 2 else total), count

    monkeypatch.setattr(AloneLoop, "nll", spoilt)
    with pytest.raises(Exception, match=r"Step 3: the loss or its gradient is not finite .*preference.jsonl:\d+"):
        train(recipe_of("dpo", max_steps=4), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@trl
def test_a_range_test_of_rates_uses_the_objective(recipe_of: Any, tmp_path: Path) -> None:
    from qvera.config.lr_range import LrRange
    from qvera.training.lr_finder import find_lr

    found = find_lr(recipe_of("dpo"), tmp_path / "out", LrRange(steps=10))
    assert found is not None and found.points[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_plan_counts_both_answers_of_a_pair(recipe_of: Any, make_recipe: Any) -> None:
    device = torch.device("cpu")
    pairs, judged, imitated = (
        make_plan(recipe, device) for recipe in (recipe_of("dpo"), recipe_of("kto"), make_recipe())
    )
    assert (pairs.batch.rows, judged.batch.rows, imitated.batch.rows) == (8, 4, 4)
    assert pairs.memory.total_bytes > judged.memory.total_bytes
    all_logits = {part.name for part in make_plan(recipe_of("orpo"), device).memory.moments["loss"]}
    assert "logits of all tokens" in all_logits


REFUSED: list[tuple[str, dict[str, dict[str, Any]], str]] = [
    ("dpo", {"data": {"packing": True}}, "data.packing: is not built for training.objective: dpo"),
    ("dpo", {"data": {"too_long": "split"}}, "data.too_long: split would part an answer from its prompt"),
    ("dpo", {"data": {"train_on": "all"}}, "data.train_on"),
    ("dpo", {"data": {"max_target_length": 8}}, "data.max_target_length"),
    ("dpo", {"data": {"adapter_column": "who"}}, "training.objective: dpo is not built for many adapters"),
    ("dpo", {"data": {"format": "text"}}, "training.objective: dpo reads rows of the format preference"),
    ("kto", {"data": {"format": "preference"}}, "training.objective: kto reads rows of the format unpaired-preference"),
    ("sft", {"data": {"format": "preference"}}, "preference is for training.objective: dpo or orpo. Set that"),
    ("sft", {"training": {"beta": 0.2}}, "training.beta: has no effect without"),
    ("orpo", {"training": {"loss_type": "ipo"}}, "training.loss_type: has no effect without training.objective: dpo"),
    (
        "dpo",
        {"data": {"mixture": [{"path": "y", "label_names": ["a", "b"]}]}},
        "data.mixture.0.label_names: has no meaning for",
    ),
    ("dpo", {"training": {"bilevel": True}}, "training.bilevel: is not built for"),
    ("dpo", {"training": {"torch_compile": True}}, "training.torch_compile: is not built for"),
    ("dpo", {"training": {"loss_chunk_tokens": 64}}, "training.loss_chunk_tokens"),
    ("kto", {"training": {"on_oom": "halve"}}, "halve changes the loss of training.objective: kto"),
    ("kto", {"training": {"per_device_train_batch_size": 1}}, "pairs each prompt with another row's answer"),
    ("dpo", {"adapter": {"dropout": 0.1}}, "adapter.dropout: TRL's losses are computed without dropout"),
    ("dpo", {"adapter": {"init_from": "x"}}, "the reference of training.objective: dpo is the base"),
]


@pytest.mark.parametrize(("objective", "keys", "said"), REFUSED)
def test_what_an_objective_can_not_have_is_refused_by_name(
    objective: str, keys: dict[str, Any], said: str, make_recipe: Any
) -> None:
    from qvera.config.schema import parse_recipe

    tree = make_recipe().to_dict()
    tree["data"] = {"path": "x.jsonl"}
    tree["training"] = {"objective": objective}
    for section, values in keys.items():
        tree[section] = {**tree[section], **values}
    with pytest.raises(InputError, match=re.escape(said)):
        parse_recipe(tree, "recipe")


def test_the_format_follows_the_objective_in_each_source(make_recipe: Any) -> None:
    recipe = make_recipe(training={"objective": "kto"}, data={"mixture": [{"path": "more.jsonl"}]})
    assert [source.format for source in (recipe.data, *recipe.data.mixture)] == ["unpaired-preference"] * 2


@trl
@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, "zero1", "zero2"])
def test_two_processes_train_as_one_does(stage: str | None, recipe_of: Any, tmp_path: Path) -> None:
    from tests.distributed.ranks import Ranks

    settings = {"max_steps": 3, "eval_steps": 3, "per_device_train_batch_size": 2}
    train(recipe_of("dpo", **settings), tmp_path / "one")
    recipe = recipe_of("dpo", **settings, output_dir=str(tmp_path / "two")).replace(deepspeed=stage)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    ranks = Ranks(["-m", "qvera", "train", str(tmp_path / "recipe.yaml")], 2, tmp_path / "logs")
    assert ranks.wait(240) == [0, 0], ranks.text()
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    for name, vector in one.items():
        torch.testing.assert_close(vector, two[name], rtol=1e-3, atol=1e-4)
    for key in ("loss", "rewards/margins", "rewards/accuracies", "rows"):
        (a,), (b,) = records(tmp_path / "one", "eval"), records(tmp_path / "two", "eval")
        assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4)
