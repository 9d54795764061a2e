"""What comes before the first step: the plan in the run, and the longest batch that leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qvera.cli.main import main
from qvera.data import build_datasets
from qvera.models.tokenizer import load_tokenizer
from qvera.training.plan import Machine, make_plan
from qvera.training.session import TrainingSession
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.helpers import start_process
from tests.training.runs import assert_same_run, run_json

pytestmark = pytest.mark.process


def test_the_longest_batch_leaves_no_trace(make_recipe: Any, tmp_path: Path) -> None:
    """With dropout, so that the random state counts too."""
    for tried in (True, False):
        training = {"max_steps": 3, "try_longest_batch": tried}
        train(make_recipe(adapter={"dropout": 0.2}, training=training), tmp_path / str(tried))
    assert_same_run(tmp_path / "True", tmp_path / "False")


def test_a_run_ends_with_predicted_and_measured_memory(make_recipe: Any, tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    train(make_recipe(training={"max_steps": 2}), tmp_path / "run", console=console)
    text = console.export_text()
    assert "Plan: peak" in text and "Fits" in text
    plan = run_json(tmp_path / "run")["plan"]
    measured = plan["measured"]
    assert measured["predicted_bytes"] == plan["memory"]["total_bytes"]
    assert measured["private_bytes"] > 50e6  # an interpreter with torch
    assert measured["relative_error"] == pytest.approx(measured["predicted_bytes"] / measured["total_bytes"] - 1)
    assert measured["tensor_bytes"] is None  # a CPU counts none
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Memory</h2>" in page
    assert "Predicted peak" in page


def test_only_a_plan_that_is_far_too_large_for_a_gpu_is_refused(make_recipe: Any, tmp_path: Path, plan_on: Any) -> None:
    recipe = make_recipe(training={"max_steps": 1, "gradient_checkpointing": True})
    card = Machine("a GPU", "cuda", torch.float32, False, 10**10)
    rows = build_datasets(recipe.data, load_tokenizer(recipe.model)).train
    needed = make_plan(recipe, card, rows).needed_bytes
    for share, said in ((1.05, "Fits, barely"), (0.9, "Does not fit by the plan")):
        plan_on(dataclasses.replace(card, available_bytes=int(needed * share)))
        console = Console(record=True, width=300)
        train(recipe, tmp_path / str(share), console=console)
        text = console.export_text()
        assert said in text and "tries the longest batch" in text
    plan_on(dataclasses.replace(card, available_bytes=int(needed * 0.8)))
    with pytest.raises(InputError, match="Does not fit: needs"):
        train(recipe, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def train_with_little_memory(recipe: str, log: Path) -> None:
    """With a real limit on the address space, set just before the longest batch runs."""
    real = TrainingSession.try_longest_batch

    def limited(*parts: Any) -> Any:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (now + 30_000_000, now + 30_000_000))
        return real(*parts)

    TrainingSession.try_longest_batch = limited  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    with open(log, "w") as handle:
        os.dup2(handle.fileno(), 2)
        sys.exit(main(["train", recipe]))


def test_a_batch_that_does_not_fit_says_so_before_the_first_step(write_recipe: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " + "zq " * 250}) + "\n" for i in range(64)))
    recipe = write_recipe(
        data={"path": str(rows), "max_length": 256, "eval_fraction": 0.0},
        training={"output_dir": str(tmp_path / "run"), "global_batch_size": 64, "per_device_train_batch_size": 64,
                  "gradient_checkpointing": False, "sample_count": 0},
    )  # fmt: skip
    process = start_process(train_with_little_memory, str(recipe), tmp_path / "log")
    process.join(200)
    said = " ".join((tmp_path / "log").read_text().split())
    assert process.exitcode == 2, said[-2000:]
    for part in (
        "the longest batch of this run (64 rows, the longest of 256 tokens",
        "rows.jsonl:",
        "training.gradient_checkpointing=true",
    ):
        assert part in said
    assert not (tmp_path / "run").exists()
