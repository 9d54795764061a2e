"""bench/paper.py: the paper's counts from shapes, and the whole command on tiny models of the same architectures."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, PretrainedConfig, RobertaConfig, ViTConfig

from bench import paper
from bench.common import read_lines
from bench.paper import TABLES, Trial
from qvera.adapters.save_load import attach, named_vectors
from qvera.config.schema import load_recipe
from qvera.tasks import task_of
from tests.families import ENCODERS

_PUBLISHED: dict[str, PretrainedConfig] = {
    "FacebookAI/roberta-base": RobertaConfig(),
    "FacebookAI/roberta-large": RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "openai-community/gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "openai-community/gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "google/vit-base-patch16-224-in21k": ViTConfig(),
    "google/vit-large-patch16-224-in21k": ViTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}
"""The shapes of the published models."""


def test_the_trained_numbers_are_the_papers() -> None:
    counted: dict[tuple[str, str], int] = {}  # by model and adapter, which are all that the number depends on
    for row in (row for rows in TABLES.values() for row in rows.values()):
        recipe = load_recipe(paper.ROOT / "recipes" / f"{row.recipe}.yaml")
        key = recipe.model.path, str(recipe.adapter.replace(seed=0))
        if key not in counted:
            model_class = task_of(recipe).model_class(None)
            with torch.device("meta"):
                model = model_class.from_config(_PUBLISHED[recipe.model.path])
                model = attach(model, recipe.adapter, model_class=model_class)
            counted[key] = sum(v.numel() for name, v in named_vectors(model).items() if ".qvera_" in name)
        assert counted[key] == row.trained, row.recipe


@pytest.mark.process
def test_a_table_is_run_and_shown_beside_the_papers_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = TABLES["glue-base"]["mrpc"]
    columns = load_recipe(paper.ROOT / "recipes" / f"{row.recipe}.yaml").data.columns
    rows = [{**dict.fromkeys(columns.values(), f"say red {number}"), "label": number % 2} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    ENCODERS["roberta"].write(tmp_path / "model")
    changes = {
        "model.path": tmp_path / "model", "data.path": tmp_path / "rows.jsonl", "data.eval_fraction": 0.25,
        "data.eval_split": "null", "data.revision": "null", "data.config_name": "null", "data.max_length": 60,
        "training.max_steps": 2, "training.global_batch_size": 4, "training.per_device_train_batch_size": 4,
        "training.warmup_steps": 0, "training.eval_steps": 1, "adapter.rank": 8,
    }  # fmt: skip
    lines = tmp_path / "lines.jsonl"
    run = ["run", "glue-base", "--only", "mrpc", "--seeds", "0", "1", "--runs", str(tmp_path / "runs")]
    run += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    for words in (run, run, ["table", "glue-base"]):  # the second one finds the lines
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["paper", *words, "--lines", str(lines)])
        paper.main()
    found, shown = read_lines(lines), capsys.readouterr().out
    assert [(one["recipe"], one["seed"]) for one in found] == [(row.recipe, 0), (row.recipe, 1)]
    for score, figure in row.scores.items():
        assert f"mrpc, {score}" in shown and f"| {figure} |" in shown
    assert f"| {found[0]['trained']:,} |" in shown and found[0]["trained"] < row.trained  # of the tiny model that ran


def test_seeds_change_rows_projections_and_head_and_the_best_epoch_is_the_score(tmp_path: Path) -> None:
    change = shlex.join(["data.system=Say it briefly."])
    one, other = (paper.recipe_of(Trial("e2e/gpt2-medium", seed, change), tmp_path) for seed in (1, 2))
    assert (one.data.seed, one.adapter.seed, one.training.seed, one.data.system) == (1, 1, 1, "Say it briefly.")
    assert one.training.output_dir != other.training.output_dir
    records = [{"kind": "train", "step": 1}, *({"kind": "eval", "accuracy": x} for x in (0.5, 0.75, 0.25))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "run.json").write_text(json.dumps({"result": {"eval_after": {"accuracy": 0.6}}}))
    assert paper.best_epoch(tmp_path, "accuracy") == 75.0
    (tmp_path / "metrics.jsonl").write_text(json.dumps(records[0]) + "\n")  # a recipe without `eval_steps`
    assert paper.best_epoch(tmp_path, "accuracy") == 60.0
    common = {"recipe": "glue/rte-roberta-base", "changes": "", "seconds": 1.0, "device": "cpu", "trained": 7}
    lines = [{**common, "scores": scores} for scores in ({"accuracy": 80.0}, None, {"accuracy": 60.0})]
    assert "| 70.0 (60.0 to 80.0, 2 seeds), 1 diverged |" in paper.table("glue-base", lines)
