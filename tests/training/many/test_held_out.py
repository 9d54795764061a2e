"""Held-out losses that are not finite, and memory that runs out while they are computed."""

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
from qvera.distributed.group import Group, for_all
from qvera.evaluation.named_adapters import require_named
from qvera.training.bank_loop import BankLoop
from qvera.training.many import ManyTrainer
from qvera.training.roster import AdapterRun
from qvera.training.session import TrainingSession
from qvera.training.trainer import train
from qvera.utils.errors import InputError, OutOfMemory
from tests.training.runs import assert_same, cut_off, entries, many_recipe, records, train_many, write_rows

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


def test_one_in_the_middle_is_never_the_best_also_after_a_kill(
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


@pytest.mark.parametrize("eval_steps", [0, 2], ids=["scored-at-the-end", "evaluated-at-the-last-step"])
def test_one_at_the_end_leaves_the_adapter_unsaved_and_is_said(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_steps: int, capsys: Any
) -> None:
    recipe = recipe_of(make_recipe, tmp_path, eval_steps=eval_steps, load_best_model_at_end=False)
    console = Console(record=True, width=400)
    spoil_held_out(monkeypatch, "ben", {6})
    found = train_many(recipe, tmp_path / "run", console=console)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "anna": "done",
        "ben": "not_finite",
        "cleo": "done",
    }
    said = "step 6: its held-out loss is not finite. Lower training.learning_rate."
    assert (found["ben"]["reason"], found["ben"]["eval_after"], found["ben"]["steps"]) == (said, None, 6)
    assert f"Adapter ben: {said} It is stopped and not saved; the others go on." in console.export_text()
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == {"anna", "cleo"}
    with pytest.raises(InputError, match="--adapter ben: .*its loss, gradient or held-out loss was not finite"):
        require_named(tmp_path / "run", "ben")
    print_result(tmp_path / "run", json.loads((tmp_path / "run" / "run.json").read_text()))
    printed = capsys.readouterr().out
    assert "2 done, 1 not finite" in printed
    assert "in the mean of 2 adapters" in printed


def test_one_at_the_end_leaves_the_best_vectors_where_the_run_keeps_them(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_held_out(monkeypatch, "ben", {6})
    entry = train_many(recipe_of(make_recipe, tmp_path, eval_steps=3), tmp_path / "run")["ben"]
    assert (entry["status"], entry["best_step"]) == ("done", 3)
    (at_best,) = [record for record in records(tmp_path / "run", "eval", "ben") if record["step"] == 3]
    assert at_best["loss"] == pytest.approx(entry["eval_after"]["loss"], rel=1e-6)


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
    print_result(tmp_path / "run", json.loads((tmp_path / "run" / "run.json").read_text()))
    assert "held-out loss" not in capsys.readouterr().out  # there is no mean


def test_a_held_out_loss_is_without_label_smoothing(make_recipe: Any, tmp_path: Path) -> None:
    """Before training all answer as the base, however the run's loss is smoothed."""
    losses = []
    for smoothing in (0.0, 0.3):
        found = train_many(recipe_of(make_recipe, tmp_path, label_smoothing=smoothing), tmp_path / f"run-{smoothing}")
        losses.append({name: entry["eval_before"]["loss"] for name, entry in found.items()})
    assert losses[0] == losses[1]


def test_a_process_whose_round_does_not_fit_tells_the_others(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in rounds of their own, and must not wait for it as for one that has ended with all."""
    trainer = ManyTrainer(TrainingSession(recipe_of(make_recipe, tmp_path), tmp_path / "run", Group()))
    monkeypatch.setattr(trainer, "group", Group(world_size=2))
    trainer.loop = BankLoop  # type: ignore[assignment]  # whose steps are each process's own
    error = trainer.end(for_all(OutOfMemory("Round 3: memory ran out")))
    assert isinstance(error, OutOfMemory) and not error.shared


def test_memory_that_runs_out_in_one_saves_no_half_done_round(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(make_recipe, tmp_path)
    train_many(recipe, tmp_path / "whole")
    real = BankLoop.pass_nll

    def pass_nll(self: BankLoop, slots: Any, examples: Any, weights: Any = None) -> torch.Tensor:
        if weights is None and self.round == 4:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return real(self, slots, examples, weights)

    with monkeypatch.context() as patch:
        patch.setattr(BankLoop, "pass_nll", pass_nll)
        with pytest.warns(UserWarning, match="Memory ran out"), pytest.raises(OutOfMemory, match="Round 3 is saved"):
            train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", tmp_path / "whole")
