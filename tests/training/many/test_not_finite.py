"""A loss that is not finite, of a step or of held-out rows, stops its own adapter, which is named; the others go on."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qvera.cli.train import print_result
from qvera.evaluation.named_adapters import require_named
from qvera.training.bank_loop import BankLoop
from qvera.training.failures import LOWER_RATE
from qvera.training.many import ManyTrainer
from qvera.training.roster import AdapterRun
from qvera.training.trainer import train
from qvera.utils.errors import InputError, RunFailed
from tests.training.runs import (
    all_files,
    cut_off,
    entries,
    many_recipe,
    poison,
    records,
    run_json,
    train_many,
    write_rows,
)  # fmt: skip

pytestmark = pytest.mark.process

COUNTS = {"anna": 12, "ben": 9, "cleo": 8}
TRAINING = {"max_steps": 6, "eval_steps": 2, "save_steps": 3, "save_total_limit": 100, "load_best_model_at_end": True}


def recipe_of(make_recipe: Any, tmp_path: Path, **training: Any) -> Any:
    write_rows(tmp_path / "rows.jsonl", COUNTS)
    return many_recipe(make_recipe, tmp_path / "rows.jsonl", {**TRAINING, **training}, eval_fraction=0.25)


def spoil_held_out(monkeypatch: pytest.MonkeyPatch, name: str, steps: Collection[int]) -> None:
    """Let an adapter's vectors after so many steps answer NaN to its held-out rows; what it trains on is finite."""
    real = BankLoop.pass_nll

    def is_bad(loop: BankLoop, run: AdapterRun) -> bool:
        at_best = run.best is not None and torch.equal(loop.bank.vectors[run.held_slot], run.best)
        return run.name == name and run.state.step in steps and not at_best

    def pass_nll(self: BankLoop, slots: Any, examples: Any, weights: Any = None) -> torch.Tensor:
        nll = real(self, slots, examples, weights)
        if weights is None:
            bad = {run.slot for run in self.roster.in_flight if is_bad(self, run)}
            nll = torch.where(torch.tensor([slot in bad for slot in slots]), math.nan, nll)
        return nll

    monkeypatch.setattr(BankLoop, "pass_nll", pass_nll)


def test_a_loss_that_is_not_finite_ends_its_adapter_alone_and_is_said(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others become beside it: test_alone."""
    write_rows(tmp_path / "rows.jsonl", COUNTS)
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", {"max_steps": 4, "per_device_train_batch_size": 16})
    console = Console(record=True, width=400)
    poison(monkeypatch, "ben", step=3)
    found = train_many(recipe, tmp_path / "run", console=console)
    steps = {name: (entry["status"], entry["steps"]) for name, entry in found.items()}
    assert steps == {**dict.fromkeys(found, ("done", 4)), "ben": ("not_finite", 2)}
    text = console.export_text()
    assert "Adapter ben: step 3: the loss or its gradient is not finite (losses not finite; gradient norm nan)" in text
    assert "rows.jsonl:" in found["ben"]["reason"]
    assert "It is stopped and not saved; the others go on." in text


def test_a_run_whose_adapters_all_diverge_fails(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", {"anna": 4, "ben": 2})
    real = ManyTrainer.take_turn

    def take_turn(self: ManyTrainer) -> None:
        real(self)
        self.loop.bank.vectors.fill_(math.nan)

    monkeypatch.setattr(ManyTrainer, "take_turn", take_turn)
    with pytest.raises(RunFailed, match="No adapter's loss stayed finite"):
        train_many(many_recipe(make_recipe, tmp_path / "rows.jsonl"), tmp_path / "run")
    assert {entry["status"] for entry in entries(tmp_path / "run").values()} == {"not_finite"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert all_files(tmp_path / "run") == {}


def test_a_held_out_loss_in_the_middle_is_never_the_best_also_after_a_kill(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(make_recipe, tmp_path)
    spoil_held_out(monkeypatch, "ben", {2})
    found = train_many(recipe, tmp_path / "run")
    losses = [record["loss"] for record in records(tmp_path / "run", "eval", "ben")]
    assert [loss is not None and math.isfinite(loss) for loss in losses] == [False, True, True]
    assert found["ben"]["status"] == "done"
    assert found["ben"]["best_step"] in (4, 6)
    assert math.isfinite(found["ben"]["eval_after"]["loss"])
    cut = cut_off(tmp_path / "run", tmp_path / "cut", after=3)
    train(recipe, cut, resume=True)
    assert found == entries(tmp_path / "run")
    assert entries(cut)["ben"]["eval_after"]["loss"] == found["ben"]["eval_after"]["loss"]
    assert (entries(cut)["ben"]["best_step"], entries(cut)["ben"]["steps"]) == (found["ben"]["best_step"], 6)


def test_a_held_out_loss_at_the_end_leaves_the_adapter_unsaved_and_is_said(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Or with its best vectors, where the run keeps them."""
    recipe = recipe_of(make_recipe, tmp_path, eval_steps=0, load_best_model_at_end=False)
    console = Console(record=True, width=400)
    spoil_held_out(monkeypatch, "ben", {6})
    found = train_many(recipe, tmp_path / "run", console=console)
    statuses = {name: entry["status"] for name, entry in found.items()}
    assert statuses == {"anna": "done", "ben": "not_finite", "cleo": "done"}
    said = f"step 6: its held-out loss is not finite. {LOWER_RATE}"
    assert (found["ben"]["reason"], found["ben"]["eval_after"], found["ben"]["steps"]) == (said, None, 6)
    assert f"Adapter ben: {said} It is stopped and not saved; the others go on." in console.export_text()
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == {"anna", "cleo"}
    with pytest.raises(InputError, match="--adapter ben: .*its loss, gradient or held-out loss was not finite"):
        require_named(tmp_path / "run", "ben")
    print_result(tmp_path / "run", run_json(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "2 done, 1 not finite" in printed
    assert "in the mean of 2 adapters" in printed

    recipe = recipe_of(make_recipe, tmp_path, eval_steps=3, label_smoothing=0.3)
    smoothed = train_many(recipe, tmp_path / "best")
    entry = smoothed["ben"]
    assert (entry["status"], entry["best_step"]) == ("done", 3)
    (at_best,) = [record for record in records(tmp_path / "best", "eval", "ben") if record["step"] == 3]
    assert at_best["loss"] == pytest.approx(entry["eval_after"]["loss"], rel=1e-6)
    # before training all answer as the base, however the loss of training is smoothed
    assert all(smoothed[name]["eval_before"]["loss"] == found[name]["eval_before"]["loss"] for name in found)


def test_a_base_that_does_not_answer_the_held_out_rows_is_told_from_a_rate_that_is_too_high(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Before training all answer with the first slot."""
    real = BankLoop.pass_nll

    def pass_nll(self: BankLoop, slots: Any, examples: Any, weights: Any = None) -> torch.Tensor:
        nll = real(self, slots, examples, weights)
        before = weights is None and self.round == 0
        return nll * math.nan if before else nll

    recipe = recipe_of(make_recipe, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(BankLoop, "pass_nll", pass_nll)
        spoil_held_out(patch, "ben", {2, 4, 6})
        found = train_many(recipe, tmp_path / "run")
    assert found["ben"]["reason"].endswith("It was not finite before training either: look at the held-out rows.")
    assert found["anna"]["status"] == "done"
    print_result(tmp_path / "run", run_json(tmp_path / "run"))
    assert "held-out loss" not in capsys.readouterr().out  # there is no mean
