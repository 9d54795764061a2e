"""What a hook does between steps is part of the run: a resumed run is the uninterrupted one to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.adapters.hooks import TrainingHook, TrainingHooks
from qvera.adapters.save_load import named_vectors
from qvera.config import plugins
from qvera.training.trainer import train
from tests.training.runs import assert_same_run, cut_off

pytestmark = pytest.mark.process


class Pull(TrainingHook):
    """Pulls every b towards its mean over the steps, which it keeps, and counts the steps."""

    def __init__(self, model: Any) -> None:
        self.vectors = {name: v for name, v in named_vectors(model).items() if name.endswith("_b")}
        self.means = {name: torch.zeros_like(vector) for name, vector in self.vectors.items()}
        self.steps = 0
        self.begun: list[int] = []

    def before_step(self, step: int) -> None:
        self.begun.append(step)

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        self.steps += 1
        assert self.steps == step
        with torch.no_grad():
            for name, vector in self.vectors.items():
                self.means[name] += (vector - self.means[name]) / step
                vector.lerp_(self.means[name], 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.means = {name: state[name].clone() for name in self.means}


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[Pull]:
    """Every run of the test gets a `Pull`; they are collected here."""
    made: list[Pull] = []

    class Pulling(plugins.Schedule):
        name = "pull"

        def hook(self, training: Any) -> TrainingHook:
            made.append(Pull(training.model))
            return made[-1]

    monkeypatch.setitem(plugins.registered["qvera.schedules"], "pull", Pulling)
    return made


def test_a_run_with_a_hook_is_resumed_to_the_bit(make_recipe: Any, tmp_path: Path, hooks: list[Pull]) -> None:
    recipe = make_recipe(training={"max_steps": 4, "save_steps": 2})
    train(recipe, tmp_path / "whole")
    again = cut_off(tmp_path / "whole", tmp_path / "again", after=2)
    train(recipe, again, resume=True)
    assert_same_run(again, tmp_path / "whole")
    assert hooks[1].begun == [3, 4]
    assert (again / "checkpoints" / "step-00000004" / "hooks.safetensors").is_file()


def test_an_attempt_that_memory_did_not_suffice_for_is_begun_again(
    make_recipe: Any, tmp_path: Path, hooks: list[Pull], fail: Any
) -> None:
    fail(step=2, rows=2)
    train(make_recipe(training={"max_steps": 3, "on_oom": "halve"}), tmp_path / "run")
    assert hooks[0].begun == [1, 2, 2, 3]
    assert hooks[0].steps == 3


def test_hooks_keep_their_states_apart() -> None:
    class Counter(TrainingHook):
        count = 0

        def after_step(self, step: int, loss_scale: float = 1.0) -> None:
            self.count += step

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state.get("count", -1)

    first, second = Counter(), Counter()
    TrainingHooks({"first": first}).after_step(3)
    saved = TrainingHooks({"first": first, "second": second}).state_dict()
    assert saved == {"first/count": 3, "second/count": 0}
    loaded = Counter(), Counter()
    TrainingHooks(dict(zip(("second", "third"), loaded, strict=True))).load_state_dict(saved)
    assert [one.count for one in loaded] == [0, -1]
