"""A step that memory does not suffice for is undone: saved and resumed to the bit, or taken again with fewer rows a pass.

The error is injected; no accelerator has raised it in a run yet.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from qvera.cli.main import main
from qvera.config.schema import Recipe
from qvera.config.sections import LrRange
from qvera.data import Example
from qvera.data.rows import Rows
from qvera.distributed.group import Group
from qvera.evaluation import held_out
from qvera.models import forward
from qvera.training.alone import Trainer
from qvera.training.failures import step_error
from qvera.training.loop import AloneLoop
from qvera.training.plan import Machine, make_plan
from qvera.training.plan.run import changed
from qvera.training.trainer import find_lr, train
from qvera.utils.errors import InputError, OutOfMemory
from qvera.utils.memory import Shortage
from tests.training.runs import (
    MESSAGE,
    assert_close_run,
    assert_same_run,
    cut_off,
    losses,
    records,
    run_json,
    untimed,
)

pytestmark = pytest.mark.process

FOUR_STEPS = {"max_steps": 4, "save_steps": 2, "save_total_limit": 9}


@pytest.fixture
def fail_held_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let every pass over held-out rows run out of memory, from that step on."""
    real, held_out_loss = forward.batch_nll, AloneLoop.held_out_loss

    def arrange(step: int) -> None:
        def too_much(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                raise torch.OutOfMemoryError(MESSAGE)
            return real(*args)

        def from_then_on(loop: AloneLoop, _: object) -> Any:
            monkeypatch.setattr(forward, "batch_nll", too_much if loop.state.step >= step else real)
            return held_out_loss(loop)

        monkeypatch.setattr(AloneLoop, "held_out_loss", from_then_on)

    return arrange


@pytest.fixture(scope="module")
def whole(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without dropout, with checkpoints of steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("memory") / "whole"
    train(make_recipe(training=FOUR_STEPS), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def evaluated(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe with dropout that keeps its best vectors, and its run."""
    training = {"max_steps": 4, "eval_steps": 2, "save_steps": 9, "load_best_model_at_end": True}
    recipe = make_recipe(adapter={"dropout": 0.2}, training=training)
    run_dir = tmp_path_factory.mktemp("memory") / "evaluated"
    train(recipe, run_dir)
    return recipe, run_dir


def test_a_run_is_saved_before_the_step_and_goes_on_to_the_bit(
    evaluated: tuple[Recipe, Path], tmp_path: Path, fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In backward of the second pass of step 4, with dropout, where no checkpoint was planned."""
    recipe, whole = evaluated
    fail(step=4, rows=2, where="backward", first_pass=2)
    with pytest.raises(OutOfMemory) as caught:
        train(recipe, tmp_path / "cut")
    for part in (
        "Step 4: memory ran out in a forward and backward pass (4 rows, the longest of",
        "2.15 GB were asked for",
        "No change makes it fit; at the least (--set",  # most of this process's memory is torch itself
        "Or set training.on_oom=halve",
        "Step 3 is saved: the same command with --resume goes on from it. Of keys that save memory it may change ",
    ):
        assert part in str(caught.value)
    assert run_json(tmp_path / "cut")["status"] == "failed"
    monkeypatch.undo()
    with pytest.raises(InputError, match="per_device_train_batch_size changed"):
        train(recipe.replace(training={"per_device_train_batch_size": 2}), tmp_path / "cut", resume=True)
    train(recipe.replace(training={"on_oom": "halve"}), tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", whole)


def test_the_message_has_the_three_mildest_changes_that_save_what_was_missing(make_recipe: Any) -> None:
    training = {"per_device_train_batch_size": 8, "loss_chunk_tokens": 4096, "gradient_checkpointing": False}
    recipe = make_recipe(data={"max_length": 1024}, adapter={"rank": 2048}, training=training)
    plan = make_plan(recipe, Machine("a GPU", "cuda", torch.float16, False, 10**10, 0, 1000))
    missing = plan.needed_bytes // 5
    short = Shortage(missing + 100, 100)
    row = Example(np.zeros(9, np.int32), np.ones(9, bool), "row 1", np.zeros(0, np.int32), "", None)
    first, header, *changes, halve = str(step_error(7, short, [row], plan, Group())).splitlines()
    assert first.endswith(f"pass (1 row, the longest of 9 tokens): {short}. The step was undone.")
    assert header == "Any one of these makes it fit:"
    assert len(changes) == 3
    assert halve == "Or set training.on_oom=halve, which goes on with half as many rows in a pass."
    for line in changes:
        (setting,) = re.findall(r"--set '?([^' ]+)'?", line)
        key, _, value = setting.partition("=")
        other = make_plan(changed(recipe, {key: json.loads(value)}), plan.machine)
        assert other.needed_bytes <= plan.needed_bytes - missing
    halving = make_plan(changed(recipe, {"training.on_oom": "halve"}), plan.machine)
    text = str(step_error(7, Shortage(100, 0), [row], halving, Group()))
    assert "--set" in text
    assert "on_oom" not in text and "per_device_train_batch_size" not in text  # a pass has one row already


def test_halved_passes_give_the_same_numbers_and_a_resumed_run_keeps_them(
    make_recipe: Any, tmp_path: Path, fail: Any, whole: Path
) -> None:
    recipe, halved, console = (
        make_recipe(training={**FOUR_STEPS, "on_oom": "halve"}),
        tmp_path / "halved",
        Console(record=True, width=1000),
    )
    fail(step=2, rows=1, first_pass=2)
    train(recipe, halved, console=console)
    said = console.export_text()
    assert "step 2: memory ran out (2.15 GB were asked for," in said
    assert "taken again with at most 2 rows in a pass" in said
    assert [(r["step"], r["pass_rows"]) for r in records(halved, "out_of_memory")] == [(2, 2), (2, 1)]
    assert run_json(halved)["result"]["halvings"] == [{"step": 2, "pass_rows": 2}, {"step": 2, "pass_rows": 1}]
    assert_close_run(halved, whole)
    assert [r["learning_rate"] for r in records(halved)] == [r["learning_rate"] for r in records(whole)]
    train(recipe, cut_off(halved, tmp_path / "cut", after=2), resume=True)
    assert_same_run(tmp_path / "cut", halved)


def test_packed_rows_are_halved_by_tokens(make_recipe: Any, tmp_path: Path, fail: Any, whole: Path) -> None:
    fail(step=2, rows=1)
    train(make_recipe(data={"packing": True}, training={**FOUR_STEPS, "on_oom": "halve"}), tmp_path / "halved")
    limits = [r["pass_tokens"] for r in records(tmp_path / "halved", "out_of_memory")]
    assert limits and limits == sorted(limits, reverse=True)
    assert losses(tmp_path / "halved") == pytest.approx(losses(whole), rel=1e-5)


def test_with_halve_a_longest_batch_that_does_not_fit_is_a_warning(
    make_recipe: Any, tmp_path: Path, fail: Any, whole: Path
) -> None:
    fail(step=0, rows=2)
    console = Console(record=True, width=1000)
    train(make_recipe(training={**FOUR_STEPS, "on_oom": "halve"}), tmp_path / "halved", console=console)
    assert "The longest batch does not fit into memory" in console.export_text()
    assert [(r["step"], r["pass_rows"]) for r in records(tmp_path / "halved", "out_of_memory")] == [(1, 2)]
    assert losses(tmp_path / "halved") == pytest.approx(losses(whole), rel=1e-5)
    with pytest.raises(InputError, match="the longest batch of this run"):
        train(make_recipe(training=FOUR_STEPS), tmp_path / "save")


def test_an_evaluation_that_does_not_fit_is_made_again_in_the_run_that_goes_on(
    evaluated: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_held_out: Any
) -> None:
    """In the middle and at the last step; a kill after its record was written leaves no second one either."""
    recipe, whole = evaluated
    cut = tmp_path / "cut"
    for step in (2, 4):
        fail_held_out(step)
        with (
            pytest.warns(UserWarning, match="Memory ran out with"),
            pytest.raises(OutOfMemory, match=f"Step {step} is saved: the same command with --resume goes on from it"),
        ):
            train(recipe, cut, resume=step > 2)
        assert run_json(cut)["status"] == "failed"
        with open(cut / "metrics.jsonl", "a") as handle:
            handle.write(f'{{"kind": "eval", "step": {step}, "loss": 9.0}}\n')
    monkeypatch.undo()
    train(recipe, cut, resume=True)
    assert_same_run(cut, whole)
    assert untimed(records(cut, "eval")) == untimed(records(whole, "eval"))
    assert run_json(cut)["result"]["best_step"] == run_json(whole)["result"]["best_step"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_score_before_training_that_does_not_fit_ends_the_run(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_held_out: Any, sharded: bool
) -> None:
    """With ZeRO-3's shards no batch is halved, since all ranks compute the same number of them."""
    fail_held_out(0)
    monkeypatch.setattr(held_out, "any_sharded", lambda _: sharded)
    many = "with [2-9] held-out rows at a time: .* Lower training.per_device_eval_batch_size"
    with (
        contextlib.nullcontext() if sharded else pytest.warns(UserWarning, match="Memory ran out with"),
        pytest.raises(OutOfMemory, match=many if sharded else "with one of the held-out rows at a time"),
    ):
        train(make_recipe(training={"max_steps": 2}), tmp_path / "cut")
    assert run_json(tmp_path / "cut")["status"] == "failed"


def test_scores_after_training_that_do_not_fit_leave_a_run_that_can_go_on(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(training={"max_steps": 1})
    real = Trainer.score

    def score(trainer: Trainer, label: str) -> Any:
        if label == "After training":
            raise OutOfMemory("Memory ran out with one of the held-out rows at a time.")
        return real(trainer, label)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "score", score)
        with pytest.raises(OutOfMemory, match="Step 1 is saved: the same command with --resume goes on from it"):
            train(recipe, tmp_path / "run")
    assert run_json(tmp_path / "run")["status"] == "failed"
    train(recipe, tmp_path / "run", resume=True)
    assert run_json(tmp_path / "run")["status"] == "done"
    assert run_json(tmp_path / "run")["result"]["eval_after"]["loss"] > 0


def test_a_single_row_that_does_not_fit_ends_the_run(write_recipe: Any, tmp_path: Path, fail: Any, capsys: Any) -> None:
    recipe = write_recipe(training={"on_oom": "halve", "output_dir": str(tmp_path / "run")})
    fail(step=1, rows=0)
    assert main(["train", str(recipe)]) == 1
    _, found, message = capsys.readouterr().err.partition(
        "Step 1: memory ran out in a forward and backward pass (1 row,"
    )
    assert found
    assert "on_oom" not in message and "is saved" not in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_memory_that_runs_out_before_the_first_pass_ends_the_run_though_it_may_halve(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """While the rows of step 3 are read: fewer rows a pass would not help."""
    recipe = make_recipe(training={"max_steps": 4, "save_steps": 9, "on_oom": "halve"})
    real, take = Rows.__getitem__, AloneLoop.train_step

    def too_much(rows: Rows, index: Any) -> Any:
        monkeypatch.setattr(Rows, "__getitem__", real)  # the message is planned with the rows
        raise MemoryError

    def third(loop: AloneLoop) -> Any:
        monkeypatch.setattr(Rows, "__getitem__", too_much if loop.state.step == 2 else real)
        return take(loop)

    monkeypatch.setattr(AloneLoop, "train_step", third)
    message = (
        "Step 3: memory ran out before the first forward and backward pass: (.|\n)*Step 2 is saved: the same command"
    )
    with pytest.raises(OutOfMemory, match=message):
        train(recipe, tmp_path / "cut")
    monkeypatch.undo()
    train(recipe, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", whole)


def test_a_range_test_does_not_take_it_for_divergence(make_recipe: Any, tmp_path: Path, fail: Any) -> None:
    fail(step=3, rows=0)
    with pytest.raises(OutOfMemory, match="Step 3: memory ran out"):
        find_lr(make_recipe(), tmp_path, LrRange(steps=10))


def test_deepspeed_can_not_halve(make_recipe: Any) -> None:
    with pytest.raises(InputError, match=r"training\.on_oom: halve: DeepSpeed can't undo"):
        make_recipe(training={"on_oom": "halve"}).replace(deepspeed="zero2")
