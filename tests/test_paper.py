"""bench/paper.py: the paper's counts from shapes, and the whole command on tiny models of the same architectures."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPT2Config,
    PretrainedConfig,
    RobertaConfig,
    ViTConfig,
)

from bench import paper
from bench.common import read_lines
from bench.paper import TABLES, Row, Trial
from qvera.adapters.files.save_load import attach, named_vectors
from qvera.config.load import load_recipe
from qvera.tasks import task_of
from tests.conftest import small_tokenizer
from tests.tasks.images import save_vit, write_folders

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
_ROWS = [pytest.param(row, id=row.recipe) for rows in TABLES.values() for row in rows.values()]


_counted: dict[tuple[str, str], int] = {}
"""By model and adapter, which are all that the number depends on."""


@pytest.mark.parametrize("row", _ROWS)
def test_the_trained_numbers_are_the_papers(row: Row) -> None:
    recipe = load_recipe(paper.ROOT / "recipes" / f"{row.recipe}.yaml")
    key = recipe.model.path, str(recipe.adapter.replace(seed=0))
    if key not in _counted:
        model_class = task_of(recipe).model_class(None)
        with torch.device("meta"):
            config = _PUBLISHED[recipe.model.path]
            model = attach(model_class.from_config(config), recipe.adapter, model_class=model_class)
        vectors = (vector for name, vector in named_vectors(model).items() if ".qvera_" in name)
        _counted[key] = sum(vector.numel() for vector in vectors)
    assert _counted[key] == row.trained


_WORDS = ["good", "bad", "red", "blue"]


def write_rows(directory: Path, columns: dict[str, str], kind: str) -> Path:
    """40 rows with the columns of a recipe, or folders of images."""
    if kind == "image":
        return write_folders(directory / "images")
    chooser, rows = random.Random(0), []
    for number in range(40):
        row: dict[str, Any] = {column: f"say {chooser.choice(_WORDS)} {number}" for column in columns.values()}
        if kind != "text":
            row["label"] = chooser.random() * 5 if kind == "value" else chooser.randrange(2)
        rows.append(json.dumps(row) + "\n")
    path = directory / "rows.jsonl"
    path.write_text("".join(rows))
    return path


def write_model(directory: Path, recipe_path: str) -> Path:
    """A tiny random checkpoint of the architecture that a recipe's model has."""
    model_type = _PUBLISHED[recipe_path].model_type
    if model_type == "vit":
        return save_vit(directory / "model")
    sizes: dict[str, Any] = {"vocab_size": 304, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model_type == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        sizes |= {"max_position_embeddings": 66}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes)
    kind: Any = AutoModelForCausalLM if model_type == "gpt2" else AutoModelForMaskedLM
    kind.from_config(config).save_pretrained(directory / "model")
    small_tokenizer().save_pretrained(directory / "model")
    return directory / "model"


@pytest.mark.process
@pytest.mark.parametrize(
    ("table", "name", "kind"),
    [
        ("glue-base", "mrpc", "class"),
        ("glue-base", "stsb", "value"),
        ("e2e", "medium", "text"),
        ("vision-base", "flowers102", "image"),
    ],
)
def test_a_table_is_run_and_shown_beside_the_papers_figures(
    table: str, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    row = TABLES[table][name]
    recipe = load_recipe(paper.ROOT / "recipes" / f"{row.recipe}.yaml")
    rows = write_rows(tmp_path, recipe.data.columns, kind)
    changes = {
        "model.path": write_model(tmp_path, recipe.model.path), "data.path": rows, "data.eval_fraction": 0.25,
        "data.eval_split": "null", "data.revision": "null", "data.config_name": "null",
        "training.max_steps": 2, "training.global_batch_size": 4, "training.per_device_train_batch_size": 4,
        "adapter.rank": 8, "training.warmup_steps": 0,
    }  # fmt: skip
    if kind == "text":
        monkeypatch.setattr(paper, "e2e_scores", lambda recipe, names: dict.fromkeys(names, 12.5))
        changes |= {"training.sample_count": 0, "data.eval_limit": 4}
    else:
        changes |= {"training.eval_steps": 1}
    if kind != "image":
        changes |= {"data.max_length": 60}
    lines, runs, seeds = tmp_path / "lines.jsonl", tmp_path / "runs", ["0", "1"] if name == "mrpc" else ["0"]
    line = ["paper", "run", table, "--only", name, "--seeds", *seeds, "--lines", str(lines), "--runs", str(runs)]
    for key, value in changes.items():
        line += ["--set", f"{key}={value}"]
    for _ in range(2):  # the second one finds the lines
        monkeypatch.setattr("sys.argv", line)
        paper.main()
    found = read_lines(lines)
    assert [(one["recipe"], one["seed"]) for one in found] == [(row.recipe, int(seed)) for seed in seeds]
    assert all(set(one["scores"]) == set(row.scores) for one in found)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["paper", "table", table, "--lines", str(lines)])
    paper.main()
    shown = capsys.readouterr().out
    for score, figure in row.scores.items():
        assert f"{name}, {score}" in shown
        assert f"| {figure} |" in shown
    assert f"| {found[0]['trained']:,} |" in shown and found[0]["trained"] < row.trained  # of the tiny model that ran


def test_the_table_says_how_many_seeds_diverged(tmp_path: Path) -> None:
    common = {"recipe": "glue/rte-roberta-base", "changes": "", "seconds": 1.0, "device": "cpu", "trained": 7}
    lines = [{**common, "scores": scores} for scores in ({"accuracy": 80.0}, None, {"accuracy": 60.0})]
    assert "| 70.0 (60.0 to 80.0, 2 seeds), 1 diverged |" in paper.table("glue-base", lines)


def test_a_change_may_have_spaces(tmp_path: Path) -> None:
    trial = Trial("e2e/gpt2-medium", 0, shlex.join(["data.system=Say it briefly.", "adapter.rank=8"]))
    recipe = paper.recipe_of(trial, tmp_path)
    assert (recipe.data.system, recipe.adapter.rank) == ("Say it briefly.", 8)


def test_the_best_epoch_is_the_papers_score(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": 1}, *({"kind": "eval", "accuracy": x} for x in (0.5, 0.75, 0.25))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert paper.best_epoch(tmp_path, "accuracy") == 75.0


def test_seeds_change_rows_projections_and_head_and_each_has_its_run(tmp_path: Path) -> None:
    one, other = (paper.recipe_of(Trial("glue/rte-roberta-base", seed), tmp_path) for seed in (1, 2))
    assert (one.data.seed, one.adapter.seed, one.training.seed) == (1, 1, 1)
    assert one.training.output_dir != other.training.output_dir
