"""What comes before the first step: the plan in the run, and the longest batch that leaves no trace."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qvera.evaluation.report.run_page import write_report
from qvera.training.plan import Machine, make_plan
from qvera.training.session import TrainingSession
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.training.runs import losses, same, vectors

pytestmark = pytest.mark.process


def test_the_longest_batch_leaves_no_trace(make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, so that the random state counts too."""
    recipe = make_recipe(adapter={"dropout": 0.2}, training={"max_steps": 5})
    ran = []
    real = TrainingSession.try_longest_batch
    monkeypatch.setattr(TrainingSession, "try_longest_batch", lambda *parts: (ran.append(1), real(*parts)))
    train(recipe, tmp_path / "with")
    assert ran
    monkeypatch.setattr(TrainingSession, "try_longest_batch", lambda *parts: None)
    train(recipe, tmp_path / "without")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert same(vectors(tmp_path / "with"), vectors(tmp_path / "without"))


def test_a_run_ends_with_predicted_and_measured_memory(make_recipe: Any, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    train(make_recipe(training={"max_steps": 2}), tmp_path / "run", console=console)
    assert "Plan: peak" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "Fits" in console.file.getvalue()  # type: ignore[attr-defined]
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    measured = plan["measured"]
    assert measured["predicted_bytes"] == plan["memory"]["total_bytes"]
    assert measured["private_bytes"] > 50e6  # an interpreter with torch
    assert measured["relative_error"] == pytest.approx(measured["predicted_bytes"] / measured["total_bytes"] - 1)
    assert measured["tensor_bytes"] is None  # a CPU counts none
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Memory</h2>" in page
    assert "Predicted peak" in page

    # without a plan, or with one that is damaged, the page has no such section
    file = tmp_path / "run" / "run.json"
    for broken in (None, 7, {"memory": {"moments": {"backward": [3, {"kind": "base", "bytes": "x"}]}}}):
        run = json.loads(file.read_text())
        run["plan"] = broken
        file.write_text(json.dumps(run))
        without = write_report(tmp_path / "run").read_text(encoding="utf-8")
        assert "<h2>Memory</h2>" not in without
        assert without.count("<svg") < page.count("<svg")  # the chart of the plan is not there either


def test_only_a_plan_that_is_far_too_large_for_a_gpu_is_refused(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(training={"max_steps": 1, "gradient_checkpointing": True})
    card = Machine("a GPU", "cuda", torch.float32, False, 10**10)
    needed = make_plan(recipe, card).needed_bytes
    for share, said in ((1.05, "Fits, barely"), (0.9, "Does not fit by the plan")):
        machine = dataclasses.replace(card, available_bytes=int(needed * share))
        monkeypatch.setattr(
            "qvera.training.session.make_plan",
            lambda recipe, device, *_, **__: make_plan(recipe, machine),  # noqa: B023
        )
        console = Console(file=io.StringIO(), width=300)
        train(recipe, tmp_path / str(share), console=console)
        assert said in console.file.getvalue()  # type: ignore[attr-defined]
        assert "tries the longest batch" in console.file.getvalue()  # type: ignore[attr-defined]
    machine = dataclasses.replace(card, available_bytes=int(needed * 0.8))
    with pytest.raises(InputError, match="Does not fit: needs"):
        train(recipe, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


_LIMITED = """
import resource, sys
import torch
from qvera.training.session import TrainingSession
from qvera.cli.main import main
torch.set_num_threads(1)
real = TrainingSession.try_longest_batch
def limited(*parts):
    now = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (now + 30_000_000, now + 30_000_000))
    real(*parts)
TrainingSession.try_longest_batch = limited
sys.exit(main(sys.argv[1:]))
"""


def test_a_batch_that_does_not_fit_says_so_before_the_first_step(
    write_recipe: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With a real limit on the address space, set just before the longest batch runs."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " + "zq " * 250}) + "\n" for i in range(64)))
    recipe = write_recipe(
        data={"path": str(rows), "max_length": 256, "eval_fraction": 0.0},
        training={"output_dir": str(tmp_path / "run"), "global_batch_size": 64, "per_device_train_batch_size": 64,
                  "gradient_checkpointing": False, "sample_count": 0},
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, "train", str(recipe)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2, done.stderr[-2000:]
    said = " ".join(done.stderr.split())
    assert "the longest batch of this run (64 rows, the longest of 256 tokens" in said
    assert "rows.jsonl:" in said
    assert "training.gradient_checkpointing=true" in said
    assert not (tmp_path / "run").exists()
