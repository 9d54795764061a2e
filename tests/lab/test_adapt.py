"""Training over tasks, and a few steps on the tasks that were held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvera.cli.main import main
from qvera.training.trainer import train
from qvera.utils.errors import InputError, OutOfMemory
from tests.training.runs import cut_off, losses, same, vectors

pytestmark = pytest.mark.process

WORDS = ["red", "blue", "green", "grey"]


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four tasks, of 12 rows and of 24: answer any number with the task's word."""
    directory = tmp_path_factory.mktemp("tasks")
    for number, word in enumerate(WORDS):
        rows = [{"prompt": f"say {i}", "completion": f"{word} {word}"} for i in range(12 * (1 + number % 2))]
        (directory / f"{word}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(directory / f"{word}.jsonl") for word in WORDS]


@pytest.fixture(scope="module")
def over_tasks(make_recipe: Any, task_files: list[str]) -> Any:
    def make(**training: Any) -> Any:
        data = {
            "path": task_files[0],
            "mixture": [{"path": path} for path in task_files[1:]],
            "eval_fraction": 0.0,
            "sampling": "task",
            "held_out_tasks": [task_files[2]],
        }
        return make_recipe(data=data, training={"save_total_limit": 9, **training})

    return make


@pytest.fixture(scope="module")
def adapted(over_tasks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    train(over_tasks(adapt_steps=6, adapt_rows=4, adapt_learning_rate=8e-2), run_dir)
    return run_dir


def test_a_held_out_task_is_learned_in_a_few_steps(adapted: Path, task_files: list[str]) -> None:
    [found] = json.loads((adapted / "run.json").read_text())["result"]["adaptation"]
    assert {name: found[name] for name in ("task", "support_rows", "query_rows")} == {
        "task": task_files[2],
        "support_rows": 4,
        "query_rows": 8,
    }
    assert found["loss_after"] < 0.8 * found["loss_before"]
    page = (adapted / "report.html").read_text()
    assert "Held-out tasks" in page
    assert f'<th scope="row">{task_files[2]}</th><td>4</td><td>8</td>' in page


def test_other_rows_are_scored_as_rows_not_as_tasks(adapted: Path, task_files: list[str], tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    assert main(["eval", str(adapted), "--data", task_files[1], "--no-generation", "--json", str(scores)]) == 0
    assert json.loads(scores.read_text())["scores"]["loss"] > 0


def test_adapting_leaves_the_run_as_it_was(adapted: Path, over_tasks: Any, tmp_path: Path) -> None:
    train(over_tasks(), tmp_path / "plain")
    assert same(vectors(adapted), vectors(tmp_path / "plain"))
    assert losses(adapted) == losses(tmp_path / "plain")


def test_a_run_over_tasks_is_resumed_to_the_bit(adapted: Path, over_tasks: Any, tmp_path: Path) -> None:
    again = cut_off(adapted, tmp_path / "again", after=3)
    train(over_tasks(adapt_steps=6, adapt_rows=4, adapt_learning_rate=8e-2), again, resume=True)
    assert losses(again) == losses(adapted)
    assert same(vectors(again), vectors(adapted))
    mine, first = (json.loads((run / "run.json").read_text())["result"]["adaptation"] for run in (again, adapted))
    assert mine == first


def test_a_task_whose_loss_is_not_finite_leaves_the_run_whole(
    adapted: Path, over_tasks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(over_tasks(adapt_steps=3, adapt_learning_rate=1e30), tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "done"
    assert [task["loss_after"] for task in run["result"]["adaptation"]] == [None]
    assert "Lower training.adapt_learning_rate" in " ".join(capsys.readouterr().err.split())
    assert same(vectors(tmp_path / "run"), vectors(adapted))


def test_a_task_that_memory_does_not_suffice_for_ends_the_run(
    over_tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapt(trainer: Any) -> Any:
        raise OutOfMemory("Step 1: memory ran out.")

    monkeypatch.setattr("qvera.lab.tasks.adapt_to_held_out_tasks", adapt)
    with pytest.raises(OutOfMemory, match="Step 6 is saved: the same command with --resume goes on"):
        train(over_tasks(adapt_steps=3), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_adapting_needs_held_out_tasks_and_plain_torch(make_recipe: Any, over_tasks: Any) -> None:
    with pytest.raises(InputError, match="training.adapt_steps: has no effect without data.held_out_tasks"):
        make_recipe(training={"adapt_steps": 2})
    with pytest.raises(InputError, match="training.adapt_steps: steps with another optimizer than DeepSpeed's"):
        over_tasks(adapt_steps=2).replace(deepspeed="zero2")
