"""A run whose adapters' names are no good file names keeps each under a directory that gives its name back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvera.utils.adapter_names import unescape_name
from tests.training.many.runs import entries, many_recipe, records, train_many, write_rows

NAMES = ["Anna", "anna", "CON", "..", "a/b", "ben smith", "Zoë", "Zoe\u0308", "😀", "7", "end.", "-x", "a=b"]


def test_every_name_has_a_directory_of_its_own_and_is_shown_as_it_was(make_recipe: Any, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    write_rows(data, dict.fromkeys(NAMES, 1))
    run_dir = tmp_path / "run"
    assert set(train_many(many_recipe(make_recipe, data, {"max_steps": 1}), run_dir)) == set(NAMES)
    directories = {entry["directory"]: name for name, entry in entries(run_dir).items()}
    assert {path.name for path in (run_dir / "adapters").iterdir()} == set(directories)
    assert {directory: unescape_name(directory) for directory in directories} == directories
    assert {record["adapter"] for record in records(run_dir)} == set(NAMES)
    assert len({directory.casefold() for directory in directories}) == len(NAMES)
