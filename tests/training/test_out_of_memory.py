"""A step that memory does not suffice for is undone: saved and resumed to the bit, or taken again with fewer rows a pass.

The error is injected; no accelerator has raised it in a run yet.
"""

from __future__ import annotations

import contextlib
import io
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
from qvera.config.lr_range import LrRange
from qvera.config.schema import Recipe
from qvera.data import Example
from qvera.data.rows import Rows
from qvera.distributed.group import Group
from qvera.evaluation import held_out
from qvera.models import forward
from qvera.training.failures import step_error
from qvera.training.loop import AloneLoop
from qvera.training.lr_finder import find_lr
from qvera.training.plan import Machine, make_plan
from qvera.training.plan.run import changed
from qvera.training.trainer import Trainer, train
from qvera.utils.errors import InputError, OutOfMemory
from qvera.utils.memory import Shortage
from tests.training.runs import MESSAGE, cut_off, losses, records, same, vectors

pytestmark = pytest.mark.process


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let passes of step ``step`` and later with more than ``rows`` rows run out of memory, in forward or in backward."""
    real = AloneLoop.nll

    def arrange(step: int, rows: int, where: str = "forward", first_pass: int = 1) -> None:
        passes: dict[int, int] = {}
        hooks: list[Any] = []

        def out_of_memory(_: torch.Tensor) -> None:
            hooks.pop().remove()
            raise torch.OutOfMemoryError(MESSAGE)

        def nll(loop: AloneLoop, examples: Any, *rest: Any) -> Any:
            if not rest or loop.state.step + 1 < step:  # not the trial of the longest batch
                return real(loop, examples, *rest)
            number = passes[loop.state.step] = passes.get(loop.state.step, 0) + 1
            fails = len(examples) > rows and number >= first_pass
            if fails and where == "forward":
                raise torch.OutOfMemoryError(MESSAGE)
            found, count = real(loop, examples, *rest)
            if fails:
                first = next(iter(loop.engine.vectors.values()))
                hooks.append(first.register_hook(out_of_memory))
            return found, count

        monkeypatch.setattr(AloneLoop, "nll", nll)

    return arrange


@pytest.fixture(scope="module")
def whole(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps without dropout, with checkpoints of steps 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("memory") / "whole"
    train(make_recipe(training={"max_steps": 6, "save_steps": 2, "save_total_limit": 9}), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def dropped_out(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe with dropout, and its run."""
    recipe = make_recipe(adapter={"dropout": 0.2}, training={"max_steps": 5, "save_steps": 2})
    run_dir = tmp_path_factory.mktemp("memory") / "dropped-out"
    train(recipe, run_dir)
    return recipe, run_dir


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_is_saved_before_the_step_and_goes_on_to_the_bit(
    dropped_out: tuple[Recipe, Path], tmp_path: Path, fail: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In the second pass of step 4, with dropout, after the last planned checkpoint at step 2."""
    recipe, whole = dropped_out
    with monkeypatch.context():
        fail(step=4, rows=2, where=where, first_pass=2)
        with pytest.raises(OutOfMemory) as caught:
            train(recipe, tmp_path / "cut")
    text = str(caught.value)
    assert "Step 4: memory ran out in a forward and backward pass (4 rows, the longest of" in text
    assert "2.15 GB were asked for" in text
    assert "No change makes it fit; at the least (--set" in text  # most of this process's memory is torch itself
    assert "Or set training.on_oom=halve" in text
    assert "Step 3 is saved: the same command with --resume goes on from it." in text
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    train(recipe, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(whole)
    assert same(vectors(tmp_path / "cut"), vectors(whole))


def test_the_message_has_the_three_mildest_changes_that_save_what_was_missing(make_recipe: Any) -> None:
    recipe = make_recipe(
        data={"max_length": 1024},
        adapter={"rank": 2048},
        training={"per_device_train_batch_size": 8, "loss_chunk_tokens": 4096, "gradient_checkpointing": False},
    )
    plan = make_plan(recipe, Machine("a GPU", "cuda", torch.float16, False, 10**10, 0, 1000))
    missing = plan.needed_bytes // 5
    row = Example(np.zeros(9, np.int32), np.ones(9, bool), "row 1", np.zeros(0, np.int32), "", None)
    error = step_error(7, Shortage(missing + 100, 100), [row], plan, None, Group())
    first, header, *changes, halve = str(error).splitlines()
    assert first.endswith(
        "pass (1 row, the longest of 9 tokens): " + str(Shortage(missing + 100, 100)) + ". The step was undone."
    )
    assert header == "Any one of these makes it fit:"
    assert len(changes) == 3
    assert halve == "Or set training.on_oom=halve, which goes on with half as many rows in a pass."
    halving = changed(recipe, {"training.on_oom": "halve"})
    text = str(step_error(7, Shortage(100, 0), [row], make_plan(halving, plan.machine), None, Group()))
    assert "on_oom" not in text
    assert "per_device_train_batch_size" not in text  # a pass has one row already
    assert "--set" in text
    for line in changes:
        (setting,) = re.findall(r"--set '?([^' ]+)'?", line)
        key, _, value = setting.partition("=")
        other = make_plan(changed(recipe, {key: json.loads(value)}), plan.machine)
        assert other.needed_bytes <= plan.needed_bytes - missing


def test_halved_passes_give_the_same_numbers_and_a_resumed_run_keeps_them(
    make_recipe: Any, tmp_path: Path, fail: Any, whole: Path
) -> None:
    training = {"max_steps": 6, "save_steps": 2, "save_total_limit": 9, "on_oom": "halve"}
    recipe = make_recipe(training=training)
    fail(step=3, rows=1, first_pass=2)
    console = Console(file=io.StringIO(), width=1000)
    train(recipe, tmp_path / "halved", console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 3: memory ran out (2.15 GB were asked for," in said
    assert "taken again with at most 2 rows in a pass" in said
    assert [(r["step"], r["pass_rows"]) for r in records(tmp_path / "halved", "out_of_memory")] == [(3, 2), (3, 1)]
    result = json.loads((tmp_path / "halved" / "run.json").read_text())["result"]
    assert result["halvings"] == [{"step": 3, "pass_rows": 2}, {"step": 3, "pass_rows": 1}]
    assert losses(tmp_path / "halved") == pytest.approx(losses(whole), rel=1e-5)
    for name, tensor in vectors(whole).items():
        torch.testing.assert_close(vectors(tmp_path / "halved")[name], tensor, rtol=1e-3, atol=2e-5)
    rates = [[r["learning_rate"] for r in records(d)] for d in (tmp_path / "halved", whole)]
    assert rates[0] == rates[1]
    train(recipe, cut_off(tmp_path / "halved", tmp_path / "cut", after=4), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "halved")
    assert same(vectors(tmp_path / "cut"), vectors(tmp_path / "halved"))


def test_with_halve_a_longest_batch_that_does_not_fit_is_a_warning(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    real = AloneLoop.nll

    def nll(loop: AloneLoop, examples: Any, *rest: Any) -> Any:
        if len(examples) > 2:
            raise torch.OutOfMemoryError(MESSAGE)
        return real(loop, examples, *rest)

    monkeypatch.setattr(AloneLoop, "nll", nll)
    console = Console(file=io.StringIO(), width=1000)
    training = {"max_steps": 6, "save_steps": 2, "save_total_limit": 9}
    train(make_recipe(training={**training, "on_oom": "halve"}), tmp_path / "halved", console=console)
    assert "The longest batch does not fit into memory" in console.file.getvalue()  # type: ignore[attr-defined]
    assert [(r["step"], r["pass_rows"]) for r in records(tmp_path / "halved", "out_of_memory")] == [(1, 2)]
    assert losses(tmp_path / "halved") == pytest.approx(losses(whole), rel=1e-5)
    with pytest.raises(InputError, match="the longest batch of this run"):
        train(make_recipe(training=training), tmp_path / "save")


@pytest.mark.parametrize("max_steps", [4, 3], ids=["in-the-middle", "at-the-last-step"])
def test_an_evaluation_that_does_not_fit_is_made_again_in_the_run_that_goes_on(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_steps: int
) -> None:
    """A kill after its record was written and before the next checkpoint leaves no second one either."""
    training = {"max_steps": max_steps, "eval_steps": 3, "save_steps": 4, "load_best_model_at_end": True}
    recipe = make_recipe(training=training)
    train(recipe, tmp_path / "whole")
    real, held_out_loss = forward.batch_nll, AloneLoop.held_out_loss

    def too_much(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError(MESSAGE)
        return real(*args)

    def later(loop: AloneLoop) -> Any:
        monkeypatch.setattr(forward, "batch_nll", too_much if loop.state.step else real)
        return held_out_loss(loop)

    monkeypatch.setattr(AloneLoop, "held_out_loss", later)
    with (
        pytest.warns(UserWarning, match="Memory ran out with"),
        pytest.raises(OutOfMemory, match="Step 3 is saved: the same command with --resume goes on from it"),
    ):
        train(recipe, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as handle:
        handle.write('{"kind": "eval", "step": 3, "loss": 9.0}\n')
    train(recipe, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same(vectors(tmp_path / "cut"), vectors(tmp_path / "whole"))
    (again,), (once,) = (records(tmp_path / name, "eval") for name in ("cut", "whole"))
    assert again | {"seconds": once["seconds"]} == once
    results = [json.loads((tmp_path / name / "run.json").read_text())["result"] for name in ("cut", "whole")]
    assert results[0]["best_step"] == results[1]["best_step"] == 3


@pytest.mark.parametrize("sharded", [False, True])
def test_a_score_before_training_that_does_not_fit_ends_the_run(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """With ZeRO-3's shards no batch is halved, since all ranks compute the same number of them."""
    real = forward.batch_nll

    def too_much(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError(MESSAGE)
        return real(*args)

    monkeypatch.setattr(forward, "batch_nll", too_much)
    monkeypatch.setattr(held_out, "any_sharded", lambda _: sharded)
    many = "with [2-9] held-out rows at a time: .* Lower training.per_device_eval_batch_size"
    with (
        contextlib.nullcontext() if sharded else pytest.warns(UserWarning, match="Memory ran out with"),
        pytest.raises(OutOfMemory, match=many if sharded else "with one of the held-out rows at a time"),
    ):
        train(make_recipe(training={"max_steps": 2}), tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "failed"


def test_scores_after_training_that_do_not_fit_leave_a_run_that_can_go_on(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(training={"max_steps": 2})
    real = Trainer.score

    def score(trainer: Trainer, label: str) -> Any:
        if label == "After training":
            raise OutOfMemory("Memory ran out with one of the held-out rows at a time.")
        return real(trainer, label)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "score", score)
        with pytest.raises(OutOfMemory, match="Step 2 is saved: the same command with --resume goes on from it"):
            train(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    train(recipe, tmp_path / "run", resume=True)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "done"
    assert run["result"]["eval_after"]["loss"] > 0


def test_packed_rows_are_halved_by_tokens(make_recipe: Any, tmp_path: Path, fail: Any) -> None:
    recipe = make_recipe(data={"packing": True}, training={"max_steps": 3, "on_oom": "halve"})
    train(recipe, tmp_path / "whole")
    fail(step=2, rows=1)
    train(recipe, tmp_path / "halved")
    limits = [r["pass_tokens"] for r in records(tmp_path / "halved", "out_of_memory")]
    assert limits
    assert limits == sorted(limits, reverse=True)
    assert losses(tmp_path / "halved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_single_row_that_does_not_fit_ends_the_run(write_recipe: Any, tmp_path: Path, fail: Any, capsys: Any) -> None:
    recipe = write_recipe(training={"on_oom": "halve", "output_dir": str(tmp_path / "run")})
    fail(step=1, rows=0)
    assert main(["train", str(recipe)]) == 1
    said = capsys.readouterr().err
    assert "Step 1: memory ran out in a forward and backward pass (1 row," in said
    assert "on_oom" not in said.partition("Step 1: memory ran out in a forward")[2]
    assert "is saved" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("on_oom", ["save", "halve"])
def test_memory_that_runs_out_before_the_first_pass_ends_the_run_too(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, on_oom: str
) -> None:
    """While the rows of step 3 are read: fewer rows a pass would not help."""
    recipe = make_recipe(training={"max_steps": 6, "save_steps": 9, "on_oom": on_oom})
    real, take = Rows.__getitem__, AloneLoop.train_step

    def too_much(rows: Rows, index: Any) -> Any:
        monkeypatch.setattr(Rows, "__getitem__", real)  # the message is planned with the rows
        raise MemoryError

    def third(loop: AloneLoop) -> Any:
        monkeypatch.setattr(Rows, "__getitem__", too_much if loop.state.step == 2 else real)
        return take(loop)

    monkeypatch.setattr(AloneLoop, "train_step", third)
    with pytest.raises(
        OutOfMemory, match="Step 3: memory ran out before the first forward and backward pass: "
    ) as caught:
        train(recipe, tmp_path / "cut")
    assert "Step 2 is saved: the same command with --resume goes on from it." in str(caught.value)
    monkeypatch.undo()
    train(recipe, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(whole)
    assert same(vectors(tmp_path / "cut"), vectors(whole))


def test_a_range_test_does_not_take_it_for_divergence(make_recipe: Any, tmp_path: Path, fail: Any) -> None:
    fail(step=3, rows=0)
    with pytest.raises(OutOfMemory, match="Step 3: memory ran out"):
        find_lr(make_recipe(), tmp_path, LrRange(steps=10))


def test_deepspeed_can_not_halve(make_recipe: Any) -> None:
    recipe: Recipe = make_recipe(training={"on_oom": "halve"})
    with pytest.raises(InputError, match=r"training\.on_oom: halve: DeepSpeed can't undo"):
        recipe.replace(deepspeed="zero2")
