"""A run whose adapters' names are no good file names keeps each under a directory that gives its name back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qvera.cli.main import main
from qvera.cli.train import print_result
from qvera.utils.adapter_names import unescape_name
from tests.training.runs import entries, many_recipe, poison, records, train_many, write_rows

NAMES = ["Anna", "anna", "CON", "..", "a/b", "ben smith", "Zoë", "Zoe\u0308", "😀", "-7", "end.", "a=b", "tiny-llama"]


def test_every_name_has_a_directory_of_its_own_and_is_shown_as_it_was(make_recipe: Any, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    write_rows(data, dict.fromkeys(NAMES, 1))
    run_dir, console = tmp_path / "run", Console(record=True, width=400)
    assert set(train_many(many_recipe(make_recipe, data, {"max_steps": 1}), run_dir, console=console)) == set(NAMES)
    assert "tiny-llama: an adapter and the base have this name, and `qvera serve` means" in console.export_text()
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
    print_result(run_dir, json.loads((run_dir / "run.json").read_text()))
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
