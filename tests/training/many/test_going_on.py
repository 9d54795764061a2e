"""Killed or stopped in the middle, with adapters joining and leaving, a run ends with the same bits."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load

from qvera.adapters.save_load import save_adapter
from qvera.config.schema import Recipe
from qvera.distributed.group import Group, for_all
from qvera.training import checkpoint
from qvera.training.bank_loop import BankLoop
from qvera.training.many import ManyTrainer
from qvera.training.optim import AdamSettings, BankAdamW
from qvera.training.session import TrainingSession
from qvera.training.trainer import train
from qvera.utils.errors import InputError, Interrupted, OutOfMemory, RunFailed
from tests.disk import fill, small_disk
from tests.training.runs import (
    all_files,
    assert_same,
    cut_off,
    entries,
    many_recipe,
    records,
    run_json,
    train_many,
    vouch_for,
    write_rows,
)

pytestmark = pytest.mark.process

COUNTS = {"anna": 21, "ben": 9, "cleo": 1, "dan": 14, "eve": 6, "Eve": 8}
"""By two epochs of steps of four rows: 12, 6, 2, 8, 4 and 4 steps, of which two or three go into a pass."""


@pytest.fixture(scope="module")
def whole(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe, and a finished run with a checkpoint of each of its last rounds. Copy it before you change it."""
    directory = tmp_path_factory.mktemp("many")
    write_rows(directory / "rows.jsonl", COUNTS)
    training = {"max_steps": -1, "num_train_epochs": 2.0, "save_steps": 3, "save_total_limit": 100}
    training |= {"eval_steps": 2, "load_best_model_at_end": True}
    recipe = many_recipe(make_recipe, directory / "rows.jsonl", training, eval_fraction=0.2)
    train_many(recipe, directory / "run")
    return recipe, directory / "run"


def test_the_run_has_adapters_that_join_and_leave_at_its_checkpoints(whole: tuple[Recipe, Path]) -> None:
    _, run_dir = whole
    found = []
    for path in checkpoint.directories(run_dir / "checkpoints"):
        state = json.loads((path / "state.json").read_text())
        found.append([entry["status"] for entry in state["adapters"]])
    assert any({"waiting", "in_flight", "done"} <= set(statuses) for statuses in found)
    assert set(found[-1]) == {"done"}
    for name in COUNTS:  # whoever has begun takes a step in every round
        rounds = [record["round"] for record in records(run_dir, adapter=name)]
        assert rounds == list(range(rounds[0], rounds[0] + len(rounds)))


@pytest.mark.parametrize("after", [0, 6])
def test_a_killed_run_goes_on_to_the_same_bits(whole: tuple[Recipe, Path], tmp_path: Path, after: int) -> None:
    recipe, run_dir = whole
    cut = cut_off(run_dir, tmp_path / "cut", after=after)
    if after == 0:  # killed before its first checkpoint
        lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
        (cut / "metrics.jsonl").write_text("".join(lines[:7]) + '{"kind": "tra')
        shutil.rmtree(cut / "adapters")
    train(recipe, cut, resume=True)
    assert_same(cut, run_dir)


