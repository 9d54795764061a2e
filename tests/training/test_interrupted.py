"""Ctrl-C and SIGTERM in every phase of a run, and runs whose process is gone: the same command goes on, or begins again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvera.cli.main import main
from qvera.config.schema import Recipe
from qvera.evaluation.report.read import status_of
from qvera.evaluation.run_info import directory_facts
from qvera.tasks.causal_lm import CausalLM
from qvera.training import session
from qvera.training.alone import Trainer
from qvera.training.loop import AloneLoop
from qvera.training.trainer import train
from qvera.utils.errors import InputError, Interrupted
from tests.training.runs import losses, records, run_json, same, vectors

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def whole(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and its finished run."""
    recipe = make_recipe(training={"max_steps": 4, "save_steps": 2, "eval_steps": 3, "exact_match_rows": 2})
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe, run_dir)
    return recipe, run_dir


def signalling(function: Callable[..., Any], number: int, call: int = 1) -> Callable[..., Any]:
    """The function, which sends this process a signal at the beginning of one of its calls."""
    calls = iter(range(1, 1_000_000))

    def wrapped(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*given, **named)

    return wrapped


NOTHING, STEP_4 = "No step was saved yet: the same command begins again", "Step 4 is saved: the same command goes on"
PHASES: dict[str, tuple[Any, str, int, str]] = {
    "tokenizing": (session, "build_datasets", 1, NOTHING),
    "loading the base": (session, "load_base", 1, NOTHING),
    "the longest batch": (AloneLoop, "try_batch", 1, NOTHING),
    "held-out loss before": (AloneLoop, "held_out_loss", 1, NOTHING),
    "answers before": (CausalLM, "answers", 1, NOTHING),
    "training": (AloneLoop, "train_step", 3, "after step 3 of 4, and saved. The same command goes on"),
    "the last step": (AloneLoop, "train_step", 4, STEP_4),
    "the last save": (Trainer, "save_adapter", 1, STEP_4),
    "answers after": (CausalLM, "answers", 2, STEP_4),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_leaves_what_the_same_command_ends(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    (recipe, reference), run_dir = whole, tmp_path / "run"
    number = [signal.SIGINT, signal.SIGTERM][list(PHASES).index(phase) % 2]
    place, name, call, said = PHASES[phase]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, signalling(getattr(place, name), number, call))
        with pytest.raises(Interrupted, match=f"Stopped by {number.name}.*{said}"):
            train(recipe, run_dir)
    assert not run_dir.exists() or not (run_dir / "run.json").exists() or run_json(run_dir)["status"] == "interrupted"
    train(recipe, run_dir)
    assert run_json(run_dir)["status"] == "done"
    assert losses(run_dir) == losses(reference)
    assert same(vectors(run_dir), vectors(reference))


def test_a_signal_in_an_evaluation_saves_before_its_end_and_the_run_goes_on_with_it(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run_dir = whole[0], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(AloneLoop, "held_out_loss", signalling(AloneLoop.held_out_loss, signal.SIGTERM, 2))
        with pytest.raises(Interrupted, match=r"SIGTERM after step 3 of 4, and saved\. The same command goes on"):
            train(recipe, run_dir)
    assert not losses(run_dir, "eval")
    train(recipe, run_dir)
    for kind in ("train", "eval"):
        assert losses(run_dir, kind) == losses(whole[1], kind)
    assert same(vectors(run_dir), vectors(whole[1]))
    assert run_json(run_dir)["result"]["best_step"] == run_json(whole[1])["result"]["best_step"]


@pytest.mark.parametrize("save_steps", [2, 1000])
def test_several_ranks_save_before_an_evaluation_and_after_a_kill_in_it_the_run_goes_on_with_it(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    """Here one process that takes itself for one of two."""
    recipe = make_recipe(training={"max_steps": 3, "save_steps": save_steps, "eval_steps": 2})
    setup, evaluate = Trainer.setup, Trainer.evaluate

    def setup_of_two(run: Trainer) -> None:
        setup(run)
        run.group = dataclasses.replace(run.group, world_size=2)

    def evaluate_and_copy(run: Trainer) -> None:
        shutil.copytree(run.run_dir, tmp_path / "killed")
        assert (tmp_path / "killed" / "checkpoints" / "step-00000002").is_dir()
        evaluate(run)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "setup", setup_of_two)
        patch.setattr(Trainer, "evaluate", evaluate_and_copy)
        train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "killed", resume=True)
    for kind in ("train", "eval"):
        assert losses(tmp_path / "killed", kind) == losses(tmp_path / "whole", kind)
    assert [record["step"] for record in records(tmp_path / "killed")] == [1, 2, 3]
    assert same(vectors(tmp_path / "killed"), vectors(tmp_path / "whole"))


def test_the_first_ctrl_c_is_answered_and_the_second_one_stops_at_once_and_names_the_saved_step(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe, real = whole[0], AloneLoop.train_step

    def step(loop: AloneLoop) -> dict[str, Any]:
        if loop.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # of a person who has read the answer
            os.kill(os.getpid(), signal.SIGINT)
        return real(loop)

    with monkeypatch.context() as patch:
        patch.setattr(AloneLoop, "train_step", step)
        with pytest.raises(Interrupted, match="Stopped by SIGINT. Step 3 is saved: the same command goes on from it"):
            train(recipe, tmp_path / "run")
    assert "SIGINT: saving after this step; press Ctrl-C again to stop at once." in capsys.readouterr().err
    train(recipe, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole[1])


def test_an_error_that_nobody_expects_leaves_no_run_that_runs(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AloneLoop, "train_step", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(whole[0], tmp_path / "run")
    assert run_json(tmp_path / "run")["status"] == "failed"
    with pytest.raises(InputError, match="already holds a run"):
        train(whole[0], tmp_path / "run")


@pytest.mark.parametrize(
    ("dry_run", "said"),
    [
        (False, "process {} on .* trains in this directory. Wait for it"),
        (True, "holds a run. Process {} on .* trains it: wait for it. If that is gone, add --resume"),
    ],
)
def test_a_second_run_in_the_directory_of_one_that_trains_is_told_of_it(
    dry_run: bool, said: str, whole: tuple[Recipe, Path], tmp_path: Path
) -> None:
    def begin_another(_: object) -> None:
        train(whole[0], tmp_path / "run", dry_run=dry_run)

    with pytest.raises(InputError, match=said.format(os.getpid())):
        train(whole[0], tmp_path / "run", callbacks=[begin_another])


def test_a_run_whose_process_is_gone_is_told_as_interrupted_by_its_process(
    whole: tuple[Recipe, Path], tmp_path: Path, capsys: Any
) -> None:
    """As kill -9 leaves it; `qvera ui` is tested in tests/serve/ui."""
    recipe, reference = whole
    info = run_json(shutil.copytree(reference, tmp_path / "run"))
    assert status_of({**info, "status": "running"}) == "running", "this process is there"
    assert status_of({**info, "status": "running", "started": "2001-01-01T00:00:00+00:00"}) == "interrupted"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    info = {**info, "status": "running", "processes": {**info["processes"], "pid": gone.pid}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    assert directory_facts(tmp_path / "run")["status"] == "interrupted"
    train(recipe, tmp_path / "run")
    assert "which was interrupted: it goes on" in " ".join(capsys.readouterr().err.split())
    assert same(vectors(tmp_path / "run"), vectors(reference))
    elsewhere = {**info, "processes": {**info["processes"], "host": "another-machine"}}
    assert status_of(elsewhere) == "running", "nobody here knows"


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_again(
    whole: tuple[Recipe, Path], tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(whole[1], tmp_path / "run")
    for name in ("checkpoints", "adapter"):  # which come later
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    info = run_json(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**info, "status": "interrupted"}))
    train(whole[0], tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "was interrupted: no step of it was saved, so it begins again." in said
    assert "it goes on" not in said
    assert same(vectors(tmp_path / "run"), vectors(whole[1]))


def test_a_run_that_was_interrupted_before_its_first_step_may_begin_again_by_another_recipe(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_recipe: Any
) -> None:
    settings = {"max_steps": 2, "output_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "answers", signalling(CausalLM.answers, signal.SIGINT))
        assert main(["train", str(write_recipe(training=settings))]) == 75
    assert main(["train", str(write_recipe(training={**settings, "learning_rate": 0.01}))]) == 0
    assert run_json(tmp_path / "run")["status"] == "done"
