"""W + ΔW held between the optimizer steps of a run: the plan knows each layer's path, and a run keeps its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.adapters import hold_training_weights
from qvera.adapters.products import fused
from qvera.adapters.save_load import attach
from qvera.config.schema import parse_recipe
from qvera.training.plan import Batch, Machine, PlannedRun, shape_of
from qvera.training.trainer import train
from tests.conftest import small_llama
from tests.training.runs import assert_same_run, cut_off, losses

Shape = tuple[int, int]


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Inputs and outputs of each product with W + ΔW that a training pass takes."""
    taken: list[Shape] = []
    original = fused.summed_linear

    def counted(module: Any, *rest: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            taken.append((module.in_features, module.out_features))
        return original(module, *rest)

    monkeypatch.setattr(fused, "summed_linear", counted)
    return taken


def test_a_run_that_goes_on_without_the_memory_gives_the_same_bits(
    make_recipe: Any, tmp_path: Path, plan_on: Any, summed: list[Shape]
) -> None:
    training = {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "max_steps": 2, "save_steps": 1}
    recipe = make_recipe(training={**training, "sample_count": 0}, data={"eval_fraction": 0.0})
    plan_on(Machine("a CPU", "cpu", torch.float32, True, 10**12))
    train(recipe, tmp_path / "roomy")
    assert summed
    summed.clear()
    plan_on(Machine("a CPU", "cpu", torch.float32, True, 1))
    train(recipe, tmp_path / "tight")
    assert not summed  # so short passes take the low-rank path
    assert losses(tmp_path / "tight") == pytest.approx(losses(tmp_path / "roomy"), rel=1e-5)
    train(recipe, cut_off(tmp_path / "roomy", tmp_path / "again", after=1), resume=True)
    assert summed
    assert_same_run(tmp_path / "again", tmp_path / "roomy")


@pytest.mark.parametrize("holds", [True, False])
def test_the_plan_takes_the_path_that_each_layer_takes(summed: list[Shape], holds: bool) -> None:
    model: Any = small_llama()
    shape = shape_of(model)
    tree = {"model": "-", "data": {"path": "-"}, "adapter": {"rank": 32}}
    machine, found = Machine("a CPU", "cpu", torch.float32, True, 10**12), set()
    attach(model, parse_recipe(tree, "t").adapter)
    for passes in (1, 4):
        training = {"global_batch_size": passes, "per_device_train_batch_size": 1}
        recipe = parse_recipe({**tree, "training": training}, "t")
        for tokens in (4, 8, 12, 20, 30, 45, 60, 70, 80):
            batch = Batch(1, tokens, tokens, False, False, "", tokens)
            builds = 1 / passes if holds else fused.BUILDS_UNHELD
            run = PlannedRun(shape, recipe, batch, machine, builds_per_pass=builds)
            hold_training_weights(model, holds, builds)
            summed.clear()
            model(torch.arange(tokens)[None] + 3)
            planned = sorted((x.n, x.m) for x in run.adapted if run.is_summed(x))
            assert sorted(summed) == planned
            found.add(len(planned))
    assert len(found) > 3  # none, some and all of them
