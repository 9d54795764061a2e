"""Several processes share out the adapters of a run: each trains its own, and one directory has them all."""

from __future__ import annotations

import json
import os
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
STEPS, EVAL_STEPS = 24, 8
LIMIT_SECONDS = 400.0


class Runs:
    """A recipe, its run in one process, and runs in two: a whole one, and one that a signal to rank 1 stopped."""

    def __init__(self, root: Path, make_recipe: Any) -> None:
        self.root, self.recipe = root, root / "recipe.yaml"
        write_rows(root / "rows.jsonl", COUNTS)
        training = {"max_steps": STEPS, "save_steps": 5, "eval_steps": EVAL_STEPS, "learning_rate": 1e-3}
        recipe = many_recipe(make_recipe, root / "rows.jsonl", training, eval_fraction=0.2)
        self.recipe.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
        self.names = list(train_many(recipe, root / "one"))
        self.train("two")
        self.train("cut", stop_in=root / "cut" / "metrics.rank-00001.jsonl")

    def train(self, name: str, *more: str, stop_in: Path | None = None) -> str:
        """Run it in that directory; what both said."""
        output = f"training.output_dir={self.root / name}"
        command = ["-m", "qvera", "train", str(self.recipe), "--set", output, *more]
        ranks = Ranks(command, 2, self.root / f"{name}-logs")
        if stop_in is not None:
            wait_until(lambda: stop_in.exists() and len(stop_in.read_text().splitlines()) > 12, LIMIT_SECONDS)
            os.kill(int(ranks.processes[1].pid or 0), signal.SIGTERM)
        assert ranks.wait(LIMIT_SECONDS) == [75 if stop_in is not None else 0] * 2, ranks.text()
        return ranks.text()

    def copy_of_cut(self, name: str) -> Path:
        return Path(shutil.copytree(self.root / "cut", self.root / name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make_recipe: Any) -> Runs:
    return Runs(tmp_path_factory.mktemp("many"), make_recipe)


def test_two_processes_train_all_as_one_does(runs: Runs) -> None:
    one, two = runs.root / "one", runs.root / "two"
    found = entries(two)
    assert list(found) == runs.names
    assert {(entry["status"], entry["steps"]) for entry in found.values()} == {("done", STEPS)}
    assert not list(two.glob("metrics.rank*"))
    assert {record.get("rank", 0) for record in records(two)} == {0, 1}
    for name in COUNTS:
        assert [record["step"] for record in records(two, adapter=name)] == list(range(1, STEPS + 1))
        evaluations = STEPS // EVAL_STEPS if found[name]["eval_rows"] else 0
        assert len(records(two, "eval", name)) == evaluations
        for key, tensor in vectors(one, name).items():
            largest = float(tensor.abs().max())
            torch.testing.assert_close(vectors(two, name)[key], tensor, rtol=0, atol=1e-5 * largest)


def test_they_go_on_after_one_was_told_to_stop(runs: Runs) -> None:
    whole, resumed = runs.root / "two", runs.copy_of_cut("resumed")
    assert json.loads((resumed / "run.json").read_text())["status"] == "interrupted"
    runs.train("resumed", "--resume")
    assert all_files(resumed) == all_files(whole)
    for name in COUNTS:
        assert records(resumed, adapter=name) == records(whole, adapter=name)


def test_a_process_that_had_saved_nothing_yet_begins_again_beside_one_that_goes_on(runs: Runs) -> None:
    """The first one recomputed layers when it began, which a plan would not choose now."""
    run_dir = runs.copy_of_cut("half")
    shutil.rmtree(run_dir / "checkpoints" / "rank-00001")
    (run_dir / "metrics.rank-00001.jsonl").unlink()
    newest = checkpoint.directories(run_dir / "checkpoints")[-1]
    saved = checkpoint.load(newest)
    assert saved.state["gradient_checkpointing"] is False
    changed = saved.state | {"gradient_checkpointing": True}
    checkpoint.write(newest.parent, "round", saved.number, saved.files, changed)
    assert "Gradient checkpointing stays on" in runs.train("half", "--resume")
    assert {entry["status"] for entry in entries(run_dir).values()} == {"done"}
    for name in COUNTS:
        assert [record["step"] for record in records(run_dir, adapter=name)] == list(range(1, STEPS + 1))
