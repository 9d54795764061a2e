"""Parameter groups with rates of their own (LoRA+) on two processes under ZeRO: the numbers of one process, and resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvera.config.schema import parse_recipe
from qvera.training.trainer import train
from tests.distributed.ranks import run_worker
from tests.distributed.runs import BARE, TinyRuns, close, losses

pytestmark = [pytest.mark.process, pytest.mark.slow]

ADAPTER = {"method": "lora", "rank": 4, "alpha": 10, "loraplus_lr_ratio": 4}
STAGES = ("zero2", "zero3")
STEPS, CUT = 4, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> Path:
    """A run on one process, on two under each stage, and one of each stage that is stopped and goes on."""
    place = TinyRuns(tmp_path_factory.mktemp("groups"), tiny_rows)
    settings = {"max_steps": STEPS, "save_steps": CUT, "learning_rate": 1e-2, **BARE}
    train(parse_recipe({**place.recipe(**settings), "adapter": ADAPTER}, "one"), place.root / "alone")
    tasks = []
    for stage in STAGES:
        recipe = {**place.recipe(stage, **settings), "adapter": ADAPTER}
        tasks.append(place.task(stage, stage, {"recipe": recipe}))
        tasks.append(place.task(f"{stage}-cut", stage, {"recipe": recipe, "stop_after": CUT}))
        tasks.append(place.task(f"{stage}-on", stage, {"recipe": recipe, "of": f"{stage}-cut", "resume": True}))
    run_worker(tasks, 2, place.root / "spawn", limit_seconds=600)
    return place.root


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_the_numbers_of_one(root: Path, stage: str) -> None:
    assert len(losses(root / stage)) == STEPS
    close(root / stage, root / "alone", rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(root: Path, stage: str) -> None:
    close(root / f"{stage}-cut", root / stage, rtol=1e-6)
