"""Recipes of tinker-cookbook 0.6.1, unchanged, as processes against `qvera serve`: `make test-tinker`."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.common import smollm2
from tests.serve.command import Command
from tests.serve.scripted_training import chat_rows

pytest.importorskip("tinker_cookbook", reason="make test-tinker")
pytestmark = [pytest.mark.matrix, pytest.mark.process]


@pytest.fixture(scope="module")
def model() -> Path:
    """SmolLM2-135M-Instruct, which `qvera quickstart --fetch-only` fetches."""
    return Path(smollm2())


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    directory = tmp_path_factory.mktemp("server") / "training"
    with Command(str(model), "--training-dir", str(directory), "--tinker") as command:
        yield command


def run(recipe: str, command: Command, log: Path, **options: object) -> list[dict[str, Any]]:
    """Run a recipe of the cookbook, and return its metrics."""
    line = [sys.executable, "-m", f"tinker_cookbook.recipes.{recipe}", "behavior_if_log_dir_exists=resume"]
    line += [f"{name}={value}" for name, value in {"renderer_name": "role_colon", "log_path": log, **options}.items()]
    offline = {"HF_HUB_OFFLINE": "1", "TINKER_BASE_URL": command.url, "TINKER_API_KEY": "tml-none"}
    done = subprocess.run(line, env=os.environ | offline, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{command.said[-2000:]}"
    return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]


def test_chat_sl_trains_on_a_local_file_and_resumes(server: Command, model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(chat_rows(48, answer="blue"))
    usual = {"model_name": model, "dataset": rows, "batch_size": 8, "lora_rank": 8, "save_every": 2, "max_steps": 4}
    losses = [step["train_mean_nll"] for step in run("chat_sl.train", server, tmp_path / "whole", **usual)]
    assert len(losses) == 4 and losses[3] < losses[0] - 0.5
    # as it looks where the recipe was killed after its second step
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    saved = (tmp_path / "whole" / "checkpoints.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed" / "checkpoints.jsonl").write_text("".join(line for line in saved if '"final"' not in line))
    resumed = [step["train_mean_nll"] for step in run("chat_sl.train", server, tmp_path / "killed", **usual)]
    # The recipe is a step ahead: what it saves at step 2 has steps 2 and 3 in it, and it does them again when it resumes.
    assert resumed[:2] == losses[:2] and losses[3] > resumed[2] > resumed[3]


@pytest.fixture(scope="module")
def taught(server: Command, model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A state that has learned the form of an answer. The base gives none, so all of its rewards would be the same."""
    directory, chooser = tmp_path_factory.mktemp("taught"), random.Random(0)
    rows = directory / "sums.jsonl"
    with rows.open("w") as file:
        for one, other in ((chooser.randrange(101), chooser.randrange(101)) for _ in range(200)):
            messages = [("user", f"What is {one} + {other}?"), ("assistant", str(one + other))]
            print(json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}), file=file)
    settings = {"batch_size": 16, "lora_rank": 8, "learning_rate": 1e-3, "max_steps": 6, "save_every": 6}
    run("chat_sl.train", server, directory / "log", model_name=model, dataset=rows, **settings)
    saved = (directory / "log" / "checkpoints.jsonl").read_text().splitlines()
    return str(json.loads(saved[-1])["state_path"])


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo"])
def test_rewards_of_math_rl_rise_and_its_sampler_agrees_with_the_trainer(
    loss: str, taught: str, server: Command, model: Path, tmp_path: Path
) -> None:
    steps = run(
        "math_rl.train",
        server,
        tmp_path / loss,
        model_name=model,
        load_checkpoint_path=taught,
        env="arithmetic",
        loss_fn=loss,
        group_size=4,
        groups_per_batch=16,
        lora_rank=8,
        learning_rate=1e-4,
        max_tokens=8,
        max_steps=24,
        save_every=0,
        eval_every=0,
        **({"num_substeps": 2} if loss == "ppo" else {}),
    )
    rewards = [step["env/all/reward/total"] for step in steps if "env/all/reward/total" in step]
    differences = [step["optim/kl_sample_train_v1"] for step in steps if "optim/kl_sample_train_v1" in step]
    first, last = np.mean(rewards[:8]), np.mean(rewards[-8:])
    print(f"{loss}: reward {first:.3f} in the first eight of {len(rewards)} steps, {last:.3f} in the last eight")
    assert len(rewards) == 24 and last > first + 0.02
    assert differences and np.abs(differences).max() < 0.01  # what the cookbook's own documentation expects
