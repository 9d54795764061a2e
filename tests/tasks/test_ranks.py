"""Texts and pictures are classified in two processes as in one, with and without ZeRO, and resume to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qvera.training.trainer import train
from tests.distributed.ranks import Ranks, run_worker
from tests.distributed.runs import close
from tests.training.runs import losses, vectors

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(classify: Any, see: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, of two steps each; ``on`` stopped after one and went on."""
    root = tmp_path_factory.mktemp("ranks")
    training = {"max_steps": 2, "head_learning_rate": 1e-2, "per_device_train_batch_size": 2, "eval_steps": 1}
    training |= {"save_steps": 1, "gradient_checkpointing": True}
    texts, pictures = (
        make(training={**training, "output_dir": str(root / name)})
        for make, name in ((classify, "texts"), (see, "pictures"))
    )
    train(texts, root / "one, texts")
    train(pictures, root / "one, pictures")
    zero3 = {**texts.to_dict(), "deepspeed": "zero3"}
    cut = {"recipe": zero3, "run_dir": str(root / "on")}
    tasks: list[dict[str, Any]] = [
        {"name": "texts", "recipe": texts.to_dict(), "run_dir": str(root / "texts")},
        {"name": "zero3", "recipe": zero3, "run_dir": str(root / "zero3")},
        {"name": "cut", "stop_after": 1, **cut},
        {"name": "on", "resume": True, **cut},
    ]
    run_worker(tasks, 2, root / "spawn", limit_seconds=300)
    (root / "pictures.yaml").write_text(yaml.safe_dump(pictures.to_dict()))
    ranks = Ranks(["-m", "qvera", "train", str(root / "pictures.yaml")], 2, root / "logs")
    assert ranks.wait(300) == [0, 0], ranks.text()
    return root


@pytest.mark.parametrize(("name", "of_one"), [("texts", "texts"), ("zero3", "texts"), ("pictures", "pictures")])
def test_two_processes_give_the_numbers_of_one(runs: Path, name: str, of_one: str) -> None:
    run, alone = runs / name, runs / f"one, {of_one}"
    close(run, alone, rtol=1e-4)
    assert {"base_model.model.score.weight", "base_model.model.classifier.weight"} & vectors(run).keys()
    mine, theirs = (json.loads((path / "run.json").read_text())["result"]["eval_after"] for path in (run, alone))
    assert mine["accuracy"] == theirs["accuracy"]
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert losses(run, "eval") == pytest.approx(losses(alone, "eval"), rel=1e-4)


def test_a_run_under_zero3_goes_on_to_the_bit(runs: Path) -> None:
    mine, theirs = vectors(runs / "on"), vectors(runs / "zero3")
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
