"""Several processes share out the adapters of a run: each trains its own, and one directory has them all."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qvera.training import checkpoint
from tests.distributed.ranks import Ranks
from tests.helpers import wait_until
from tests.training.runs import all_files, entries, many_recipe, records, train_many, vectors, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.process]

COUNTS = {"anna": 12, "ben": 9, "cleo": 1, "dan": 14, "eve": 30}
LIMIT_SECONDS = 400.0


def launch(recipe: Path, run_dir: Path, logs: Path, *more: str) -> Ranks:
    set_dir = f"training.output_dir={run_dir}"
    return Ranks(["-m", "qvera", "train", str(recipe), "--set", set_dir, *more], 2, logs)


@pytest.fixture
def recipe_file(make_recipe: Any, tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", COUNTS)
    training = {"max_steps": 40, "save_steps": 5, "eval_steps": 10, "learning_rate": 1e-3}
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", training, eval_fraction=0.2)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    return path


def test_two_processes_train_all_and_go_on_after_one_was_told_to_stop(
    recipe_file: Path, make_recipe: Any, tmp_path: Path
) -> None:
    ranks = launch(recipe_file, tmp_path / "two", tmp_path / "logs")
    assert ranks.wait(LIMIT_SECONDS) == [0, 0], ranks.text()
    found = entries(tmp_path / "two")
    assert {name: (entry["status"], entry["steps"]) for name, entry in found.items()} == dict.fromkeys(
        COUNTS, ("done", 40)
    )
    assert not list((tmp_path / "two").glob("metrics.rank*"))
    for name in COUNTS:
        assert [record["step"] for record in records(tmp_path / "two", adapter=name)] == list(range(1, 41))
        assert len(records(tmp_path / "two", "eval", name)) == (4 if found[name]["eval_rows"] else 0)
    assert {record.get("rank", 0) for record in records(tmp_path / "two")} == {0, 1}

    training = {"max_steps": 40, "save_steps": 5, "eval_steps": 10, "learning_rate": 1e-3}
    one = many_recipe(make_recipe, tmp_path / "rows.jsonl", training, eval_fraction=0.2)
    alone = train_many(one, tmp_path / "one")
    assert list(alone) == list(found)
    for name in COUNTS:
        for key, tensor in vectors(tmp_path / "one", name).items():
            torch.testing.assert_close(
                vectors(tmp_path / "two", name)[key], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max())
            )

    cut_off(recipe_file, tmp_path / "cut", tmp_path / "cut-logs")
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "interrupted"
    ranks = launch(recipe_file, tmp_path / "cut", tmp_path / "resume-logs", "--resume")
    assert ranks.wait(LIMIT_SECONDS) == [0, 0], ranks.text()
    assert all_files(tmp_path / "cut") == all_files(tmp_path / "two")
    for name in COUNTS:
        assert records(tmp_path / "cut", adapter=name) == records(tmp_path / "two", adapter=name)


def test_a_process_that_had_saved_nothing_yet_begins_again_beside_one_that_goes_on(
    recipe_file: Path, tmp_path: Path
) -> None:
    """The first one recomputed layers when it began, which a plan would not choose now."""
    run_dir = tmp_path / "run"
    cut_off(recipe_file, run_dir, tmp_path / "cut-logs")
    shutil.rmtree(run_dir / "checkpoints" / "rank-00001")
    (run_dir / "metrics.rank-00001.jsonl").unlink()
    newest = checkpoint.directories(run_dir / "checkpoints")[-1]
    saved = checkpoint.load(newest)
    assert saved.state["gradient_checkpointing"] is False
    changed = saved.state | {"gradient_checkpointing": True}
    checkpoint.write(newest.parent, "round", saved.number, saved.files, changed)

    ranks = launch(recipe_file, run_dir, tmp_path / "logs", "--resume")
    assert ranks.wait(LIMIT_SECONDS) == [0, 0], ranks.text()
    assert "Gradient checkpointing stays on" in ranks.text()
    assert {name: entry["status"] for name, entry in entries(run_dir).items()} == dict.fromkeys(COUNTS, "done")
    for name in COUNTS:
        assert [record["step"] for record in records(run_dir, adapter=name)] == list(range(1, 41))


def cut_off(recipe: Path, run_dir: Path, logs: Path) -> None:
    """Start a run, and tell one of its processes to stop in the middle."""
    ranks = launch(recipe, run_dir, logs)
    log = run_dir / "metrics.rank-00001.jsonl"
    wait_until(lambda: log.exists() and len(records_of(log)) > 12, LIMIT_SECONDS)
    ranks.processes[1].send_signal(signal.SIGTERM)
    assert ranks.wait(LIMIT_SECONDS) == [75, 75], ranks.text()


def records_of(path: Path) -> list[str]:
    return path.read_text().splitlines()
