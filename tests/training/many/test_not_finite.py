"""A loss that is not finite stops its own adapter, which is named; the others are the same to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qvera.training.many import ManyTrainer
from qvera.training.optim import BankAdamW
from qvera.utils.errors import RunFailed
from tests.training.runs import all_files, entries, many_recipe, poison, records, train_many, write_rows

pytestmark = pytest.mark.process

COUNTS = {"anna": 12, "ben": 9, "cleo": 7, "dan": 5}


def test_a_nan_does_not_reach_the_others(make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with a run in which the same adapter leaves at the same step, its numbers finite all the time."""
    write_rows(tmp_path / "rows.jsonl", COUNTS)
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", {"max_steps": 5, "per_device_train_batch_size": 16})
    console = Console(record=True, width=400)
    with monkeypatch.context() as patch:
        poison(patch, "ben", step=3)
        found = train_many(recipe, tmp_path / "run", console=console)
    assert {name: (entry["status"], entry["steps"]) for name, entry in found.items()} == {
        "anna": ("done", 5),
        "ben": ("not_finite", 2),
        "cleo": ("done", 5),
        "dan": ("done", 5),
    }
    text = console.export_text()
    assert "Adapter ben: step 3: the loss or its gradient is not finite (losses not finite; gradient norm nan)" in text
    assert "rows.jsonl:" in found["ben"]["reason"]
    assert "It is stopped and not saved; the others go on." in text

    real = BankAdamW.step

    def refuse(self: BankAdamW, slots: list[int], rates: list[float]) -> list[float]:
        norms = real(self, slots, rates)
        return [math.inf if slot in bad else norm for slot, norm in zip(slots, norms, strict=True)]

    bad: list[int] = []
    take = ManyTrainer.take_turn

    def take_turn(self: ManyTrainer) -> bool:
        bad[:] = [run.held_slot for run in self.loop.in_flight if run.name == "ben" and run.state.step == 2]
        return take(self)

    monkeypatch.setattr(BankAdamW, "step", refuse)
    monkeypatch.setattr(ManyTrainer, "take_turn", take_turn)
    assert train_many(recipe, tmp_path / "without")["ben"]["status"] == "not_finite"
    assert all_files(tmp_path / "run") == all_files(tmp_path / "without")
    for name in ("anna", "cleo", "dan"):
        assert records(tmp_path / "run", adapter=name) == records(tmp_path / "without", adapter=name)


def test_a_run_whose_adapters_all_diverge_fails(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", {"anna": 4, "ben": 2})
    real = ManyTrainer.take_turn

    def take_turn(self: ManyTrainer) -> bool:
        is_due = real(self)
        self.loop.bank.vectors.fill_(math.nan)
        return is_due

    monkeypatch.setattr(ManyTrainer, "take_turn", take_turn)
    with pytest.raises(RunFailed, match="No adapter's loss stayed finite"):
        train_many(many_recipe(make_recipe, tmp_path / "rows.jsonl"), tmp_path / "run")
    assert {entry["status"] for entry in entries(tmp_path / "run").values()} == {"not_finite"}
    assert all_files(tmp_path / "run") == {}


def test_memory_that_runs_out_in_the_optimizer_ends_the_run(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some vectors may have been stepped and some not, so the round is not saved."""
    write_rows(tmp_path / "rows.jsonl", {"anna": 4, "ben": 2})
    real = BankAdamW.step

    def too_much(self: BankAdamW, slots: list[int], rates: list[float]) -> list[float]:
        if self.steps[slots[0]] == 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return real(self, slots, rates)

    monkeypatch.setattr(BankAdamW, "step", too_much)
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", {"save_steps": 1})
    with pytest.raises(RunFailed, match="Memory ran out in the optimizer's step: 2.15 GB were asked for"):
        train_many(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "round-00000002"
