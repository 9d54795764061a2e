"""`qvera train` with a recipe that names adapters: what it prints and leaves, under directories that give names back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from qvera.cli.main import main
from qvera.cli.train import print_result
from qvera.config.sections import LrRange
from qvera.training import session
from qvera.training.trainer import find_lr, train
from qvera.utils.adapter_names import unescape_name
from qvera.utils.errors import InputError
from tests.training.runs import entries, many_recipe, poison, records, run_json, train_many, write_rows

pytestmark = pytest.mark.process


def test_train_says_how_many_are_done_and_leaves_one_file_of_metrics(
    make_recipe: Any, tmp_path: Path, capsys: Any
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
    assert main(["train", str(path)]) == 0
    shown = capsys.readouterr()
    printed, progress = shown.out, " ".join(shown.err.split())
    assert "3 adapters of 1 to 8 rows (median 6), 9 optimizer steps together" in progress
    assert "at most 2 adapters at a time" in progress
    assert re.search(r"adapters +3 done, in .*/run/adapters", printed)
    assert re.search(r"held-out loss +[\d.]+ → [\d.]+ in the mean of 3 adapters", printed)
    assert re.search(r"look at +too few rows: ben", printed)
    run, found = run_json(run_dir), entries(run_dir)
    assert list(found) == [name for name in found if (run_dir / "adapters" / found[name]["directory"]).is_dir()]
    assert (run["status"], run["result"]["steps"], run["result"]["planned_steps"]) == ("done", 9, 9)
    assert {name: entry["eval_rows"] for name, entry in found.items()} == {"Ärzte & Co.": 4, "ben": 1, "anna": 3}
    rounds = records(run_dir, "round")
    assert [record["round"] for record in rounds] == list(range(1, 7))
    assert {record["adapters"] for record in rounds} == {1, 2}
    assert [record["rows"] for record in rounds] == [5, 5, 5, 4, 2, 4]
    assert {record["adapter"] for record in records(run_dir)} == found.keys()
    assert (run_dir / "report.html").exists()


def test_a_rate_can_be_looked_for_over_the_rows_of_all_and_float16_that_auto_came_to_is_refused(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of learning rates trains one adapter over all rows; many in float16: as on a card without bfloat16."""
    write_rows(tmp_path / "rows.jsonl", {"anna": 9, "ben": 5})
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", {"max_steps": 3})
    found = find_lr(recipe, tmp_path / "rates", LrRange(steps=12))
    assert found is not None and (tmp_path / "rates" / "lr-range.jsonl").is_file()
    monkeypatch.setattr(session, "build_scaler", lambda *_: torch.amp.GradScaler("cpu"))
    with pytest.raises(InputError, match="model.compute_dtype: this device has no bfloat16"):
        train(recipe, tmp_path / "run")


NAMES = ["Anna", "anna", "CON", "..", "a/b", "ben smith", "Zoë", "Zoe\u0308", "😀", "-7", "end.", "a=b", "tiny-llama"]


def test_every_name_has_a_directory_of_its_own_and_is_shown_as_it_was(make_recipe: Any, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    write_rows(data, dict.fromkeys(NAMES, 1))
    run_dir, console = tmp_path / "run", Console(record=True, width=400)
    assert set(train_many(many_recipe(make_recipe, data, {"max_steps": 1}), run_dir, console=console)) == set(NAMES)
    said = console.export_text()
    assert "tiny-llama: an adapter and the base have this name, and `qvera serve` means" in said
    assert "13 adapters of 1 row each, 13 optimizer steps together." in said
    directories = {entry["directory"]: name for name, entry in entries(run_dir).items()}
    assert {path.name for path in (run_dir / "adapters").iterdir()} == set(directories)
    assert {directory: unescape_name(directory) for directory in directories} == directories
    assert {record["adapter"] for record in records(run_dir)} == set(NAMES)
    assert len({directory.casefold() for directory in directories}) == len(NAMES)


def test_a_name_can_not_steer_the_terminal_that_shows_it(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Wherever it is printed: while training, in its summary, in tables, in errors."""
    bad, good = "\x1b[2Jdiverges\n", "\x1b[2Janna\n"
    run_dir, console = tmp_path / "run", Console(record=True, width=400)
    write_rows(tmp_path / "rows.jsonl", {bad: 1, good: 1})
    poison(monkeypatch, bad, step=2)
    train_many(many_recipe(make_recipe, tmp_path / "rows.jsonl", {"max_steps": 2}), run_dir, console=console)
    assert f"Adapter {bad!r}: step 2: " in console.export_text()
    capsys.readouterr()
    print_result(run_dir, run_json(run_dir))
    assert main(["info", str(run_dir)]) == 0
    assert main(["info", str(run_dir), "--adapter", good]) == 0
    generate = ["generate", str(run_dir), "--prompt", "say red", "--max-new-tokens", "1", "--adapter"]
    assert main([*generate, good]) == 0
    assert main([*generate, bad]) == 2
    assert main([*generate, bad + good]) == 2
    shown = capsys.readouterr()
    assert "\x1b[2J" not in shown.out + shown.err
    assert shown.out.count(repr(good)) >= 3
    assert shown.err.count(repr(good)) >= 2
