"""A classification in two processes, with and without ZeRO: the numbers of one process, and resume to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.config.schema import parse_recipe
from qvera.training.trainer import train
from tests.distributed.ranks import run_worker
from tests.distributed.runs import close, losses, vectors

pytestmark = [pytest.mark.process, pytest.mark.slow]

HEAD = "base_model.model.score.weight"
STAGES = (None, "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(classify: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, four steps each; those of ``zero3-on`` stopped after two and went on."""
    root = tmp_path_factory.mktemp("ranks")
    tasks: list[dict[str, Any]] = []
    training = {"max_steps": 4, "head_learning_rate": 1e-2, "per_device_train_batch_size": 2, "eval_steps": 2}
    recipe = classify(training={**training, "gradient_checkpointing": True}).to_dict()
    train(parse_recipe(recipe, "alone"), root / "alone")
    for stage in STAGES:
        name, of_stage = stage or "plain", {**recipe, "deepspeed": stage}
        tasks.append({"name": name, "recipe": of_stage, "run_dir": str(root / name)})
    cut: dict[str, Any] = {"recipe": {**recipe, "deepspeed": "zero3"}, "run_dir": str(root / "zero3-on")}
    tasks += [{"name": "cut", "stop_after": 2, **cut}, {"name": "on", "resume": True, **cut}]
    run_worker(tasks, 2, root / "spawn", limit_seconds=300)
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_the_numbers_of_one(runs: Path, stage: str | None) -> None:
    run = runs / (stage or "plain")
    close(run, runs / "alone", rtol=1e-4)
    assert HEAD in vectors(run)
    mine, theirs = (
        json.loads((path / "run.json").read_text())["result"]["eval_after"] for path in (run, runs / "alone")
    )
    assert mine["accuracy"] == theirs["accuracy"]
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert losses(run, "eval") == pytest.approx(losses(runs / "alone", "eval"), rel=1e-4)


def test_a_run_under_zero3_goes_on_to_the_bit(runs: Path) -> None:
    mine, theirs = vectors(runs / "zero3-on"), vectors(runs / "zero3")
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