def test_an_adapter_whose_directory_is_gone_is_trained_again(whole: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, run_dir = whole
    there = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shutil.rmtree(there / "adapters" / "dan")
    console = Console(record=True, width=1000)
    train(recipe, there, console=console, resume=True)
    assert f"{there / 'adapters' / 'dan'}: is gone, so adapter dan is trained again." in console.export_text()
    found, expected = all_files(there), all_files(run_dir)
    dan = "adapters/dan/adapter_model.safetensors"
    vectors, own = (load(files.pop(dan)) for files in (found, expected))
    assert found == expected and entries(there).keys() == entries(run_dir).keys()
    for name, tensor in own.items():  # it shares its passes with others now, which round differently
        torch.testing.assert_close(vectors[name], tensor, rtol=1e-3, atol=2e-5)
    assert (
        entries(there)["dan"]["status"] == "done" and entries(there)["dan"]["steps"] == entries(run_dir)["dan"]["steps"]
    )


def test_a_stopped_run_is_saved_and_goes_on(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run_dir = whole
    real = ManyTrainer.take_turn

    def take_turn(self: ManyTrainer) -> None:
        real(self)
        if self.loop.round == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ManyTrainer, "take_turn", take_turn)
        with pytest.raises(Interrupted, match="Stopped by SIGTERM after round 5, and saved") as stopped:
            train(recipe, tmp_path / "run")
    assert stopped.value.exit_code == 75
    known = entries(tmp_path / "run")
    assert "unfinished" in {entry["status"] for entry in known.values()}
    going_on: list[dict[str, Any]] = []
    train(recipe, tmp_path / "run", callbacks=[lambda _: going_on.append(entries(tmp_path / "run"))])
    assert going_on[0] == known  # what was known is told while it runs
    assert_same(tmp_path / "run", run_dir)


@pytest.mark.parametrize("held_out", [False, True], ids=["while it trains", "while it is evaluated"])
def test_a_round_that_runs_out_of_memory_is_undone_and_the_one_before_is_saved(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: bool
) -> None:
    recipe, run_dir = whole
    real = BankLoop.pass_nll

    def pass_nll(self: BankLoop, slots: Any, examples: Any, weights: Any = None) -> Any:
        found = real(self, slots, examples, weights)
        if self.round == 4 and (weights is None) is held_out:  # after the gradients of the fifth round's first pass
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return found

    message = r"Round 5: memory ran out .*2\.15 GB were asked for(.|\n)*Round 4 is saved.*--resume"
    with monkeypatch.context() as patch:
        patch.setattr(BankLoop, "pass_nll", pass_nll)
        warned = pytest.warns(UserWarning, match="Memory ran out") if held_out else contextlib.nullcontext()
        with warned, pytest.raises(OutOfMemory, match="Round 3 is saved" if held_out else message):
            train(recipe, tmp_path / "run")
    assert run_json(tmp_path / "run")["status"] == "failed"
    train(recipe, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", run_dir)


def test_memory_that_runs_out_in_the_optimizer_ends_the_run(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some vectors may have been stepped and some not, so the round is not saved."""
    real = BankAdamW.step

    def too_much(self: BankAdamW, slots: list[int], settings: list[AdamSettings]) -> list[float]:
        if self.steps[slots[0]] == 3:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return real(self, slots, settings)

    monkeypatch.setattr(BankAdamW, "step", too_much)
    with pytest.raises(RunFailed, match="Memory ran out in the optimizer's step: 2.15 GB were asked for"):
        train(whole[0], tmp_path / "run")
    assert run_json(tmp_path / "run")["status"] == "failed"
    assert [path.name for path in checkpoint.directories(tmp_path / "run" / "checkpoints")] == ["round-00000003"]


def test_a_process_whose_round_does_not_fit_tells_the_others(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in rounds of their own, and must not wait for it as for one that has ended with all."""
    trainer = ManyTrainer(TrainingSession(whole[0], tmp_path / "run", Group()))
    monkeypatch.setattr(trainer, "group", Group(world_size=2))
    trainer.loop = BankLoop  # type: ignore[assignment]  # whose steps are each process's own
    error = trainer.end(for_all(OutOfMemory("Round 3: memory ran out")))
    assert isinstance(error, OutOfMemory) and not error.shared


def test_other_rows_or_processes_or_damaged_checkpoints_are_refused(whole: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, run_dir = whole
    cut = cut_off(run_dir, tmp_path / "cut", after=3)
    write_rows(tmp_path / "other.jsonl", COUNTS | {"zoe": 5})
    other = recipe.replace(data=recipe.data.replace(path=str(tmp_path / "other.jsonl")))
    with pytest.raises(InputError, match=r"data\.path changed"):
        train(other, cut, resume=True)
    rows = Path(recipe.data.path)
    text = rows.read_text()
    rows.write_text(text.replace("1", "2", 1))
    try:
        for run_json in (None, run_dir / "run.json"):
            if run_json is not None:  # killed before its first checkpoint, but after some adapters had ended
                shutil.copy(run_json, cut)
                (cut / "checkpoints").rename(tmp_path / "checkpoints")
            before = all_files(cut)
            with pytest.raises(InputError, match=r"saved with other rows \(data\.path or data\.eval_path\) than it"):
                train(recipe, cut, resume=True)
            assert all_files(cut) == before
    finally:
        rows.write_text(text)
    (tmp_path / "checkpoints").rename(cut / "checkpoints")
    for path in checkpoint.directories(cut / "checkpoints"):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, "processes": 2}))
        vouch_for(path)
    with pytest.raises(InputError, match=r"was written by one of 2 processes, .* now there are 1\. Go on with as many"):
        train(recipe, cut, resume=True)
    for path in checkpoint.directories(cut / "checkpoints"):
        (path / "vectors.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint that can be used, and the run has taken \d+ rounds"):
        train(recipe, cut, resume=True)


def test_a_disk_that_fills_up_while_one_is_saved_keeps_the_finished_ones(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run_dir = whole
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        real = save_adapter
        fillers: list[Path] = []

        def save(*args: Any, **kwargs: Any) -> Any:
            if (disk / "run" / "adapters" / "ben").exists() and not fillers:
                fillers.append(fill(disk, leave_bytes=2_000))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("qvera.training.many.save_adapter", save)
            with pytest.raises(RunFailed, match=r"adapters/\w+: the disk is full.*--resume"):
                train(recipe, disk / "run")
        kept = all_files(disk / "run")
        assert kept
        assert kept.items() <= all_files(run_dir).items()
        fillers[0].unlink()
        train(recipe, disk / "run", resume=True)
        assert_same(disk / "run", run_dir)
