"""`qvera train` with a recipe that names adapters: what it prints and leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qvera.cli.main import main
from qvera.config.lr_range import LrRange
from qvera.training import session
from qvera.training.bank_loop import BankLoop
from qvera.training.lr_finder import find_lr
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.training.runs import entries, many_recipe, records, write_rows

pytestmark = pytest.mark.process


def test_train_says_how_many_are_done_and_leaves_one_file_of_metrics(
    make_recipe: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    write_rows(tmp_path / "rows.jsonl", {"anna": 9, "Ärzte & Co.": 12, "ben": 2})
    training = {"max_steps": 3, "eval_steps": 3, "adapters_at_once": 2, "output_dir": str(run_dir)}
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", training, eval_fraction=0.3)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    assert main(["train", str(path), "--dry-run"]) == 0
    assert not run_dir.exists()
    capsys.readouterr()
    scored: list[int] = []
    real = BankLoop.pass_nll

    def pass_nll(self: BankLoop, slots: Any, examples: Any, weights: Any = None) -> Any:
        if weights is None:
            scored.append(len(slots))
        return real(self, slots, examples, weights)

    monkeypatch.setattr(BankLoop, "pass_nll", pass_nll)
    assert main(["train", str(path)]) == 0
    shown = capsys.readouterr()
    printed, progress = shown.out, " ".join(shown.err.split())
    assert "3 adapters of 1 to 8 rows (median 6), 9 optimizer steps together" in progress
    assert "at most 2 adapters at a time" in progress
    assert "3 of 3 adapters done, 0 in flight" in progress
    assert re.search(r"adapters +3 done, in .*/run/adapters", printed)
    assert re.search(r"held-out loss +[\d.]+ → [\d.]+ in the mean of 3 adapters", printed)
    assert re.search(r"look at +too few rows: ben", printed)
    run = json.loads((run_dir / "run.json").read_text())
    found = entries(run_dir)
    assert list(found) == [name for name in found if (run_dir / "adapters" / found[name]["directory"]).is_dir()]
    assert (run["status"], run["result"]["steps"], run["result"]["planned_steps"]) == ("done", 9, 9)
    assert [(name, entry["eval_rows"]) for name, entry in found.items()] == [
        ("Ärzte & Co.", 4),
        ("ben", 1),
        ("anna", 3),
    ]
    # before training all share the passes, of at most four rows; the first two adapters leave in the same round, where
    # their last evaluation is the one after training, and the third leaves alone
    assert scored == [4, 4, 4, 1, 3]
    rounds = records(run_dir, "round")
    assert [record["round"] for record in rounds] == list(range(1, 7))
    assert {record["adapters"] for record in rounds} == {1, 2}
    assert [record["rows"] for record in rounds] == [5, 5, 5, 4, 2, 4]
    assert {record["adapter"] for record in records(run_dir)} == found.keys()
    assert (run_dir / "report.html").exists()


def test_a_rate_can_be_looked_for_over_the_rows_of_all(make_recipe: Any, tmp_path: Path) -> None:
    """The test of learning rates trains one adapter over all rows."""
    write_rows(tmp_path / "rows.jsonl", {"anna": 9, "ben": 5})
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", {"max_steps": 3})
    found = find_lr(recipe, tmp_path / "rates", LrRange(steps=12))
    assert found is not None and (tmp_path / "rates" / "lr-range.jsonl").is_file()


def test_float16_that_auto_came_to_is_refused(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card without bfloat16."""
    write_rows(tmp_path / "rows.jsonl", {"anna": 9, "ben": 5})
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", {"max_steps": 3})
    monkeypatch.setattr(session, "build_scaler", lambda *_: torch.amp.GradScaler("cpu"))
    with pytest.raises(InputError, match="model.compute_dtype: this device has no bfloat16"):
        train(recipe, tmp_path / "run")
